"""Rewrites of Functions that keep their meaning: each pass takes a Function and returns a rebuilt copy.

Inputs and outputs keep their names, types and order (but for `rename` and `prune(inputs=True)`), so a pass can stand
anywhere before a kernel takes its wire form.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import numpy as np

from anert.errors import AnertError, InputError, ShapeError
from anert.mil import ops
from anert.mil.graph import DTYPES, Function, Op, Operand, TensorType, Value
from anert.mil.ops.table import emit, lookup, types_of
from anert.mil.syntax import RESERVED

RISKY_NAMES = frozenset(("var", "diff", "mean", "std", "eps", "x", "y", "mul", "add", "rsqrt", "c", "C"))
"""Value names for which one project reports silent zeros or failed compiles on an M1 (ane_facts 3.1)."""

FOLD_LIMIT = 1 << 20
"""Elements that a folded constant, and the constants it comes from, may have."""

Mapping = MutableMapping[Value, Value]
"""Values of one function -> their counterparts in another."""


def clone_ops(taken: Iterable[Op], mapping: Mapping, into: Function) -> None:
    """Append copies of `taken` to `into`, operands replaced through `mapping`, which learns the new outputs.

    Operands that the mapping lacks must belong to `into`. Names are kept where they are free. Types are inferred anew
    where an operand's type has changed; raises ShapeError if the op does not take it."""
    for op in taken:
        inputs = {k: _mapped(v, mapping) for k, v in op.inputs.items()}
        names = [v.name for v in op.outputs]
        if types_of(inputs) == types_of(op.inputs):
            outputs = into.append(op.kind, inputs, op.attrs, [v.type for v in op.outputs], names)
        else:
            outputs = emit(op.kind, inputs, op.attrs, names, into)
        _label(outputs, op)
        mapping.update(zip(op.outputs, outputs, strict=True))


def clone(function: Function) -> tuple[Function, Mapping]:
    """A copy of a function, equal to it, and the mapping from its values to the copy's."""
    copy, mapping = _signature(function)
    clone_ops(function.ops, mapping, copy)
    return copy.returns(*(mapping[v] for v in function.outputs)), mapping


def prune(function: Function, inputs: bool = False) -> Function:
    """Without the ops whose results reach no output; `inputs=True` drops the inputs that nobody reads, too."""
    live = set(function.outputs)
    kept_ops = []
    for op in reversed(function.ops):
        if not live.isdisjoint(op.outputs):
            live.update(op.operands())
            kept_ops.append(op)
    kept = [v for v in function.inputs if not inputs or v in live]
    copy, mapping = _signature(function, kept)
    clone_ops(reversed(kept_ops), mapping, copy)
    return copy.returns(*(mapping[v] for v in function.outputs))


def fold_constants(function: Function, max_elements: int = FOLD_LIMIT, exact: bool = True) -> Function:
    """Ops whose operands are all constants become constants, computed by the op table's NumPy definition in float64.

    `exact` leaves an op alone if its result would be rounded by becoming a constant of its own type: an interior value
    of a program is not rounded in precision fp32. Outputs of the function stay computed."""
    copy, mapping = _signature(function)
    outputs = set(function.outputs)
    for op in function.ops:
        operands = [mapping[v] for v in op.operands()]
        small = all(v.type.size <= max_elements for v in (*operands, *op.outputs))
        results = None
        if op.kind != "const" and small and all(v.is_const for v in operands) and outputs.isdisjoint(op.outputs):
            results = _evaluate(op, mapping, exact)
        if results is None:
            clone_ops([op], mapping, copy)
            continue
        for old, array in zip(op.outputs, results, strict=True):
            mapping[old] = copy.const(array, old.dtype, old.name)
    return prune(copy.returns(*(mapping[v] for v in function.outputs)))


def _evaluate(op: Op, mapping: Mapping, exact: bool) -> list[np.ndarray] | None:
    """The values of an op on constants, or None if they cannot be had or, with `exact`, would be rounded."""

    def array(v: Value) -> np.ndarray:
        a = mapping[v].const
        assert a is not None
        return a.astype(np.float64) if a.dtype.kind == "f" else a

    inputs = {k: tuple(map(array, v)) if isinstance(v, tuple) else array(v) for k, v in op.inputs.items()}
    try:
        results = lookup(op.kind).evaluate(inputs, op.attrs)
    except AnertError:
        return None  # such as an index out of range: an error of the run, not of the program
    arrays = []
    for old, computed in zip(op.outputs, results, strict=True):
        with np.errstate(all="ignore"):
            folded = computed.astype(DTYPES[old.dtype])
        if exact and not np.array_equal(folded.astype(computed.dtype), computed, equal_nan=folded.dtype.kind == "f"):
            return None
        arrays.append(folded)
    return arrays


