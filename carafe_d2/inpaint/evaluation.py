"""How near filled images come to the true ones."""

import logging
import math

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class InpaintingEvaluator(DatasetEvaluator):
    """L1 and PSNR of whole images whose holes were filled, each a mean over the images.

    L1 is the mean absolute difference in percent of the range of values, PSNR is in dB.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._sums = {"L1": 0.0, "PSNR": 0.0}
        self._count = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: with ``image`` (3, H, W), the true ones.
            outputs: with ``inpainted`` (3, H, W).
        """
        for each, output in zip(inputs, outputs, strict=True):
            difference = output["inpainted"].double().cpu() - each["image"]
            error = (difference / 255).square().mean().item()
            self._sums["L1"] += 100 * (difference / 255).abs().mean().item()
            self._sums["PSNR"] += -10 * math.log10(error) if error else math.inf
            self._count += 1

    def evaluate(self) -> dict | None:
        """Returns L1 and PSNR in the first process, and nothing in the others."""
        gathered = comm.gather((self._sums, self._count))
        if not comm.is_main_process():
            return None
        count = sum(each for _, each in gathered)
        result = {name: sum(sums[name] for sums, _ in gathered) / count for name in self._sums}
        logger.info(f"L1 {result['L1']:.2f} %, PSNR {result['PSNR']:.2f} dB of {count} images.")
        return {"inpainting": result}
