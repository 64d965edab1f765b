"""llama2.c's checkpoints, v0, v1 and v2: the real one, ones written here, and ones that lie."""

import hashlib
import os
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import SMALL, configs, damaged, draw, model, refused, same_tensors

from anert.errors import InputError
from anert.formats import LlamaConfig, find, llama2c, open_model_file
from anert.formats import base as formats_base

TRUE_260K = "cfebf5a594ed"
"""Start of the git blob id of karpathy's file; another of the same size and header has permuted weights."""


@pytest.fixture(scope="module")
def path(shared_data):
    return shared_data / "llama2c" / "stories260K.bin"


def test_the_real_checkpoint(path):
    blob = path.read_bytes()
    assert hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest().startswith(TRUE_260K)
    source = open_model_file(path)
    assert source.format == "v0" and find(path).title == "llama2.c checkpoint"
    assert source.llama() == LlamaConfig(64, 172, 5, 8, 4, 512, 512, True) and source.llama().head_dim == 8
    tensors = source.tensors
    assert tensors.n_params == 260_032 == source.llama().n_params() and len(tensors) == 47
    assert tensors["layers.4.wk"].shape == (32, 64) and tensors["layers.0.w2"].shape == (64, 172)
    assert np.isfinite(tensors["norm"]).all() and 0.1 < tensors["norm"].mean() < 20
    assert not tensors["norm"].flags.writeable


def test_its_loss_on_real_text(path, shared_data, tmp_path):
    """An independent Llama on our tensors and our tokens: 1.3332 nats, see the data's notes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from anert import data
    from anert.tokenizer import load_tokenizer

    source = open_model_file(path)
    c, t = source.llama(), source.tensors
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


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_rewrite_is_byte_identical(path, tmp_path, version):
    """v0: of the original. v1, v2: of what we wrote first."""
    first, second = tmp_path / "first.bin", tmp_path / "second.bin"
    llama2c.write(first, open_model_file(path), version)
    llama2c.write(second, open_model_file(first), version)
    assert second.read_bytes() == (path if version == 0 else first).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.bin", "second.bin"]


def test_a_rewrite_through_v1_keeps_every_weight(path, tmp_path):
    llama2c.write(tmp_path / "v1.bin", open_model_file(path), 1)
    llama2c.write(tmp_path / "v0.bin", open_model_file(tmp_path / "v1.bin"), 0)
    assert same_tensors(open_model_file(tmp_path / "v0.bin"), open_model_file(path))


def test_computed_tables_are_the_originals_to_a_unit_in_the_last_place(path):
    tables = open_model_file(path).extra
    for name, table in zip(llama2c.TABLES, llama2c.rope_tables(512, 8), strict=True):
        assert table.dtype == np.float32 and np.abs(table - tables[name]).max() < 1.2e-7


@settings(max_examples=50)
@given(configs, st.sampled_from([0, 1]))
def test_round_trip(tmp_path_factory, config, version):
    path = tmp_path_factory.getbasetemp() / "model.bin"
    source = model(config)
    llama2c.write(path, source, version)
    assert path.stat().st_size == llama2c.file_size(config, version)
    again = open_model_file(path)
    assert again.llama() == config and same_tensors(again, source) and ("output" in again.tensors) == (not config.tied)
    if version == 0:
        header = struct.unpack("<7i", path.read_bytes()[:28])
        assert header[5] == (config.vocab_size if config.tied else -config.vocab_size)


@settings(max_examples=40)
@given(configs, st.sampled_from([0, 1, 2, 8]))
def test_q8_round_trip(tmp_path_factory, config, group):
    """Every weight is within half a step of its group's scale; a rewrite has the same bytes."""
    path = tmp_path_factory.getbasetemp() / "q8.bin"
    source = model(config)
    sizes = [int(np.prod(shape)) for _, shape in config.shapes() if len(shape) == 2]
    if group and any(n % group for n in sizes):
        with pytest.raises(InputError, match=f"group size {group} does not divide"):
            llama2c.write(path, source, 2, group)
        return
    llama2c.write(path, source, 2, group)
    again = open_model_file(path)
    group = again.about["group_size"]
    assert path.stat().st_size == llama2c.file_size(config, 2, group)
    for name in source.tensors:
        want, got = source.tensors[name], again.tensors[name]
        if want.ndim == 1:
            assert (want == got).all()
            continue
        step = np.abs(want.reshape(-1, group)).max(axis=1, keepdims=True) / 127
        assert (np.abs(want.reshape(-1, group) - got.reshape(-1, group)) <= step * 0.5001).all()
    before = path.read_bytes()
    llama2c.write(path, again, 2)
    assert path.read_bytes() == before


