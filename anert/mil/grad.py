"""Reverse-mode differentiation of a Function: forward with taps, backward for activations, gradient recipes.

`differentiate` clones the forward into one joint graph, appends the backward by each op's gradient rule (or by that of
`Function.custom_vjp`), and cuts the joint graph in two: what the backward needs of the forward is either *saved* (an
extra output of the forward, a tap) or *recomputed* (cloned into the backward). Gradients of parameters stay out of MIL
wherever a native pass can form them from a tap and a cotangent: a Recipe. Names: `tap_<value>`, `cot_<value>`.
(Griewank & Walther 2008, ch. 3 and 12; the cut follows the min-memory rule below.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from anert.errors import ShapeError, UnsupportedError
from anert.mil import ops
from anert.mil.graph import Function, Op, Value, copy_op
from anert.mil.ops.table import lookup


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a native pass forms a Param's gradient, fp16 in, fp32 added to; `tap` and `cot` name values of the backward's
    ports.

    kind `gemm`: dw (O, I) += cot (O, N) tap (I, N)^T, or the roles swapped when `swap` (w was read transposed).
    kind `rowsum`: dw (C, 1) += sum over N of tap (C, N) * cot (C, N); no tap: of cot alone.
    kind `add`: dw += cot, which has the parameter's shape.
    """

    param: str
    kind: str
    cot: str
    tap: str = ""
    swap: bool = False


@dataclass(slots=True)
class Gradient:
    """`forward`: inputs as given; outputs the originals, then the taps. `backward`: inputs are any of the forward's
    inputs, taps and `cot_<output>`; outputs are `cot_<input>` for each differentiated activation, then recipe
    operands."""

    forward: Function
    backward: Function
    recipes: list[Recipe]
    taps: list[str]
    """Names of the saved values: forward outputs behind the originals, backward inputs of the same name."""
    recomputed: list[str] = field(default_factory=list)
    """Forward values that the backward computes again: for reports."""


class _Joint:
    """The joint graph and the cotangents gathered so far."""

    def __init__(self, function: Function, params: Iterable[str]) -> None:
        self.fn = Function(function.name, function.opset)
        self.mapping: dict[Value, Value] = {}
        for v in function.inputs:
            self.mapping[v] = self.fn.input(v.name, v.shape, v.dtype)
        for op in function.ops:
            copy_op(op, self.fn, self.mapping)
        self.forward_ops = list(self.fn.ops)
        self.vjps = {
            self.mapping[out]: (tuple(self.mapping[v] for v in values), slope)
            for out, (values, slope) in function.vjps.items()
        }
        self.params = {v for v in self.fn.inputs if v.name in set(params)}
        self.cot: dict[Value, Value] = {}
        self.recipes: list[tuple[Value, str, Value, Value | None, bool]] = []

    def accumulate(self, value: Value, gradient: Value) -> None:
        have = self.cot.get(value)
        self.cot[value] = gradient if have is None else ops.add(have, gradient)

    def param_behind(self, value: Value) -> tuple[Value, bool] | None:
        """The matrix parameter that `value` is, or is the transpose of: (parameter, transposed)."""
        flip = False
        while value not in self.params:
            op = value.op
            if op is None or op.kind != "transpose" or tuple(op.attrs["perm"]) != (1, 0):
                return None
            flip, value = not flip, op.inputs["x"]  # type: ignore[assignment]
        return value, flip

    def recipe(self, op: Op, dout: Value) -> set[str]:
        """Form recipes for the operands of `op` that are parameters; returns the names of the operands done with."""
        done: set[str] = set()
        if op.kind == "matmul" and dout.type.rank == 2:
            x, y = op.inputs["x"], op.inputs["y"]
            assert isinstance(x, Value) and isinstance(y, Value)
            left = self.param_behind(x)
            if left is not None and x.type.rank == y.type.rank == 2 and not op.attrs["transpose_y"]:
                # out = w h: dw = dout h^T; read as w^T: dw = h dout^T
                self.recipes.append((left[0], "gemm", dout, y, left[1] != op.attrs["transpose_x"]))
                done.add("x")
        elif op.kind in ("mul", "add"):
            for name, other in (("x", "y"), ("y", "x")):
                w, h = op.inputs[name], op.inputs[other]
                assert isinstance(w, Value) and isinstance(h, Value)
                if (
                    w in self.params
                    and h not in self.params
                    and w.shape == (dout.shape[0], 1)
                    and h.shape == dout.shape
                ):
                    self.recipes.append((w, "rowsum", dout, h if op.kind == "mul" else None, False))
                    done.add(name)
        return done

    def gradients(
        self, op: Op, douts: tuple[Value | None, ...], active: set[Value]
    ) -> Iterator[tuple[Value, Value | None]]:
        """Form the recipes of `op`; yields each other value that it has a gradient for, with that gradient."""
        if op.out in self.vjps and douts[0] is not None:
            values, slope = self.vjps[op.out]
            for v, dv in zip(values, slope(op.out, douts[0], values), strict=True):
                if dv is not None and dv.type != v.type:
                    raise ShapeError(f"custom_vjp of {op.out.name!r}: {v.name!r} is {v.type}, its gradient {dv.type}")
                yield v, dv
            return
        done = self.recipe(op, douts[0]) if len(douts) == 1 and douts[0] is not None else set()
        left = {k: x if isinstance(x, tuple) else (x,) for k, x in op.inputs.items() if k not in done}
        if not any(v in active for x in left.values() for v in x):
            return
        rule = lookup(op.kind).grad
        if rule is None:
            raise UnsupportedError(
                f"{op.kind} ({op.out.name}) has no gradient rule and stands between the loss and an input"
            )
        for name, g in rule(op, douts).items():
            if name in left and g is not None:
                yield from zip(left[name], g if isinstance(g, tuple) else (g,), strict=True)

    def reverse(self, active: set[Value]) -> None:
        """Walk the forward backwards; `active` are the values through which a gradient is wanted."""
        for op in reversed(self.forward_ops):
            douts = tuple(self.cot.get(v) for v in op.outputs)
            if all(d is None for d in douts) or not any(v in active for v in op.operands()):
                continue
            for v, dv in self.gradients(op, douts, active):
                if dv is not None and v in active:
                    self.accumulate(v, dv)
        for v in self.params:
            if v in self.cot:
                self.recipes.append((v, "add", self.cot[v], None, False))


