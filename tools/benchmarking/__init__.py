"""The parts of tools/benchmark.py; only `detectors` needs Detectron2."""
