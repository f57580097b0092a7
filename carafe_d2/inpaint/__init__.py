"""Image inpainting with a choice of upsamplers: the two models of the CARAFE paper's table.

``GlobalLocalInpainter`` and ``PartialConvInpainter`` are meta-architectures of Detectron2. Their
images come from :class:`~carafe_d2.inpaint.data.InpaintMapper`, which cuts holes into them, and
what they fill in is measured by :class:`~carafe_d2.inpaint.evaluation.InpaintingEvaluator`.
"""
