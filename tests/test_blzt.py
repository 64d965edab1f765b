"""BLZT checkpoints of maderix/ANE and Orion, from writers made here after their sources; and ones that lie."""

import math
import random
import struct

import numpy as np
import pytest
from model_files import SMALL, damaged, draw, refused

from anert.errors import InputError
from anert.formats import LlamaConfig, blzt, find, huggingface, llama2c, open_model_file

MHA = LlamaConfig(8, 12, 2, 2, 2, 5, 4)
WIDE = LlamaConfig(8, 12, 2, 2, 1, 5, 4, head_dim=6)  # as "Qwen3-0.6B": heads wider than dim
STEP, TOTAL, LOSS, LR, ADAM_T = 1234, 5000, 2.5, 3e-4, 99


def header(c, version, tail):
    out = struct.pack("<4i", 0x424C5A54, version, STEP, TOTAL)
    out += struct.pack("<6i", c.n_layers, c.vocab_size, c.dim, c.hidden_dim, c.n_heads, c.seq_len)
    out += struct.pack("<2f3d", LR, LOSS, 1.0, 2.0, 3.0) + struct.pack("<3i", 10, 20, ADAM_T)
    return out + tail


class Moments:
    """Adam state that nobody may take for weights."""

    def of(self, w):
        return np.full(w.size, 7.25, "<f4").tobytes()


def maderix(c, version, t):
    """save_checkpoint of training_dynamic/train.m: a layer's weights, then m and v of each, then the next layer."""
    adam, out = Moments(), []
    tail = struct.pack("<3i", c.n_kv_heads, c.head_dim, c.n_heads * c.head_dim) if version == 4 else bytes(12)
    for i in range(c.n_layers):
        names = ["wq", "wk", "wv", "wo", "w1", "w2", "w3", "attn_norm", "ffn_norm"]
        weights = [t[f"layers.{i}.{n}"] for n in names]
        out += [w.tobytes() for w in weights]
        for w in weights:
            out += [adam.of(w), adam.of(w)]
    for w in (t["norm"], t["tok_embeddings"]):
        out += [w.tobytes(), adam.of(w), adam.of(w)]
    return header(c, version, tail) + b"".join(out)


def orion(c, t):
    """core/checkpoint.m: a header without padding (88 bytes); all layers, then all m and v, then the rest."""
    adam, out, moments = Moments(), [], []
    for i in range(c.n_layers):
        weights = [t[f"layers.{i}.{n}"] for n in ("attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w3", "w2")]
        out += [w.tobytes() for w in weights]
        moments += [adam.of(w) for w in weights] * 2
    e, n = t["tok_embeddings"], t["norm"]
    out += [*moments, e.tobytes(), n.tobytes(), adam.of(e), adam.of(e), adam.of(n), adam.of(n)]
    return header(c, 2, bytes(4)) + b"".join(out)


FILES = {
    "v2": (MHA, maderix(MHA, 2, draw(MHA)), "", 0.0, 1.0),
    "v3 early": (MHA, maderix(MHA, 3, draw(MHA)), "norope", 0.0, 1.0),
    "v3 late": (MHA, maderix(MHA, 3, draw(MHA)), "rope+alpha", 1e4, 0.5),
    "v4": (SMALL, maderix(SMALL, 4, draw(SMALL)), "", 1e4, 0.5),
    "v4 wide": (WIDE, maderix(WIDE, 4, draw(WIDE)), "", 1e4, 0.5),
    "v2 with RoPE": (MHA, maderix(MHA, 2, draw(MHA)), "rope", 1e4, 1.0),
    "orion": (MHA, orion(MHA, draw(MHA)), "", 0.0, 1.0),
}
"""name -> config, content, --arch, rope_theta, scale of wo and w2: 1/sqrt(2 * 2 layers) is a half."""


@pytest.mark.parametrize("name", FILES)
def test_every_writer_is_read(tmp_path, name):
    config, content, arch, theta, alpha = FILES[name]
    assert len(content) == (88 if name == "orion" else 96) + 12 * config.n_params()
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    found = open_model_file(path, **({"arch": arch} if arch else {}))
    assert found.llama() == LlamaConfig(**{**config.describe(), "rope_theta": theta})
    want = draw(config)
    for tensor in want:
        scale = alpha if tensor.endswith((".wo", ".w2")) else 1.0
        assert (found.tensors[tensor] == want[tensor] * np.float32(scale)).all(), tensor
    assert found.step == STEP and found.about["loss"] == LOSS and found.about["adam_t"] == ADAM_T
    assert found.about["writer"] == ("orion" if name == "orion" else "maderix")
    assert found.about["total_steps"] == TOTAL and math.isclose(found.about["lr"], LR, rel_tol=1e-6)


