"""Random Functions over the whole op table and their values by its definitions, for tests of text and passes."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from op_cases import CASES, Source

from anert.mil.graph import Function, Value, mil_dtype
from anert.mil.ops.table import emit, lookup

HINTS = st.sampled_from((
    "x", "y", "_", "cond", "block", "inf", "nan", "func_1", "A", "a", "c_0", "BLOBFILE", "ios18", "name", None,
))  # fmt: skip


class Grower:
    """Adds ops of drawn kinds to a function; operands are new inputs, new constants, or values that fit."""

    def __init__(self, draw: Any, opset: str, inputs: bool) -> None:
        self.draw, self.inputs = draw, inputs
        self.source = Source(draw, 5)
        self.function = Function("main", opset)
        self.values: list[Value] = []

    def value(self, array: np.ndarray) -> Value:
        dtype = mil_dtype(array.dtype)
        fitting = [v for v in self.values if v.dtype == dtype and v.shape == array.shape and array.dtype.kind == "f"]
        if fitting and self.draw(st.booleans()):
            chosen: Value = self.draw(st.sampled_from(fitting))
            return chosen
        hint = self.draw(HINTS) or "c"
        if self.inputs and self.draw(st.booleans()):
            v = self.function.input(f"in{len(self.function.inputs)}_{hint}", array.shape, dtype)
        else:
            v = self.function.const(array, dtype, hint)
        self.values.append(v)
        return v

    def op(self, kind: str) -> None:
        case = CASES[kind](self.source)
        row = lookup(kind)
        inputs = {
            k: tuple(self.value(x) for x in a) if isinstance(a, tuple) else self.value(a)
            for k, a in case.inputs.items()
        }
        attrs = {k: v for k, v in case.attrs.items() if row.arg(k).since <= self.function.opset}
        self.values += emit(kind, inputs, attrs, self.draw(HINTS), self.function)


@st.composite
def functions(draw: Any, opset: str | None = None, most: int = 5, inputs: bool = True) -> Function:
    """A Function of up to `most` drawn ops (without `inputs`: of constants only) that returns some of its values."""
    grower = Grower(draw, opset or draw(st.sampled_from(("ios15", "ios16", "ios17", "ios18"))), inputs)
    kinds = sorted(k for k in CASES if k != "const")
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most)):
        grower.op(kind)
    results = [v for v in grower.values if v.op is not None and not v.is_const]
    outputs = draw(st.lists(st.sampled_from(results), min_size=1, max_size=4, unique=True))
    return grower.function.returns(*outputs)


def feeds(function: Function, seed: int) -> dict[str, np.ndarray]:
    """Random arrays for a function's inputs; integers are 0, which every index may be."""
    rng = np.random.default_rng(seed)
    return {
        v.name: rng.normal(size=v.shape).astype(np.float16) if v.dtype == "fp16" else np.zeros(v.shape, v.dtype)
        for v in function.inputs
    }


def evaluate(function: Function, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs in float64, op by op, nothing rounded."""
    known = {v: widen(inputs[v.name]) for v in function.inputs}
    for op in function.ops:
        given = {k: tuple(known[x] for x in v) if isinstance(v, tuple) else known[v] for k, v in op.inputs.items()}
        known.update(zip(op.outputs, lookup(op.kind).evaluate(given, op.attrs), strict=True))
    return [known[v] for v in function.outputs]


def widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype.kind == "f" else array
