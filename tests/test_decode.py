"""Decoding from a cache: the numbers of the whole forward pass, whatever the cut into calls, widths and wire forms."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert.backend.cpu import CpuBackend
from anert.backend.reference import ReferenceBackend
from anert.blocks import build_cached_blocks, columnwise, mixing_block
from anert.capabilities import ANE
from anert.decode import WIDTHS, Moves, Session, Windowed, open_session, widths_for
from anert.errors import CompileError, InputError, StateError, UnsupportedError
from anert.ffi import Pool, ffi
from anert.kernel import Slot
from anert.mil import ops
from anert.mil.lint import lint
from anert.mil.text import parse
from anert.network import Network
from anert.numpy_llama import NumpyLlama
from anert.param import ParamStore, Spec
from anert.plugin import load
from anert.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
SEQ_LEN = 48
LOGIT_ERROR = 2e-3
"""Of the largest logit: fp16 weights, caches and residual stream against float32 throughout."""
POOLS = {n: Pool(threads=n) for n in (1, 3)}


@pytest.fixture(scope="module")
def model():
    stories = load(str(ROOT / "plugins" / "stories.py"))
    preset = stories.preset("260k")
    return preset.model(dataclasses.replace(preset.config, seq_len=SEQ_LEN, n_layers=2))


def opened(model, runtime: Runtime) -> tuple[ParamStore, Session]:
    store = ParamStore(runtime.heap, runtime.pool, model.specs(), train=False)
    store.initialise(3)
    for p in store.values():  # larger than at the start of training, so that attention attends
        p.master *= 1.0 if p.spec.std is None else 8.0
    session = Session(runtime, model, store)
    store.sync()
    return store, session


@pytest.fixture(scope="module")
def both(model):
    """(session, logits of every position by the whole forward pass, tokens)."""
    rt = Runtime("cpu", "fp32")
    store, session = opened(model, rt)
    net = Network(rt, model, store, SEQ_LEN, 1, train=False)
    store.sync()
    tokens = np.random.default_rng(0).integers(0, 512, SEQ_LEN).astype(np.int32)
    return session, net.head.logits(net.forward(tokens), np.arange(SEQ_LEN, dtype=np.int32)), tokens


def close(got: np.ndarray, want: np.ndarray, bound: float = LOGIT_ERROR) -> bool:
    return bool(np.abs(got - want).max() <= bound * np.abs(want).max())


def test_token_by_token_is_the_whole_forward_pass(both):
    session, want, tokens = both
    session.reset()
    for i, token in enumerate(tokens):
        assert close(session.extend([int(token)]), want[i])
    assert session.position == SEQ_LEN


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=6), st.data())
@settings(max_examples=25)
def test_any_cut_into_calls_gives_the_same(both, parts, data):
    session, want, tokens = both
    session.reset()
    for n in parts:
        if n > SEQ_LEN - session.position:
            back = data.draw(st.integers(0, session.position))
            session.rewind(back)
            n = min(n, SEQ_LEN - back)
        start = session.position
        if n:
            assert close(session.extend(tokens[start : start + n]), want[start + n - 1])


def test_what_was_forgotten_is_not_seen(both):
    session, want, tokens = both
    session.reset()
    session.extend(511 - tokens[:40])
    session.rewind(0)
    assert close(session.extend(tokens[:1]), want[0])
    session.extend(511 - tokens[1:9])
    session.rewind(1)
    assert close(session.extend(tokens[1:5]), want[4])


def test_numpy_is_the_oracle(model, both):
    session, want, tokens = both
    engine = NumpyLlama(model, session.store.tensors())
    assert close(engine.extend(tokens[:30]), want[29])
    assert close(engine.extend(tokens[30:31]), want[30])
    engine.rewind(12)
    assert close(engine.extend(tokens[12:20]), want[19])


def test_weights_and_cache_are_there_once(both):
    session, _, _ = both
    cfg = session.model.config
    kv = cfg.dim // cfg.n_heads * cfg.n_kv_heads
    assert session.cache_bytes == 2 * cfg.n_layers * kv * SEQ_LEN * 2
    copies = {name: len(p.placements) for name, p in session.store.items()}
    assert copies.pop("norm") == 0 and set(copies.values()) == {1}, "the whole pass and decoding read the same copies"
    before = session.runtime.heap.nbytes
    session.reset()
    session.extend(np.zeros(SEQ_LEN, np.int32))
    assert session.runtime.heap.nbytes == before


def test_nothing_compiles_after_the_start(model):
    rt = Runtime("cpu", "fp32")
    _, session = opened(model, rt)
    compiled = rt.backend.compiles
    assert compiled == session.kernels == 2 * len(WIDTHS)
    session.extend(list(range(40)))
    session.extend([1])
    assert rt.backend.compiles == compiled
    tight = Runtime("cpu", "fp32", compile_budget=3)
    with pytest.raises(CompileError, match="budget of 3"):
        opened(model, tight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions(model, both, precision):
    _, session = opened(model, Runtime("cpu", precision))
    _, want, tokens = both
    session.extend(tokens[:33])
    assert close(session.extend(tokens[33:34]), want[33], 3e-2)


def test_the_engines_wire_form_computes_the_same(model, both):
    """Widths of 32, surfaces of 48 KiB, at most 8 inputs: what the Neural Engine is given, run on the CPU; and the
    reference backend."""
    _, want, tokens = both
    for backend in (CpuBackend, ReferenceBackend):
        rt = Runtime("cpu", "fp32")
        rt.backend = (
            CpuBackend(rt.pool, "fp32", rt.heap, capabilities=dataclasses.replace(ANE))
            if backend is CpuBackend
            else ReferenceBackend(rt.heap, "exact")
        )
        _, session = opened(model, rt)
        assert close(session.extend(tokens[:9]), want[8])
        for i in (9, 10):
            assert close(session.extend([int(tokens[i])]), want[i])
    kernels = [k for b in build_cached_blocks(model, 32, 64, ANE) for k in b.forward]
    assert all(len(k.inputs) <= ANE.max_inputs for k in kernels)


@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_one_native_call_has_the_bits_of_its_parts(model, weights):
    rt = Runtime("cpu", "fp32", threads=2)
    store = ParamStore(rt.heap, rt.pool, model.specs(), train=False)
    store.initialise(3)
    whole, parts = (Session(rt, model, store, weights=weights) for _ in range(2))
    store.sync()
    assert all(width.at_once is not None for width in whole.widths)
    for width in parts.widths:
        width.at_once = None
    tokens = np.random.default_rng(2).integers(0, 512, SEQ_LEN)
    for start, end in ((0, 3), (3, 4), (4, 30), (30, 31), (31, SEQ_LEN)):
        a, b = (session.extend(tokens[start:end]) for session in (whole, parts))
        assert a.tobytes() == b.tobytes() and whole.position == parts.position == end
    for key, cache in whole._caches.items():
        assert cache.array().tobytes() == parts._caches[key].array().tobytes()
        assert cache.surface.seed == parts._caches[key].surface.seed > 0


def test_new_positions_are_checked_by_the_native_call(model):
    rt = Runtime("cpu", "fp32", threads=1)
    _, session = opened(model, rt)
    width = session.widths[0]
    for at, count, complaint in ((0, 0, "positions: 0"), (0, width.size + 1, "positions"), (SEQ_LEN, 1, "do not fit")):
        with pytest.raises(InputError, match=complaint):
            width.at_once(at, count, ffi.NULL)
    width.tokens[0] = 512
    with pytest.raises(InputError, match="token id 512 at position 0 is outside the vocabulary of 512"):
        width.at_once(0, 1, ffi.NULL)
    width.tokens[0] = 0
    assert np.isfinite(session.extend([5])).all()


def test_bad_calls(both):
    session, _, tokens = both
    session.reset()
    for bad in ([], [[1, 2]]):
        with pytest.raises(InputError, match="at least one token"):
            session.extend(bad)
    with pytest.raises(InputError, match=r"token.* 512"):
        session.extend([3, 512])
    with pytest.raises(InputError, match="49 tokens do not fit: the context of 48 positions holds 0"):
        session.extend([1] * 49)
    with pytest.raises(StateError, match="cannot go back to position 5: the cache holds 0"):
        session.rewind(5)
    assert close(session.extend(tokens[:2]), both[1][1]), "a refused call leaves the cache as it was"


@settings(max_examples=60, deadline=None)
@given(rows=st.one_of(st.integers(1, 5), st.integers(511, 515)), cols=st.integers(1, 9), other=st.integers(1, 9),
       threads=st.sampled_from(sorted(POOLS)), data=st.data())  # fmt: skip
def test_columns_move_to_where_they_are_told(rows, cols, other, threads, data):
    source = np.arange(rows * cols, dtype=np.uint16).reshape(rows, cols)
    target = np.full((rows, other + 2), 0xFFFF, np.uint16)  # two columns beside it

    def at(a, width):
        return ffi.cast("uint16_t *", a.ctypes.data), rows, width, a.shape[1]

    moves = Moves(POOLS[threads], [(at(source, cols), at(target, other))], (source, target))
    count = data.draw(st.integers(0, min(cols, other)))
    a, b = data.draw(st.integers(0, cols - count)), data.draw(st.integers(0, other - count))
    moves.run(a, b, count)
    want = np.full_like(target, 0xFFFF)
    want[:, b : b + count] = source[:, a : a + count]
    assert np.array_equal(target, want)
    for bad in ((cols - count + 1, b), (a, other - count + 1), (-1, b)):
        with pytest.raises(InputError, match="columns"):
            moves.run(*bad, count)
    assert np.array_equal(target, want)


@pytest.mark.parametrize("preset", ["260k", "15m", "110m", "tiny"])
def test_the_engines_kernels_break_no_rule(preset):
    """No error of the constraint catalogue for any chip, a token at a time and in a prefill."""
    chosen = load(str(ROOT / "plugins" / "stories.py")).preset(preset)
    model = chosen.model(chosen.config)
    for width in (32, 128):
        for block in build_cached_blocks(model, width, chosen.config.seq_len, ANE):
            for kernel in block.forward:
                found = lint(parse(kernel.text, blobs=kernel.blobs).main)
                assert [f for f in found if f.severity == "error"] == []


# ---- models that no cache can serve


def shifted(cfg, x, w, pos):
    """Half of each position's channels come from the position before it (Peng et al. 2023, RWKV's token shift)."""
    before = ops.pad(ops.slice_by_size(x, begin=(0, 0), size=(x.shape[0], x.shape[1] - 1)), pad=(0, 0, 1, 0))
    return x + w.mix @ before


def mean(cfg, x, w, pos):
    return x + w.mix @ (x - ops.reduce_sum(x, axes=(1,), keep_dims=True))


@pytest.fixture
def mixing(model):
    class Mixing(type(model)):
        blocks = (*type(model).blocks, shifted)

        def layer_params(self, cfg):
            return {**super().layer_params(cfg), "mix": Spec.normal(cfg.dim, cfg.dim)}

    return Mixing(model.config)


def test_positions_that_meet_outside_attention_are_found(model, mixing):
    assert mixing_block(model) == "" and mixing_block(mixing) == "shifted"
    assert all(columnwise(model.trace_alone(block, 7)) for block in model.blocks), "no need to run them"
    assert not columnwise(mixing.trace_alone(shifted, 7)) and not columnwise(mixing.trace_alone(mean, 7))
    type(mixing).blocks = (mean,)
    assert mixing_block(mixing) == "mean"


def test_such_a_model_runs_by_windows(mixing):
    rt = Runtime("cpu", "fp32")
    store = ParamStore(rt.heap, rt.pool, mixing.specs(), train=False)
    store.initialise(3)
    engine = open_session(rt, mixing, store)
    store.sync()
    assert isinstance(engine, Windowed) and rt.backend.compiles == engine.kernels
    net = Network(rt, mixing, store, SEQ_LEN, 1, train=False)
    tokens = np.random.default_rng(0).integers(0, 512, SEQ_LEN).astype(np.int32)
    want = net.head.logits(net.forward(tokens), np.arange(SEQ_LEN, dtype=np.int32))
    assert close(engine.extend(tokens[:20]), want[19]) and close(engine.extend(tokens[20:40]), want[39])
    engine.rewind(5)
    assert close(engine.extend(tokens[5:7]), want[6]) and engine.position == 7
    with pytest.raises(InputError, match="42 tokens do not fit: 7 of 48"):
        engine.extend([1] * 42)
    with pytest.raises(StateError, match="position 9: 7 are seen"):
        engine.rewind(9)
    with pytest.raises(UnsupportedError, match="block 'shifted' mixes positions"):
        open_session(rt, mixing, store, weights="int8")


def test_weights_written_ahead_are_those_of_a_plain_sync(model):
    """Copies that came to be while the thread was writing are written too."""
    rt = Runtime("cpu", "fp32")
    tensors = {n: np.random.default_rng(1).standard_normal(s.shape, np.float32) for n, s in model.specs().items()}
    logits = []
    for ahead in (False, True):
        store = ParamStore(rt.heap, rt.pool, model.specs(), False, tensors)
        session = Session(rt, model, store, widths=(1,))
        if ahead:
            store.sync_ahead()
        session.add_widths(WIDTHS)
        net = Network(
            rt, model, store, SEQ_LEN, 1, train=False
        )  # other surfaces for the same weights, where it has any
        store.copy_of("norm", Slot("x", model.config.dim, 1, 0, 4, 1, 4), 8 * model.config.dim, rt.backend.surface)
        store.sync()
        assert (
            store["norm"].placements[-1][0].array().reshape(-1, 4).T.tolist()
            == [tensors["norm"][:, 0].astype(np.float16).tolist()] * 4
        )
        tokens = np.arange(SEQ_LEN, dtype=np.int32)
        logits += [session.extend(tokens[:20]), net.head.logits(net.forward(tokens), np.array([19], np.int32))[0]]
    assert logits[0].tobytes() == logits[2].tobytes() and logits[1].tobytes() == logits[3].tobytes()


def test_what_fails_on_the_way_is_raised_by_sync(model, monkeypatch):
    rt = Runtime("cpu", "fp32")
    store, _ = opened(model, rt)
    store["norm"].placements.append((rt.backend.surface(64), Slot("x", 64, 1, 0, -1, 1)))
    store["norm"]._native = None
    store.sync_ahead()
    with pytest.raises(InputError, match="no negative stride"):
        store.sync()


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, [1]), (2, [1, 8]), (24, [1, 8]), (25, [1, 8, 32]), (33, list(WIDTHS))]
)
def test_no_wider_program_than_a_prompt_needs(longest, expected, model):
    assert widths_for(longest) == expected
    _, session = opened(model, Runtime("cpu", "fp32"))
    assert {session._width(n).size for n in range(1, longest + 1)} == {min(w, SEQ_LEN) for w in expected}
