"""The reference backend: ports, precisions, overflow counts, the first non-finite value, programs over surfaces."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from op_cases import Case, feed, op_cases, trace

from anert.backend.reference import CONTRACTION_LIMIT, NonFinite, ReferenceBackend, evaluate, first_nonfinite
from anert.errors import InputError, ShapeError, StateError
from anert.mil import ops
from anert.mil.graph import Function, Op
from anert.mil.text import print_module


def scaled_sum() -> Function:
    """out = sum(x * x) / 1000, whose middle is beyond fp16."""
    f = Function()
    x = f.input("x", (4, 100))
    return f.returns(ops.mul(ops.reduce_sum(x * x, 1, keep_dims=True), 0.0009765625, name="out"))


def test_only_ports_round_in_exact() -> None:
    f = Function()
    x = f.input("x", (1,))
    f.returns(ops.sub(x + 4096.0, 4096.0, name="out"))
    third = np.array([1 / 3])
    exact = evaluate(f, {"x": third})["out"]
    assert exact.dtype == np.float16 and exact == np.float16(1 / 3)
    assert evaluate(f, {"x": third}, "fp16")["out"] == 0.0
    loose = evaluate(f, {"x": third}, "float64")["out"]
    assert loose.dtype == np.float64 and loose == pytest.approx(1 / 3, abs=1e-12)


def test_output_ports_overflow_to_inf() -> None:
    f = Function()
    f.returns(ops.mul(f.input("x", (2,)), 2.0, name="out"))
    assert evaluate(f, {"x": [40000.0, -40000.0]})["out"].tolist() == [np.inf, -np.inf]


def test_fp16_counts_overflows_by_value() -> None:
    f, x = scaled_sum(), np.full((4, 100), 30.0)
    x[0] = 1.0
    counts: dict[str, int] = {}
    assert np.isfinite(evaluate(f, {"x": x}, overflows=counts)["out"]).all() and not counts
    out = evaluate(f, {"x": x}, "fp16", overflows=counts)["out"]
    assert np.isinf(out[1:]).all() and np.isfinite(out[0]) and counts == {"reduce_sum": 3}


def test_fp16_holds_contractions_to_the_engine_s_limit() -> None:
    f = Function()
    x, w = f.input("x", (1, 2)), f.input("w", (2, 1))
    f.returns(ops.matmul(x, w, name="out"))
    fine, past = {"x": [[1.0, 0.0]], "w": [[CONTRACTION_LIMIT], [0.0]]}, {"x": [[1.0, 1.0]], "w": [[32000.0], [2000.0]]}
    counts: dict[str, int] = {}
    assert evaluate(f, fine, "fp16", overflows=counts)["out"] == CONTRACTION_LIMIT and not counts
    assert evaluate(f, past, "fp16", overflows=counts)["out"] == np.inf and counts == {"out": 1}
    assert evaluate(f, past)["out"] == 34000.0


@settings(max_examples=30, deadline=None)
@given(op_cases("matmul", largest=8))
def test_one_op_rounds_once_in_either_precision(case: Case) -> None:
    f = trace("matmul", case)
    exact, half = evaluate(f, feed(case)), evaluate(f, feed(case), "fp16")
    for a, b in zip(exact.values(), half.values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_watch_sees_every_op_in_order() -> None:
    seen: list[tuple[int, str]] = []

    def watch(i: int, op: Op, results: tuple[np.ndarray, ...]) -> None:
        assert results[0].shape == op.out.shape
        seen.append((i, op.kind))

    f = scaled_sum()
    evaluate(f, {"x": np.ones((4, 100))}, watch=watch)
    assert seen == [(i, op.kind) for i, op in enumerate(f.ops)]


def test_an_input_may_be_an_output() -> None:
    f = Function()
    x = f.input("x", (2,))
    f.returns(x, x + 1.0)
    assert [a.tolist() for a in evaluate(f, {"x": [1.0, 2.0]}).values()] == [[1.0, 2.0], [2.0, 3.0]]


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({}, ShapeError, "takes inputs x, got none"),
        ({"x": np.ones(2), "y": np.ones(2)}, ShapeError, "got x, y"),
        ({"x": np.ones(3)}, ShapeError, "takes shape"),
        ({"x": np.array(["a", "b"])}, ShapeError, "takes fp16"),
    ],
)
def test_bad_inputs_are_named(inputs: dict[str, Any], error: type[Exception], words: str) -> None:
    f = Function()
    f.returns(f.input("x", (2,)) + 1.0)
    with pytest.raises(error, match=words):
        evaluate(f, inputs)


def test_integer_inputs_must_be_integers() -> None:
    f = Function()
    f.returns(f.input("i", (2,), "int32") + 1)
    assert evaluate(f, {"i": [1.0, 2.0]})[f.outputs[0].name].tolist() == [2, 3]
    for bad in ([0.5, 1.0], [True, False], [1 << 40, 0]):
        with pytest.raises(ShapeError, match="cannot hold"):
            evaluate(f, {"i": np.array(bad)})


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="exact, fp16, float64"):
        evaluate(scaled_sum(), {"x": np.ones((4, 100))}, "fp8")
    with pytest.raises(InputError, match="exact or fp16"):
        ReferenceBackend(precision="float64")


# The first non-finite value


def test_nothing_is_found_where_all_is_finite() -> None:
    assert first_nonfinite(scaled_sum(), {"x": np.ones((4, 100))}) is None


def test_the_op_that_makes_a_nan_is_named() -> None:
    f = Function()
    x = f.input("x", (3,))
    y = ops.log(x, name="logarithm")
    f.returns(y * 2.0)
    found = first_nonfinite(f, {"x": [1.0, -1.0, -2.0]})
    assert found == NonFinite(0, "log", "logarithm", 2)


def test_the_first_of_two_is_named() -> None:
    f = Function()
    x = f.input("x", (2,))
    f.returns(ops.sqrt(x, name="root") + ops.log(x, name="logarithm"))
    found = first_nonfinite(f, {"x": [1.0, -1.0]})
    assert found is not None and found.name == "root"


def test_an_infinite_mask_is_no_fault_but_its_nan_is() -> None:
    f = Function()
    x = f.input("x", (2, 2))
    scores = x + f.const(np.array([[0.0, -np.inf], [0.0, 0.0]]))
    f.returns(ops.softmax(scores, name="p"))
    assert first_nonfinite(f, {"x": np.ones((2, 2))}) is None
    g = Function()
    x = g.input("x", (1, 2))
    g.returns(ops.softmax(x + g.const(np.full((1, 2), -np.inf)), name="p"))
    found = first_nonfinite(g, {"x": np.ones((1, 2))})
    assert found is not None and (found.kind, found.name, found.elements) == ("softmax", "p", 2)


def test_an_output_port_that_overflows_is_named() -> None:
    f = scaled_sum()
    found = first_nonfinite(f, {"x": np.full((4, 100), 1000.0)})
    assert found is not None and (found.kind, found.name, found.elements) == ("mul", "out", 4)


def test_fp16_names_the_interior_that_overflows() -> None:
    found = first_nonfinite(scaled_sum(), {"x": np.full((4, 100), 30.0)}, "fp16")
    assert found is not None and (found.kind, found.elements) == ("reduce_sum", 4)


def test_a_non_finite_input_is_named_before_any_op() -> None:
    x = np.ones((4, 100))
    x[1, 2] = np.nan
    assert first_nonfinite(scaled_sum(), {"x": x}) == NonFinite(-1, "input", "x", 1)


# The backend


@pytest.fixture(scope="module")
def backend() -> ReferenceBackend:
    pytest.importorskip("anert._native")
    return ReferenceBackend()


def test_programs_run_on_surfaces(backend: ReferenceBackend) -> None:
    f = Function()
    x, w = f.input("i00_x", (8, 4)), f.input("i01_w", (8, 8))
    f.returns(ops.relu(w @ x, name="o00_y"))
    program = backend.compile(print_module(f))
    assert backend.compile(print_module(f)) is program and backend.compiles == 1
    assert program.stats.flops_written == 2 * 8 * 8 * 4 and program.stats.bytes_out == 64
    surfaces = {p.name: backend.surface(p.nbytes) for p in (*program.inputs, *program.outputs)}
    binding = program.bind(surfaces)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 4)).astype(np.float16), rng.normal(size=(8, 8)).astype(np.float16)
    with surfaces["i00_x"].lock() as s:
        s.array(np.float16, (8, 4))[:] = a
    with surfaces["i01_w"].lock() as s:
        s.array(np.float16, (8, 8))[:] = b
    binding.run()
    expected = np.maximum(b.astype(np.float64) @ a.astype(np.float64), 0.0).astype(np.float16)
    np.testing.assert_array_equal(surfaces["o00_y"].array(np.float16, (8, 4)), expected)


def test_fp16_programs_count_overflows() -> None:
    pytest.importorskip("anert._native")
    backend = ReferenceBackend(precision="fp16")
    program = backend.compile(print_module(scaled_sum()))
    surfaces = {p.name: backend.surface(p.nbytes) for p in (*program.inputs, *program.outputs)}
    with surfaces["x"].lock() as s:
        s.array(np.float16, (4, 100))[:] = 30.0
    binding = program.bind(surfaces)
    binding.run()
    binding.run()
    assert program.overflows == {"reduce_sum": 8}  # type: ignore[attr-defined]


def test_a_held_surface_stops_the_run(backend: ReferenceBackend) -> None:
    program = backend.compile(print_module(scaled_sum()))
    surfaces = {p.name: backend.surface(p.nbytes) for p in (*program.inputs, *program.outputs)}
    binding = program.bind(surfaces)
    with surfaces["out"].lock(), pytest.raises(StateError):
        binding.run()
    binding.run()


def test_a_missing_or_short_surface_is_refused(backend: ReferenceBackend) -> None:
    program = backend.compile(print_module(scaled_sum()))
    good = {p.name: backend.surface(p.nbytes) for p in (*program.inputs, *program.outputs)}
    with pytest.raises(ShapeError, match="no surface"):
        program.bind({"x": good["x"]})
    with pytest.raises(ShapeError, match="needs 800 bytes"):
        program.bind(good | {"x": backend.surface(64)})
