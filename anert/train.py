"""The training loop: a generator of events. Nothing is drawn or printed here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Everything that `anert run PLUGIN train` can be told; a plugin's preset may carry other defaults.

    Steps are optimizer steps; a step reads `batch * grad_accum` windows of the model's seq_len.
    """

    steps: int = 1000
    batch: int = 1
    grad_accum: int = 1
    lr: float = 5e-4
    min_lr: float = 0.0
    """Where the cosine ends."""
    warmup: int = 100
    optimizer: str = "adamw"
    """`adamw`, `lion`, or a name that the plugin registered."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    """Global gradient norm; 0 turns clipping off."""
    loss_scale: str = "dynamic"
    """`dynamic`, or a number."""
    seed: int = 1337
    data: str = ""
    """Text or token file; empty: the plugin's own corpus."""
    val: str = "0.05"
    """A fraction of the data's tail, or a file."""
    tokenizer: str = ""
    """Tokenizer file; empty: one that the data names, or one trained on it."""
    init: str = "scratch"
    """`scratch`, `resume`, or a checkpoint file or directory."""
    out: str = ""
    """Run directory; empty: runs/<plugin>-<preset>-<n>."""
    eval_every: int = 100
    eval_tokens: int = 16384
    sample_every: int = 100
    sample_prompt: str = "Once upon a time"
    save_every: int = 250
    keep: int = 3
    time_budget_s: float = 0.0
    """Stop and save after this many seconds of training; 0: no limit."""
    backend: str = "auto"
    precision: str = "auto"
    """`fp32`, `bf16`, `fp16`; auto: bf16 where the CPU multiplies it natively, else fp32."""
    layout: str = "auto"
    threads: int = 0
    """0: ANERT_NUM_THREADS, else what the cgroup and affinity grant."""
    compile_budget: int = 0
    """0: the backend's own."""
