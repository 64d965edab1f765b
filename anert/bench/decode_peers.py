"""llama.cpp and llama2.c as peers: their programs, built by the user, on a random model of the same shape."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anert.bench.measure import Case, let_peers_wait
from anert.bench.options import BenchOptions
from anert.errors import AnertError, InputError

if TYPE_CHECKING:
    from anert.bench.decode import Told

PEERS = {"llamacpp": "llama.cpp's llama-bench", "llama2c": "llama2.c's run"}
LAYER = {
    "attn_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
    "ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up",
}  # fmt: skip
"""Our names of a layer's parameters and GGUF's."""
PROMPT = "Once upon a time"
"""Of the first token."""


def peer_cases(name: str, options: BenchOptions, told: Told, ours: list[Case],
               folder: tempfile.TemporaryDirectory[str]) -> list[Case]:  # fmt: skip
    """A case for each peer and encoding that runs; ours get theirs as baseline: fp16 f16's, int8 q8_0's. AnertError
    where none runs."""
    if set(told.model.layer_params(told.config)) != set(LAYER):
        raise InputError(f"{told.name} is no Llama-style model: the peers run no other")
    let_peers_wait()
    threads, where = told.rt.pool.threads, Path(folder.name)
    made: list[Case] = []
    complaints: list[str] = []
    for peer, path in options.peers:
        if peer == "llamacpp":
            for mine, encoding in zip(ours, ("f16", "q8_0"), strict=True):
                file = where / f"{encoding}.gguf"
                write_gguf(told, file, encoding)
                peer_case = Case(f"llama.cpp {name} {encoding}", _llamacpp(path, file, name, told.n, threads), "tok/s",
                                 told.n, notes={"threads": threads})  # fmt: skip
                if complaint := _complaint(peer_case):
                    complaints.append(complaint)
                    mine.notes = {**mine.notes, "said": f"{peer_case.name} does not run: {complaint}"}
                else:
                    made.append(peer_case)
                    mine.baseline = peer_case.name
        elif name == "decode":
            write_llama2c(told, where / "peer.bin")
            write_vocabulary(told.config.vocab_size, where / "peer.tokenizer")
            made.append(Case("llama2.c decode f32", _llama2c(path, where, told.n, threads), "tok/s", told.n,
                             notes={"threads": threads}))  # fmt: skip
            if not ours[0].baseline:
                ours[0].baseline = made[-1].name
    if not made and complaints:
        raise AnertError(complaints[0])
    return made


def _complaint(case: Case) -> str:
    """Why a peer's program does not run this case, empty if it does: one may crash on one encoding alone."""
    try:
        case.run()
    except AnertError as error:
        return str(error)
    return ""


def _llamacpp(path: str, file: Path, name: str, n: int, threads: int) -> Any:
    prompt, new = (0, n) if name == "decode" else (n, 0)
    argv = [path, "-m", str(file), "-p", str(prompt), "-n", str(new), "-t", str(threads), "-r", "1", "-o", "json"]

    def run() -> float:
        found = _output(argv, {}).stdout
        try:
            return float(json.loads(found)[0]["avg_ns"]) / 1e9
        except (ValueError, LookupError, TypeError):
            raise AnertError(f"{path} printed no result that we can read: {found[:200]!r}") from None

    return run


def _llama2c(path: str, where: Path, n: int, threads: int) -> Any:
    argv = [path, str(where / "peer.bin"), "-z", str(where / "peer.tokenizer"), "-t", "0", "-n", str(n)]

    def run() -> float:
        found = re.search(r"achieved tok/s: ([0-9.]+)", _output(argv, {"OMP_NUM_THREADS": str(threads)}).stderr)
        if found is None or not float(found[1]):
            raise AnertError(f"{path} printed no `achieved tok/s`: its text ended at once, or it is another program")
        return n / float(found[1])

    return run


def _output(argv: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, errors="replace",
                          check=False)  # fmt: skip
    if done.returncode:
        said = " ".join(done.stderr.split())[-200:]
        raise AnertError(f"{argv[0]} ended with {done.returncode}" + (f": {said}" if said else ""))
    return done


# ---- files of a drawn model


def write_llama2c(told: Told, path: Path) -> bool:
    """The model as llama2.c's v0 file; False if that cannot hold it."""
    c, store = told.config, told.store
    if set(told.model.layer_params(c)) != set(LAYER) or "output" in store:
        return False
    kv = getattr(c, "n_kv_heads", c.n_heads)
    with open(path, "wb") as f:
        f.write(struct.pack("<7i", c.dim, c.hidden_dim, c.n_layers, c.n_heads, kv, c.vocab_size, c.seq_len))
        f.write(store["tok_embeddings"].master.data)
        for kind in LAYER:
            for i in range(c.n_layers):
                f.write(np.ascontiguousarray(store[f"layers.{i}.{kind}"].master).data)
        f.write(np.ascontiguousarray(store["norm"].master).data)
        f.write(np.zeros(c.seq_len * (c.dim // c.n_heads), "<f4").data)  # angles, which nothing reads
    return True


def write_vocabulary(n: int, path: Path) -> None:
    """A tokenizer.bin of n pieces: control tokens, all bytes, what merges into the words of PROMPT, so that each is one
    token as in a trained vocabulary, then `t<id>`."""
    names = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256))]
    words = [f" {word}" for word in PROMPT.split()]
    made = dict.fromkeys([*"".join(words), *(word[:end] for word in words for end in range(2, len(word) + 1))])
    first = len(names) + len(made)
    pieces = [piece.encode() for piece in [*names, *made, *(f" t{i}" for i in range(first, n))][:n]]
    with open(path, "wb") as f:
        f.write(struct.pack("<I", max(map(len, pieces))))
        for i, piece in enumerate(pieces):
            f.write(struct.pack("<fi", 0.0 if i < len(names) else -float(i), len(piece)) + piece)


def write_gguf(told: Told, path: Path, encoding: str) -> None:
    """The model as GGUF, matrices in `f16` or `q8_0`."""
    try:
        import gguf
    except ImportError:
        raise InputError("--peer llamacpp needs the package gguf: pip install 'anert[gguf]'") from None
    c, kind = told.config, gguf.GGMLQuantizationType.Q8_0
    w: Any = gguf.GGUFWriter(path, "llama")
    w.add_context_length(c.seq_len)
    w.add_embedding_length(c.dim)
    w.add_block_count(c.n_layers)
    w.add_feed_forward_length(c.hidden_dim)
    w.add_head_count(c.n_heads)
    w.add_head_count_kv(getattr(c, "n_kv_heads", c.n_heads))
    w.add_layer_norm_rms_eps(told.model.norm_eps)
    w.add_rope_dimension_count(c.dim // c.n_heads)
    w.add_vocab_size(c.vocab_size)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if encoding == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"<t{i}>" for i in range(c.vocab_size)])
    w.add_token_scores([0.0] * c.vocab_size)
    w.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (c.vocab_size - 3))
    names = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    names |= {f"layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(c.n_layers) for ours, theirs in LAYER.items()}
    for name, p in told.store.items():
        if p.cols == 1:
            w.add_tensor(f"{names[name]}.weight", p.master[:, 0])
        elif encoding == "f16" or p.cols % 32:  # q8_0 has groups of 32
            w.add_tensor(f"{names[name]}.weight", p.master.astype(np.float16))
        else:
            w.add_tensor(f"{names[name]}.weight", gguf.quants.quantize(p.master, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
