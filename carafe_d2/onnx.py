"""CARAFE in ONNX files as functions of a domain of our own, with standard operators as bodies.

Plain ``torch.onnx.export`` writes standard operators from the start, and takes longer.
"""

import re
from collections.abc import Callable
from importlib.util import find_spec

import torch

from .errors import UserError
from .ops import DECOMPOSITIONS

DOMAIN = "carafe_d2"

_SIZES = ("kernel_size", "group_size", "scale_factor")


def to_onnx(program: torch.export.ExportedProgram, inline: bool = False):
    """Translates a program into ONNX.

    CARAFE becomes a node of the domain ``carafe_d2`` with the name and the arguments of PyTorch's
    operator, and the file holds a function of standard operators as its body. A runtime takes the
    body, unless it has a kernel of its own for that name. No tensor of it has more than five
    dimensions. Outputs keep the names of a dictionary.

    Args:
        program: of ``torch.export.export``, with CARAFE in it.
        inline: put the bodies in the place of the nodes: the file has standard operators only.

    Returns:
        The :class:`onnx.ModelProto`.

    Raises:
        UserError: a package is missing, or a part of the model cannot be translated; the message
            names it.
    """
    require_packages("onnx", "onnxscript")
    import onnx.inliner

    table: dict[Callable, Callable] = {op: _translation(op) for op in DECOMPOSITIONS}
    outputs = program.call_spec.out_spec
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            output_names=outputs.context if outputs.type is dict else None,
            custom_translation_table=table,
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(_obstacle(program, error)) from error
    assert exported  # which only the older exporter does not put out
    model = exported.model_proto
    (opset,) = (opset.version for opset in model.opset_import if not opset.domain)
    functions = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            arguments = {argument.name: argument.i for argument in node.attribute}
            sizes = [arguments[name] for name in _SIZES]
            # A function is told from others of its name by this.
            node.overload = "k{}_g{}_s{}".format(*sizes)
            function = _onnx_function(node.op_type, node.overload, opset, *sizes)
            functions[node.op_type, node.overload] = function
    model.functions.extend(functions.values())
    onnx.checker.check_model(model)
    return onnx.inliner.inline_local_functions(model) if inline else model


def _translation(operator: torch._ops.OpOverload) -> Callable:
    """What PyTorch's exporter calls to make a node of the operator."""
    from onnx import TensorProto
    from onnx.defs import OpSchema
    from onnxscript import opset18, values

    name, kernels = operator._schema.name.split("::")[1], operator._schema.arguments[1].name
    dtypes = [f"tensor({dtype})" for dtype in ("float", "double", "float16", "bfloat16")]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(input, "T") for input in ("features", kernels)],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", dtypes, "")],
        attributes=[OpSchema.Attribute(size, OpSchema.AttrType.INT, "") for size in _SIZES],
    )
    make_node = values.Op(values.Opset(DOMAIN, 1), name, schema)

    def translate(features, kernels, kernel_size: int, group_size: int, scale_factor: int):
        sizes = dict(zip(_SIZES, (kernel_size, group_size, scale_factor), strict=True))
        if (dtype := features.dtype) == kernels.dtype:
            return make_node(features, kernels, **sizes)
        # As the operator does with a half type beside another one, it computes in float32.
        wide = [opset18.Cast(x, to=TensorProto.FLOAT) for x in (features, kernels)]
        return opset18.Cast(make_node(*wide, **sizes), to=dtype)

    return translate


# Of the masks or logits, what multiplies each tap: (N*group, k*k, s*s, rows, columns).
_SOFTMAX = """
        logits = Reshape <allowzero = 1> (kernel_logits, by_tap)
        weights = Softmax <axis = 1> (logits)"""
_WEIGHTS = {
    "carafe": """
        pixels = Concat <axis = 0> (ngkk, h, s, w, s)
        of_pixels = Reshape <allowzero = 1> (masks, pixels)
        of_taps = Transpose <perm = [0, 2, 4, 1, 3]> (of_pixels)
        weights = Reshape <allowzero = 1> (of_taps, by_tap)""",
    "carafe_upsample": _SOFTMAX,
    "carafe_downsample": """
        weights = Reshape <allowzero = 1> (masks, by_tap)""",
    "carafe_downsample_softmax": _SOFTMAX,
}