def common_subexpressions(function: Function) -> Function:
    """Ops (and constants) that compute the same from the same become one. Ops that give an output stay."""
    copy, mapping = _signature(function)
    seen: dict[Any, list[Value]] = {}
    for op in function.ops:
        inputs = tuple((k, _mapped(v, mapping)) for k, v in op.inputs.items())
        key = (op.kind, inputs, tuple((k, _key(v)) for k, v in op.attrs.items()))
        known = seen.get(key)
        if known is not None and not set(op.outputs) & set(function.outputs):
            mapping.update(zip(op.outputs, known, strict=True))
            continue
        clone_ops([op], mapping, copy)
        seen.setdefault(key, [mapping[v] for v in op.outputs])
    return copy.returns(*(mapping[v] for v in function.outputs))


def decompose(function: Function, backend: str = "ane") -> Function:
    """Composite ops rewritten into simpler ones, in the forms known to work on the ANE; those that `backend` has
    natively are left. An op that decomposes into composites is taken apart further."""
    while any(_composite(op, backend) for op in function.ops):
        copy, mapping = _signature(function)
        for op in function.ops:
            rewrite = lookup(op.kind).decompose
            if not _composite(op, backend) or rewrite is None:
                clone_ops([op], mapping, copy)
                continue
            result = rewrite({k: _mapped(v, mapping) for k, v in op.inputs.items()}, op.attrs)
            if result.type != op.out.type:
                raise ShapeError(f"{op.kind} gives {op.out.type}, its decomposition {result.type}")
            if op.out in function.outputs and (result.op is None or result in mapping.values()):
                result = emit("identity", {"x": result})[0]
            mapping[op.out] = result
        function = _returns(copy, [mapping[v] for v in function.outputs], [v.name for v in function.outputs])
    return clone(function)[0]


def _composite(op: Op, backend: str) -> bool:
    row = lookup(op.kind)
    return row.category == "composite" and backend not in row.native


def specialise(function: Function, constants: dict[str, np.ndarray]) -> Function:
    """With these inputs, by name, as constants. Raises ShapeError for an array of another shape."""
    kept = [v for v in function.inputs if v.name not in constants]
    copy, mapping = _signature(function, kept)
    for v in function.inputs:
        if v.name in constants:
            if constants[v.name].shape != v.shape:
                raise ShapeError(f"input {v.name!r} is {v.shape}, its constant {constants[v.name].shape}")
            mapping[v] = copy.const(constants[v.name], v.dtype, v.name)
    clone_ops(function.ops, mapping, copy)
    return copy.returns(*(mapping[v] for v in function.outputs))


def constant_products(function: Function) -> Function:
    """matmul with a constant left operand (O, I) as a 1x1 conv, the form in which the Neural Engine takes constants
    (ane_facts 0.3); what leads from a constant to a matmul is folded first."""
    function = fold_constants(function, max_elements=1 << 62)
    copy, mapping = _signature(function)
    for op in function.ops:
        weight, x = op.inputs.get("x"), op.inputs.get("y")
        if op.kind != "matmul" or not isinstance(weight, Value) or not isinstance(x, Value) or not _is_product(op):
            clone_ops([op], mapping, copy)
            continue
        assert weight.const is not None
        matrix = weight.const.reshape(weight.shape[-2:])
        matrix = matrix.T if op.attrs["transpose_x"] else matrix
        lead, (inner, n) = x.shape[:-2], x.shape[-2:]
        batch = int(np.prod(lead))
        columns = ops.reshape(mapping[x], shape=(batch, inner, 1, n))
        filters = copy.const(matrix.reshape(*matrix.shape, 1, 1), weight.dtype, weight.name)
        mapping[op.out] = ops.reshape(ops.conv(columns, filters), shape=op.out.shape)
    return prune(_returns(copy, [mapping[v] for v in function.outputs], [v.name for v in function.outputs]))


def _is_product(op: Op) -> bool:
    """Whether a matmul is of one constant matrix with columns as they lie."""
    weight, x = op.inputs["x"], op.inputs["y"]
    assert isinstance(weight, Value) and isinstance(x, Value)
    single = weight.type.rank >= 2 and weight.type.size == weight.shape[-1] * weight.shape[-2]
    return weight.is_const and not x.is_const and single and x.type.rank >= 2 and not op.attrs["transpose_y"]


def rename(function: Function, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None) -> Function:
    """With canonical names: inputs and outputs as given (None: as they are), every other value `v012_<kind>`.

    Raises InputError for a name that MIL text cannot spell, a repeated one, or a wrong number of them."""
    given = dict(zip(function.inputs, _names("input", inputs, function.inputs), strict=True))
    for value, name in zip(function.outputs, _names("output", outputs, function.outputs), strict=True):
        if given.setdefault(value, name) != name:
            raise InputError(f"output {name!r} is the value {given[value]!r} already: return a copy (identity)")
    if len(set(given.values())) != len(given):
        raise InputError(f"inputs and outputs need different names, got {', '.join(given.values())}")
    copy = Function(function.name, function.opset)
    mapping: Mapping = {v: copy.input(given[v], v.shape, v.dtype) for v in function.inputs}
    interior = [v for op in function.ops for v in op.outputs if v not in given]
    width = max(3, len(str(len(interior))))
    used = set(given.values())
    for n, v in enumerate(interior):
        assert v.op is not None
        given[v] = f"v{n:0{width}d}_{v.op.kind}"
        while given[v] in used:
            given[v] += "_"
    for op in function.ops:
        operands = {k: _mapped(v, mapping) for k, v in op.inputs.items()}
        values = copy.append(op.kind, operands, op.attrs, [v.type for v in op.outputs], [given[v] for v in op.outputs])
        mapping.update(zip(op.outputs, values, strict=True))
    return copy.returns(*(mapping[v] for v in function.outputs))


