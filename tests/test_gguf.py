"""GGUF: small files from the gguf package's own writer, damaged ones, and SmolLM2-135M as it is published."""

import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from model_files import SMALL, damaged, draw, refused

from anert.errors import InputError, UnsupportedError
from anert.formats import LlamaConfig, find, gguf_file, open_model_file
from anert.formats.gguf_tokenizer import tokenizer as gguf_tokenizer
from anert.tokenizer import load_tokenizer

NAMES = {
    "attn_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
    "ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up",
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
}  # fmt: skip
WIDE = LlamaConfig(64, 96, 2, 4, 2, 40, 32, False, 1e-6, 5e5, 32)


def llama_cpp_name(name):
    parts = name.split(".")
    return f"blk.{parts[1]}.{NAMES[parts[2]]}.weight" if len(parts) == 3 else f"{NAMES[name]}.weight"


def write(path, config, tensors, quantize="", tokenizer=None, **more):
    """As llama.cpp's converter writes a Llama, through the gguf package."""
    gguf = pytest.importorskip("gguf")
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(config.n_layers)
    w.add_context_length(config.seq_len)
    w.add_embedding_length(config.dim)
    w.add_feed_forward_length(config.hidden_dim)
    w.add_head_count(config.n_heads)
    w.add_head_count_kv(config.n_kv_heads)
    w.add_layer_norm_rms_eps(config.norm_eps)
    w.add_rope_freq_base(config.rope_theta)
    if config.head_dim * config.n_heads != config.dim:
        w.add_key_length(config.head_dim)
    for key, value in more.items():
        w.add_string(f"llama.{key}".replace("__", "."), value)
    if tokenizer is not None:
        tokenizer(w)
    for name, array in tensors.items():
        kind = quantize if array.ndim == 2 else ""
        if kind == "F16":
            w.add_tensor(llama_cpp_name(name), array.astype("f2"))
        elif kind:
            qtype = gguf.GGMLQuantizationType[kind]
            w.add_tensor(llama_cpp_name(name), gguf.quantize(array, qtype), raw_dtype=qtype)
        else:
            w.add_tensor(llama_cpp_name(name), array)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.mark.parametrize("quantize", ["", "F16", "BF16", "Q8_0", "Q4_1"])
def test_what_the_package_writes_is_read(tmp_path, quantize):
    gguf = pytest.importorskip("gguf")
    tensors = draw(WIDE)
    write(tmp_path / "x.gguf", WIDE, tensors, quantize)
    found = open_model_file(tmp_path / "x.gguf")
    assert found.llama() == WIDE and find(tmp_path / "x.gguf").title == "GGUF"
    assert set(found.tensors.encodings()) == {"F32", quantize or "F32"}
    for name, want in tensors.items():
        if quantize == "F16" and want.ndim == 2:
            want = want.astype("f2")
        elif quantize and want.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantize]
            want = gguf.dequantize(gguf.quantize(want, kind), kind)
        got = found.tensors[name]
        assert got.shape == want.shape and got.dtype == want.dtype and (got == want).all(), name


def test_quantized_weights_ask_for_the_package(tmp_path, monkeypatch):
    write(tmp_path / "q.gguf", WIDE, draw(WIDE), "Q8_0")
    write(tmp_path / "f.gguf", WIDE, draw(WIDE), "F16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'anert\[gguf\]'"):
        open_model_file(tmp_path / "q.gguf")
    assert open_model_file(tmp_path / "f.gguf").llama() == WIDE  # plain floats need none


@pytest.mark.parametrize(
    ("more", "says"),
    [({"rope__scaling__type": "yarn"}, "RoPE scaling yarn"), ({"rope__freq_base": "ten"}, "a number was expected")],
)
def test_what_is_not_plain_llama_is_refused(tmp_path, more, says):
    tensors = draw(SMALL)
    write(tmp_path / "x.gguf", SMALL, tensors, **more)
    with pytest.raises(InputError, match=says):
        open_model_file(tmp_path / "x.gguf")


def test_other_architectures_and_odd_tensors_are_refused(tmp_path, monkeypatch):
    tensors = draw(SMALL)
    write(tmp_path / "x.gguf", SMALL, tensors)
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "y.gguf").write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen3", 1))
    with pytest.raises(InputError, match="architecture 'qwen3'"):
        open_model_file(tmp_path / "y.gguf")
    monkeypatch.setitem(NAMES, "bias", "attn_q_bias")
    write(tmp_path / "z.gguf", SMALL, {**tensors, "layers.0.bias": np.zeros(8, "f4")})
    with pytest.raises(InputError, match="1 tensors have no place in this architecture, blk"):
        open_model_file(tmp_path / "z.gguf")
    del tensors["layers.1.w3"]
    write(tmp_path / "w.gguf", SMALL, tensors)
    with pytest.raises(InputError, match=r"layers\.1\.w3 is missing"):
        open_model_file(tmp_path / "w.gguf")


