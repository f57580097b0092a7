"""The benchmark: what it measures, how it measures, what it writes. No test asserts a time."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from carafe_d2 import carafe_naive, carafe_upsample
from carafe_d2.benchmark import __main__ as benchmark
from carafe_d2.benchmark import measure, peers, report, upsampling
from carafe_d2.benchmark.upsampling import FORWARD, FORWARD_BACKWARD
from carafe_d2.errors import UserError
from carafe_d2.files import MarkdownBlock
from carafe_d2.reference import (
    carafe_downsample_naive,
    carafe_downsample_softmax_naive,
    carafe_upsample_naive,
)

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
PAGE = "before\n<!-- begin: {} -->\nnot measured\n<!-- end -->\nafter\n"


# --- a whole run --------------------------------------------------------------------------------


class QuickRun:
    def __init__(self, folder: Path, device: str):
        self.folder = folder
        self.page = folder / "page.md"
        self.page.write_text(PAGE.format(f"upsampling {device}"))
        command = [sys.executable, "-m", "carafe_d2.benchmark", "--quick", "--device", device]
        command += ["--threads", "1", "--output", folder, "--markdown", self.page]
        self.process = subprocess.run(command, capture_output=True, text=True)
        assert self.process.returncode == 0, self.process.stderr
        content = json.loads((folder / "upsampling.json").read_text())
        self.machine, self.results = content["machine"], content["results"]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    return QuickRun(tmp_path_factory.mktemp("benchmark"), "cpu")


@pytest.mark.gpu
def test_runs_on_a_gpu(tmp_path):
    run = QuickRun(tmp_path, "cuda")
    assert run.machine["gpu"] == torch.cuda.get_device_name()
    assert all(r["milliseconds"] > 0 for r in run.results if not r["skipped"])


def test_json_holds_every_candidate_of_every_case(quick_run):
    found = {(r["case"], r["pass"], r["candidate"]) for r in quick_run.results}
    candidates = [n for n in upsampling.standard_candidates() if "compiled" not in n]
    up, down = ([n for n in candidates if n.startswith("down") == d] for d in (False, True))
    assert found == {
        (case, pass_, name)
        for case in upsampling.QUICK_CASES
        for pass_ in upsampling.PASSES
        for name in ("copy", "matmul", *(down if case == "tiny_down" else up))
    }
    assert len(found) == len(quick_run.results)
    assert {f"upsampler/{name}" for name in upsampling.UPSAMPLERS} < set(up)


def test_json_fields_are_consistent(quick_run):
    skipped = {(r["case"], r["candidate"]) for r in quick_run.results if r["skipped"]}
    skipped = {(case, name) for case, name in skipped if "mmcv" not in name}
    assert skipped == {("tiny_grouped", "upsampler/unfold_module")}
    by_name = {(r["case"], r["pass"], r["candidate"]): r for r in quick_run.results}
    for (case, pass_, name), result in by_name.items():
        milliseconds = result["milliseconds"]
        if result["skipped"]:
            assert milliseconds is None
            continue
        lower, upper = result["quartiles"]
        assert 0 < lower <= milliseconds <= upper
        assert result["rounds"] >= 3
        assert result["fewest_bytes"] > 0
        assert result["gflops"] == pytest.approx(result["flops"] / milliseconds / 1e6)
        assert result["gbytes"] == pytest.approx(result["fewest_bytes"] / milliseconds / 1e6)
        copy = by_name[case, pass_, "copy"]
        assert result["copy_share"] == pytest.approx(result["gbytes"] / copy["gbytes"])
        # what is said to be faster has the smaller time in the same table
        if "/" in name:
            ours = by_name[case, pass_, upsampling.GROUPS[name.split("/")[0]]]
            assert result["speedup"] == pytest.approx(milliseconds / ours["milliseconds"])


def test_json_says_where_and_how(quick_run):
    machine = quick_run.machine
    assert machine["threads"] == 1
    assert machine["torch"] == torch.__version__
    assert machine["device"] == "cpu"
    assert machine["command"].startswith("python -m carafe_d2.benchmark --quick --device cpu")
    assert {"cpu", "cores", "date", "carafe_d2", "torch_instruction_set"} < machine.keys()


def test_prints_and_inserts_a_table_for_each_case(quick_run):
    page = quick_run.page.read_text()
    assert page.startswith("before\n<!-- begin: upsampling cpu -->\n\nMeasured on ")
    assert page.endswith("<!-- end -->\nafter\n")
    assert "not measured\n<!--" not in page
    for case in upsampling.QUICK_CASES:
        assert quick_run.process.stdout.count(f"\n{case}: features ") == 1
        assert page.count(f"**{case}: features ") == 1
    for name in upsampling.standard_candidates(with_peers=False):
        cases = 1 if name.startswith("down") else 2
        assert quick_run.process.stdout.count(f"\n{name} ") == cases
        assert page.count(f"\n| {name} ") == cases
    assert quick_run.process.stdout.count("page faults in a call: at most ") == 3
    assert "upsampler/unfold_module: not measured, has one group only" in page


def test_plot_is_a_picture(quick_run):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    picture = pyplot.imread(quick_run.folder / "upsampling_float32_contiguous.png")
    assert min(picture.shape[:2]) > 400
    for color in (report.OURS_COLOR, report.PEER_COLOR):
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(picture[..., :3] - wanted).max(-1) < 0.01).mean() > 0.01


WITHOUT_DETECTRON2 = """
import sys
sys.modules["detectron2"] = None  # Python's way to make an import fail
from carafe_d2.benchmark import __main__ as benchmark
benchmark.main(sys.argv[1:])
benchmark.main(["--detector"])
"""


def test_only_detectors_need_detectron2(tmp_path):
    options = ["--quick", "--cases", "tiny", "--no-peers", "--device", "cpu", "--threads", "1"]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_DETECTRON2, *options, "--output", tmp_path],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert "\nupsampler/carafe " in result.stdout
    assert "UserError: --detector needs Detectron2" in result.stderr


@pytest.mark.parametrize("layout", upsampling.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_and_layout_runs(dtype, layout):
    candidates = upsampling.standard_candidates().values()  # tiny is not for compiled ones
    run = upsampling.Benchmark(candidates, CPU, 1e-4, skip=100, quick=True).run
    cases = [upsampling.QUICK_CASES[name] for name in ("tiny", "tiny_down")]
    results = [result for case in cases for result in run(case, dtype, layout)]
    assert [r.candidate for r in results if r.skipped and "mmcv" not in r.candidate] == []


# --- bytes and FLOPs ----------------------------------------------------------------------------

# Features 2x8x5x4, kernel 3, group 2, scale 3, in numbers of elements.
CASE = upsampling.QUICK_CASES["tiny_grouped"]
FEATURES, MASKS, OUT = 2 * 8 * 5 * 4, 2 * (2 * 9) * (15 * 12), 2 * 8 * 15 * 12
REASSEMBLY = 2 * OUT * 9  # a multiplication and an addition for each tap
COMPRESSOR, ENCODER = 8 * 64, 64 * (2 * 9 * 9) * 9  # weights; the biases have 64 and 162


def needs(name, pass_, case=CASE, dtype=torch.float32):
    return upsampling.demands(
        upsampling.standard_candidates()[name], case, dtype, "contiguous", pass_
    )


@pytest.mark.parametrize(
    "name", ["operator/carafe", "operator/unfold_einsum", "fused/separate_steps"]
)
def test_operator_moves_its_tensors_once(name):
    forward = FEATURES + MASKS + OUT
    # the output's gradient; features and kernels, read again; their gradients
    backward = OUT + 2 * (FEATURES + MASKS)
    assert needs(name, FORWARD) == (4 * forward, REASSEMBLY)
    assert needs(name, FORWARD_BACKWARD) == (4 * (forward + backward), 3 * REASSEMBLY)
    assert needs(name, FORWARD, dtype=torch.bfloat16) == (2 * forward, REASSEMBLY)


def test_upsampler_also_reads_its_weights():
    parameters = COMPRESSOR + 64 + ENCODER + 162
    forward = FEATURES + parameters + OUT
    locations = 2 * 5 * 4
    convolutions = 2 * locations * (COMPRESSOR + ENCODER)
    assert needs("upsampler/carafe", FORWARD) == (4 * forward, convolutions + REASSEMBLY)
    both = forward + OUT + 2 * (FEATURES + parameters)
    assert needs("upsampler/carafe", FORWARD_BACKWARD) == (
        4 * both,
        3 * (convolutions + REASSEMBLY),
    )


def test_interpolation_reads_its_input_only_once():
    assert needs("upsampler/nearest", FORWARD) == (4 * (FEATURES + OUT), 0)
    assert needs("upsampler/nearest", FORWARD_BACKWARD) == (4 * 2 * (FEATURES + OUT), 0)


# --- peers --------------------------------------------------------------------------------------

DEFINITIONS = {
    "operator": carafe_naive,
    "fused": carafe_upsample_naive,
    "down_operator": carafe_downsample_naive,
    "down_fused": carafe_downsample_softmax_naive,
}
SAME_AS_CARAFE = {
    "operator/shift_and_add": peers.shift_and_add,
    **{
        n: p.build
        for n, p in peers.PEERS.items()
        if p.is_carafe and "naive" not in n and "module" not in n
    },
}


@pytest.mark.parametrize("layout", upsampling.LAYOUTS)
@pytest.mark.parametrize(("kernel", "group", "scale"), [(5, 1, 2), (3, 2, 3), (1, 4, 1)])
@pytest.mark.parametrize("name", SAME_AS_CARAFE)
def test_peer_computes_carafe(name, kernel, group, scale, layout):
    down = name.startswith("down")
    case = upsampling.Case("any", (2, 8, 5, 4), kernel, group, scale, downsampling=down)
    inputs = upsampling.Inputs(case, torch.float64, layout, CPU)
    kernels = inputs.masks if "operator/" in name else inputs.logits
    results = []
    for function in (SAME_AS_CARAFE[name], DEFINITIONS[name.split("/")[0]]):
        out = function(inputs.features, kernels, *case.sizes)
        grads = torch.autograd.grad(out, [inputs.features, kernels], inputs.grad_output(out))
        results.append([out, *grads])
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_compiled_peers_run_where_they_are_wanted():
    names = ["operator/carafe", *peers.compiled_peers()]
    candidates = [upsampling.standard_candidates()[name] for name in names]
    benchmark = upsampling.Benchmark(candidates, CPU, 1e-4, skip=100, quick=True)
    for compiled in (True, False):
        case = upsampling.Case("any", (1, 4, 4, 4), kernel=1, compiled=compiled)
        results = list(benchmark.run(case, torch.float32, "contiguous"))
        assert [r for r in results if r.skipped] == []
        found = {r.candidate for r in results} & set(names)
        assert found == set(names if compiled else names[:1])


def test_unfold_module_reassembles_like_carafe():
    module = peers.UnfoldCARAFE(8, 2, 5).double().eval()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    masks = module.masks(x)
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(2, 10, 8, dtype=torch.float64))
    torch.testing.assert_close(module(x), carafe_naive(x, masks, 5, 1, 2))


def test_carafe_convolutions_are_those_of_the_pack():
    case = upsampling.QUICK_CASES["tiny"]
    pack = upsampling.OURS["upsampler/carafe"](8, 2, 5, 1)
    convolutions = peers.carafe_convolutions(8, 2, 5, 1)
    convolutions.load_state_dict(
        dict(zip(convolutions.state_dict(), pack.state_dict().values(), strict=True))
    )
    x = torch.randn(case.shape)
    torch.testing.assert_close(pack(x), carafe_upsample(x, convolutions(x), 5, 1, 2))


def test_downsamplers_put_out_the_same_size_and_unfold_the_same_values():
    case = upsampling.QUICK_CASES["tiny_down"]
    built = {
        name: candidate.build(8, *(case.sizes[i] for i in (2, 0, 1)))
        for name, candidate in upsampling.standard_candidates().items()
        if candidate.group == "downsampler"
    }
    x = torch.randn(case.shape)
    shapes = {name: module(x).shape for name, module in built.items()}
    assert shapes.pop("downsampler/carafe_convolutions") == (2, 2 * 9, 2, 2)
    assert {*shapes.values()} == {(2, 8, 2, 2)}
    ours, theirs = (built[f"downsampler/{name}"] for name in ("carafe", "unfold_module"))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    ones = built["downsampler/blur_pool"](torch.ones(case.shape))
    torch.testing.assert_close(ones, torch.ones(2, 8, 2, 2))


def test_dysample_without_offsets_is_bilinear():
    module = peers.DySample(8, 2)
    torch.nn.init.zeros_(module.offset.weight)
    x = torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(module(x), F.interpolate(x, scale_factor=2, mode="bilinear"))


def test_dysample_offsets_count_quarters_of_a_pixel_x_first():
    module = peers.DySample(8, 2)
    torch.nn.init.zeros_(module.offset.weight)
    # pixel shuffle takes s*s channels for each of (group, axis)
    offsets = torch.tensor([4.0, -8.0]).repeat(module.GROUPS).repeat_interleave(4)
    module.offset.bias.data.copy_(offsets)
    x = torch.randn(1, 8, 9, 7)
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear")
    # one source pixel to the right and two up
    torch.testing.assert_close(module(x)[:, :, 4:, :-2], bilinear[:, :, :-4, 2:])


# --- measuring ----------------------------------------------------------------------------------


class SlowingMachine:
    """A clock on a machine that gets slower with every measurement; nothing is called."""

    def __init__(self):
        self.calls = []

    def __call__(self, function, calls=1):
        self.calls.append((function(), calls))
        return function() * (1 + len(self.calls) // 4)


def test_functions_take_turns_and_slow_ones_leave_out_rounds():
    clock = SlowingMachine()
    times = {"fast": 0.001, "medium": 0.15, "slow": 0.3, "very slow": 5.0}
    functions = {name: lambda t=t: t for name, t in times.items()}
    timings = measure.interleave(functions, times, clock, seconds=1)
    rounds = {name: len(timing.rounds) for name, timing in timings.items()}
    assert rounds == {"fast": 12, "medium": 6, "slow": 3, "very slow": 3}
    assert [t for t, _ in clock.calls[:6]] == [0.001, 0.15, 0.3, 5.0, 0.001, 0.001]
    assert {calls for t, calls in clock.calls if t == 0.001} == {83}
    assert {calls for t, calls in clock.calls if t == 5.0} == {1}


class SlowlyLaunchedGpu:
    """A GPU and its host as two clocks: the host launches and goes on, the GPU has a queue."""

    LAUNCH, FLUSH = 5e-6, 60e-6  # seconds

    def __init__(self, monkeypatch):
        self.host = self.gpu = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = gpu.launch(0)

            def elapsed_time(self, end):
                return 1e3 * (end.time - self.time)

        self.zero_ = lambda: self.launch(self.FLUSH)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: self)
        properties = SimpleNamespace(L2_cache_size=1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)

    def launch(self, seconds: float) -> float:
        """A kernel that runs so long; returns when it ends on the GPU."""
        self.host += self.LAUNCH
        self.gpu = max(self.gpu, self.host) + seconds
        return self.gpu

    def synchronize(self):
        self.host = max(self.host, self.gpu)


@pytest.mark.parametrize("kernel", [2e-6, 5e-4])
@pytest.mark.parametrize("python", [0, 1e-4, 4e-4])
@pytest.mark.parametrize("kernels", [1, 8])
def test_what_the_host_takes_to_launch_is_no_time_of_a_gpu(kernel, python, kernels, monkeypatch):
    gpu = SlowlyLaunchedGpu(monkeypatch)

    def function():
        gpu.host += python
        for _ in range(kernels):
            gpu.launch(kernel)

    clock = measure.Clock(torch.device("cuda"))
    for calls in (1, 1, 20):
        assert clock(function, calls) == pytest.approx(kernels * kernel)


def test_what_the_host_takes_counts_where_that_is_wanted(monkeypatch):
    gpu = SlowlyLaunchedGpu(monkeypatch)

    def function():
        gpu.host += 2e-3
        gpu.launch(1e-5)
        gpu.synchronize()

    clock = measure.Clock(torch.device("cuda"), hide_host=False)
    assert clock(function, 20) == pytest.approx(2e-3, rel=0.05)


def test_timing_is_median_and_quartiles():
    timing = measure.Timing(rounds=[4.0, 1.0, 2.0, 3.0, 5.0], page_faults=[900, 0, 0])
    assert timing.as_dict() == {
        "milliseconds": 3000.0,
        "quartiles": (2000.0, 4000.0),
        "rounds": 5,
        "page_faults": 0,
    }


WARM = """
import torch
from carafe_d2.benchmark import measure
source = torch.zeros(2**24)  # 64 MiB
clock = measure.Clock(source.device)
for prepare in (lambda: None, measure.keep_freed_memory):
    prepare()
    timings = measure.interleave({"copy": source.clone}, {"copy": 0.1}, clock, 0.1)
    print(timings["copy"].as_dict()["page_faults"])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_large_tensors_are_warm_memory():
    """Without `keep_freed_memory` every call has a page fault for each of the output's pages."""
    run = subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True)
    cold, warm = map(float, run.stdout.split())
    assert warm < 10 < cold


