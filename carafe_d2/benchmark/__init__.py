"""The parts of python -m carafe_d2.benchmark; only `detectors` needs Detectron2."""
