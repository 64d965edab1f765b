"""Every gradient rule against central differences in float64 and against PyTorch's, through the reference backend."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from op_cases import Case, feed, op_cases, trace

from anert.backend.reference import evaluate
from anert.errors import UnsupportedError
from anert.mil.graph import Function, Value
from anert.mil.ops import TABLE

WITH_GRADIENT = sorted(kind for kind, row in TABLE.items() if row.grad is not None)


def backward(f: Function) -> tuple[dict[str, Value], list[Value]]:
    """Append the gradient of `f`'s last op: the gradient of each input, and the cotangents, new inputs `dout<i>`."""
    op = f.ops[-1]
    outs = list(f.outputs)
    douts = [f.input(f"dout{i}", v.shape, v.dtype) for i, v in enumerate(outs)]
    rule = TABLE[op.kind].grad
    assert rule is not None
    grads: dict[str, Value] = {}
    for name, g in rule(op, tuple(douts)).items():
        operand = op.inputs[name]
        pairs = zip(operand, g, strict=True) if isinstance(operand, tuple) else [(operand, g)]
        for v, dv in pairs:
            if dv is not None:
                assert (dv.shape, dv.dtype) == (v.shape, v.dtype)
                grads[v.name] = dv
    return grads, douts


def jittered(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The inputs in float64, moved off fp16's grid so that ties and kinks are far from the step."""
    moved = {}
    for name, a in feed(case).items():
        moved[name] = a if a.dtype != np.float16 else a.astype(np.float64) + rng.uniform(-1e-2, 1e-2, a.shape)
    return moved


def check(kind: str, case: Case, seed: int, step: float = 1e-6) -> None:
    rng = np.random.default_rng(seed)
    f = trace(kind, case, "fp32")
    plain = trace(kind, case, "fp32")
    if not f.outputs[0].dtype.startswith("fp"):
        return
    inputs = jittered(case, rng)
    try:
        grads, douts = backward(f)
    except UnsupportedError:
        assert kind.startswith("scatter")
        return
    cotangents = {d.name: rng.normal(size=d.shape) for d in douts}
    f.returns(*grads.values())
    found = evaluate(f, inputs | cotangents, "float64") if grads else {}

    def loss(at: dict[str, np.ndarray]) -> float:
        outs = evaluate(plain, at, "float64")
        return sum(float(np.sum(outs[v.name] * cotangents[f"dout{i}"])) for i, v in enumerate(plain.outputs))

    for v in f.inputs:
        a = inputs.get(v.name)
        if a is None or a.dtype != np.float64:
            continue
        assert v.name in grads, f"{kind}: no gradient for {v.name}"
        direction = rng.normal(size=a.shape)
        difference, closer = (
            (loss(inputs | {v.name: a + h * direction}) - loss(inputs | {v.name: a - h * direction})) / (2 * h)
            for h in (step, step / 4)
        )
        assume(
            abs(difference - closer) < 1e-4 * (1 + abs(closer))
        )  # else a kink or a jump of the op is within the step
        product = float(np.sum(found[grads[v.name].name] * direction))
        scale = float(np.sum(np.abs(found[grads[v.name].name] * direction))) + 1.0
        assert abs(product - difference) < 1e-5 * scale, (kind, v.name, product, difference)


@pytest.mark.parametrize("kind", WITH_GRADIENT)
def test_gradient_is_the_central_difference(kind: str) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(op_cases(kind, largest=5), st.integers(0, 2**32 - 1))
    def run(case: Case, seed: int) -> None:
        check(kind, case, seed)

    run()


@pytest.mark.parametrize("kind", WITH_GRADIENT)
def test_gradient_is_pytorch_s(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from torch_ops import call

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(op_cases(kind, largest=8), st.integers(0, 2**32 - 1))
    def run(case: Case, seed: int) -> None:
        rng = np.random.default_rng(seed)
        f = trace(kind, case, "fp32")
        if not f.outputs[0].dtype.startswith("fp"):
            return
        inputs = jittered(case, rng)
        leaves = {k: torch.from_numpy(np.array(a)).requires_grad_(a.dtype == np.float64) for k, a in inputs.items()}
        named = iter(leaves.values())
        operands = {
            k: tuple(next(named) for _ in v) if isinstance(v, tuple) else next(named) for k, v in case.inputs.items()
        }
        attrs = {k: f.ops[-1].attrs[k] if isinstance(v, float) else v for k, v in case.attrs.items()}
        outs = call(kind, operands, attrs)
        try:
            grads, douts = backward(f)
        except UnsupportedError:
            return
        cotangents = {d.name: rng.normal(size=d.shape) for d in douts}
        if not grads:  # integers that were cast
            return
        f.returns(*grads.values())
        found = evaluate(f, inputs | cotangents, "float64")
        wanted = [leaves[name] for name in grads]
        differentiable = [(o, d) for o, d in zip(outs, douts, strict=True) if o.requires_grad]
        expected = torch.autograd.grad(
            [o for o, _ in differentiable], wanted, [torch.from_numpy(cotangents[d.name]) for _, d in differentiable]
        )
        for (name, g), e in zip(grads.items(), expected, strict=True):
            e = e.numpy()
            np.testing.assert_allclose(found[g.name], e, rtol=2e-6, atol=2e-6 * (1 + np.abs(e).max()), err_msg=name)

    run()


def test_ties_of_reduce_max_share_the_cotangent() -> None:
    f = trace("reduce_max", Case({"x": np.array([1.0, 3.0, 3.0], np.float16)}, {}), "fp32")
    grads, _ = backward(f)
    f.returns(grads["i00_x"])
    assert evaluate(f, {"i00_x": [1.0, 3.0, 3.0], "dout0": 2.0})[f.outputs[0].name].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "expected"), [("maximum", [2.0, 0.0]), ("minimum", [2.0, 0.0])])
def test_ties_of_two_operands_go_to_the_first(kind: str, expected: list[float]) -> None:
    f = trace(kind, Case({"x": np.float16([1.0]), "y": np.float16([1.0])}, {}), "fp32")
    grads, _ = backward(f)
    f.returns(*grads.values())
    found = evaluate(f, {"i00_x": [1.0], "i01_y": [1.0], "dout0": [2.0]})
    assert [float(a[0]) for a in found.values()] == expected


def test_constant_operands_get_no_gradient() -> None:
    for kind, constant in (("mul", "y"), ("matmul", "x"), ("conv", "weight"), ("select", "a"), ("layer_norm", "gamma")):
        arrays = {
            "mul": {"x": np.ones(3), "y": np.ones(3)},
            "matmul": {"x": np.ones((2, 3)), "y": np.ones((3, 2))},
            "conv": {"x": np.ones((1, 2, 4)), "weight": np.ones((2, 2, 1))},
            "select": {"cond": np.ones(3, np.bool_), "a": np.ones(3), "b": np.ones(3)},
            "layer_norm": {"x": np.ones((2, 3)), "gamma": np.ones((2, 3))},
        }[kind]
        inputs = {k: a if a.dtype == np.bool_ else a.astype(np.float16) for k, a in arrays.items()}
        f = trace(kind, Case(inputs, {}), constants=(constant,))
        rule = TABLE[kind].grad
        assert rule is not None
        grads = rule(f.ops[-1], (f.input("dout", f.outputs[0].shape),))
        assert grads.get(constant) is None and sum(g is not None for g in grads.values()) >= 1, kind