def candidate(build, name="operator/other", **peer):
    return upsampling.Candidate(name, build, peers.Peer(build, "a test", **peer))


def left_out(candidates, case=upsampling.QUICK_CASES["tiny"], **options):
    options = {"seconds": 1e-4, "skip": 100, "quick": True, **options}
    results = upsampling.Benchmark(candidates, CPU, **options).run(
        case, torch.float32, "contiguous"
    )
    return [(r.candidate, r.skipped) for r in results if r.skipped]


OURS = [upsampling.standard_candidates()[name] for name in upsampling.GROUPS.values()]


def test_slow_peers_are_left_out_and_not_tried_again():
    calls = []

    def slow(*arguments):
        calls.append(1)
        return carafe_naive(*arguments)

    skipped = left_out([*OURS, candidate(slow)], skip=1e-9)
    assert [name for name, _ in skipped] == ["operator/other"] * 2
    assert skipped[0][1] == "takes about 0 s a call"
    assert len(calls) == 2  # both in the first forward's warm-up


def test_peers_that_need_too_much_memory_are_left_out(monkeypatch):
    peer = candidate(carafe_naive, patches=(0.3, 0.5))
    # all neighbors: 8*6*7 locations, 2*2 output pixels, 5*5 taps, 4 bytes each
    patches = 8 * 6 * 7 * 4 * 25 * 4
    monkeypatch.setattr(upsampling, "available_memory", lambda device: patches)
    (skipped,) = left_out([peer])
    assert skipped == ("operator/other", "needs about 0 GiB of memory")
    monkeypatch.setattr(upsampling, "available_memory", lambda device: 2 * patches)
    assert left_out([peer]) == []


