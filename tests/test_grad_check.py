import pytest
import torch

from carafe_d2 import grad_check

SMALL = ["--shape", "1", "4", "6", "6", "--check-shape", "1", "2", "2", "2", "--kernel", "3"]


def test_prints_a_table(capsys):
    assert grad_check.main([*SMALL, "--device", "cpu", "--iterations", "1"]) == 0
    table = capsys.readouterr().out
    for name in grad_check.OPERATORS:
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert " ok " in line
        assert line.count(" ms") == 2


def test_finds_a_wrong_gradient(capsys, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features):
            return features * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    monkeypatch.setitem(grad_check.OPERATORS, "carafe", lambda f, m, *_: Wrong.apply(f) * m.sum())
    assert grad_check.main([*SMALL, "--device", "cpu", "--iterations", "1"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_wrong_options_are_named(capsys):
    assert grad_check.main([*SMALL, "--kernel", "4", "--device", "cpu"]) == 2
    assert "kernel_size: expected a positive odd number, but got 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grad_check.main(["--iterations", "0"])
    assert "--iterations: expected at least 1" in capsys.readouterr().err


def test_chooses_shape_and_device_by_itself():
    args = grad_check.parse_args([])
    on_gpu = torch.cuda.is_available()
    assert args.device.type == ("cuda" if on_gpu else "cpu")
    assert args.shape == ([2, 1024, 100, 100] if on_gpu else [1, 256, 50, 68])
