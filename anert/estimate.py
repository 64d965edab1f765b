"""A training step on the Neural Engine, on paper: the kernels that a run would compile, under the model of
boundaries.py. The same arithmetic on the published design (ten kernels a layer, packed, fp32 on the host) is set
against its published times: CALIBRATION. Nothing here was measured by anert on a Neural Engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from anert.boundaries import (
    BLAS_TFLOPS,
    CHIPS,
    Chip,
    Design,
    Estimate,
    Interval,
    Unit,
    candidates,
    engine_time,
    predict,
    ranked,
)
from anert.capabilities import ANE, Capabilities
from anert.errors import InputError
from anert.model import Decoder

# ---- the published design, under the same model


def published(cfg: Any, seq_len: int, vocab: int = 0) -> Design:
    """The reference's ten kernels a layer (ane_facts 5.3) for this model: packed fp16 inputs, fp32 on the host, so
    that every activation is converted in and out. vocab: classes of its classifier (it compacts 32,000 to 9,205)."""
    d, hidden, s, heads = cfg.dim, cfg.hidden_dim, seq_len, cfg.n_heads
    size = getattr(cfg, "head_dim", 0) or d // heads
    q, kv = heads * size, cfg.n_kv_heads * size
    score = 2 * heads * s * s * size
    rows = (  # name, FLOPs, packed input, activations among it, output (elements)
        ("sdpaFwd", 2 * d * (q + 2 * kv) * s + 2 * score, d * (s + q + 2 * kv), d * s, (2 * q + 2 * kv + d) * s),
        ("woFwd", 2 * q * d * s, q * (s + d), q * s, d * s),
        ("ffnFused", 6 * d * hidden * s, d * (2 * s + 3 * hidden), 2 * d * s, (d + 3 * hidden) * s),
        ("ffnBwdW2t", 2 * d * hidden * s, d * (s + hidden), d * s, hidden * s),
        ("ffnBwdW13t", 4 * d * hidden * s, hidden * (2 * s + 2 * d), 2 * hidden * s, d * s),
        ("wotBwd", 2 * q * d * s, d * (s + q), d * s, q * s),
        ("sdpaBwd1", 3 * score, 4 * q * s, 4 * q * s, (q + 2 * heads * s) * s),
        ("sdpaBwd2", 2 * score, (2 * heads * s + 2 * q) * s, 2 * q * s, 2 * q * s),
        ("qBwd", 2 * q * d * s, q * (s + d), q * s, d * s),
        ("kvBwd", 4 * kv * d * s, kv * (2 * s + 2 * d), 2 * kv * s, d * s),
    )  # fmt: skip
    units = [
        # 4 bytes on the host's side of each conversion, 2 on the engine's; scores go from surface to surface in fp16
        Unit(name, flops, 2 * ins, 2 * outs, 6 * (acts + outs) - (6 * 2 * heads * s * s) * (name == "sdpaBwd1"),
             cfg.n_layers)
        for name, flops, ins, acts, outs in rows
    ]  # fmt: skip
    linear = 2.0 * s * (2 * d * q + 2 * d * kv + 3 * d * hidden) * cfg.n_layers
    scale = cfg.n_layers * s * d / (12 * 256 * 768)  # of rms 1.8, silu 6, rms_bwd 4, dw_copy 2.5 ms in its log
    return Design(
        "published packed design", None, units[:3], units[3:], 6.0 * (vocab or cfg.vocab_size) * d * s, linear,
        14.3 * scale, grads_beside_forward=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Published:
    """A published time of the published design."""

    what: str
    chip: str
    ms: float
    part: str
    """A part of Estimate.parts, `copies`, or `total`."""
    config: str = "stories110m"


CALIBRATION = (
    Published("M3 Ultra, engine forward", "m3", 32.7, "forward"),
    Published("M3 Ultra, engine backward", "m3", 36.6, "backward"),
    Published("M3 Ultra, conversions (8.5 to 15.9 and 10.5 to 14.8)", "m3", 24.9, "copies"),
    Published("M3 Ultra, classifier and loss", "m3", 14.3, "head"),
    Published("M3 Ultra, whole step", "m3", 115.4, "total"),
    Published("M4, whole step, Stories110M", "m4", 91.0, "total"),
    Published("M4 Pro, whole step (69 to 73)", "m4", 71.0, "total"),
    Published("M4 Max, whole step", "m4", 64.0, "total"),
    Published("M1 Pro and Max, whole step (143 to 167)", "m1", 155.0, "total"),
    Published("M4, whole step, Qwen3-0.6B", "m4", 412.0, "total", "qwen3-0.6b"),
)


@dataclass(frozen=True, slots=True)
class _Shape:
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    head_dim: int = 0


COMPACTED = 9205
"""Classes that the published runs keep of the vocabulary: those that their data use."""
SHAPES = {
    "stories110m": _Shape(768, 2048, 12, 12, 12, COMPACTED),
    "qwen3-0.6b": _Shape(1024, 3072, 28, 16, 8, COMPACTED, 128),
}
"""At seq_len 256. Qwen's compacted vocabulary was not published: taken as that of Stories110M, on the same data."""