def test_errors_of_peers_are_noted_and_those_of_carafe_are_not():
    def fails(*_):
        raise RuntimeError("not for this dtype\nand a traceback")

    assert left_out([candidate(fails)]) == [("operator/other", "not for this dtype")] * 2
    with pytest.raises(RuntimeError, match="not for this dtype"):
        left_out([candidate(fails, "operator/carafe")])


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "p9"], "--cases: expected some of base, p6, .*, got 'p9'"),
        (["--candidates", "x*"], "--candidates: expected some of operator/carafe, .*, got 'x\\*'"),
        (["--candidates", "dysample", "--no-peers"], "got 'dysample'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--layout", "nhwc"], "--layout: invalid choice: 'nhwc'"),
        (["--device", "tpu9"], "--device: expected cpu or cuda, got 'tpu9'"),
        (["--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
        (["--device", "cuda:99"], "--device cuda:99: .* finds no such GPU here"),
        (["--threads", "0"], "--threads: invalid positive int value: '0'"),
        (["--shape", "1", "6", "4", "4", "--group", "4"], "--group: expected a divisor of the 6"),
        (["--shape", "1", "6", "4", "4", "--kernel", "4"], "--kernel: expected an odd number"),
        (["--shape", "1", "6", "4", "4", "--cases", "p3"], "--shape replaces the standard cases"),
        (["--downsampling"], "--downsampling goes with --shape only"),
        (["--training"], "--training goes with --detector only"),
        (["--runtimes", "onnxruntime"], "--runtimes goes with --detector only"),
        (["--detector", "--cases", "p3"], "--cases does not go with --detector"),
        (["--detector", "--layout", "contiguous", "channels_last"], "takes one --layout"),
        (["--detector", "yolo"], "--detector: expected a YAML file or one of .*, got 'yolo'"),
        (["--markdown", "missing.md"], "cannot read missing.md: No such file"),
        (["--detector", "--markdown", "README.md"], "has no block <!-- begin: detectors cpu -->"),
    ],
)
def test_wrong_options_are_named_in_one_sentence(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    if "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    with pytest.raises(UserError, match=message) as error:
        benchmark.main([*arguments, "--output", str(tmp_path)])
    assert "\n" not in str(error.value)


ALL_PEERS = [*peers.PEERS, *peers.compiled_peers()]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["carafe"], ["operator/carafe", "upsampler/carafe", "downsampler/carafe"]),
        (["fused/*"], ["fused/carafe_upsample", *(n for n in ALL_PEERS if n[0] == "f")]),
        (["near*", "operator/carafe"], ["operator/carafe", "upsampler/nearest"]),
    ],
)
def test_candidates_are_chosen_by_pattern(patterns, names):
    args = benchmark.parse_args(["--candidates", *patterns])
    assert [c.name for c in benchmark.choose_candidates(args)] == names


