"""Benchmarks: each makes Cases, `measure` times them side by side, and what cannot be true is refused.

A benchmark is a row of BENCHMARKS: its module has `cases(options) -> list[Case]`, made of what really runs, and
`close()` if there is something to end. What no Case can say has `results(options, rounds)` instead, which yields events
and Results.
"""

from __future__ import annotations

from anert.bench.measure import Case, Result, fingerprint, measure
from anert.bench.roofline import refuse_implausible

__all__ = ["BENCHMARKS", "Case", "Result", "fingerprint", "measure", "refuse_implausible"]

BENCHMARKS = {
    "gemm": ("products at a model's shapes, against the peak", "kernels"),
    "convert": ("fp32 to fp16 and back, straight and transposed, against a plain copy", "kernels"),
    "sync": ("every fp16 copy of a model's weights written from its masters, against a plain copy", "kernels"),
    "dispatch": ("the host's cost of running a program that does nothing", "kernels"),
    "forward": ("a forward pass of a model", "model"),
    "decode": ("token after token from a cache, fp16 and int8 weights, and the first token of a process", "decode"),
    "prefill": ("a prompt into the cache", "decode"),
    "train": ("a training step of a model: forward, backward, gradients, clip, AdamW, weight sync", "model"),
    "tokenizer": ("both tokenizers beside tiktoken, tokenizers and sentencepiece on --text FILE", "tokenizer"),
    "strategies": ("weights as tensors against weights baked into the programs, over a run", "strategies"),
    "scaling": ("a training step along --axis, and which points leave the line", "scaling"),
    "soak": ("many steps of a small model: memory, files, time and compiles stay as they are", "soak"),
    "mpi": ("sums over ranks, and training on several against one; started by mpiexec", "mpi"),
}
"""name -> (what it measures, module of anert.bench)."""
