"""llama2.c v0 checkpoints: the real one, ones written here, and ones that lie."""

import hashlib
import os
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert.errors import InputError
from anert.formats import llama2c
from anert.formats.llama2c import LlamaConfig

TRUE_260K = "cfebf5a594ed"
"""Start of the git blob id of karpathy's file; another of the same size and header has permuted weights."""


@pytest.fixture(scope="module")
def path(shared_data):
    return shared_data / "llama2c" / "stories260K.bin"


def draw(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {n: s for n, s in llama2c.layout(config) if n not in llama2c.TABLES}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_the_real_checkpoint(path):
    blob = path.read_bytes()
    assert hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest().startswith(TRUE_260K)
    config, tensors = llama2c.read(path)
    assert config == LlamaConfig(64, 172, 5, 8, 4, 512, 512, True) and config.head_dim == 8
    assert sum(t.size for t in tensors.values()) == 260_032 and len(tensors) == 47
    assert tensors["layers.4.wk"].shape == (32, 64) and tensors["layers.0.w2"].shape == (64, 172)
    assert np.isfinite(tensors["norm"]).all() and 0.1 < tensors["norm"].mean() < 20
    assert not tensors["norm"].flags.writeable
    assert llama2c.read(path, mmap=False)[1]["norm"].flags.writeable


def test_its_loss_on_real_text(path, shared_data, tmp_path):
    """An independent Llama on our tensors and our tokens: 1.3332 nats, see the data's notes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from anert import data
    from anert.tokenizer import load_tokenizer

    c, t = llama2c.read(path)
    config = transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size, max_position_embeddings=c.seq_len, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"mlp.gate_proj": "w1", "mlp.down_proj": "w2", "mlp.up_proj": "w3"}
    names |= {f"self_attn.{x}_proj": f"w{x}" for x in "qkvo"}
    state = {"model.embed_tokens.weight": t["tok_embeddings"], "model.norm.weight": t["norm"]}
    for i in range(c.n_layers):
        for theirs, ours in names.items():
            w = t[f"layers.{i}.{ours}"]
            if ours in ("wq", "wk"):  # adjacent pairs -> halves
                w = w.reshape(-1, c.head_dim // 2, 2, c.dim).swapaxes(1, 2).reshape(w.shape)
            state[f"model.layers.{i}.{theirs}.weight"] = w
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()})
    tokenizer = load_tokenizer(shared_data / "llama2c" / "tok512.bin")
    ds = data.prepare(shared_data / "text" / "tinystories_10k.txt", tokenizer, tmp_path, 512, 0.0)
    ids = torch.tensor(np.asarray(data.open_tokens(ds.path).tokens[: 48 * 512 + 1], np.int64))
    with torch.no_grad():
        logits = model(ids[:-1].reshape(48, 512)).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 512), ids[1:])
    assert abs(float(loss) - 1.3332) < 0.005


def test_a_rewrite_is_byte_identical(path, tmp_path):
    config, tensors = llama2c.read(path, tables=True)
    llama2c.write(tmp_path / "x.bin", config, tensors)
    assert (tmp_path / "x.bin").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_computed_tables_are_the_originals_to_a_unit_in_the_last_place(path):
    _, tensors = llama2c.read(path, tables=True)
    for name, table in zip(llama2c.TABLES, llama2c.rope_tables(512, 8), strict=True):
        assert table.dtype == np.float32 and np.abs(table - tensors[name]).max() < 1.2e-7


small = st.integers(1, 3)
configs = st.builds(
    lambda half, group, kv, layers, hidden, vocab, seq, tied: LlamaConfig(
        2 * half * group * kv, hidden, layers, group * kv, kv, vocab, seq, tied
    ),
    *[small] * 4,
    *[st.integers(1, 9)] * 3,
    st.booleans(),
)


@settings(deadline=None, max_examples=50)
@given(configs)
def test_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "model.bin"
    tensors = draw(config)
    llama2c.write(path, config, tensors)
    assert path.stat().st_size == llama2c.file_size(config) and llama2c.sniff(path)
    again, found = llama2c.read(path)
    assert again == config and found.keys() == tensors.keys() and ("output" in found) == (not config.tied)
    assert all((found[n] == tensors[n]).all() for n in tensors)
    header = struct.unpack("<7i", path.read_bytes()[:28])
    assert header[5] == (config.vocab_size if config.tied else -config.vocab_size)


def test_an_independent_reader_finds_the_tensors(tmp_path):
    """As llama2.c's run.c walks through the file (memory_map_weights)."""
    c = LlamaConfig(8, 12, 2, 2, 1, 5, 4, tied=False)
    tensors = draw(c)
    llama2c.write(tmp_path / "m.bin", c, tensors)
    data, at = np.fromfile(tmp_path / "m.bin", "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return data[at - int(np.prod(shape)) : at].reshape(shape)

    assert (take(5, 8) == tensors["tok_embeddings"]).all()
    attention = {"attn_norm": (8,), "wq": (8, 8), "wk": (4, 8), "wv": (4, 8), "wo": (8, 8)}
    ffn = {"ffn_norm": (8,), "w1": (12, 8), "w2": (8, 12), "w3": (12, 8)}
    for kind, shape in (attention | ffn).items():
        for layer in range(2):
            assert (take(*shape) == tensors[f"layers.{layer}.{kind}"]).all()
    assert (take(8) == tensors["norm"]).all()
    cos, sin = take(4, 2), take(4, 2)
    angles = np.outer(np.arange(4), [1, 10000 ** (-2 / 4)])
    assert np.allclose(cos, np.cos(angles)) and np.allclose(sin, np.sin(angles))
    assert (take(5, 8) == tensors["output"]).all() and at == data.size


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (60_816_028, (288, 768, 6, 6, 6, 32000, 256)),
        (167_020_572, (512, 1376, 8, 8, 8, 32000, 1024)),
        (438_381_596, (768, 2048, 12, 12, 12, 32000, 1024)),
    ],
)
def test_sizes_of_the_published_models(size, fields):
    assert llama2c.file_size(LlamaConfig(*fields)) == size