# ---- damage ----


def small_with_tokenizer(path):
    def add(w):
        w.add_tokenizer_model("llama")
        w.add_token_list([b"<unk>", b"<s>", b"</s>", b"a", b"b"])
        w.add_token_scores([0.0] * 5)
        w.add_token_types([2, 3, 3, 1, 1])

    write(path, SMALL, draw(SMALL), tokenizer=add)
    return path.read_bytes()


def test_every_prefix_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    content, rng = small_with_tokenizer(path), random.Random(4)
    for n in [*range(1, 1200, 7), *(rng.randrange(len(content)) for _ in range(40)), len(content) - 33]:
        path.write_bytes(content[:n])
        refused(path, open_model_file)


def test_damage_is_refused_or_reads_as_a_model_of_that_size(tmp_path):
    path = tmp_path / "x.gguf"
    for content in damaged(small_with_tokenizer(path), 6, 150):
        path.write_bytes(content)
        try:
            found = open_model_file(path)
            assert sum(found.tensors[n].size for n in found.tensors) == found.llama().n_params()
            if found.tokenizer:
                found.tokenizer()
        except (InputError, UnsupportedError) as e:
            assert "x.gguf" in str(e)


@pytest.mark.parametrize(
    "lie",
    [
        struct.pack("<IQQ", 3, 1 << 60, 0),  # tensors
        struct.pack("<IQQ", 3, 0, 1 << 60),  # keys
        struct.pack("<IQQQ", 3, 0, 1, 1 << 60),  # length of a key
        struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 60),  # bytes of an array
        struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 60),  # strings of an array
        struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1 << 60),  # arrays of an array
        struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77),  # type of a value
        struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 1 << 30),  # dimensions of a tensor
        struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"t", 2, 1 << 40, 1 << 40, 0, 0),  # its sizes
        struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 4, 0, 1 << 62),  # where it lies
        struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 4, 999, 0),  # its type
        struct.pack("<IQQ", 1, 0, 0),
        struct.pack(">IQQ", 3, 0, 0),
    ],
)
def test_headers_that_lie_allocate_nothing(tmp_path, lie):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + lie + bytes(64))
    pytest.importorskip("gguf")
    refused(tmp_path / "x.gguf", open_model_file, 1 << 20)


# ---- tokenizers ----


def test_a_llama_tokenizer(tmp_path, shared_data):
    """tok512 as llama.cpp's converter would write it: the same ids."""
    ours = load_tokenizer(shared_data / "llama2c" / "tok512.bin")

    def add(w):
        w.add_tokenizer_model("llama")
        w.add_token_list([p.replace(" ", "\u2581").encode() for p in ours.model.pieces])
        w.add_token_scores(list(ours.model.scores))
        w.add_token_types(list(ours.model.types))
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)

    write(tmp_path / "x.gguf", SMALL, draw(SMALL), tokenizer=add)
    found = open_model_file(tmp_path / "x.gguf").tokenizer()
    assert found.hash == ours.hash
    text = (shared_data / "text" / "tinystories_10k.txt").read_text("utf-8")[:5000]
    assert found.encode(text, bos=True) == ours.encode(text, bos=True)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": "bert"}, "a 'bert' tokenizer"),
        ({"model": "gpt2", "pre": "unheard-of"}, "pre-tokenizer 'unheard-of'"),
        ({"model": "gpt2", "tokens": 5}, "no tokens"),
        ({"model": "gpt2", "token_type": [1]}, "not a type for each"),
        ({"model": "gpt2", "tokens": ["a", "a"], "token_type": [1, 1]}, "no token for byte|doubled"),
        ({"model": "llama"}, "no score for each"),
        ({"model": "llama", "scores": [0.0] * 2, "token_type": [6, 1]}, "damaged"),
        ({"model": "llama", "scores": [0.0] * 2, "token_type": [1, 99]}, "damaged"),
    ],
)
def test_tokenizers_that_are_refused(keys, says):
    base = {"tokens": ["a", "b"], "token_type": [1, 1]}
    with pytest.raises(InputError, match=says):
        gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in {**base, **keys}.items()}, Path("x.gguf"))


def test_gguf_is_recognised_before_anything_is_read(tmp_path):
    assert gguf_file.sniff(tmp_path, b"GGUF") and not gguf_file.sniff(tmp_path, b"GGU")