def test_a_group_of_zeros_stays_zero(tmp_path):
    tensors = draw(SMALL)
    tensors["layers.0.wq"][:] = 0
    llama2c.write(tmp_path / "x.bin", model(SMALL, tensors), 2)
    got = open_model_file(tmp_path / "x.bin").tensors
    assert not got["layers.0.wq"].any() and np.isfinite(got["layers.1.wq"]).all()


class Walk:
    """Takes arrays off a file, as llama2.c's programs do with pointers."""

    def __init__(self, path, skip):
        self.data, self.at = path.read_bytes(), skip

    def take(self, *shape, dtype="<f4"):
        n = int(np.prod(shape))
        out = np.frombuffer(self.data, dtype, n, self.at).reshape(shape)
        self.at += out.nbytes
        return out


ATTENTION = {"attn_norm": (8,), "wq": (8, 8), "wk": (4, 8), "wv": (4, 8), "wo": (8, 8)}
FFN = {"ffn_norm": (8,), "w1": (12, 8), "w2": (8, 12), "w3": (12, 8)}


def test_an_independent_reader_finds_the_tensors(tmp_path):
    """As llama2.c's run.c walks through a v0 file (memory_map_weights)."""
    c = LlamaConfig(8, 12, 2, 2, 1, 5, 4, tied=False)
    tensors = draw(c)
    llama2c.write(tmp_path / "m.bin", model(c, tensors), 0)
    f = Walk(tmp_path / "m.bin", 28)
    assert (f.take(5, 8) == tensors["tok_embeddings"]).all()
    for kind, shape in (ATTENTION | FFN).items():
        for layer in range(2):
            assert (f.take(*shape) == tensors[f"layers.{layer}.{kind}"]).all()
    assert (f.take(8) == tensors["norm"]).all()
    cos, sin = f.take(4, 2), f.take(4, 2)
    angles = np.outer(np.arange(4), [1, 10000 ** (-2 / 4)])
    assert np.allclose(cos, np.cos(angles)) and np.allclose(sin, np.sin(angles))
    assert (f.take(5, 8) == tensors["output"]).all() and f.at == len(f.data)


