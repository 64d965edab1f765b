"""The derived backward of whole blocks against PyTorch autograd in float64, and what is saved or recomputed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anert import nn
from anert.backend.reference import evaluate
from anert.errors import ShapeError, UnsupportedError
from anert.mil import ops
from anert.mil.grad import Gradient, differentiate
from anert.mil.graph import Function
from anert.mil.passes import clone


def cfg(**over):
    return SimpleNamespace(**{"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 4, "norm_eps": 1e-5, **over})


def attention(c, x, w, pos):
    h = nn.rmsnorm(x, w["attn_norm"], c.norm_eps)
    q, k, v = (nn.heads(w[m] @ h, n) for m, n in (("wq", c.n_heads), ("wk", c.n_kv_heads), ("wv", c.n_kv_heads)))
    return x + w["wo"] @ nn.merge(nn.causal_attention(nn.rope(q, pos), nn.rope(k, pos), v, pos))


def ffn(c, x, w, pos):
    h = nn.rmsnorm(x, w["ffn_norm"], c.norm_eps)
    return x + w["w2"] @ (nn.silu(w["w1"] @ h) * (w["w3"] @ h))


def shapes(c, block):
    kv = c.dim // c.n_heads * c.n_kv_heads
    if block is attention:
        return {
            "attn_norm": (c.dim, 1),
            "wq": (c.dim, c.dim),
            "wk": (kv, c.dim),
            "wv": (kv, c.dim),
            "wo": (c.dim, c.dim),
        }
    return {
        "ffn_norm": (c.dim, 1),
        "w1": (c.hidden_dim, c.dim),
        "w2": (c.dim, c.hidden_dim),
        "w3": (c.hidden_dim, c.dim),
    }


def trace(block, c, seq_len, batch):
    fn = Function(block.__name__)
    x = fn.input("x", (c.dim, seq_len * batch))
    w = {n: fn.input(n, s) for n, s in shapes(c, block).items()}
    y = block(c, x, w, nn.Positions(seq_len, batch))
    fn.claim("y", y)
    return fn.returns(y)


def random_inputs(fn, seed=0):
    rng = np.random.default_rng(seed)
    scale = {"x": 1.0, "attn_norm": 1.0, "ffn_norm": 1.0}
    return {v.name: (rng.standard_normal(v.shape) * scale.get(v.name, 0.2)).astype(np.float16) for v in fn.inputs}


def run(gradient: Gradient, inputs, dout):
    """Parameter gradients, dx and y by the reference, recipes in float64."""
    have = {k: np.asarray(v, np.float64) for k, v in inputs.items()}
    have |= evaluate(gradient.forward, {v.name: have[v.name] for v in gradient.forward.inputs}, precision="float64")
    have["cot_y"] = dout
    have |= evaluate(gradient.backward, {v.name: have[v.name] for v in gradient.backward.inputs}, precision="float64")
    grads: dict[str, np.ndarray] = {}
    for r in gradient.recipes:
        cot, tap = have[r.cot], have[r.tap] if r.tap else None
        if r.kind == "gemm":
            dw = tap @ cot.T if r.swap else cot @ tap.T
        elif r.kind == "rowsum":
            dw = (cot if tap is None else cot * tap).sum(1, keepdims=True)
        else:
            dw = cot
        grads[r.param] = grads.get(r.param, 0.0) + dw
    return have["y"], have["cot_x"], grads


def twice_fp16(a):
    """What two fp16 constants hold of it."""
    high = a.astype(np.float16).astype(np.float64)
    return high + (a - high).astype(np.float16)


def torch_block(block, c, inputs, dout, seq_len, batch):
    """The same in PyTorch float64, written in the textbook's layout: (B, T, C), rotation by complex numbers."""
    torch = pytest.importorskip("torch")
    t = {k: torch.tensor(np.asarray(v, np.float64), requires_grad=True) for k, v in inputs.items()}
    x = t["x"].T.reshape(batch, seq_len, c.dim)

    def norm(z, gain):
        return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + float(np.float16(c.norm_eps))) * gain[:, 0]

    if block is ffn:
        h = norm(x, t["ffn_norm"])
        y = x + (torch.nn.functional.silu(h @ t["w1"].T) * (h @ t["w3"].T)) @ t["w2"].T
    else:
        h, hd = norm(x, t["attn_norm"]), c.dim // c.n_heads
        q, k, v = (
            (h @ t[n].T).reshape(batch, seq_len, m, hd).transpose(1, 2)
            for n, m in (("wq", c.n_heads), ("wk", c.n_kv_heads), ("wv", c.n_kv_heads))
        )
        angle = np.outer(np.arange(seq_len), 10000.0 ** (-np.arange(0, hd, 2) / hd))
        turn = [torch.tensor(twice_fp16(f(angle))) for f in (np.cos, np.sin)]

        def rotate(z):
            a, b = z[..., 0::2], z[..., 1::2]
            return torch.stack((a * turn[0] - b * turn[1], a * turn[1] + b * turn[0]), -1).flatten(-2)

        k, v = (z.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for z in (rotate(k), v))
        scores = rotate(q) @ k.transpose(-1, -2) * float(np.float16(hd**-0.5))
        scores = scores.masked_fill(torch.triu(torch.ones(seq_len, seq_len, dtype=torch.bool), 1), -torch.inf)
        o = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq_len, c.dim)
        y = x + o @ t["wo"].T
    y = y.reshape(batch * seq_len, c.dim).T
    y.backward(torch.tensor(dout))
    return y.detach().numpy(), {k: z.grad.numpy() for k, z in t.items()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("block", [attention, ffn], ids=lambda b: b.__name__)
def test_block_gradients_equal_autograd(block, kv, batch):
    c, t = cfg(n_kv_heads=kv), 6
    fn = trace(block, c, t, batch)
    params = [v.name for v in fn.inputs if v.name != "x"]
    gradient = differentiate(fn, ["x"], params)
    inputs = random_inputs(fn)
    dout = np.random.default_rng(1).standard_normal((c.dim, t * batch))
    y, dx, grads = run(gradient, inputs, dout)
    want_y, want = torch_block(block, c, inputs, dout, t, batch)
    np.testing.assert_allclose(y, want_y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dx, want["x"], rtol=1e-9, atol=1e-9)
    assert set(grads) == set(params)
    for name in params:
        np.testing.assert_allclose(grads[name], want[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_matmul_results_are_saved_and_scores_are_not():
    gradient = differentiate(trace(attention, cfg(), 64, 1), ["x"], shapes(cfg(), attention))
    saved = {v.name: v.shape for v in gradient.forward.outputs[1:]}
    assert set(saved.values()) == {(32, 64)}, "q, k, v and the attention's output, all (dim, T)"
    assert len(saved) == 4
    assert any(op.kind == "softmax" for op in gradient.backward.ops), "probabilities are computed again"
    kinds = {(r.param, r.kind) for r in gradient.recipes}
    assert kinds == {("attn_norm", "rowsum"), ("wq", "gemm"), ("wk", "gemm"), ("wv", "gemm"), ("wo", "gemm")}


def test_parameter_used_twice_adds_up():
    fn = Function("tied")
    x, w = fn.input("x", (4, 5)), fn.input("w", (4, 4))
    y = w @ ops.tanh(w @ x)
    fn.claim("y", y)
    gradient = differentiate(fn.returns(y), ["x"], ["w"])
    inputs = random_inputs(fn)
    dout = np.random.default_rng(2).standard_normal((4, 5))
    _, dx, grads = run(gradient, inputs, dout)
    w64, x64 = (np.asarray(inputs[n], np.float64) for n in ("w", "x"))
    h = np.tanh(w64 @ x64)
    dh = (w64.T @ dout) * (1 - h * h)
    np.testing.assert_allclose(grads["w"], dout @ h.T + dh @ x64.T, rtol=1e-9)
    np.testing.assert_allclose(dx, w64.T @ dh, rtol=1e-9)


def test_transposed_bias_and_elementwise_parameters():
    fn = Function("odd")
    x, w, b, s = fn.input("x", (4, 6)), fn.input("w", (4, 3)), fn.input("b", (3, 1)), fn.input("s", (3, 6))
    y = (ops.matmul(w, x, transpose_x=True) + b) * s
    fn.claim("y", y)
    gradient = differentiate(fn.returns(y), ["x"], ["w", "b", "s"])
    assert {(r.param, r.kind, r.swap) for r in gradient.recipes} == {
        ("w", "gemm", True),
        ("b", "rowsum", False),
        ("s", "add", False),
    }
    inputs = random_inputs(fn)
    dout = np.random.default_rng(3).standard_normal((3, 6))
    _, dx, grads = run(gradient, inputs, dout)
    i = {k: np.asarray(v, np.float64) for k, v in inputs.items()}
    inner = i["w"].T @ i["x"] + i["b"]
    np.testing.assert_allclose(grads["s"], dout * inner, rtol=1e-9)
    np.testing.assert_allclose(grads["b"], (dout * i["s"]).sum(1, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(grads["w"], i["x"] @ (dout * i["s"]).T, rtol=1e-9)
    np.testing.assert_allclose(dx, i["w"] @ (dout * i["s"]), rtol=1e-9)


def test_no_path_and_no_rule_are_said():
    fn = Function("lost")
    x, w = fn.input("x", (4, 4)), fn.input("w", (4, 4))
    z = ops.tanh(w @ w)
    fn.claim("y", z)
    with pytest.raises(UnsupportedError, match="'x'"):
        differentiate(fn.returns(z), ["x"], ["w"])
    assert x.name == "x"


def norm(kind, channels, positions):
    """nn.rmsnorm or nn.layernorm as a Function of x, gain (and bias)."""
    fn = Function(kind)
    x, gain = fn.input("x", (channels, positions)), fn.input("gain", (channels, 1))
    y = nn.rmsnorm(x, gain) if kind == "rmsnorm" else nn.layernorm(x, gain, fn.input("bias", (channels, 1)))
    fn.claim("y", y)
    return fn.returns(y)


def norm_inputs(fn, rms, seed):
    """x of this root mean square, gain about 1, and dy of 1, in fp16."""
    rng = np.random.default_rng(seed)
    drawn = {v.name: rng.standard_normal(v.shape) for v in fn.inputs}
    drawn["x"] *= rms
    drawn["gain"] = 1 + 0.2 * drawn["gain"]
    return {n: a.astype(np.float16) for n, a in drawn.items()}, rng.standard_normal(fn.outputs[0].shape)


def torch_norm(kind, inputs, dy):
    """Gradients by name, by autograd in float64."""
    torch = pytest.importorskip("torch")
    t = {k: torch.tensor(np.asarray(v, np.float64), requires_grad=True) for k, v in inputs.items()}
    eps, x = float(np.float16(1e-5)), t["x"].T
    if kind == "rmsnorm":
        y = torch.nn.functional.rms_norm(x, x.shape[1:], t["gain"][:, 0], eps)
    else:
        y = torch.nn.functional.layer_norm(x, x.shape[1:], t["gain"][:, 0], t["bias"][:, 0], eps)
    y.T.backward(torch.tensor(np.asarray(dy, np.float64)))
    return {k: z.grad.numpy() for k, z in t.items()}


def derived(fn):
    return differentiate(fn, ["x"], [v.name for v in fn.inputs[1:]])


NORMS = pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
QUIETLY = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@NORMS
def test_the_rule_of_a_norm_equals_autograd_and_that_of_its_ops(kind):
    @settings(max_examples=40, **QUIETLY)
    @given(st.integers(1, 40), st.integers(1, 5), st.integers(-8, 8), st.integers(0, 1 << 20))
    def check(channels, positions, exponent, seed):
        fn = norm(kind, channels, positions)
        inputs, dy = norm_inputs(fn, 2.0**exponent, seed)
        want = torch_norm(kind, inputs, dy)
        unit = 1 / np.sqrt(np.square(inputs["x"].astype(np.float64)).mean(0).min() + 1e-5)
        for of in (fn, clone(fn)[0]):
            _, dx, grads = run(derived(of), inputs, dy)
            np.testing.assert_allclose(dx, want["x"], rtol=1e-9, atol=1e-8 * unit)
            for name, g in grads.items():
                np.testing.assert_allclose(g, want[name], rtol=1e-9, atol=1e-8, err_msg=name)

    check()


def half_backward(gradient, inputs, dy):
    """cot_x where every op rounds to fp16, and the elements of every op that became infinite."""
    lost: dict[str, int] = {}
    have = {**inputs, "cot_y": dy}
    have |= evaluate(gradient.forward, {v.name: have[v.name] for v in gradient.forward.inputs}, "fp16")
    found = evaluate(gradient.backward, {v.name: have[v.name] for v in gradient.backward.inputs}, "fp16", None, lost)
    return found["cot_x"].astype(np.float64), lost


@NORMS
def test_the_rule_of_a_norm_holds_where_every_op_rounds_to_fp16(kind):
    """At a loss scale that takes dx to a quarter of what fp16 holds, whatever the size of x."""
    op_by_op = []

    @settings(max_examples=25, **QUIETLY)
    @given(st.sampled_from((64, 288, 768)), st.floats(-5.6, 4), st.integers(0, 1 << 20))
    def check(channels, exponent, seed):
        fn = norm(kind, channels, 8)
        inputs, dy = norm_inputs(fn, 2.0**exponent, seed)
        scale = 2.0**14 / np.abs(torch_norm(kind, inputs, dy)["x"]).max()
        dy = (dy * min(scale, 1000.0)).astype(np.float16)
        want = torch_norm(kind, inputs, dy)["x"]
        dx, lost = half_backward(derived(fn), inputs, dy)
        assert not lost
        assert np.abs(dx - want).max() <= 8 * 2.0**-11 * np.abs(want).max()
        if exponent < -3:
            op_by_op.append(half_backward(derived(clone(fn)[0]), inputs, dy)[1])

    check()
    assert op_by_op and all(op_by_op), "the rules of the ops overflow here"


def test_a_norm_costs_seven_ops_in_the_backward():
    """dx; before it the forward's x / 16, r and n again, and the gain."""
    kinds = [op.kind for op in derived(norm("rmsnorm", 768, 8)).backward.ops if op.kind != "const"]
    again = ["mul", "mul", "reduce_sum", "real_div", "add", "pow", "mul"]
    assert kinds == [*again, "mul", "mul", "mul", "reduce_sum", "real_div", "mul", "mul", "sub"]


def test_a_norm_of_a_parameter():
    fn = Function("weight_norm")
    x, w, gain = fn.input("x", (6, 4)), fn.input("w", (6, 4)), fn.input("gain", (6, 1))
    fn.claim("y", nn.rmsnorm(w, gain) * x)
    gradient = differentiate(fn.returns(fn.ops[-1].out), ["x"], ["w", "gain"])
    inputs = random_inputs(fn)
    dy = np.random.default_rng(5).standard_normal((6, 4))
    _, _, grads = run(gradient, inputs, dy)
    want = torch_norm("rmsnorm", {"x": inputs["w"], "gain": inputs["gain"]}, dy * inputs["x"])
    assert {(r.param, r.kind) for r in gradient.recipes} == {("w", "add"), ("gain", "rowsum")}
    np.testing.assert_allclose(grads["w"], want["x"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(grads["gain"], want["gain"], rtol=1e-9, atol=1e-9)


def test_custom_vjp_takes_the_place_of_the_ops():
    """A rule that hands on three times the gradient, so that it cannot be taken for that of the ops."""
    fn = Function("thrice")
    x = fn.input("x", (2, 3))
    e = ops.exp(x)
    out = fn.custom_vjp(ops.tanh(e), [x, e], lambda out, dout, values: (dout * 3.0, None))
    fn.claim("y", out + x)
    gradient = differentiate(fn.returns(fn.ops[-1].out), ["x"], [])
    _, dx, _ = run(gradient, random_inputs(fn), np.ones((2, 3)))
    np.testing.assert_array_equal(dx, np.full((2, 3), 4.0))
    assert clone(fn)[0] == fn, "no part of equality"


def test_custom_vjp_refuses_what_it_cannot_mean():
    fn, other = Function("one"), Function("two")
    x, z = fn.input("x", (2, 3)), other.input("x", (2, 3))
    y = ops.tanh(x)
    halves = ops.split(x, num_splits=2, axis=0)
    with pytest.raises(ShapeError, match="'x' is not the only output of an op"):
        fn.custom_vjp(x, [x], lambda out, dout, values: (dout,))
    with pytest.raises(ShapeError, match="not the only output of an op"):
        fn.custom_vjp(halves[0], [x], lambda out, dout, values: (dout,))
    with pytest.raises(ShapeError, match="of function 'one'"):
        fn.custom_vjp(ops.tanh(z), [z], lambda out, dout, values: (dout,))
    for late in (z, y, halves[0]):
        with pytest.raises(ShapeError, match="is not there before it"):
            fn.custom_vjp(y, [x, late], lambda out, dout, values: (dout, None))
    fn.custom_vjp(y, [x], lambda out, dout, values: (ops.reduce_sum(dout, keep_dims=True),))
    fn.claim("y", y)
    with pytest.raises(ShapeError, match=r"'x' is fp16\[2, 3\], its gradient fp16\[1, 1\]"):
        differentiate(fn.returns(y), ["x"], [])
