"""The native head alone against PyTorch in float64: embedding, final norm, classifier, cross-entropy, and all
gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anert.errors import InputError
from anert.ffi import Pool, isas
from anert.head import Head
from anert.kernel import Slot
from anert.network import Location
from anert.param import ParamStore, Spec
from anert.surface import Heap, Surface

torch = pytest.importorskip("torch")

# Past the edges of native/head.c: 512 vocabulary rows a block, 64 channels, 32 columns, 256 positions a chunk.
VOCABS = st.one_of(st.integers(1, 70), st.integers(500, 530), st.integers(1020, 1030))
DIMS = st.one_of(st.integers(1, 80), st.just(288))
LENGTHS = st.one_of(st.integers(1, 40), st.integers(250, 260), st.integers(505, 520))
EPS = 1e-5


@dataclass
class Rig:
    """A head on surfaces of its own; `gap` columns lie between the rows of x and dx."""

    store: ParamStore
    head: Head
    x: Location
    dx: Location


def rig(vocab, dim, n, tied=True, norm=True, precision="fp32", pool=None, seed=0, gap=0) -> Rig:
    heap, pool = Heap(), pool or Pool(1)
    specs = {"tok_embeddings": Spec.normal(vocab, dim, 0.3)}
    if norm:
        specs["norm"] = Spec.ones(dim)
    if not tied:
        specs["output"] = Spec.normal(vocab, dim, 0.3)
    store = ParamStore(heap, pool, specs, train=True)
    store.initialise(seed)
    for name, p in store.items():
        if name == "norm":
            p.master[...] += 0.3 * np.random.default_rng(seed).standard_normal(p.master.shape, np.float32)
        else:  # the head reads matrices in fp16, the gain in fp32
            p.master[...] = p.master.astype(np.float16)
            store.copy_of(name, Slot(name, vocab, dim, 0, dim, 1), 2 * vocab * dim, lambda size: Surface(heap, size))
    store.sync()
    assert store.grads is not None
    store.grads[...] = 0.0
    embedding = store["tok_embeddings"]
    head = Head(heap, pool, embedding, store.get("output", embedding), store.get("norm"), EPS, n, precision)
    width = n + gap
    x, dx = (Location(Surface(heap, 2 * dim * width), Slot("x", dim, n, 0, width, 1)) for _ in range(2))
    rng = np.random.default_rng(seed + 1)
    x.array()[...] = rng.standard_normal((dim, n)) * 2
    dx.array()[...] = np.nan
    return Rig(store, head, x, dx)


def targets_of(vocab, n, ignored, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, vocab, n, dtype=np.int32)
    targets[rng.random(n) < ignored] = -1
    return targets


def oracle(r: Rig, targets):
    """(loss, gradients of the parameters by name, dx), float64."""
    p = {k: torch.tensor(v.master.astype(np.float64), requires_grad=True) for k, v in r.store.items()}
    x = torch.tensor(r.x.array().astype(np.float64), requires_grad=True)
    h = x
    if "norm" in p:
        h = x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS) * p["norm"]
    logits = (p.get("output", p["tok_embeddings"]) @ h).T
    wanted = torch.tensor(targets, dtype=torch.long)
    total = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")
    loss = total / max(1, int((wanted >= 0).sum()))
    loss.backward()
    grads = {k: v.grad.numpy() if v.grad is not None else np.zeros(v.shape) for k, v in p.items()}
    return loss.item(), grads, x.grad.numpy(), logits.detach().numpy()


def near(got, want, bound, what):
    """Norm-wise."""
    size = np.linalg.norm(want)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= bound * size + 1e-9, what


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(VOCABS, DIMS, LENGTHS, st.sampled_from([0.0, 0.3, 0.95]), st.booleans(), st.booleans(), st.integers(0, 40),
       st.integers(0, 99))  # fmt: skip
def test_loss_and_gradients_are_pytorch_s(vocab, dim, n, ignored, tied, norm, gap, seed):
    r, targets = rig(vocab, dim, n, tied, norm, seed=seed, gap=gap), targets_of(vocab, n, ignored, seed)
    want, grads, dx, logits = oracle(r, targets)
    loss, count = r.head.loss(r.x, targets)
    assert count == (targets >= 0).sum()
    assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
    scale = 1024.0
    again, _ = r.head.loss_backward(r.x, targets, r.dx, scale)
    assert again == loss
    near(r.dx.array().astype(np.float64) / scale, dx, 1e-3, "dx")  # it is an fp16 port
    for name, p in r.store.items():
        near(p.grad, grads[name], 3e-5, name)
    columns = np.arange(n, dtype=np.int32)[::-1].copy()
    near(r.head.logits(r.x, columns), logits[columns], 1e-5, "logits")


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(VOCABS, DIMS, LENGTHS, st.integers(0, 99))
def test_bf16_is_near(vocab, dim, n, seed):
    """bf16 operands have 8 bits: relative errors of 2^-9 a product, which sums average out."""
    r, targets = rig(vocab, dim, n, precision="bf16", seed=seed), targets_of(vocab, n, 0.2, seed)
    want, grads, dx, logits = oracle(r, targets)
    loss, _ = r.head.loss_backward(r.x, targets, r.dx, 256.0)
    assert abs(loss - want) <= 0.01 * max(1.0, float(np.abs(logits).max()))
    near(r.dx.array().astype(np.float64) / 256.0, dx, 3e-2, "dx")
    for name, p in r.store.items():
        near(p.grad, grads[name], 3e-2, name)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(VOCABS, DIMS, LENGTHS, st.integers(0, 99))
def test_embedding_and_its_gradient(vocab, dim, n, seed):
    r = rig(vocab, dim, n, seed=seed, gap=seed % 7)
    tokens = np.random.default_rng(seed).integers(0, vocab, n, dtype=np.int32)
    table = r.store["tok_embeddings"].master
    r.head.embed(tokens, r.x)
    assert np.array_equal(r.x.array(), table[tokens].T.astype(np.float16))
    r.dx.array()[...] = np.random.default_rng(seed + 1).standard_normal((dim, n))
    want = np.zeros((vocab, dim))
    np.add.at(want, tokens, r.dx.array().T.astype(np.float64) / 8)
    for times in (1, 2):  # it adds
        r.head.embed_backward(tokens, r.dx, 1 / 8)
        near(r.store["tok_embeddings"].grad, times * want, 1e-6, "embedding")


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(VOCABS, DIMS, LENGTHS, st.integers(0, 99))
def test_the_sum_of_squares_of_a_tied_gradient_is_kept(vocab, dim, n, seed):
    """By the classifier's product, then by what the scatter adds; an unknown one stays unknown."""
    r = rig(vocab, dim, n, seed=seed)
    p, tokens = r.store["tok_embeddings"], np.random.default_rng(seed).integers(0, vocab, n, dtype=np.int32)
    r.dx.array()[...] = np.random.default_rng(seed + 1).standard_normal((dim, n))
    r.head.embed_backward(tokens, r.dx, 1 / 8)
    assert math.isnan(p.squares)
    for _ in range(2):  # it accumulates
        r.head.loss_backward(r.x, targets_of(vocab, n, 0.2), r.dx, 64.0)
        r.head.embed_backward(tokens, r.dx, 1 / 64)
        assert p.squares == pytest.approx(np.square(p.grad, dtype=np.float64).sum(), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("isa", isas())
def test_threads_do_not_change_a_bit_and_every_isa_is_right(isa):
    found = []
    for threads in (1, 2, 3):
        r = rig(700, 72, 300, pool=Pool(threads, isa))
        targets = targets_of(700, 300, 0.2)
        loss, _ = r.head.loss_backward(r.x, targets, r.dx, 64.0)
        found.append((loss, r.store.grads.copy(), r.dx.array().copy()))
    want, grads, _, _ = oracle(r, targets)
    assert found[0][0] == pytest.approx(want, rel=1e-5)
    near(r.store["norm"].grad, grads["norm"], 3e-5, isa)
    near(r.store["tok_embeddings"].grad, grads["tok_embeddings"], 3e-5, isa)
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert np.array_equal(other[1], found[0][1]) and np.array_equal(other[2], found[0][2])


def test_nothing_to_predict_is_no_loss_and_no_gradient():
    r = rig(50, 16, 40)
    loss, count = r.head.loss_backward(r.x, np.full(40, -1, np.int32), r.dx, 1024.0)
    assert (loss, count) == (0.0, 0)
    assert not r.store.grads.any() and not r.dx.array().any()


def test_large_logits_do_not_overflow():
    r = rig(600, 32, 20, norm=False)
    r.x.array()[...] = 6e4 * np.sign(r.x.array())
    targets = targets_of(600, 20, 0.0)
    want, *_ = oracle(r, targets)
    assert want > 1e4
    assert r.head.loss(r.x, targets)[0] == pytest.approx(want, rel=1e-5)


def test_a_nan_is_no_loss():
    r = rig(600, 32, 20)
    r.x.array()[3, 7] = np.nan
    targets = targets_of(600, 20, 0.0)
    assert np.isnan(r.head.loss(r.x, targets)[0])


@pytest.mark.parametrize(
    ("bad", "words"), [(50, "target 50 at position 3 is outside the vocabulary of 50"), (-2, "target -2")]
)
def test_a_target_past_the_vocabulary_is_named(bad, words):
    r = rig(50, 16, 8)
    targets = targets_of(50, 8, 0.0)
    targets[3] = bad
    with pytest.raises(InputError, match=words):
        r.head.loss(r.x, targets)


def test_a_token_past_the_vocabulary_is_named():
    r = rig(50, 16, 8)
    tokens = np.zeros(8, np.int32)
    tokens[5] = 50
    with pytest.raises(InputError, match="token id 50 at position 5"):
        r.head.embed(tokens, r.x)


@pytest.mark.parametrize("ids", [np.zeros(7, np.int32), np.zeros(8, np.int64), np.zeros(16, np.int32)[::2]])
def test_ids_of_another_size_or_type_are_refused(ids):
    r = rig(20, 8, 8, True, True)
    for run in (r.head.loss, lambda x, ids: r.head.embed(ids, x), lambda _, ids: r.head.hold(ids)):
        with pytest.raises(InputError, match="expected 8 contiguous int32 ids"):
            run(r.x, ids)
