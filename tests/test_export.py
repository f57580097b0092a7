"""What PyTorch's tracers make of up- and downsampler: compile, export, AOTInductor, ONNX."""

import copy
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch.export import Dim

from carafe_d2 import (
    CARAFE,
    CARAFEDownsample,
    CARAFEDownsamplePack,
    CARAFEPack,
    add_carafe_config,
    carafe_upsample,
    collect_env,
)
from carafe_d2.errors import UserError
from carafe_d2.export import run_package, save_package
from carafe_d2.onnx import to_onnx
from carafe_d2.ops import DECOMPOSITIONS
from carafe_d2.reference import downsampled
from carafe_d2.upsample import KernelPrediction

ANY_SIZE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}  # batch, height and width


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def with_lively_kernels(model: torch.nn.Module) -> torch.nn.Module:
    """Fresh CARAFE kernels are all but uniform; these are not."""
    for module in model.modules():
        if isinstance(module, KernelPrediction):
            torch.nn.init.normal_(module.content_encoder.weight, std=0.3)
    return model.eval()


def pack(**options) -> CARAFEPack:
    return with_lively_kernels(CARAFEPack(8, **{"scale_factor": 2, **options}))


def down(**options) -> CARAFEDownsamplePack:
    return with_lively_kernels(CARAFEDownsamplePack(8, **{"scale_factor": 2, **options}))


BOTH = pytest.mark.parametrize("make", [pack, down])


def pyramid(up_kernel: int) -> torch.nn.Module:
    cfg = get_cfg()
    add_carafe_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_carafe_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.CARAFE.UP_KERNEL = up_kernel
    cfg.MODEL.CARAFE.COMPRESSED_CHANNELS = 8
    return with_lively_kernels(build_backbone(cfg))


class SomeOf(torch.nn.Module):
    """Upsamples as many maps as a mask selects, as mask heads do for the instances found."""

    def __init__(self):
        super().__init__()
        self.upsample = pack(up_kernel=3)

    def forward(self, x, keep):
        return self.upsample(x[keep])


# ------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@BOTH
def test_trains_compiled_without_recompiling(make, backend, device):
    # Inductor of older versions compiles plain convolutions for one size, on CPUs.
    fixed_size = backend == "inductor" and torch.__version__ < "2.15"
    torch.compiler.reset()
    eager = make().to(device, torch.float64)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for stance, size in (("default", (2, 8, 6, 5)), ("fail_on_recompile", (3, 8, 4, 9))):
        x = torch.randn(size, dtype=torch.float64, device=device).requires_grad_()
        x_compiled = x.detach().clone().requires_grad_()
        out = eager(x)
        with torch.compiler.set_stance("default" if fixed_size else stance):
            out_compiled = compiled(x_compiled)
        torch.testing.assert_close(out_compiled, out)
        out.square().sum().backward()
        out_compiled.square().sum().backward()
        torch.testing.assert_close(x_compiled.grad, x.grad)
    for ours, expected in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_compiles_with_a_batch_that_depends_on_data():
    model = SomeOf()
    x = torch.randn(4, 8, 5, 6)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for keep in ([True, False, True, True], [False, False, True, False], [False] * 4):
            keep = torch.tensor(keep)
            torch.testing.assert_close(compiled(x, keep), model(x, keep))


# -------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize("strict", [False, True])
@BOTH
def test_exports_with_the_operator_as_one_node(make, strict):
    model = make()
    program = torch.export.export(
        model, (torch.randn(2, 8, 5, 6),), dynamic_shapes=(ANY_SIZE,), strict=strict
    )
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls[-1] in DECOMPOSITIONS

    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    sizes = (2, 8, 5, 6), (1, 8, 9, 4), (3, 8, 1, 1)
    # PyTorch takes what a convolution with a stride puts out for larger than one pixel.
    for size in sizes if make is pack else sizes[:2]:
        x = torch.randn(size)
        assert torch.equal(loaded(x), model(x))


def test_pyramid_exports_for_any_padded_image_size():
    """Detectron2 pads images to the pyramid's size divisibility, here to multiples of 64."""
    model = pyramid(up_kernel=3)
    height, width = (model.size_divisibility * Dim(name, min=2) for name in ("rows", "columns"))
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 128, 192),),
        dynamic_shapes=({0: Dim.DYNAMIC, 2: height, 3: width},),
    )
    x = torch.randn(1, 3, 256, 128)
    torch.testing.assert_close(program.module()(x), model(x))


def test_exports_with_a_batch_that_depends_on_data():
    model, x = SomeOf(), torch.randn(4, 8, 5, 6)
    keep = torch.tensor([True, False, True, True])
    program = torch.export.export(model, (x, keep))
    for chosen in (keep, ~keep, keep & ~keep):
        torch.testing.assert_close(program.module()(x, chosen), model(x, chosen))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (pack(), [torch.randn(2, 8, 5, 6)]),
        (CARAFE(3, 2, 2).eval(), [torch.randn(2, 4, 5, 6), torch.randn(2, 18, 10, 12)]),
        (down(down_kernel=3), [torch.randn(2, 8, 5, 6)]),
        (CARAFEDownsample(3, 2, 2).eval(), [torch.randn(2, 4, 5, 6), torch.randn(2, 18, 3, 3)]),
    ],
    ids=["fused", "plain", "fused down", "plain down"],
)
def test_decompositions_replace_the_operator(model, inputs):
    program = torch.export.export(model, tuple(inputs)).run_decompositions(DECOMPOSITIONS)
    assert not {node.target for node in program.graph.nodes} & DECOMPOSITIONS.keys()
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


