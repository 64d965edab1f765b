"""A whole training step through runtime, kernels, native head and recipes, against PyTorch; and what must not depend on
layout."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from anert.errors import CompileError, InputError, PluginError, ShapeError
from anert.model import Decoder
from anert.network import Network
from anert.param import ParamStore, Spec
from anert.plugin import load
from anert.runtime import Runtime

SMALL = {"dim": 64, "hidden_dim": 172, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100, "seq_len": 24}


@pytest.fixture(scope="module")
def stories():
    from pathlib import Path

    return load(str(Path(__file__).resolve().parents[1] / "plugins" / "stories.py"))


def model_of(stories, **over):
    from dataclasses import replace

    preset = stories.preset("tiny")
    return preset.model(replace(preset.config, **{**SMALL, **over}))


def network(model, batch=2, train=True, seed=3, engine=None, **runtime):
    rt = Runtime("cpu", **{"precision": "fp32", "threads": 1, **runtime})
    rt.engine = engine
    store = ParamStore(rt.heap, rt.pool, model.specs(), train)
    store.initialise(seed)
    for p in store.values():  # weights that fp16 holds exactly, so that both sides start from the same numbers
        p.master[...] = p.master.astype(np.float16)
        if p.spec.fill == 1.0:
            rng = np.random.default_rng(len(p.name))
            p.master[...] = (1 + 0.1 * rng.standard_normal(p.spec.shape)).astype(np.float16)
    net = Network(rt, model, store, model.config.seq_len, batch, train)
    store.sync()
    return net


def batch_of(net, seed=0):
    rng = np.random.default_rng(seed)
    vocab = net.model.config.vocab_size
    return rng.integers(0, vocab, net.n, dtype=np.int32), rng.integers(0, vocab, net.n, dtype=np.int32)


def gradients(net, scale=256.0, seed=0):
    tokens, targets = batch_of(net, seed)
    net.zero_grad()
    loss = net.loss_backward(tokens, targets, scale)
    return loss, {name: p.grad.copy() for name, p in net.store.items()}


@pytest.mark.parametrize(("precision", "overall", "each"), [("fp32", 1e-3, 5e-3), ("bf16", 1.5e-2, 4e-2)])
@pytest.mark.parametrize(("batch", "fusion"), [(1, "blocks"), (3, "blocks"), (1, "1"), (3, "2")])
def test_training_step_equals_pytorch(stories, batch, fusion, precision, overall, each):
    torch_stories = pytest.importorskip("torch_stories", exc_type=ImportError)
    net = network(model_of(stories), batch, precision=precision, fusion=fusion)
    oracle = torch_stories.TorchStories(net.model.config, net.store.tensors())
    loss, grads = gradients(net)
    tokens, targets = batch_of(net)
    want = oracle.loss(tokens.reshape(batch, -1), targets.reshape(batch, -1))
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-3 if precision == "fp32" else 1e-2)
    off = total = 0.0
    for name, g in grads.items():
        t = oracle.p[name].grad.numpy().reshape(g.shape)
        error, size = np.linalg.norm(g - t), np.linalg.norm(t)
        assert error <= each * size, f"{name}: {error / size:.2e}"
        off, total = off + error**2, total + size**2
    assert (off / total) ** 0.5 < overall


def test_ports_and_packed_agree_bit_for_bit(stories):
    model = model_of(stories)
    a, b = (gradients(network(model, layout=layout)) for layout in ("ports", "packed"))
    assert a[0] == b[0]
    for name in a[1]:
        assert np.array_equal(a[1][name], b[1][name]), name


def test_threads_do_not_change_a_bit(stories):
    model = model_of(stories, n_kv_heads=4)
    a, b = (gradients(network(model, threads=t)) for t in (1, 2))
    assert a[0] == b[0]
    for name in a[1]:
        assert np.array_equal(a[1][name], b[1][name]), name


class Apart(Network):
    """Every program and gradient by a call of its own."""

    def _schedule(self, tasks):
        from anert.schedule import Schedule

        return Schedule(tasks)


@pytest.mark.parametrize("over", [{}, {"n_kv_heads": 4}])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_in_few_calls_has_the_bits_of_its_parts(stories, monkeypatch, backend, over):
    """Joined, joined into calls of one program each, and by the tasks themselves; parts are timed alike. Gradients of
    what only rows are summed for are set, not added to what lay there."""
    model, found = model_of(stories, **over), []
    for kind, most in ((Network, 10**12), (Network, 1), (Apart, 0)):
        monkeypatch.setattr("anert.network.CHAIN_FLOPS", most)
        rt = Runtime(backend, precision="fp32", threads=1)
        store = ParamStore(rt.heap, rt.pool, model.specs(), True)
        store.initialise(5)
        net = kind(rt, model, store, model.config.seq_len, 1, True)
        store.sync()
        for p in store.values():
            p.grad.fill(7.0)
        gradients(net)
        loss, grads = gradients(net, seed=1)
        squares = [p.squares for p in store.values()]
        found.append((loss, {name: g.tobytes() for name, g in grads.items()}, set(net.ms), str(squares)))
        found[-1] += (len(net._training._calls),)
    joined, single, apart = found
    assert joined[:4] == single[:4] == apart[:4]
    assert joined[4] == 5  # embedding, forward, head, backward, embedding
    assert joined[4] < single[4] <= apart[4]
    assert joined[2] == {"head", "forward", "backward", "weight_grads"}


def test_gradients_do_not_depend_on_the_loss_scale_beyond_rounding(stories):
    model = model_of(stories)
    a, b = gradients(network(model), 1.0 * 2**8), gradients(network(model), 2.0**12)
    for name in a[1]:
        assert np.linalg.norm(a[1][name] - b[1][name]) < 2e-3 * np.linalg.norm(a[1][name]), name


def test_micro_batches_add_up(stories):
    net = network(model_of(stories))
    _, once = gradients(net, seed=0)
    _, other = gradients(net, seed=1)
    net.zero_grad()
    for seed in (0, 1):
        net.loss_backward(*batch_of(net, seed), 256.0)
    for name, p in net.store.items():
        np.testing.assert_allclose(p.grad, once[name] + other[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_compiles_equal_kernels_and_do_not_grow(stories):
    net = network(model_of(stories, n_layers=5, seq_len=8), batch=1)
    assert net.runtime.backend.compiles == net.kernels
    for seed in range(300):
        gradients(net, seed=seed)
        assert net.runtime.backend.compiles == net.kernels
    with pytest.raises(CompileError, match="budget of 2"):
        network(model_of(stories), compile_budget=2)


def test_first_nonfinite_is_named(stories):
    net = network(model_of(stories))
    net.store["layers.1.w3"].master[...] = 3e4
    net.store["layers.1.w1"].master[...] = 3e4
    net.store.sync()
    tokens, targets = batch_of(net)
    net.loss(tokens, targets)
    assert "layer 1, block ffn" in net.name_nonfinite()


def test_layers_do_not_see_the_future(stories):
    net = network(model_of(stories), batch=1, train=False)
    tokens, _ = batch_of(net)
    x = net.forward(tokens).array().copy()
    tokens[10:] = 0
    y = net.forward(tokens).array()
    assert np.array_equal(x[:, :10], y[:, :10]) and not np.array_equal(x[:, 10:], y[:, 10:])


def test_models_that_cannot_be_are_refused(stories):
    with pytest.raises(InputError, match="n_heads 5"):
        model_of(stories, n_heads=5)
    with pytest.raises(InputError, match="vocab_size"):
        model_of(stories, vocab_size=0)

    def unknown(cfg, x, w, pos):
        return x + w.nothing @ x

    def wrong(cfg, x, w, pos):
        return w.a @ x

    class Odd(Decoder):
        def layer_params(self, cfg):
            return {"a": Spec.normal(8, cfg.dim)}

    config = SimpleNamespace(dim=16, n_layers=1, vocab_size=10, seq_len=4)
    model = Odd(config)
    with pytest.raises(PluginError, match=r"w\.nothing"):
        model.trace(unknown, 4, 1)
    with pytest.raises(ShapeError, match=r"\(16, 4\)"):
        model.trace(wrong, 4, 1)