def calibration() -> list[dict[str, Any]]:
    """Each published time beside the prediction: interval, error of its middle, and whether the interval holds it."""
    rows = []
    for p in CALIBRATION:
        e = predict(published(SHAPES[p.config], 256), CHIPS[p.chip], BLAS_TFLOPS)
        copies = e.parts["copies forward"] + e.parts["copies backward"]
        found = e.total if p.part == "total" else copies if p.part == "copies" else e.parts[p.part]
        rows.append({
            "what": p.what, "published_ms": p.ms, "best_ms": found.best, "worst_ms": found.worst,
            "middle_ms": found.middle, "error": found.middle / p.ms - 1, "inside": found.best <= p.ms <= found.worst,
        })  # fmt: skip
    return rows


# ---- the verb


def estimate(model: Decoder, chip: str, seq_len: int, batch: int, caps: Capabilities = ANE,
             host_tflops: tuple[float, float] = BLAS_TFLOPS) -> dict[str, Any]:  # fmt: skip
    """The report of `anert estimate`: first in `boundaries` what a run on an engine of these capabilities chooses, then
    what it chooses among, then what other capabilities would allow. Raises InputError for an unknown chip."""
    if chip not in CHIPS:
        raise InputError(f"--chip {chip}: no published figures of it; there are {', '.join(CHIPS)}")
    if not model.blocks:
        raise InputError("this model has no blocks: nothing of it runs on the engine")
    c = CHIPS[chip]
    allowed = candidates(caps)
    designs = [d for d, _ in ranked(model, seq_len, batch, allowed, caps, c)]
    if not designs:
        raise InputError("no layout carries this model's kernels on the Neural Engine: see anert lint")
    more = [b for b in candidates(replace(caps, layout="ports")) if b not in allowed]
    wider = [d for d, _ in ranked(model, seq_len, batch, more, caps, c)]
    rows = [{**as_row(predict(d, c, host_tflops)), "allowed": d in designs} for d in (*designs, *wider)]
    rows[0]["default"] = True
    return {
        "chip": chip, "source": c.source, "seq_len": seq_len, "batch": batch, "host_tflops": list(host_tflops),
        "default": rows[0], "boundaries": rows,
        "units": [_unit_row(u, c) for u in designs[0].units],
        "same_model": against_published(model, designs[0], c, seq_len, batch), "calibration": calibration(),
        "optimizer_ms": optimizer(model, c),
    }  # fmt: skip


def against_published(model: Decoder, default: Design, chip: Chip, seq_len: int, batch: int) -> list[dict[str, Any]]:
    """The default and the published design, both with the same rates on engine and host, and the same classes."""
    cfg = model.config
    if batch != 1 or not hasattr(cfg, "hidden_dim") or not hasattr(cfg, "n_kv_heads"):
        return []
    rows = []
    for vocab in dict.fromkeys((cfg.vocab_size, min(cfg.vocab_size, COMPACTED))):
        mine = replace(default, head_flops=6.0 * vocab * cfg.dim * seq_len, name=f"{default.name}, {vocab:,} classes")
        theirs = replace(published(cfg, seq_len, vocab), name=f"published packed design, {vocab:,} classes")
        rows += [{**as_row(predict(d, chip, BLAS_TFLOPS)), "host_tflops": list(BLAS_TFLOPS)} for d in (mine, theirs)]
    return rows


def optimizer(model: Decoder, chip: Chip) -> dict[str, float]:
    """AdamW with the write of two fp16 placements, once a step, beyond the figures above: 32 bytes a parameter over
    the chip's memory at best, at half its rate at worst."""
    moved = 32.0 * sum(s.size for s in model.specs().values()) / 1e6
    return {"best": moved / chip.memory, "worst": 2 * moved / chip.memory}


def as_row(e: Estimate) -> dict[str, Any]:
    def row(i: Interval) -> dict[str, float]:
        return {"best": i.best, "worst": i.worst, "middle": i.middle}

    return {
        "name": e.name, "ms": row(e.total), "engine_ms": row(engine_time(e)),
        "parts": {name: row(i) for name, i in e.parts.items()}, "dispatches": e.dispatches, "flops": e.flops,
        "bytes": e.bytes, "bound_by": e.bound_by,
    }  # fmt: skip


def _unit_row(u: Unit, chip: Chip) -> dict[str, Any]:
    ms = u.ms(chip)
    return {
        "name": u.name, "dispatches": u.times, "flops": u.flops, "bytes_in": u.bytes_in, "bytes_out": u.bytes_out,
        "copied": u.copied, "best_ms": ms.best, "worst_ms": ms.worst,
        "past_sram": u.past_sram,
    }  # fmt: skip