@pytest.mark.parametrize("version", [1, 2])
def test_an_independent_reader_of_the_later_versions(tmp_path, version):
    """As export.py writes them (version1_export, version2_export) and runq.c reads v2 (read_checkpoint)."""
    c = LlamaConfig(8, 12, 2, 2, 1, 5, 4, tied=False)
    tensors = draw(c)
    llama2c.write(tmp_path / "m.bin", model(c, tensors), version)
    head = (tmp_path / "m.bin").read_bytes()[:256]
    assert head[:4] == b"24ka" and struct.unpack_from("<8iB", head, 4) == (version, 8, 12, 2, 2, 1, 5, 4, 0)
    group = struct.unpack_from("<i", head, 37)[0]
    assert (group, any(head[41:])) == (8, False) if version == 2 else not any(head[37:])
    f = Walk(tmp_path / "m.bin", 256)
    for kind in ("attn_norm", "ffn_norm"):
        for layer in range(2):
            assert (f.take(8) == tensors[f"layers.{layer}.{kind}"]).all()
    assert (f.take(8) == tensors["norm"]).all()
    kinds = {k: s for k, s in (ATTENTION | FFN).items() if len(s) == 2}
    names = [("tok_embeddings", (5, 8))]
    names += [
        (f"layers.{i}.{k}", s) for k in ("wq", "wk", "wv", "wo", "w1", "w2", "w3") for s in [kinds[k]] for i in (0, 1)
    ]
    for name, shape in [*names, ("output", (5, 8))]:
        if version == 1:
            assert (f.take(*shape) == tensors[name]).all()
            continue
        n = shape[0] * shape[1]
        q, scale = f.take(n, dtype="i1"), f.take(n // 8)
        groups = tensors[name].reshape(-1, 8)
        assert (scale == np.abs(groups).max(axis=1) / np.float32(127)).all()
        assert (q.reshape(-1, 8) == np.rint(groups / scale[:, None])).all()
    assert f.at == len(f.data)


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
            open_model_file(tmp_path / "x.bin")
        assert find(tmp_path / "x.bin") is None


@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_prefix_is_refused(tmp_path, version):
    llama2c.write(tmp_path / "whole.bin", model(SMALL), version)
    blob, rng = (tmp_path / "whole.bin").read_bytes(), random.Random(1)
    for n in [*range(1, 300, 3), *(rng.randrange(len(blob)) for _ in range(20)), len(blob) - 1]:
        (tmp_path / "x.bin").write_bytes(blob[:n])
        refused(tmp_path / "x.bin", open_model_file)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_damage_is_refused_or_reads_as_a_model_of_that_size(tmp_path, version):
    llama2c.write(tmp_path / "whole.bin", model(SMALL), version)
    path = tmp_path / "x.bin"
    for content in damaged((tmp_path / "whole.bin").read_bytes(), version, 60):
        path.write_bytes(content)
        try:
            found = open_model_file(path)
            assert sum(found.tensors[n].size for n in found.tensors) == found.llama().n_params()
        except InputError as e:
            assert "x.bin" in str(e)


@settings(deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 9), min_size=7, max_size=7), st.integers(0, 64))
def test_headers_that_lie_allocate_nothing(tmp_path_factory, header, rest):
    path = tmp_path_factory.getbasetemp() / "lie.bin"
    path.write_bytes(struct.pack("<7i", *header) + bytes(rest))
    assert find(path) is None
    with pytest.raises(InputError):
        open_model_file(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
        (struct.pack("<Ii", 0x616B3432, 3) + bytes(300), "llama2.c version 3; anert reads 0, 1 and 2"),
        (struct.pack("<Ii", 0x616B3432, 1) + bytes(300), "v1 checkpoint: its header says dim = 0"),
        (
            struct.pack("<Ii7iBi", 0x616B3432, 2, 8, 12, 2, 2, 1, 5, 4, 1, 7) + bytes(300),
            "group size 7 does not divide",
        ),
        (struct.pack("<Ii7iBi", 0x616B3432, 2, 8, 12, 2, 2, 1, 5, 4, 1, -8) + bytes(300), "group size -8"),
        (struct.pack("<7i", 64, 172, 5, 7, 7, 512, 512), "dim = 64 for 7 heads"),
        (struct.pack("<7i", 64, 172, 5, 8, 3, 512, 512), "8 heads over 3 key-value heads"),
        (struct.pack("<7i", 64, 172, 0, 8, 4, 512, 512), "n_layers = 0"),
        (b"", "empty"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, says):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputError, match=says):
        llama2c.read(tmp_path / "x.bin")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        open_model_file(tmp_path / "none.bin")


def test_models_that_the_format_cannot_say_are_refused_before_writing(tmp_path):
    c = LlamaConfig(8, 12, 1, 2, 1, 5, 4)
    tensors = draw(c)
    wrong = (
        (model(c, {**tensors, "norm": np.zeros(9, np.float32)}), r"norm is \(9,\), its config says \(8,\)"),
        (model(c, {n: t for n, t in tensors.items() if n != "layers.0.wq"}), r"layers\.0\.wq is missing"),
        (model(c, {**tensors, "output": np.zeros((5, 8), np.float32)}), "output among them"),
        (model(LlamaConfig(8, 12, 1, 2, 3, 5, 4), tensors), "2 heads over 3"),
        (model(LlamaConfig(8, 12, 1, 2, 1, 5, 4, rope_theta=1e5)), "rope_theta 100000"),
        (model(LlamaConfig(8, 12, 1, 2, 1, 5, 4, norm_eps=1e-6)), "norm_eps 1e-06"),
        (model(LlamaConfig(8, 12, 1, 2, 1, 5, 4, head_dim=6)), "head_dim 6"),
    )
    for source, says in wrong:
        for version in range(3):
            with pytest.raises(InputError, match=says):
                llama2c.write(tmp_path / "x.bin", source, version)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    llama2c.write(tmp_path / "x.bin", model(SMALL), 0)
    before = (tmp_path / "x.bin").read_bytes()

    def full(fd):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(formats_base.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        llama2c.write(tmp_path / "x.bin", model(SMALL, draw(SMALL, 1)), 0)
    assert (tmp_path / "x.bin").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.bin"]