def _onnx_function(name: str, overload: str, opset: int, k: int, g: int, scale: int):
    """The definition in carafe_d2/reference.py, step by step, as a function of ONNX.

    Args:
        name: of PyTorch's operator, e.g. "carafe".
        overload: tells the function from others of this name.
        opset: version of the standard operators.
        k, g, scale: kernel_size, group_size, scale_factor.
    """
    import onnx.parser

    kernels = "kernel_logits" if _WEIGHTS[name] is _SOFTMAX else "masks"
    s, stride = (1, scale) if "downsample" in name else (scale, 1)
    weights = ", ".join(f"weight{i}" for i in range(k * k))
    taps = "".join(
        f"""
        from{i} = Constant <value_ints = [{i // k}, {i % k}]> ()
        to{i} = Add (from{i}, size)
        tap{i} = Slice (padded, from{i}, to{i}, last_axes, strides)
        term{i} = Mul (weight{i}, tap{i})
        sum{i} = {f"Add (sum{i - 1}, term{i})" if i else "Identity (term0)"}"""
        for i in range(k * k)
    )
    return onnx.parser.parse_function(f"""
    <domain: "{DOMAIN}", overload: "{overload}", opset_import: ["" : {opset}]>
    {name} <{", ".join(_SIZES)}> (features, {kernels}) => (output) {{
        shape = Shape (features)
        n, c, h, w = Split <axis = 0, num_outputs = 4> (shape)
        size = Concat <axis = 0> (h, w)
        last_axes = Constant <value_ints = [3, 4]> ()
        strides = Constant <value_ints = [{stride}, {stride}]> ()
        one = Constant <value_ints = [1]> ()
        g = Constant <value_ints = [{g}]> ()
        s = Constant <value_ints = [{s}]> ()
        kk = Constant <value_ints = [{k * k}]> ()
        ss = Mul (s, s)
        ng = Mul (n, g)
        ngkk = Mul (ng, kk)
        rounding = Sub (strides, one)
        rounded = Add (size, rounding)
        locations = Div (rounded, strides)
        by_tap = Concat <axis = 0> (ng, kk, ss, locations)
        {_WEIGHTS[name]}
        {weights} = Split <axis = 1, num_outputs = {k * k}> (weights)
        border = Constant <value_ints = [0, 0, {k // 2}, {k // 2}, 0, 0, {k // 2}, {k // 2}]> ()
        wide = Pad (features, border)
        growth = Constant <value_ints = [{k - 1}, {k - 1}]> ()
        wide_size = Add (size, growth)
        cg = Div (c, g)
        by_group = Concat <axis = 0> (ng, cg, one, wide_size)
        padded = Reshape <allowzero = 1> (wide, by_group)
        {taps}
        css = Mul (c, ss)
        by_source = Concat <axis = 0> (n, css, locations)
        packed = Reshape <allowzero = 1> (sum{k * k - 1}, by_source)
        output = DepthToSpace <blocksize = {s}, mode = "CRD"> (packed)
    }}""")


def _obstacle(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Which operator stopped the translation, and in which module, as far as that is told."""
    while error.__cause__:
        error = error.__cause__
    if not (found := re.search(r"op='([^']*)'", str(error))):
        return first_line(error)
    operator = found[1]
    name = re.split(r"\W", operator)[-1]
    for node in program.graph.nodes:
        modules = node.meta.get("nn_module_stack")
        if modules and node.op == "call_function" and name in str(node.target):
            part = [*modules.values()][-1][0].removeprefix("model.")
            return f"{part or 'the model'}: {operator} has no form in ONNX"
    return f"{operator} has no form in ONNX"


def require_packages(*names: str) -> None:
    """
    Raises:
        UserError: one of them is not installed.
    """
    if missing := [name for name in names if not find_spec(name)]:
        raise UserError(f"this needs what is not installed: pip install {' '.join(missing)}")


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
