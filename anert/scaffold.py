"""`anert new NAME`: the text of a model plugin that trains as it stands, and the writing of it."""

from __future__ import annotations

import keyword
from pathlib import Path

from anert.errors import InputError

TEMPLATE = '''\
"""@NAME@: a small decoder that learns to add in words. Change the forward functions; the backward pass is derived.

    anert run @NAME@.py                                                         train, about a minute on two cores
    anert run @NAME@.py sample --checkpoint runs/@NAME@-tiny-1 --prompt "two plus two"
"""

import random
from dataclasses import dataclass

from anert import Decoder, Plugin, Spec, nn

plugin = Plugin("@NAME@", api=1)


@dataclass(frozen=True)
class Config:
    dim: int = 64
    hidden_dim: int = 192
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 4
    vocab_size: int = 320
    seq_len: int = 64
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


def attention(cfg, x, w, pos):  # x (dim, T); pos: the rotation and mask of these T positions
    h = nn.rmsnorm(x, w.attn_norm, cfg.norm_eps)
    q, k, v = nn.heads(w.wq @ h, cfg.n_heads), nn.heads(w.wk @ h, cfg.n_kv_heads), nn.heads(w.wv @ h, cfg.n_kv_heads)
    return x + w.wo @ nn.merge(nn.causal_attention(nn.rope(q, pos), nn.rope(k, pos), v, pos))


def ffn(cfg, x, w, pos):  # x (dim, T)
    h = nn.rmsnorm(x, w.ffn_norm, cfg.norm_eps)
    return x + w.w2 @ (nn.silu(w.w1 @ h) * (w.w3 @ h))


@plugin.model("tiny", Config(), steps=400, batch=8, lr=2e-3, warmup=20, sample_prompt="two plus two")
@plugin.model("small", Config(dim=128, hidden_dim=384, n_layers=4), steps=1000, batch=8, lr=1e-3)
class Model(Decoder):
    blocks = (attention, ffn)  # one layer; embedding, final norm and classifier come from Decoder

    def layer_params(self, cfg):  # name -> Spec; a weight is (out, in)
        kv_dim = cfg.dim // cfg.n_heads * cfg.n_kv_heads
        return {
            "attn_norm": Spec.ones(cfg.dim),
            "wq": Spec.normal(cfg.dim, cfg.dim),
            "wk": Spec.normal(kv_dim, cfg.dim),
            "wv": Spec.normal(kv_dim, cfg.dim),
            "wo": Spec.normal(cfg.dim, cfg.dim),
            "ffn_norm": Spec.ones(cfg.dim),
            "w1": Spec.normal(cfg.hidden_dim, cfg.dim),
            "w2": Spec.normal(cfg.dim, cfg.hidden_dim),
            "w3": Spec.normal(cfg.hidden_dim, cfg.dim),
        }


@plugin.dataset("sums")
def sums(path, megabytes=1, seed=1337, progress=None):  # lines as "two plus three is five.", until the file is full
    names = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
    rng = random.Random(seed)
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            total = rng.randrange(len(names))
            first = rng.randint(0, total)
            size += file.write(f"{names[first]} plus {names[total - first]} is {names[total]}.\\n")
            if progress is not None:
                progress(size / 1e6, megabytes)
'''


def write_plugin(name: str, folder: Path) -> Path:
    """Write `folder/name.py` and return its path. InputError for a name Python cannot have, or a file that exists."""
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise InputError(f"a plugin's name is letters, digits and _, not starting with a digit or _, got {name!r}")
    path = folder / f"{name}.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.replace("@NAME@", name))
    except FileExistsError:
        raise InputError(f"{path} exists already: choose another name, or another folder with --out") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return path