def _active(function: Function, wanted: set[Value]) -> set[Value]:
    """Values that depend on any of `wanted`, and `wanted` themselves."""
    active = set(wanted)
    for op in function.ops:
        if any(v in active for v in op.operands()):
            active.update(op.outputs)
    return active


def worth_saving(op: Op, params: set[Value]) -> bool:
    """Whether an op's result is kept for the backward rather than computed again, if it can be had as (C, T).

    Elementwise ops, reductions and views are cheap and fuse. A contraction with a weight is always kept. One between
    activations is kept unless its result is larger than its operands together. Attention scores, (T, T) a head, are not
    (C, T).
    """
    if lookup(op.kind).category != "contract":
        return False
    sizes = 0
    for v in op.operands():
        if v.is_const:
            return False  # RoPE's permutation and the like: a rearrangement, not a contraction
        root = v
        while root.op is not None and lookup(root.op.kind).category == "view":
            root = next(root.op.operands())
        if root in params:
            return True
        sizes += v.type.size
    return op.out.type.size <= sizes


def _cut(joint: _Joint, needed: Iterable[Value]) -> tuple[list[Value], set[Op]]:
    """Of the forward values that the backward reads: which are saved, and which forward ops are computed again."""
    forward = set(joint.forward_ops)
    saved: dict[Value, None] = {}
    again: set[Op] = set()
    stack = list(needed)
    while stack:
        v = stack.pop()
        op = v.op
        if op is None or op not in forward or v in saved or op in again:
            continue
        if v.type.rank == 2 and (worth_saving(op, joint.params) or _views_saved(op, joint.params)):
            saved[v] = None
            continue
        again.add(op)
        stack.extend(op.operands())
    order = {v: i for i, op in enumerate(joint.forward_ops) for v in op.outputs}
    return sorted(saved, key=order.__getitem__), again


def _views_saved(op: Op, params: set[Value]) -> bool:
    """Whether `op` only rearranges a kept contraction of another rank: then its (C, T) view is what is kept."""
    while lookup(op.kind).category == "view" and len(op.outputs) == 1:
        source = next(op.operands())
        if source.op is None or source.type.size != op.out.type.size:
            return False
        if lookup(source.op.kind).category == "contract":
            return source.type.rank != 2 and worth_saving(source.op, params)
        op = source.op
    return False