# --------------------------------------------------------------------------------- AOTInductor


class MaskHead(torch.nn.Module):
    """Some layers on as many maps as are bright, and how many these are."""

    def __init__(self):
        super().__init__()
        convs = [torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)]
        self.layers = torch.nn.Sequential(*convs, pack(up_kernel=3))

    def forward(self, x):
        chosen = x[x.mean(dim=(1, 2, 3)) > 0]
        return {"masks": self.layers(chosen), "number": torch.ones_like(chosen).sum() / 240}


@pytest.mark.slow
def test_package_runs_without_python(tmp_path):
    """By the commands of docs/export.md. For such batches, stacked convolutions were wrong."""
    root = Path(__file__).parents[1]
    model, x = MaskHead().eval(), torch.randn(4, 8, 5, 6)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
        save_package(program, tmp_path / "model.pt2")
        run = run_package(tmp_path / "model.pt2")
        for images in (
            x,
            x.abs(),
            -x.abs(),
            torch.randn(5, 6, 7, 8).permute(0, 3, 1, 2)[..., :5, :6],
        ):
            torch.testing.assert_close(run(images), model(images))

    (script,) = re.findall(r"```bash\n(torch=.*?)```", (root / "docs/export.md").read_text(), re.S)
    (tmp_path / "docs").symlink_to(root / "docs")
    (tmp_path / "carafe_d2").mkdir()
    (tmp_path / "carafe_d2/_C.so").symlink_to(collect_env.LIBRARY)
    torch.save(x, tmp_path / "image.pt")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["sh", "-ec", script], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True
    )
    outputs = torch.load(tmp_path / "outputs.pt")
    for output, expected in zip(outputs, model(x).values(), strict=True):
        torch.testing.assert_close(output, expected)


def test_package_without_a_compiler(tmp_path):
    program = torch.export.export(torch.nn.ReLU(), (torch.randn(4, 5),))
    message = r"^AOTInductor cannot compile it: [^\n]*C\+\+[^\n]*$"
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-compiler",)})
    with no_compiler, pytest.raises(UserError, match=message):
        save_package(program, tmp_path / "model.pt2")


# ---------------------------------------------------------------------------------------- ONNX


def max_rank(file) -> int:
    """Of all tensors in an ONNX file whose shape can be told, which are most."""
    import onnx

    known = onnx.shape_inference.infer_shapes(file).graph.value_info
    assert len(known) > len(file.graph.node) / 2
    return max(len(value.type.tensor_type.shape.dim) for value in known)


def check_onnx(model, inputs, other_inputs=(), **options) -> None:
    """Exports with plain ``torch.onnx.export`` and runs the file in ONNX Runtime."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    file = torch.onnx.export(model, inputs, verbose=False, **options).model_proto
    onnx.checker.check_model(file, full_check=True)
    assert {node.domain for node in file.graph.node} == {""}  # the standard operators
    assert not file.functions
    assert max_rank(file) <= 5  # as many as some runtimes take

    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=providers)
    names = [argument.name for argument in session.get_inputs()]
    for tensors in (inputs, *other_inputs):
        with torch.no_grad():
            expected = model(*tensors)
        expected = list(expected.values()) if isinstance(expected, dict) else [expected]
        arrays = [tensor.numpy() for tensor in tensors]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        for output, tensor in zip(outputs, expected, strict=True):
            assert output.shape == tensor.shape
            error = (torch.from_numpy(output) - tensor).norm()
            assert error <= (1e-2 if tensor.dtype == torch.float16 else 1e-4) * tensor.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"scale_factor": 3, "up_kernel": 3, "up_group": 2}],
    ids=["default", "grouped"],
)
def test_upsampler_in_onnx(options):
    others = [(torch.randn(1, 8, 9, 4),), (torch.randn(3, 8, 1, 1),)]
    check_onnx(pack(**options), (torch.randn(2, 8, 5, 6),), others, dynamic_shapes=(ANY_SIZE,))


@pytest.mark.slow
def test_downsampler_in_onnx():
    model = down(down_kernel=3, down_group=2, scale_factor=3)
    others = [(torch.randn(1, 8, 9, 4),), (torch.randn(3, 8, 1, 1),)]
    check_onnx(model, (torch.randn(2, 8, 5, 6),), others, dynamic_shapes=(ANY_SIZE,))


@pytest.mark.slow
def test_half_precision_upsampler_in_onnx():
    check_onnx(pack(up_kernel=3).half(), (torch.randn(1, 8, 5, 6).half(),))


@pytest.mark.slow
def test_plain_operator_in_onnx():
    check_onnx(
        CARAFE(3, 2, 2).eval(),
        (torch.randn(2, 4, 5, 6), torch.randn(2, 18, 10, 12)),
        [(torch.randn(1, 4, 3, 7), torch.randn(1, 18, 6, 14))],
        dynamic_shapes=(ANY_SIZE, ANY_SIZE),
    )


@pytest.mark.slow
def test_mask_head_like_batch_in_onnx():
    x, keep = torch.randn(4, 8, 5, 6), torch.tensor([True, False, True, True])
    check_onnx(SomeOf().eval(), (x, keep), [(x, keep & ~keep)])


@pytest.mark.slow
def test_pyramid_in_onnx():
    """Five levels of a ResNet, for any image: sides that are no multiple of 64 are cropped."""
    check_onnx(
        pyramid(up_kernel=1),  # more taps take long, and test_upsampler_in_onnx has them
        (torch.randn(2, 3, 64, 128),),
        [(torch.randn(1, 3, 128, 64),), (torch.randn(1, 3, 72, 100),)],
        dynamic_shapes=(ANY_SIZE,),
        output_names=["p2", "p3", "p4", "p5", "p6"],
    )


@pytest.mark.slow
def test_decomposed_program_in_onnx():
    """An ExportedProgram holds the operator itself; its decomposition makes it ONNX's."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = pack(up_kernel=3), torch.randn(2, 8, 5, 6)
    program = torch.export.export(model, (x,)).run_decompositions(DECOMPOSITIONS)
    file = torch.onnx.export(program, verbose=False).model_proto
    session = onnxruntime.InferenceSession(file.SerializeToString())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # that it is deprecated, and of tracing