def block(x, w, c, alpha):
    """A layer without RoPE and norms: enough to see what a residual scale does. x (dim, T)."""
    v = np.repeat((w["wv"] @ x).reshape(c.n_kv_heads, c.head_dim, -1), c.n_heads // c.n_kv_heads, 0)
    attention = w["wo"].astype(np.float64) @ v.reshape(c.dim, -1)
    x = x + alpha * attention
    return x + alpha * (w["w2"].astype(np.float64) @ np.maximum(w["w1"] @ x, 0))


def test_folding_is_the_residual_scale(tmp_path):
    """x + a W o, as maderix's dynamic trainer computes it, equals a plain residual with the tensors that are read."""
    (tmp_path / "x.ckpt").write_bytes(maderix(SMALL, 4, draw(SMALL)))
    plain, raw = open_model_file(tmp_path / "x.ckpt").tensors, draw(SMALL)
    x = np.random.default_rng(1).standard_normal((8, 3))
    for i in range(2):
        layers = [{n: t[f"layers.{i}.{n}"] for n in ("wv", "wo", "w1", "w2")} for t in (raw, plain)]
        scaled, folded = block(x, layers[0], SMALL, 1 / math.sqrt(4)), block(x, layers[1], SMALL, 1.0)
        assert np.allclose(scaled, folded, rtol=1e-12)


def test_version_3_asks_what_it_is(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(FILES["v3 late"][1])
    with pytest.raises(InputError, match=r"three kinds: pass --arch norope, rope, rope\+alpha"):
        open_model_file(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"--arch 'alpha': choose"):
        open_model_file(tmp_path / "x.ckpt", arch="alpha")


def test_arch_is_for_blzt_alone(tmp_path):
    from model_files import model

    llama2c.write(tmp_path / "x.bin", model(SMALL), 0)
    with pytest.raises(InputError, match="has no choice of --arch"):
        open_model_file(tmp_path / "x.bin", arch="rope")


def test_a_model_without_rope_goes_nowhere_that_rotates(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(FILES["v2"][1])
    source = open_model_file(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="rope_theta 0"):
        llama2c.write(tmp_path / "x.bin", source, 0)
    with pytest.raises(InputError, match="without RoPE"):
        huggingface.write(tmp_path / "hf", source)
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("name", ["v2", "v4", "orion"])
def test_every_prefix_is_refused(tmp_path, name):
    content, rng, path = FILES[name][1], random.Random(3), tmp_path / "x.ckpt"
    for n in [*range(1, 100, 3), *(rng.randrange(len(content)) for _ in range(20)), len(content) - 1]:
        path.write_bytes(content[:n])
        refused(path, open_model_file)
    path.write_bytes(content + bytes(4))
    refused(path, open_model_file)


@pytest.mark.filterwarnings("ignore:invalid value")  # the damage may be a NaN among the weights
@pytest.mark.parametrize("name", ["v2", "v4", "orion"])
def test_damage_is_refused_or_reads_as_a_model_of_that_size(tmp_path, name):
    path = tmp_path / "x.ckpt"
    for content in damaged(FILES[name][1], 5, 60):
        path.write_bytes(content)
        try:
            found = open_model_file(path)
            assert sum(found.tensors[n].size for n in found.tensors) == found.llama().n_params()
        except InputError as e:
            assert "x.ckpt" in str(e)


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [(4, 5, "BLZT version 5"), (16, 0, "n_layers = 0"), (16, 2**31 - 1, "n_layers"), (32, 3, "dim = 8 for 3 heads"),
     (24, 1 << 20, "1,048,576|truncated")],
)  # fmt: skip
def test_headers_that_lie(tmp_path, at, value, says):
    content = bytearray(FILES["v2"][1])
    struct.pack_into("<i", content, at, value)
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    refused(path, open_model_file)
    with pytest.raises(InputError, match=says):
        open_model_file(path)
    assert find(path).title == "BLZT checkpoint" and blzt.sniff(path, bytes(content))
