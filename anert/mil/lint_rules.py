"""The catalogue of what the Neural Engine refuses or gets wrong, as rules (ane_facts sections 2.4, 3 and 4).

A rule's level on a chip is (severity, confidence): `agreed` where no source contradicts, `disputed` where one does or
where a single project saw it on one machine. A rule without a level for a chip does not apply there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from anert.mil.graph import Function, Op, Value
from anert.mil.ops.table import lookup
from anert.mil.passes import RISKY_NAMES
from anert.mil.syntax import Program, Statement, Typed

CHIPS = ("m1", "m2", "m3", "m4", "m5")
Levels = Mapping[str, tuple[str, str]]
Subject = TypeVar("Subject")

MAX_INPUTS, MAX_WIDTH, MAX_AXIS, MAX_MATMUL, FLAT_LIMIT = 8, 16384, 65536, 4096, 16384
KERNEL_WIDTHS = {"m1": 13, "m2": 13}
MAX_KERNEL_WIDTH = 15
SCRATCH_BYTES = 64 << 20
"""An intermediate of this size is wired kernel memory that a whole machine feels (1.3 GB a block rebooted one)."""
SRAM_BYTES = 24 << 20
NEVER = frozenset(("cumsum", "reduce_prod", "non_zero", "sliding_windows", "bitwise_and", "bitwise_or", "bitwise_xor"))
SORTING = frozenset(("topk", "sort", "argsort"))


@dataclass(frozen=True, slots=True)
class Rule(Generic[Subject]):
    """`check` yields (value's name, message) for a Function, (token, name, message) for a text."""

    id: str
    name: str
    summary: str
    levels: Levels
    source: str
    fix: str
    check: Callable[[Subject], Iterator[tuple[Any, ...]]]


def at(severity: str, confidence: str, chips: str = "m1 m2 m3 m4 m5") -> dict[str, tuple[str, str]]:
    return dict.fromkeys(chips.split(), (severity, confidence))


AGREED, DISPUTED = at("error", "agreed"), at("error", "disputed")
DOUBTFUL = at("warning", "disputed")
RULES: list[Rule[Function]] = []
"""Rules about a Function. Filled below, never after."""
TEXT_RULES: list[Rule[Program]] = []
"""Rules about what only a text has."""

Found = Iterator[tuple[str, str]]
Check = Callable[[Function], Found]
TextCheck = Callable[[Program], Iterator[tuple[int, str, str]]]


def rule(id: str, name: str, levels: Levels, source: str, summary: str, fix: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        RULES.append(Rule(id, name, summary, levels, source, fix, check))
        return check

    return add


def text_rule(
    id: str, name: str, levels: Levels, source: str, summary: str, fix: str
) -> Callable[[TextCheck], TextCheck]:
    def add(check: TextCheck) -> TextCheck:
        TEXT_RULES.append(Rule(id, name, summary, levels, source, fix, check))
        return check

    return add


def ports(f: Function) -> list[Value]:
    return [*f.inputs, *f.outputs]


def values(f: Function) -> Iterator[Value]:
    yield from f.inputs
    for op in f.ops:
        yield from op.outputs


def of_kind(f: Function, *kinds: str) -> Iterator[Op]:
    return (op for op in f.ops if op.kind in kinds)


def computed(operand: object) -> bool:
    return isinstance(operand, Value) and operand.const is None


def width(v: Value) -> int:
    return v.shape[-1] if v.shape else 1


# Ports


@rule("ANE101", "input-order", AGREED, "Orion, h3.c-ane", "Inputs bind by the byte order of their names",
      "name the inputs so that their order is alphabetical: i00_, i01_, ...")  # fmt: skip
def input_order(f: Function) -> Found:
    names = [v.name for v in f.inputs]
    if names != sorted(names):
        first = next(a for a, b in zip(names, sorted(names), strict=True) if a != b)
        yield first, f"inputs {', '.join(names)} will bind in the order {', '.join(sorted(names))}"


@rule("ANE102", "output-order", AGREED, "Orion", "Outputs bind by the byte order of their names",
      "name the outputs so that their order is alphabetical: o00_, o01_, ...")  # fmt: skip
def output_order(f: Function) -> Found:
    names = [v.name for v in f.outputs]
    if names != sorted(names):
        first = next(a for a, b in zip(names, sorted(names), strict=True) if a != b)
        yield first, f"outputs {', '.join(names)} will bind in the order {', '.join(sorted(names))}"


@rule("ANE103", "too-many-inputs", DISPUTED, "h3.c-ane (8), imperatormk (98 worked)", "More than 8 inputs bind wrongly",
      "pack several tensors into one input and slice it in the graph")  # fmt: skip
def too_many_inputs(f: Function) -> Found:
    if len(f.inputs) > MAX_INPUTS:
        yield f.inputs[MAX_INPUTS].name, f"{len(f.inputs)} inputs: beyond {MAX_INPUTS} data may reach the wrong one"


@rule("ANE104", "float32-port", {**at("error", "agreed", "m1 m2"), **at("warning", "agreed", "m3 m4 m5")},
      "maderix/ANE #6, h3.c-ane, ANEForge", "fp32 ports: refused on M1/M2, slower elsewhere",
      "use fp16 ports and convert on the CPU")  # fmt: skip
def float32_port(f: Function) -> Found:
    for v in ports(f):
        if v.dtype in ("fp32", "fp64"):
            yield v.name, f"port {v.name} is {v.dtype}"


@rule("ANE105", "integer-port", AGREED, "ANEForge", "Ports of a type that the engine does not take",
      "use fp16, int8, uint8, int16 or uint16 ports")  # fmt: skip
def integer_port(f: Function) -> Found:
    for v in ports(f):
        if v.dtype in ("int32", "uint32", "int64", "uint64", "bool"):
            yield v.name, f"port {v.name} is {v.dtype}"


@rule("ANE106", "port-width", AGREED, "h3.c-ane, Orion, Espresso", "The trailing axis of a port is a multiple of 16",
      "pad the trailing axis with zeros to a multiple of 32")  # fmt: skip
def port_width(f: Function) -> Found:
    for v in ports(f):
        if width(v) % 16 or not width(v):
            yield v.name, f"port {v.name} {list(v.shape)}: width {width(v)} fails with 0x1d or loses its last columns"


@rule("ANE107", "narrow-port", DOUBTFUL, "field guide (32), h3.c-ane (16 suffices)", "Ports narrower than 32",
      "pad the trailing axis with zeros to 32")  # fmt: skip
def narrow_port(f: Function) -> Found:
    for v in ports(f):
        if width(v) == 16:
            yield v.name, f"port {v.name} {list(v.shape)}: one project saw garbage below a width of 32"


@rule("ANE108", "wide-tensor", {**at("error", "agreed", "m1 m2"), **at("error", "disputed", "m3 m4 m5")},
      "rustane #13, maderix/ANE; ANEForge (65,536 since A16)", "The trailing axis is at most 16,384",
      "split the kernel, or put weights into another input")  # fmt: skip
def wide_tensor(f: Function) -> Found:
    for v in values(f):
        if MAX_WIDTH < width(v) <= MAX_AXIS:
            yield v.name, f"{v.name} {list(v.shape)}: width {width(v)} does not compile on all compilers"


@rule("ANE109", "long-axis", AGREED, "ANEForge, maderix/ANE #26", "No axis is longer than 65,536",
      "cut the axis into chunks (a classifier's vocabulary belongs on the CPU)")  # fmt: skip
def long_axis(f: Function) -> Found:
    for v in values(f):
        if max(v.shape, default=1) > MAX_AXIS:
            yield v.name, f"{v.name} {list(v.shape)} has an axis longer than {MAX_AXIS}"


@rule("ANE110", "unequal-ports", DOUBTFUL, "Orion (all equal), h3.c-ane (not needed)", "Surfaces of different sizes",
      "allocate all surfaces as large as the largest (pad_io=uniform)")  # fmt: skip
def unequal_ports(f: Function) -> Found:
    for what, group in (("inputs", f.inputs), ("outputs", f.outputs)):
        if len({v.type.nbytes for v in group}) > 1:
            yield group[0].name, f"{what} of {sorted({v.type.nbytes for v in group})} bytes"


@rule("ANE111", "unused-value", AGREED, "h3.c-ane", "Inputs and constants that nothing reads can fail at run time",
      "remove it (anert.mil.passes.prune)")  # fmt: skip
def unused(f: Function) -> Found:
    read = set(f.users()) | set(f.outputs)
    for v in (*f.inputs, *(op.out for op in of_kind(f, "const"))):
        if v not in read:
            yield v.name, f"{v.name} is read by no op"


# Names and dialect


@rule("ANE120", "risky-name", at("warning", "disputed", "m1"), "imperatormk (M1)", "Names that failed on one M1",
      "rename (anert.mil.passes.rename)")  # fmt: skip
def risky_name(f: Function) -> Found:
    for v in values(f):
        if v.name in RISKY_NAMES:
            yield v.name, f"the name {v.name!r} gave silent zeros or a failed compile on an M1"


@rule("ANE121", "modern-dialect", at("warning", "disputed", "m1 m2"), "maderix/ANE #6 (fails), ANEForge (works)",
      "program(1.3)/ios18 on M1 and M2", "print for ios16: program(1.0), scalars as tensor<int32, []>(1)")  # fmt: skip
def modern_dialect(f: Function) -> Found:
    if f.opset == "ios18":
        yield "", f"function {f.name} is printed as program(1.3)"


@text_rule("ANE122", "missing-name", DOUBTFUL, "ANEForge (required), maderix/ANE #18 (omitted)",
           "Statements without a name attribute", 'add [name = string("...")], unique in the function')  # fmt: skip
def missing_name(tree: Program) -> Iterator[tuple[int, str, str]]:
    for s in statements(tree):
        if "name" not in s.attrs:
            yield s.token, result(s), f"{s.kind} has no name attribute"


@text_rule("ANE123", "missing-build-info", AGREED, "field guide", "A program without buildInfo does not compile",
           "add the buildInfo dictionary; its values do not matter")  # fmt: skip
def missing_build_info(tree: Program) -> Iterator[tuple[int, str, str]]:
    if "buildInfo" not in tree.attrs:
        yield 0, "", "the program has no buildInfo"


# Ops


def statements(tree: Program) -> Iterator[Statement]:
    return (s for f in tree.functions for s in f.statements)


def result(s: Statement) -> str:
    return s.outputs[0].name if s.outputs else ""


@text_rule("ANE200", "never-on-engine", AGREED, "ANEForge", "Ops that the engine never runs", "compute it on the CPU")
def never_on_engine(tree: Program) -> Iterator[tuple[int, str, str]]:
    for s in statements(tree):
        if s.kind in NEVER:
            yield s.token, result(s), f"{s.kind} has no implementation on the engine"


@rule("ANE201", "host-op", DISPUTED, "anert", "Ops that anert keeps off the engine", "compute it on the CPU")
def host_op(f: Function) -> Found:
    for op in f.ops:
        if "ane" not in lookup(op.kind).backends and op.kind not in ("tile", *SORTING, *NEVER):
            yield op.out.name, f"{op.kind} is run on cpu and reference only"


@rule("ANE202", "tile", DISPUTED, "field guide (poisons the process), ANEForge (native)", "tile may poison the engine",
      "broadcast instead, or repeat on the CPU")  # fmt: skip
def tile(f: Function) -> Found:
    for op in of_kind(f, "tile"):
        yield op.out.name, "after tile every later evaluation of the process may fail with 0x1d"


@text_rule("ANE203", "sorting", at("error", "agreed", "m1"), "ANEForge", "Sorting ops on M1", "sort on the CPU")
def sorting(tree: Program) -> Iterator[tuple[int, str, str]]:
    for s in statements(tree):
        if s.kind in SORTING:
            yield s.token, result(s), f"{s.kind} is refused by the M1"


@rule("ANE204", "reduce-mean", DOUBTFUL, "Espresso, h3.c-ane (refused); Orion, ANEForge (works)", "reduce_mean",
      "reduce_sum times 1/n (anert.mil.passes.decompose)")  # fmt: skip
def reduce_mean(f: Function) -> Found:
    for op in of_kind(f, "reduce_mean"):
        yield op.out.name, "reduce_mean is refused by some compilers"


@rule("ANE205", "rsqrt", AGREED, "Espresso, h3.c-ane, imperatormk", "rsqrt fails in in-memory models",
      "pow with exponent -0.5 (anert.mil.passes.decompose)")  # fmt: skip
def rsqrt(f: Function) -> Found:
    for op in of_kind(f, "rsqrt"):
        yield op.out.name, "rsqrt does not compile"


@text_rule("ANE206", "gelu-mode", AGREED, "maderix/ANE #18, Orion", "gelu needs its mode",
           'add mode = string("TANH_APPROXIMATION") or another')  # fmt: skip
def gelu_mode(tree: Program) -> Iterator[tuple[int, str, str]]:
    for s in statements(tree):
        if s.kind == "gelu" and "mode" not in s.args:
            yield s.token, result(s), "gelu without mode does not compile"


@rule("ANE207", "ignored-mask", AGREED, "maderix/ANE, Orion", "scaled_dot_product_attention ignores attn_mask",
      "matmul, add the mask as a constant (-1e4), softmax, matmul (anert.mil.passes.decompose)")  # fmt: skip
def ignored_mask(f: Function) -> Found:
    for op in of_kind(f, "scaled_dot_product_attention"):
        if "attn_mask" in op.inputs:
            yield op.out.name, "attn_mask compiles and is silently ignored: attention goes unmasked"


@rule("ANE208", "runtime-conv-weight", DISPUTED, "field guide (ignored), imperatormk (small ones), ANEForge (batch 1)",
      "conv with a weight that is no constant", "use matmul")  # fmt: skip
def runtime_conv_weight(f: Function) -> Found:
    for op in of_kind(f, "conv"):
        if computed(op.inputs["weight"]):
            yield op.out.name, "a conv weight computed at run time may be ignored"


@rule("ANE209", "constant-matmul", DISPUTED, "imperatormk (M1)", "matmul with a constant operand is refused",
      "a 1x1 conv with the constant as weight")  # fmt: skip
def constant_matmul(f: Function) -> Found:
    for op in of_kind(f, "matmul"):
        if not (computed(op.inputs["x"]) and computed(op.inputs["y"])):
            yield op.out.name, "matmul with a constant operand was InvalidMILProgram on an M1"


@rule("ANE210", "contraction-width", DISPUTED, "imperatormk (M1)", "Contractions not a multiple of 32 give zeros",
      "pad with zeros (anert.mil.passes.pad_contractions)")  # fmt: skip
def contraction_width(f: Function) -> Found:
    for op in of_kind(f, "matmul"):
        x = op.inputs["x"]
        assert isinstance(x, Value)
        k = x.shape[-2] if op.attrs["transpose_x"] else x.shape[-1]
        if k % 32:
            yield op.out.name, f"matmul contracts {k}: zeros were reported where it is no multiple of 32"


@rule("ANE211", "large-matmul", DOUBTFUL, "maderix/ANE #35 (weak)", "Run-time matmul beyond 4096 x 4096",
      "split the matrix")  # fmt: skip
def large_matmul(f: Function) -> Found:
    for op in of_kind(f, "matmul"):
        for v in op.operands():
            if computed(v) and max(v.shape[-2:], default=0) > MAX_MATMUL:
                yield op.out.name, f"operand {v.name} {list(v.shape)} is beyond {MAX_MATMUL}"


@text_rule("ANE212", "concat-interleave", AGREED, "maderix/ANE #40", "concat needs interleave and a scalar axis",
           "add interleave = bool(false)")  # fmt: skip
def concat_interleave(tree: Program) -> Iterator[tuple[int, str, str]]:
    for s in statements(tree):
        if s.kind == "concat" and "interleave" not in s.args:
            yield s.token, result(s), "concat without interleave is refused"


@rule("ANE213", "softmax-length", DOUBTFUL, "Espresso (powers of two only), h3.c-ane (others work)",
      "softmax over a length that is no power of two", "pad the axis and mask it")  # fmt: skip
def softmax_length(f: Function) -> Found:
    for op in of_kind(f, "softmax"):
        n = op.out.shape[op.attrs["axis"]]
        if n & (n - 1):
            yield op.out.name, f"softmax over {n} positions was refused by one compiler"


def column_slices(f: Function) -> Iterator[Op]:
    for op in of_kind(f, "slice_by_size", "slice_by_index"):
        begin = op.attrs["begin"]
        if begin and begin[-1] and computed(op.inputs["x"]):
            yield op


@rule("ANE214", "column-slice", at("warning", "agreed", "m1 m2"), "ANEForge",
      "Slices from a column: values beyond 4,094 become inf", "pack along channels, or use ports")  # fmt: skip
def column_slice(f: Function) -> Found:
    for op in column_slices(f):
        yield op.out.name, f"a slice from column {op.attrs['begin'][-1]}: values beyond 4,094 become inf"


@rule("ANE215", "column-slice-concat", at("error", "agreed", "m1"), "ANEForge",
      "concat of several slices from columns is wrong", "pack along channels, or use ports")  # fmt: skip
def column_slice_concat(f: Function) -> Found:
    sliced = {op.out for op in column_slices(f)}
    for op in of_kind(f, "concat"):
        if sum(v in sliced for v in op.operands()) > 1:
            yield op.out.name, "concat of several column slices gives wrong numbers"


@rule("ANE216", "input-slice", DOUBTFUL, "Espresso (refused in large graphs), maderix/ANE #40 (works)",
      "slice_by_index of a function's input", "slice_by_size")  # fmt: skip
def input_slice(f: Function) -> Found:
    for op in of_kind(f, "slice_by_index"):
        if op.inputs["x"] in f.inputs:
            yield op.out.name, "slice_by_index of an input was InvalidMILProgram in a large graph"


@rule("ANE217", "times-zero", AGREED, "ANEForge", "A reduction times the constant 0 does not compile",
      "subtract it from itself")  # fmt: skip
def times_zero(f: Function) -> Found:
    for op in of_kind(f, "mul"):
        operands = list(op.operands())
        zero = any(v.const is not None and v.const.size and not v.const.any() for v in operands)
        if zero and any(v.op is not None and v.op.kind.startswith("reduce_") for v in operands):
            yield op.out.name, "mul(reduce_*, 0.0) does not compile"


@text_rule("ANE218", "quantised-scale", AGREED, "h3.c-ane", "An int8 weight's scale has rank 0 or 1",
           "give scale as tensor<fp16, [N]>")  # fmt: skip
def quantised_scale(tree: Program) -> Iterator[tuple[int, str, str]]:
    consts = {result(s): s.outputs[0].type for s in statements(tree) if s.kind == "const" and s.outputs}
    for s in statements(tree):
        if s.kind == "constexpr_affine_dequantize":
            scale = s.args.get("scale") or s.attrs.get("scale")
            type = scale.type if isinstance(scale, Typed) else consts.get(scale) if isinstance(scale, str) else None
            if type is not None and len(type.dims) > 1:
                yield s.token, result(s), f"scale {type} does not compile"


@rule("ANE219", "flat-elementwise", DOUBTFUL, "imperatormk (hang), ANEForge (gelu)",
      "Elementwise ops on [1, N] with N above 16,384", "reshape to [1, C, 1, S]")  # fmt: skip
def flat_elementwise(f: Function) -> Found:
    for op in f.ops:
        flat = len(op.out.shape) <= 2 and width(op.out) > FLAT_LIMIT
        if flat and op.kind not in ("const", "cast") and lookup(op.kind).category == "elementwise":
            yield op.out.name, f"{op.kind} on {list(op.out.shape)}: one project saw a hang"


@rule("ANE220", "broadcast-sqrt", at("warning", "disputed", "m1"), "imperatormk (M1)",
      "sqrt feeding a broadcast is wrong", "pow with exponent 0.5 or -0.5")  # fmt: skip
def broadcast_sqrt(f: Function) -> Found:
    for op in f.ops:
        for v in op.operands():
            if v.op is not None and v.op.kind == "sqrt" and v.shape != op.out.shape:
                yield op.out.name, f"{op.kind} broadcasts the square root {v.name}"


@rule("ANE221", "rank-three", at("warning", "disputed", "m1"), "imperatormk (M1)", "Rank-3 ops in ios16 programs",
      "use rank 4: [1, C, 1, T]")  # fmt: skip
def rank_three(f: Function) -> Found:
    for op in of_kind(f, "reshape", "transpose", "slice_by_size", "slice_by_index", "reduce_sum", "pow", "mul"):
        if f.opset < "ios18" and len(op.out.shape) == 3:
            yield op.out.name, f"{op.kind} of rank 3 failed or gave zeros on an M1"


def wide_kernels(f: Function, chips: tuple[str, ...]) -> Found:
    limit = KERNEL_WIDTHS.get(chips[0], MAX_KERNEL_WIDTH)
    for op in of_kind(f, "conv"):
        weight = op.inputs["weight"]
        if isinstance(weight, Value) and weight.shape[-1] > limit:
            yield op.out.name, f"a conv kernel {weight.shape[-1]} wide: at most {limit}"


@rule("ANE222", "wide-kernel", AGREED, "ANEForge", "conv kernels wider than 15", "cut the kernel in two and add")
def wide_kernel(f: Function) -> Found:
    return wide_kernels(f, ("m5",))


@rule("ANE223", "wide-kernel-a13", at("warning", "disputed", "m1 m2"), "ANEForge (measured on an A13)",
      "conv kernels wider than 13", "cut the kernel in two and add")  # fmt: skip
def wide_kernel_a13(f: Function) -> Found:
    return wide_kernels(f, ("m1",))


# Numbers and memory


@rule("ANE301", "float32-compute", AGREED, "maderix/ANE, ANEForge", "fp32 is for casts at the edges only",
      "compute in fp16")  # fmt: skip
def float32_compute(f: Function) -> Found:
    for op in f.ops:
        if op.kind not in ("const", "cast", "identity") and any(v.dtype in ("fp32", "fp64") for v in op.operands()):
            yield op.out.name, f"{op.kind} computes in {next(v.dtype for v in op.operands())}"


@rule("ANE302", "non-finite-constant", AGREED, "ANEForge", "Infinities and NaNs do not behave as IEEE says",
      "use -1e4 in masks")  # fmt: skip
def non_finite_constant(f: Function) -> Found:
    for op in of_kind(f, "const"):
        array = op.attrs["val"]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            yield op.out.name, f"constant {op.out.name} holds inf or NaN, which the engine does not propagate"


@rule("ANE303", "large-intermediate", at("warning", "agreed"), "h3.c-ane", "Large intermediates are wired memory",
      "tile the query rows (512 at a time)")  # fmt: skip
def large_intermediate(f: Function) -> Found:
    for op in f.ops:
        for v in op.outputs:
            if op.kind != "const" and v.type.nbytes > SCRATCH_BYTES and v not in f.outputs:
                yield v.name, f"{v.name} {list(v.shape)} takes {v.type.nbytes >> 20} MiB of wired memory"


@rule("ANE304", "past-sram", at("note", "agreed"), "ANEForge, maderix/ANE, Orion", "Weights past the on-chip memory",
      "split the kernel")  # fmt: skip
def past_sram(f: Function) -> Found:
    total = sum(op.out.type.nbytes for op in of_kind(f, "const"))
    if total > SRAM_BYTES:
        yield "", f"constants of {total >> 20} MiB: past about 24 MiB the engine becomes much slower"


def catalogue() -> list[Rule[Any]]:
    """Every rule, about Functions and about texts, by id."""
    return sorted([*RULES, *TEXT_RULES], key=lambda rule: rule.id)