def test_upsampler_in_onnx_by_the_torchscript_exporter(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, x, path = pack(), torch.randn(2, 8, 5, 6), tmp_path / "pack.onnx"
    torch.onnx.export(model, x, path, dynamo=False)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)


def test_onnx_functions_for_runtimes_with_a_kernel_of_their_own():
    """One for every combination of sizes; inlined they are standard operators."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = torch.nn.Sequential(
        *(pack(up_kernel=3), pack(up_kernel=3), pack(up_kernel=1, up_group=2)),
        down(scale_factor=3, down_kernel=3),
    )
    program = torch.export.export(model, (torch.randn(2, 8, 5, 6),), dynamic_shapes=(ANY_SIZE,))
    file = to_onnx(program)
    nodes = [node for node in file.graph.node if node.domain == "carafe_d2"]
    names = ["carafe_upsample"] * 3 + ["carafe_downsample_softmax"]
    assert [node.op_type for node in nodes] == names
    assert {a.name: a.i for a in nodes[2].attribute} == {
        "kernel_size": 1,
        "group_size": 2,
        "scale_factor": 2,
    }
    assert len(file.functions) == 3
    inlined = to_onnx(program, inline=True)
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} == {""}
    assert max_rank(inlined) <= 5
    for each in (file, inlined):
        session = onnxruntime.InferenceSession(each.SerializeToString())
        for size in ((1, 8, 7, 9), (3, 8, 1, 2), (0, 8, 4, 3)):
            x = torch.randn(size)
            (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(inlined, full_check=True)


@pytest.mark.parametrize(
    ("module", "size"), [(CARAFE, lambda side, s: side * s), (CARAFEDownsample, downsampled)]
)
@pytest.mark.parametrize(("kernel", "group", "scale"), [(3, 2, 2), (1, 1, 3), (5, 1, 1)])
def test_onnx_function_of_the_plain_operator(kernel, group, scale, module, size):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = module(kernel, group, scale).eval()
    masks = torch.randn(2, group * kernel**2, size(5, scale), size(6, scale))
    inputs = torch.randn(2, 4, 5, 6), masks
    session = onnxruntime.InferenceSession(
        to_onnx(torch.export.export(model, inputs)).SerializeToString()
    )
    names = [argument.name for argument in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    (output,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(output), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32")])
def test_onnx_function_of_mixed_precision(dtypes):
    """As CARAFEPack under autocast makes it: features and logits differ in dtype."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Mixed(torch.nn.Module):
        def forward(self, features, logits):
            return carafe_upsample(features, logits, 3, 1, 2)

    shapes = (1, 4, 5, 6), (1, 36, 5, 6)
    inputs = [torch.randn(s).to(getattr(torch, d)) for s, d in zip(shapes, dtypes, strict=True)]
    file = to_onnx(torch.export.export(Mixed(), tuple(inputs)))
    session = onnxruntime.InferenceSession(file.SerializeToString())
    names = [argument.name for argument in session.get_inputs()]
    (output,) = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(output), Mixed()(*inputs))


def test_what_has_no_form_in_onnx_is_named():
    pytest.importorskip("onnxscript")

    class Bessel(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    program = torch.export.export(
        torch.nn.Sequential(pack(up_kernel=1), Bessel()), (torch.randn(1, 8, 2, 2),)
    )
    with pytest.raises(UserError, match=r"^1: prims.bessel_j0 has no form in ONNX$"):
        to_onnx(program)