def test_a_wrong_size_names_both(path, tmp_path):
    blob = path.read_bytes()
    for n in (len(blob) - 1, len(blob) + 4, 28):
        (tmp_path / "x.bin").write_bytes((blob + bytes(4))[:n])
        with pytest.raises(InputError, match=f"{n:,} bytes, but .*512.* has 1,056,540 bytes"):
            llama2c.read(tmp_path / "x.bin")
        assert not llama2c.sniff(tmp_path / "x.bin")


def test_every_short_prefix_is_refused(path, tmp_path):
    blob, rng = path.read_bytes(), random.Random(1)
    for n in [*range(40), *(rng.randrange(len(blob)) for _ in range(20))]:
        (tmp_path / "x.bin").write_bytes(blob[:n])
        with pytest.raises(InputError, match=str(tmp_path)):
            llama2c.read(tmp_path / "x.bin")


@settings(deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 9), min_size=7, max_size=7), st.integers(0, 64))
def test_headers_that_lie_allocate_nothing(tmp_path_factory, header, rest):
    path = tmp_path_factory.getbasetemp() / "lie.bin"
    path.write_bytes(struct.pack("<7i", *header) + bytes(rest))
    assert not llama2c.sniff(path)
    with pytest.raises(InputError):
        llama2c.read(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
        (struct.pack("<Ii", 0x616B3432, 2) + bytes(300), "llama2.c version 2"),
        (struct.pack("<7i", 64, 172, 5, 7, 7, 512, 512), "dim = 64 for 7 heads"),
        (struct.pack("<7i", 64, 172, 5, 8, 3, 512, 512), "8 heads over 3 key-value heads"),
        (struct.pack("<7i", 64, 172, 0, 8, 4, 512, 512), "n_layers = 0"),
        (b"", "0 bytes"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, says):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputError, match=says):
        llama2c.read(tmp_path / "x.bin")


def test_missing_file(tmp_path):
    assert not llama2c.sniff(tmp_path / "none.bin")
    with pytest.raises(InputError, match="No such file"):
        llama2c.read(tmp_path / "none.bin")


def test_tensors_that_do_not_fit_are_refused_before_writing(tmp_path):
    config = LlamaConfig(8, 12, 1, 2, 1, 5, 4)
    tensors = draw(config)
    wrong = (
        ({**tensors, "norm": np.zeros(9, np.float32)}, r"norm is \(9,\), .* has \(8,\)"),
        ({n: t for n, t in tensors.items() if n != "layers.0.wq"}, r"1 tensors are missing, layers\.0\.wq"),
        ({**tensors, "output": np.zeros((5, 8), np.float32)}, "output among them"),
    )
    for given_tensors, says in wrong:
        with pytest.raises(InputError, match=says):
            llama2c.write(tmp_path / "x.bin", config, given_tensors)
    with pytest.raises(InputError, match="2 heads over 3"):
        llama2c.write(tmp_path / "x.bin", LlamaConfig(8, 12, 1, 2, 3, 5, 4), tensors)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    config = LlamaConfig(8, 12, 1, 2, 1, 5, 4)
    llama2c.write(tmp_path / "x.bin", config, draw(config))
    before = (tmp_path / "x.bin").read_bytes()

    def full(fd):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(llama2c.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        llama2c.write(tmp_path / "x.bin", config, draw(config, 1))
    assert (tmp_path / "x.bin").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.bin"]