def _names(what: str, names: Sequence[str] | None, values: Sequence[Value]) -> Sequence[str]:
    names = [v.name for v in values] if names is None else names
    if len(names) != len(values):
        raise InputError(f"the function has {len(values)} {what}s, {len(names)} names were given")
    for name in names:
        if not (name.isascii() and name.isidentifier()) or name in RESERVED:
            raise InputError(f"{what} name {name!r}: letters, digits, _, and no reserved word of MIL")
    return names


def pad_contractions(function: Function, multiple: int = 32) -> Function:
    """Every matmul whose contraction is no multiple of `multiple` gets zeros appended to both operands (a concat with a
    constant; constants are padded themselves). Results are equal exactly: the added products are zeros. Run it after
    `decompose`, which may bring matmuls in."""
    copy, mapping = _signature(function)
    padded: dict[tuple[Value, int], Value] = {}
    zeros: dict[TensorType, Value] = {}

    def pad(value: Value, axis: int, amount: int) -> Value:
        axis %= len(value.shape)
        known = padded.get((value, axis))
        if known is None:
            shape = (*value.shape[:axis], amount, *value.shape[axis + 1 :])
            type = TensorType(value.dtype, shape)
            name = f"{value.name}_padded"
            if value.const is not None:
                widened = np.concatenate([value.const, np.zeros(shape, DTYPES[value.dtype])], axis)
                known = copy.const(widened, value.dtype, name)
            else:
                if type not in zeros:
                    zeros[type] = copy.const(np.zeros(shape), value.dtype, "zeros")
                attrs = {"axis": axis, "interleave": False}
                known = emit("concat", {"values": (value, zeros[type])}, attrs, name)[0]
            padded[value, axis] = known
        return known

    for op in function.ops:
        if op.kind == "matmul":
            x, y = mapping[op.inputs["x"]], mapping[op.inputs["y"]]  # type: ignore[index]
            x_axis = -2 if op.attrs["transpose_x"] else -1
            y_axis = -1 if op.attrs["transpose_y"] or len(y.shape) == 1 else -2
            amount = -x.shape[x_axis] % multiple
            if amount:
                operands: dict[str, Operand] = {"x": pad(x, x_axis, amount), "y": pad(y, y_axis, amount)}
                mapping[op.out] = copy.append("matmul", operands, op.attrs, [op.out.type], op.out.name)[0]
                _label([mapping[op.out]], op)
                continue
        clone_ops([op], mapping, copy)
    names = [v.name for v in function.outputs]
    return prune(_returns(copy, [mapping[v] for v in function.outputs], names))


def _signature(function: Function, inputs: Sequence[Value] | None = None) -> tuple[Function, Mapping]:
    """An empty copy with the same inputs (or those given), and the mapping that begins with them."""
    copy = Function(function.name, function.opset)
    kept = function.inputs if inputs is None else inputs
    return copy, {v: copy.input(v.name, v.shape, v.dtype) for v in kept}


def _returns(function: Function, outputs: Sequence[Value], names: Sequence[str]) -> Function:
    """Set the outputs, which take back the names that they had, if an op that came in between has one of them."""
    holders = {v.name: v for op in function.ops for v in op.outputs}
    for value, name in zip(outputs, names, strict=True):
        holder = holders.get(name)
        if holder is not None and holder is not value:
            holder.name = value.name
            holders[holder.name] = holder
        value.name = name
        holders[name] = value
    return function.returns(*outputs)


def _mapped(operand: Operand, mapping: Mapping) -> Operand:
    return tuple(mapping.get(v, v) for v in operand) if isinstance(operand, tuple) else mapping.get(operand, operand)


def _label(outputs: Sequence[Value], op: Op) -> None:
    if op.label and outputs[0].op is not None:
        outputs[0].op.label = op.label


def _key(attr: Any) -> Any:
    """An attribute so that equal keys mean equal constants: bytes of arrays, bits of floats."""
    if isinstance(attr, np.ndarray):
        return attr.dtype.str, attr.shape, attr.tobytes()
    if isinstance(attr, tuple):
        return tuple(_key(v) for v in attr)
    return (type(attr).__name__, attr.hex() if isinstance(attr, float) else attr)