def test_cases():
    args = benchmark.parse_args(["--cases", "p3", "base"])
    assert list(benchmark.choose_cases(args, CPU)) == ["base", "p3"]
    own = ["--shape", *"2648", "--kernel", "3", "--group", "2", "--scale", "4"]
    args = benchmark.parse_args(own)
    (case,) = benchmark.choose_cases(args, CPU).values()
    assert (case.shape, *case.sizes) == ((2, 6, 4, 8), 3, 2, 4)
    on_gpu = upsampling.standard_cases(torch.device("cuda"))
    assert on_gpu["p3"].shape == (2, 256, 104, 168)
    assert on_gpu["mask_head"].shape == (256, 256, 14, 14)
    assert upsampling.standard_cases(CPU, batch=3)["p5"].shape == (3, 256, 26, 42)


def test_compiled_peers_take_part_in_some_cases_by_default():
    def compiled(*arguments):
        cases = benchmark.choose_cases(benchmark.parse_args(arguments), CPU)
        return [name for name, case in cases.items() if case.compiled]

    own = ["--shape", "2", "6", "4", "8"]
    assert compiled() == ["base", "p3", "mask_head"]
    assert compiled("--compile") == list(upsampling.standard_cases(CPU))
    assert compiled("--no-compile") == compiled("--quick") == compiled(*own, "--no-compile") == []
    assert compiled(*own) == ["custom"]


