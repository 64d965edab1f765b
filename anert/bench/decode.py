"""Decoding and prefill at random weights, beside llama.cpp and llama2.c on the same shape; and the first token of a
fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anert.bench.measure import Case
from anert.bench.options import BenchOptions
from anert.checkpoint import MODEL
from anert.errors import AnertError, InputError

TOLERANCE = {"fp16": 2e-2, "int8": 8e-2}
"""Logits of a token read alone against the same token at the end of a prefill, of the largest logit."""


def cases(name: str, options: BenchOptions) -> list[Case]:
    """The cases of `decode` or `prefill`, with the peers that were asked for (`llamacpp`: the path of llama-bench;
    `llama2c`: of run)."""
    from anert.bench.decode_peers import PEERS, peer_cases

    for peer, path in options.peers:
        if peer not in PEERS:
            raise InputError(f"bench {name} has no peer {peer!r}: {', '.join(PEERS)}")
        if not os.access(path, os.X_OK):
            raise InputError(f"--peer {peer}={path}: no program there: give the path of {PEERS[peer]}, built by you")
    if options.precision == "auto":
        options = replace(options, precision="fp32")  # as `anert sample`
    benches = [Told(options, weights) for weights in ("fp16", "int8")]
    made = [b.decode() if name == "decode" else b.prefill() for b in benches]
    folder = tempfile.TemporaryDirectory(prefix="anert-bench-")
    if options.peers:
        made = [*made, *peer_cases(name, options, benches[0], made, folder)]
    if name == "decode":
        made += first_tokens(options, benches[0], Path(folder.name))
    for case in made:
        case.keep = folder
    return made


class Told:
    """A session of a plugin's model at drawn weights."""

    def __init__(self, options: BenchOptions, weights: str) -> None:
        from anert.decode import Session
        from anert.param import ParamStore

        self.rt = options.runtime()
        self.model, self.config = options.model()
        self.name, self.weights, self.n = options.plugin, weights, self.config.seq_len
        self.store = ParamStore(self.rt.heap, self.rt.pool, self.model.specs(), train=False)
        self.store.initialise(1)
        self.session = Session(self.rt, self.model, self.store, weights=weights)
        self.store.sync()
        self.ids = np.random.default_rng(1).integers(3, self.config.vocab_size, self.n).astype(np.int32)

    def about(self) -> dict[str, Any]:
        rt = self.rt
        return {"backend": rt.backend.name, "precision": rt.precision, "threads": rt.pool.threads, "isa": rt.pool.isa,
                "context": self.n, "weights": self.weights, "cache_bytes": self.session.cache_bytes,
                "compiles": rt.backend.compiles, "compile_ms": round(rt.backend.compile_ms, 2)}  # fmt: skip

    def token_bytes(self) -> int:
        """Weights that a token reads, once each, and the whole cache."""
        read = 0
        for name, p in self.store.items():
            if p.cols == 1 or (name == "tok_embeddings" and "output" in self.store):
                continue
            read += p.encoded.nbytes if p.encoded is not None else 2 * p.spec.size
        return read + self.session.cache_bytes

    def verify(self) -> None:
        """The last token read alone gives the logits that it gives at the end of a prefill."""
        self.session.reset()
        n = min(40, self.n)
        whole = self.session.extend(self.ids[:n])
        self.session.rewind(n - 1)
        alone = self.session.extend(self.ids[n - 1 : n])
        off = float(np.abs(alone - whole).max() / np.abs(whole).max())
        if not off < TOLERANCE[self.weights]:
            raise AnertError(f"bench decode {self.weights}: logits off by {off:.1e} of the largest: nothing was timed")

    def _case(self, name: str, run: Any, flops: float, nbytes: float) -> Case:
        label = f"{name} {self.name} {self.weights} {self.rt.precision}"
        return Case(label, run, "tok/s", self.n, flops, nbytes, verify=self.verify, notes=self.about())

    def decode(self) -> Case:
        """A text of `seq_len` tokens, each the likeliest behind the one before."""

        def run() -> None:
            self.session.reset()
            token = 1
            for _ in range(self.n):
                token = int(np.argmax(self.session.extend([token])))

        return self._case("decode", run, self.n * self.session.flops(1), self.n * self.token_bytes())

    def prefill(self) -> Case:
        """A prompt of `seq_len` tokens, logits of the last."""

        def run() -> None:
            self.session.reset()
            self.session.extend(self.ids)

        case = self._case("prefill", run, self.session.flops(self.n), self.token_bytes())
        case.peak = partial(self.rt.peak_gflops, again=True)
        return case


def first_tokens(options: BenchOptions, told: Told, folder: Path) -> list[Case]:
    """From the start of a fresh `anert sample` to its first new text, the model's file in the cache: of llama2.c's fp32
    file, and of the run directory with fp16 matrices that `anert convert --to anert --dtype fp16` makes of it."""
    from anert.bench.decode_peers import write_llama2c, write_vocabulary
    from anert.formats import open_model_file, run_dir
    from anert.tokenizer import load_tokenizer

    model, half, vocabulary = folder / "model.bin", folder / "fp16", folder / "tokenizer.bin"
    if not write_llama2c(told, model):
        raise InputError(f"bench decode: {told.name} is no model that a llama2.c file can hold")
    write_vocabulary(told.config.vocab_size, vocabulary)
    source = open_model_file(model)
    source.tokenizer = partial(load_tokenizer, vocabulary)
    run_dir.write(half, source, dtype="fp16")
    weights = next(half.glob(f"step-*/{MODEL}"))
    return [
        _first_token(f"first token of a process {told.name}", options, told, model, model, vocabulary),
        _first_token(f"first token of a process {told.name}, fp16 file", options, told, half, weights, vocabulary),
    ]


def _first_token(name: str, options: BenchOptions, told: Told, model: Path, weights: Path, vocabulary: Path) -> Case:
    """weights: the file, of what `model` is, that holds them."""
    from anert.bench.decode_peers import PROMPT
    from anert.plugin import split_name

    argv = [sys.executable, "-m", "anert", "sample", str(model), "--plugin", split_name(options.plugin)[0],
            "--tokenizer", str(vocabulary), "--prompt", PROMPT, "-n", "1", "--temperature", "0",
            "--threads", str(told.rt.pool.threads)]  # fmt: skip

    def run() -> float:
        with open(weights, "rb") as file:  # what the system dropped meanwhile is in its cache again
            while file.read(1 << 20):
                pass
        start = time.perf_counter()
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            seen = b""
            while len(seen) <= len(PROMPT.encode()) and (piece := os.read(process.stdout.fileno(), 4096)):
                seen += piece
            seconds = time.perf_counter() - start
            complaint = process.stderr.read().decode(errors="replace")
        if process.returncode:
            raise AnertError(f"bench decode: anert sample ended with {process.returncode}: {complaint.strip()}")
        return seconds

    return Case(name, run, "ms", notes={"file_bytes": weights.stat().st_size})
