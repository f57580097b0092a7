"""Skips what the machine or the environment at hand cannot run, and says why."""

from importlib.util import find_spec

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Where Detectron2 is missing, files that cannot be imported without it are skipped."""
    report = yield
    if report.failed and "detectron2" in str(report.longrepr) and not find_spec("detectron2"):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: needs Detectron2")
    return report