def test_documentation_has_the_blocks():
    for name in ("upsampling cpu", "detectors cpu", "upsampling cuda", "detectors cuda"):
        MarkdownBlock(ROOT / "docs" / "benchmark.md", name)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "-"), (0.0123, "0.012"), (1.0, "1.00"), (12.34, "12.3"), (12345.6, "12346")],
)
def test_numbers_have_three_digits(value, text):
    assert report.significant(value) == text


# --- detectors ----------------------------------------------------------------------------------

BASELINE = """
_BASE_: "{}"
MODEL:
  BACKBONE:
    NAME: "build_resnet_fpn_backbone"
  ROI_MASK_HEAD:
    NAME: "MaskRCNNConvUpsampleHead"
"""


@pytest.fixture(scope="module")
def small_configs(tmp_path_factory):
    """The quick start's model without and with CARAFE."""
    folder = tmp_path_factory.mktemp("configs")
    quickstart = ROOT / "configs" / "shapes_mask_rcnn_R18_FPN_carafe.yaml"
    baseline, carafe = folder / "small.yaml", folder / "small_carafe.yaml"
    baseline.write_text(BASELINE.format(quickstart))
    carafe.write_text(f'_BASE_: "{quickstart}"\n')
    return [str(baseline), str(carafe)]


def test_detectors_and_their_baselines(small_configs, tmp_path, capsys, monkeypatch):
    from carafe_d2.benchmark import __main__, detectors
    from carafe_d2.export import TensorDetector

    def missing(model, folder):
        raise UserError("pip install onnxruntime")

    runtimes = dict(zip(__main__.RUNTIMES, (missing, lambda m, _: TensorDetector(m)), strict=True))
    assert runtimes.keys() == detectors.RUNTIMES.keys()
    monkeypatch.setattr(detectors, "RUNTIMES", runtimes)
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("detectors cpu"))
    options = ["--quick", "--training", "--device", "cpu", "--size", "96", "128"]
    options += ["--output", str(tmp_path), "--markdown", str(page)]
    benchmark.main(["--detector", *small_configs, *options, "--runtimes", *runtimes])
    content = json.loads((tmp_path / "detectors.json").read_text())
    assert content["settings"]["weights"] == "random, seed 0"
    results = {(r["mode"], r["config"]): r for r in content["results"]}
    names = ["small", "small_carafe"]
    rows = [f"{name}{suffix}" for name in names for suffix in ("", *(f", {r}" for r in runtimes))]
    assert [name for mode, name in results if mode == "inference"] == rows
    assert [name for mode, name in results if mode == "training"] == names
    for (mode, name), result in results.items():
        if "onnxruntime" in name:
            assert result["skipped"] == "pip install onnxruntime"
            assert result["milliseconds"] is None
            continue
        assert result["images_per_second"] == pytest.approx(1e3 / result["milliseconds"])
        detector, _, runtime = name.partition(", ")
        assert result["baseline"] == (detector if runtime else "small")
        assert result["rounds"] >= 3
        assert runtime or result["gflops"] > 0
        # as many as the config lets through, so the mask head has the same work in both models
        assert result["objects"] == (20 if mode == "inference" else 12)
        # a detector that is said to be faster takes less time in the same table
        baseline = results[mode, result["baseline"]]["milliseconds"]
        assert result["speed"] == pytest.approx(baseline / result["milliseconds"])
    assert results["training", "small"]["gflops"] > 2 * results["inference", "small"]["gflops"]
    output = capsys.readouterr().out
    assert "inference, one image of 96x128, random weights" in output
    assert "\nsmall, onnxruntime: not measured, pip install onnxruntime\n" in output
    assert "| small_carafe | " in page.read_text()


