"""Passes keep what a Function computes: random graphs before and after, by the op table's NumPy definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mil_graphs import evaluate, feeds, functions

from anert.errors import InputError, ShapeError
from anert.mil import ops
from anert.mil.graph import Function, Value
from anert.mil.ops.table import TABLE
from anert.mil.passes import (
    RISKY_NAMES,
    clone,
    clone_ops,
    common_subexpressions,
    decompose,
    fold_constants,
    pad_contractions,
    prune,
    rename,
)
from anert.mil.text import parse, print_module

EXACT: list[Callable[[Function], Function]] = [
    prune,
    common_subexpressions,
    fold_constants,
    lambda f: clone(f)[0],
    lambda f: prune(f, inputs=True),
    lambda f: prune(common_subexpressions(fold_constants(f))),
    lambda f: pad_contractions(f, 4),
]


def examples(n: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=n, deadline=None, suppress_health_check=slow)


def signature(f: Function) -> list[tuple[str, object]]:
    return [(v.name, v.type) for v in f.outputs]


def kinds(f: Function) -> list[str]:
    return [op.kind for op in f.ops if op.kind != "const"]


class TestMeaning:
    @examples(200)
    @given(functions(most=6), st.sampled_from(EXACT), st.integers(0, 99))
    def test_exact_passes(self, f: Function, rewrite: Callable[[Function], Function], seed: int) -> None:
        before = f.structure()
        g = rewrite(f)
        assert f.structure() == before and g is not f
        assert signature(g) == signature(f) and all(v.function is g for op in g.ops for v in op.operands())
        inputs = feeds(f, seed)
        for old, new in zip(evaluate(f, inputs), evaluate(g, inputs), strict=True):
            np.testing.assert_array_equal(new, old)
        assert parse(print_module(g)).main == g

    @examples(60)
    @given(functions(most=6, inputs=False))
    def test_folding_of_constant_graphs(self, f: Function) -> None:
        g = fold_constants(f, exact=False)
        assert signature(g) == signature(f)
        assert all(set(op.outputs) & set(g.outputs) for op in g.ops if op.kind != "const")

    @examples(150)
    @given(functions(most=5), st.integers(0, 99))
    def test_decompose(self, f: Function, seed: int) -> None:
        g = decompose(f)
        assert signature(g) == signature(f)
        assert not [op for op in g.ops if TABLE[op.kind].category == "composite" and "ane" not in TABLE[op.kind].native]
        inputs = feeds(f, seed)
        for old, new in zip(evaluate(f, inputs), evaluate(g, inputs), strict=True):
            assume(np.isfinite(old).all() and old.dtype.kind == "f" and np.abs(old).max(initial=0) < 1e3)
            np.testing.assert_allclose(new, old, rtol=2e-3, atol=2e-3)  # constants such as -0.5 and sqrt(2) are fp16

    @examples(80)
    @given(functions(most=5))
    def test_rename(self, f: Function) -> None:
        assume(not set(f.inputs) & set(f.outputs))
        inputs = [f"i{n:02}_a" for n in range(len(f.inputs))]
        outputs = [f"o{n:02}_a" for n in range(len(f.outputs))]
        g = rename(f, inputs, outputs)
        assert [v.name for v in g.inputs] == inputs and [v.name for v in g.outputs] == outputs
        names = [v.name for op in g.ops for v in op.outputs]
        assert len(set(names + inputs)) == len(names) + len(inputs) and not RISKY_NAMES & set(names)
        back = rename(g, [v.name for v in f.inputs], [v.name for v in f.outputs])
        assert rename(back, inputs, outputs) == g
        for old, new in zip(evaluate(f, feeds(f, 1)), evaluate(g, named(feeds(f, 1), f, g)), strict=True):
            np.testing.assert_array_equal(new, old)


def named(inputs: dict[str, np.ndarray], f: Function, g: Function) -> dict[str, np.ndarray]:
    return {new.name: inputs[old.name] for old, new in zip(f.inputs, g.inputs, strict=True)}


class TestPrune:
    def test_dead_ops_and_inputs(self) -> None:
        f = Function()
        a, b = f.input("a", (2,)), f.input("b", (2,))
        ops.exp(ops.add(a, b))
        parts = ops.emit("split", {"x": a}, {"num_splits": 2, "axis": 0})
        f.returns(parts[1])
        assert kinds(prune(f)) == ["split"] and [v.name for v in prune(f).inputs] == ["a", "b"]
        assert [v.name for v in prune(f, inputs=True).inputs] == ["a"]
        assert [v.name for v in f.inputs] == ["a", "b"] and len(f.ops) > 1

    def test_an_input_returned_as_it_is(self) -> None:
        f = Function()
        a = f.input("a", (2,))
        f.returns(a, a)
        assert prune(f, inputs=True) == f and common_subexpressions(f) == f and decompose(f) == f


class TestFold:
    def test_views_fold_and_rounding_arithmetic_does_not(self) -> None:
        f = Function()
        a = f.input("a", (3, 2))
        table = f.const(np.arange(6.0).reshape(2, 3))
        third = ops.mul(f.const(np.ones((3, 2))), f.const(1 / 3, "fp16"))
        f.returns(ops.add(ops.add(ops.transpose(table, (1, 0)), a), ops.mul(third, third)))
        assert kinds(fold_constants(f)) == ["add", "mul", "add"]
        assert kinds(fold_constants(f, exact=False)) == ["add", "add"]

    def test_the_limit(self) -> None:
        f = Function()
        f.returns(ops.add(f.input("a", (4, 4)), ops.transpose(f.const(np.ones((4, 4))), (1, 0))))
        assert kinds(fold_constants(f, max_elements=15)) == ["transpose", "add"]
        assert kinds(fold_constants(f, max_elements=16)) == ["add"]

    def test_an_error_of_the_run_is_left_to_the_run(self) -> None:
        f = Function()
        row = ops.gather(f.const(np.ones((2, 3))), f.const(np.array([7], np.int32)), axis=0)
        f.returns(ops.add(row, f.input("a", (1, 3))))
        assert kinds(fold_constants(f)) == ["gather", "add"]


class TestCommonSubexpressions:
    def test_equal_ops_and_constants_merge(self) -> None:
        f = Function()
        a = f.input("a", (2, 3))
        first, second = ops.exp(ops.mul(a, 2.0)), ops.exp(ops.mul(a, 2.0))
        f.returns(ops.add(first, second, name="sum"))
        g = common_subexpressions(f)
        assert kinds(g) == ["mul", "exp", "add"] and len(g.ops) == 4

    def test_what_differs_stays_apart(self) -> None:
        """-0.0 is not 0.0, an axis is not another, an output keeps its name."""
        f = Function()
        a = f.input("a", (2, 2))
        zero, minus = f.const(0.0), f.const(-0.0)
        f.returns(
            ops.real_div(a, zero), ops.real_div(a, minus), ops.softmax(a, 0), ops.softmax(a, 1), ops.softmax(a, 1)
        )
        g = common_subexpressions(f)
        assert g == f


class TestPadContractions:
    @examples(60)
    @given(
        st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 5)), st.booleans(), st.booleans(),
        st.sampled_from(("both", "x", "y", "neither")), st.sampled_from(((), (3,))), st.sampled_from((4, 32)),
    )  # fmt: skip
    def test_every_orientation(
        self, mkn: tuple[int, int, int], tx: bool, ty: bool, inputs: str, batch: tuple[int, ...], multiple: int
    ) -> None:
        m, k, n = mkn
        rng = np.random.default_rng(k)
        f = Function()
        shapes = {"x": (*batch, *((k, m) if tx else (m, k))), "y": (n, k) if ty else (k, n)}

        def operand(name: str) -> Value:
            if inputs in (name, "both"):
                return f.input(name, shapes[name])
            return f.const(rng.normal(size=shapes[name]))

        f.returns(ops.matmul(operand("x"), operand("y"), tx, ty, name="out"))
        g = pad_contractions(f, multiple)
        product = next(op for op in g.ops if op.kind == "matmul")
        assert product.inputs["x"].shape[-2 if tx else -1] % multiple == 0  # type: ignore[union-attr]
        assert signature(f) == signature(g)
        np.testing.assert_array_equal(evaluate(g, feeds(f, 0))[0], evaluate(f, feeds(f, 0))[0])

    def test_zeros_and_padded_operands_are_shared(self) -> None:
        f = Function()
        a, b = f.input("a", (48, 48)), f.input("b", (48, 48))
        f.returns(ops.add(ops.matmul(a, b), ops.add(ops.matmul(a, b), ops.matmul(a, a, False, True))))
        g = pad_contractions(f)
        assert kinds(g).count("concat") == 2 and len([op for op in g.ops if op.kind == "const"]) == 2
        h = Function()
        h.returns(ops.matmul(h.input("a", (64, 64)), h.input("b", (64, 64))))
        assert pad_contractions(h) == h


class TestDecompose:
    def test_names_of_outputs_survive_clashes(self) -> None:
        """The decomposition brings names that the function uses itself."""
        f = Function()
        a = f.input("a", (4, 8))
        b = ops.softmax(a, -1, name="r")
        f.returns(ops.add(b, 1.0, name="exp"), ops.silu(a, name="mul"), ops.relu(a, name="sigmoid"))
        g = decompose(f)
        assert [v.name for v in g.outputs] == ["exp", "mul", "sigmoid"]
        assert len({v.name for op in g.ops for v in op.outputs}) == sum(len(op.outputs) for op in g.ops)
        assert parse(print_module(g)).main == g


class TestRename:
    def test_canonical_names(self) -> None:
        f = Function()
        x, y = f.input("x", (2, 2)), f.input("y", (2, 2))
        f.returns(ops.relu(ops.add(ops.add(x, y, name="mul"), 1.0, name="var"), name="c"))
        g = rename(f, ["i00_x", "i01_y"], ["o00_y"])
        assert [v.name for op in g.ops for v in op.outputs] == ["v000_add", "v001_const", "v002_add", "o00_y"]

    @pytest.mark.parametrize(
        ("inputs", "outputs", "message"),
        [
            (["a"], ["o"], "2 inputs, 1 names"),
            (["a", "a"], ["o"], "different names"),
            (["a", "o"], ["o"], "different names"),
            (["a", "tensor"], ["o"], "input name 'tensor'"),
            (["a", "b"], ["o.o"], "output name 'o.o'"),
        ],
    )
    def test_names_that_cannot_be(self, inputs: list[str], outputs: list[str], message: str) -> None:
        f = Function()
        f.returns(ops.add(f.input("x", (2,)), f.input("y", (2,))))
        with pytest.raises(InputError, match=message):
            rename(f, inputs, outputs)

    def test_one_value_with_two_names(self) -> None:
        f = Function()
        r = ops.relu(f.input("x", (2,)))
        with pytest.raises(InputError, match="return a copy"):
            rename(f.returns(r, r), ["i"], ["o0", "o1"])


class TestClone:
    def test_into_another_function(self) -> None:
        f = Function()
        a = f.input("a", (2, 3))
        r = ops.softmax(ops.add(a, 1.0), -1)
        f.returns(r)
        g = Function()
        b = g.input("b", (5, 3))
        mapping = {a: b}
        clone_ops(f.ops, mapping, g)
        assert mapping[r].shape == (5, 3) and mapping[r].function is g

    def test_operands_from_nowhere(self) -> None:
        f = Function()
        a = f.input("a", (2, 3))
        ops.relu(a)
        with pytest.raises(ShapeError, match="belongs to another function"):
            clone_ops(f.ops, {}, Function())