def _unique(prefix: str, value: Value, taken: dict[str, Value]) -> str:
    name, n = f"{prefix}_{value.name}", 0
    while taken.setdefault(name, value) is not value:
        n += 1
        name = f"{prefix}_{value.name}_{n}"
    return name


def differentiate(function: Function, activations: Iterable[str], params: Iterable[str]) -> Gradient:
    """Derive the backward of `function`, a Function of fp16 tensors, by its inputs named `activations` and `params`.

    Raises UnsupportedError when an op on the way has no gradient.
    """
    wanted = list(activations)
    joint = _Joint(function, params)
    fn = joint.fn
    for out in function.outputs:
        joint.cot[joint.mapping[out]] = fn.input(f"cot_{out.name}", out.shape, out.dtype)
    seeds = set(joint.cot.values())
    inputs = {v.name: v for v in fn.inputs}
    roots = joint.params | {inputs[n] for n in wanted}
    joint.reverse(_active(fn, roots))

    taken: dict[str, Value] = {}
    named: dict[str, Value] = {}  # backward outputs by port name
    for n in wanted:
        if inputs[n] not in joint.cot:
            raise UnsupportedError(f"no output of {function.name!r} depends on its input {n!r}")
        named[_unique("cot", inputs[n], taken)] = joint.cot[inputs[n]]
    backward_ops = fn.ops[len(joint.forward_ops) :]
    live = _live(backward_ops, [*named.values(), *(r[2] for r in joint.recipes)])
    needed = [v for op in backward_ops if op in live for v in op.operands()]
    needed += [r[3] for r in joint.recipes if r[3] is not None]
    saved, again = _cut(joint, [*needed, *named.values()])

    port: dict[Value, str] = {v: v.name for v in fn.inputs}
    for v in saved:
        port[v] = _unique("tap", v, taken)

    def operand(prefix: str, value: Value) -> str:
        """The backward port that holds `value`: an input or tap where it is one, else a new output."""
        if value not in port:
            port[value] = _unique(prefix, value, taken)
            named[port[value]] = value
        return port[value]

    for value in named.values():
        if value not in seeds:
            port.setdefault(value, next(k for k, x in named.items() if x is value))
    recipes = [
        Recipe(p.name, kind, operand("cot", cot), operand("tap", tap) if tap is not None else "", swap)
        for p, kind, cot, tap, swap in joint.recipes
    ]
    backward = extract(fn, "backward", named, {v: port[v] for v in (*fn.inputs, *saved)}, again | set(backward_ops))
    outputs = {o.name: joint.mapping[o] for o in function.outputs} | {port[v]: v for v in saved}
    forward = extract(fn, "forward", outputs, {v: v.name for v in fn.inputs}, set(joint.forward_ops))
    return Gradient(forward, backward, recipes, [port[v] for v in saved], sorted(op.out.name for op in again))


def _live(body: Iterable[Op], results: Iterable[Value], stops: Iterable[Value] = ()) -> set[Op]:
    """The ops of `body` that `results` depend on, not looking behind `stops`."""
    inside, halt = set(body), set(stops)
    live: set[Op] = set()
    stack = [v for v in results if v not in halt]
    while stack:
        op = stack.pop().op
        if op is not None and op in inside and op not in live:
            live.add(op)
            stack.extend(v for v in op.operands() if v not in halt)
    return live


def extract(
    source: Function, name: str, results: dict[str, Value], inputs: dict[Value, str], body: Iterable[Op]
) -> Function:
    """A Function of the ops in `body` that `results` need, with those of `inputs` that it reads as formal inputs.

    Outputs are named as in `results`; a value that is both input and output, or output twice, goes through `identity`.
    """
    live = _live(body, results.values(), inputs)
    fn = Function(name, source.opset)
    mapping: dict[Value, Value] = {}
    reads = {v for op in live for v in op.operands()} | {v for v in results.values() if v in inputs}
    for v, port in inputs.items():
        if v in reads:
            mapping[v] = fn.input(port, v.shape, v.dtype)
    for op in source.ops:
        if op in live:
            keep = {o: mapping[o] for o in op.outputs if o in mapping}
            copy_op(op, fn, mapping)
            mapping.update(keep)
    outs: list[Value] = []
    for port, v in results.items():
        out = mapping[v]
        if out.op is None or out in outs:
            out = ops.identity(out)
        fn.claim(port, out)
        outs.append(out)
    return fn.returns(*outs)