@pytest.mark.parametrize(
    ("config", "baseline"),
    [
        ("mask_rcnn_R50_FPN_carafe_1x", "mask_rcnn_R50_FPN_1x"),
        ("mask_rcnn_R50_FPN_carafe_1x_2000", "mask_rcnn_R50_FPN_1x"),
        ("retinanet_R50_FPN_1x", "retinanet_R50_FPN_1x"),
    ],
)
def test_baseline_of_a_config(config, baseline):
    from carafe_d2.benchmark.detectors import baseline_of, config_path

    assert baseline_of(config) == baseline
    assert config_path(config).is_file()


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_random_targets_are_objects_in_the_image(mask_format):
    from carafe_d2.benchmark.detectors import (
        DEFAULT_CONFIGS,
        OBJECTS,
        config_path,
        random_instances,
    )
    from carafe_d2.config import load_config

    path = str(config_path(DEFAULT_CONFIGS[0]))
    cfg = load_config(path, ["INPUT.MASK_FORMAT", mask_format])
    instances = random_instances(cfg, (120, 200))
    assert len(instances) == OBJECTS
    boxes = instances.gt_boxes.tensor
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([200.0, 120.0, 200.0, 120.0])).all()
    drawn = instances.gt_masks.get_bounding_boxes().tensor
    torch.testing.assert_close(drawn, boxes, atol=1.5, rtol=0)


def test_training_iteration_leaves_the_weights_alone(small_configs):
    from carafe_d2.benchmark.detectors import Detector
    from carafe_d2.config import load_config

    cfg = load_config(small_configs[1], ["MODEL.DEVICE", "cpu"])
    detector = Detector(cfg, (64, 96), "channels_last")
    before = {name: p.clone() for name, p in detector.model.named_parameters()}
    iteration = detector.trainer()
    iteration()
    for name, parameter in detector.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is not None, name
