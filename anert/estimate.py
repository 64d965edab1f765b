"""A training step on the Neural Engine, on paper: from the very kernels that a run would compile.

    t(kernel) = dispatch floor + FLOPs / matmul rate + bytes of its ports / memory rate

Rates are intervals over what was published (ane_facts 5.3, 6.1), so a prediction is one too. The engine's and the
host's work are added where the schedule lets one wait for the other, and the longer one counts where they overlap. The
same arithmetic on the published design (ten kernels a layer, packed, fp32 on the host) is set against its published
times: CALIBRATION. Nothing here was measured by anert on a Neural Engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anert.backend.base import written_flops
from anert.blocks import BlockKernels, build_blocks
from anert.capabilities import ANE, Capabilities
from anert.errors import InputError, Unpackable
from anert.kernel import Kernel, Slot, round_up
from anert.mil.text import parse
from anert.model import Decoder


@dataclass(frozen=True, slots=True)
class Interval:
    """best <= worst, of one unit."""

    best: float
    worst: float

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.best + other.best, self.worst + other.worst)

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.best * factor, self.worst * factor)

    @property
    def middle(self) -> float:
        """Geometric: the ends are factors apart, not differences."""
        return (self.best * self.worst) ** 0.5


NOTHING = Interval(0.0, 0.0)


def longer(a: Interval, b: Interval) -> Interval:
    """Of two that run side by side."""
    return Interval(max(a.best, b.best), max(a.worst, b.worst))


@dataclass(frozen=True, slots=True)
class Chip:
    """rate: fp16 matmul, TFLOPS. floor: a dispatch, us. memory: GB/s of the base chip. Each (worst, best)."""

    rate: tuple[float, float]
    floor: tuple[float, float]
    memory: float
    source: str


CHIPS = {
    "m1": Chip((0.54, 2.7), (220, 220), 68, "training 0.54 TFLOPS, GEMM 2.7, floor 220 us"),
    "m2": Chip((1.4, 3.4), (220, 84), 100, "GEMM 3.4 (M2 Pro); no floor published: those of M1 and M4"),
    "m3": Chip((1.4, 5.4), (160, 84), 100, "forward pass 1.4 (M3 Ultra); no GEMM or floor published: those of M4"),
    "m4": Chip((1.4, 5.4), (160, 84), 120, "forward pass 1.4 (M3 Ultra), GEMM 5.4, floor 84 to 160 us"),
    "m5": Chip((1.4, 8.7), (110, 70), 154, "GEMM 8.7, floor 70 to 110 us"),
}
SRAM_MB = 24.0
"""Ports of a kernel beyond which published rates drop: the worst rate then counts at both ends."""
COPY_GBPS = (17.0, 35.0)
"""Host traffic of the published step: 269 MB in 8.5 to 15.9 ms forward, 368 MB in 10.5 to 14.8 ms backward."""
NEON_TFLOPS = (0.25, 0.56)
"""Host products as anert ships them, on NEON: 4 performance cores at 4.4 GHz with four fp32 FMA pipes peak at 0.56; the
other end is a cautious half. Nobody has measured it."""
BLAS_TFLOPS = (0.759, 1.76)
"""Host products on the matrix unit: the published step's classifier (10.9 GFLOP in 14.3 ms), and libxsmm's 512^3
product on an M4 (1,755 GFLOPS, scalable.uni-jena.de/opt/sme)."""


@dataclass(slots=True)
class Unit:
    """A kernel, as it counts for one layer. bytes: of its ports; copied: what the host moves between surfaces before
    it, read and written."""

    name: str
    flops: int
    bytes_in: int
    bytes_out: int
    copied: int = 0
    times: int = 1
    """Dispatches a step."""

    def ms(self, chip: Chip) -> Interval:
        """Of all its dispatches."""
        ends = []
        fits = self.bytes_in + self.bytes_out <= SRAM_MB * 1e6
        for floor, rate in ((chip.floor[1], chip.rate[1] if fits else chip.rate[0]), (chip.floor[0], chip.rate[0])):
            traffic = (self.bytes_in + self.bytes_out) / chip.memory / 1e6
            ends.append((floor / 1e3 + self.flops / rate / 1e9 + traffic) * self.times)
        return Interval(ends[0], ends[1])


@dataclass(slots=True)
class Design:
    """Who does what in a step. host_ms: elementwise work of the host that nothing overlaps, as published; head_flops:
    classifier with its backward; grad_flops: weight gradients; grads_beside_forward: whether those of a step may go on
    during the next forward pass."""

    name: str
    forward: list[Unit] = field(default_factory=list)
    backward: list[Unit] = field(default_factory=list)
    head_flops: float = 0.0
    grad_flops: float = 0.0
    host_ms: float = 0.0
    grads_beside_forward: bool = False

    @property
    def units(self) -> list[Unit]:
        return [*self.forward, *self.backward]


@dataclass(frozen=True, slots=True)
class Estimate:
    """ms of a step (forward, backward, weight gradients; not the optimizer) and of its parts, best and worst."""

    name: str
    total: Interval
    parts: dict[str, Interval]
    dispatches: int
    flops: int
    bytes: int
    bound_by: str
    """`engine` or `host`: whose work the backward pass waits for, at the middle of the intervals."""


def predict(design: Design, chip: Chip, host_tflops: tuple[float, float]) -> Estimate:
    """The step of a design on a chip. host_tflops: (worst, best) of the host's products."""

    def engine(units: Iterable[Unit]) -> Interval:
        return sum((u.ms(chip) for u in units), NOTHING)

    def copies(units: Iterable[Unit]) -> Interval:
        moved = sum(u.copied * u.times for u in units)
        return Interval(moved / COPY_GBPS[1] / 1e6, moved / COPY_GBPS[0] / 1e6)

    def host(flops: float) -> Interval:
        return Interval(flops / host_tflops[1] / 1e9, flops / host_tflops[0] / 1e9)

    parts = {
        "forward": engine(design.forward), "backward": engine(design.backward),
        "copies forward": copies(design.forward), "copies backward": copies(design.backward),
        "head": host(design.head_flops), "weight gradients": host(design.grad_flops),
        "host elementwise": Interval(design.host_ms, design.host_ms),
    }  # fmt: skip
    ahead = parts["forward"] + parts["copies forward"]
    beside = parts["backward"] + parts["copies backward"] + parts["host elementwise"]
    grads = parts["weight gradients"]
    if design.grads_beside_forward:
        total = longer(ahead + beside, grads) + parts["head"]
        waits = (ahead + beside).middle < grads.middle
    else:
        total = ahead + parts["head"] + longer(beside, grads)
        waits = beside.middle < grads.middle
    units = design.units
    return Estimate(
        design.name, total, parts, sum(u.times for u in units), sum(u.flops * u.times for u in units),
        sum((u.bytes_in + u.bytes_out) * u.times for u in units), "host" if waits else "engine",
    )  # fmt: skip


# ---- anert's own kernels


def design_of(
    model: Decoder, seq_len: int, batch: int, layout: str, caps: Capabilities = ANE, group: int = 0
) -> Design:
    """What a run of `model` dispatches. group: 0: each block its programs, as a run has it; n: n whole layers traced as
    one block (still cut where the engine's limits on inputs and width ask for it).

    Raises Unpackable for a kernel that layout `packed` cannot carry, InputError for a group that does not divide.
    """
    layers, label = model.config.n_layers, "blocks apart"
    if group:
        if layers % group:
            raise InputError(f"{layers} layers do not come in groups of {group}")
        model = grouped(model, group)
        layers, label = layers // group, f"{group} layer{'s' * (group > 1)} in one"
    blocks = build_blocks(model, seq_len, batch, True, layout, caps, caps)
    n, cfg = seq_len * batch, model.config
    design = Design(f"{layout}, {label}, {caps.max_inputs} inputs", head_flops=6.0 * cfg.vocab_size * cfg.dim * n)
    for block in blocks:
        width = round_up(n, caps.width_multiple)
        env = {name: Slot(name, cfg.dim, n, 0, width, 1) for name in ("x", "cot_y")}
        design.forward += [_unit(k, env, set(block.params), layers) for k in block.forward]
        design.backward += [_unit(k, env, set(block.params), layers) for k in block.backward]
        design.grad_flops += layers * _grad_flops(block, model, n)
    return design


def _unit(kernel: Kernel, env: dict[str, Slot], params: set[str], times: int) -> Unit:
    """A kernel's work; its results join `env`. Copies are those that Network makes: of activations that do not lie as
    the port wants them."""
    function = parse(kernel.text, blobs=kernel.blobs).main
    copied = 0
    for port in {s.port for s in kernel.inputs.values()}:
        entries = [(n, s) for n, s in kernel.inputs.items() if s.port == port]
        for name, slot in entries:
            if name in params:
                continue
            have = env[name]
            same = (have.offset, have.row_stride, have.col_stride) == (slot.offset, slot.row_stride, slot.col_stride)
            if len(entries) > 1 or not same:
                copied += 2 * 2 * slot.rows * slot.cols
    env.update(kernel.outputs)
    ins = sum(kernel.sizes[v.name] for v in function.inputs)
    outs = sum(kernel.sizes[v.name] for v in function.outputs)
    return Unit(kernel.name, written_flops(function), ins, outs, copied, times)


def _grad_flops(block: BlockKernels, model: Decoder, n: int) -> float:
    assert block.gradient is not None
    specs = model.layer_params(model.config)
    return sum(2.0 * specs[r.param].size * n for r in block.gradient.recipes if r.kind == "gemm")


class _Part:
    """The weights of one layer of a group."""

    def __init__(self, weights: Any, layer: int) -> None:
        self._weights, self._layer = weights, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, f"l{self._layer}_{name}")


def grouped(model: Decoder, n: int) -> Decoder:
    """`model` with n layers as its one block: what more of them in a program would be."""

    def layers(cfg: Any, x: Any, w: Any, pos: Any) -> Any:
        for i in range(n):
            for block in model.blocks:
                x = block(cfg, x, _Part(w, i), pos)
        return x

    one = model.layer_params(model.config)
    names = {f"l{i}_{name}": spec for i in range(n) for name, spec in one.items()}
    kind: Any = type(
        type(model).__name__, (type(model),), {"blocks": (layers,), "layer_params": lambda self, cfg: names}
    )
    found: Decoder = kind(replace(model.config, n_layers=model.config.n_layers // n))
    return found


def boundaries(model: Decoder, seq_len: int, batch: int, caps: Capabilities = ANE) -> list[Design]:
    """Every choice of kernel boundaries that the limits allow, the one that a run takes by default first."""
    found = []
    layouts = [caps.layout, *(x for x in ("packed", "ports") if x != caps.layout)]
    for layout in layouts:
        for group in (0, 1, 2):
            if group and model.config.n_layers % group:
                continue
            try:
                found.append(design_of(model, seq_len, batch, layout, caps, group))
            except Unpackable:
                continue
    return found


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
        "published packed design", units[:3], units[3:], 6.0 * (vocab or cfg.vocab_size) * d * s, linear,
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
             host_tflops: tuple[float, float] = NEON_TFLOPS) -> dict[str, Any]:  # fmt: skip
    """The report of `anert estimate`. Raises InputError for an unknown chip."""
    if chip not in CHIPS:
        raise InputError(f"--chip {chip}: no published figures of it; there are {', '.join(CHIPS)}")
    if not model.blocks:
        raise InputError("this model has no blocks: nothing of it runs on the engine")
    c = CHIPS[chip]
    designs = boundaries(model, seq_len, batch, caps)
    if not designs:
        raise InputError("no layout carries this model's kernels on the Neural Engine: see anert lint")
    rows = [as_row(predict(d, c, host_tflops)) for d in designs]
    rows[0]["default"] = True
    best = chosen(rows)
    return {
        "chip": chip, "source": c.source, "seq_len": seq_len, "batch": batch, "host_tflops": list(host_tflops),
        "default": rows[0], "boundaries": rows, "best": best["name"],
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

    engine = e.parts["forward"] + e.parts["backward"] + e.parts["copies forward"] + e.parts["copies backward"]
    return {
        "name": e.name, "ms": row(e.total), "engine_ms": row(engine + e.parts["host elementwise"]),
        "parts": {name: row(i) for name, i in e.parts.items()}, "dispatches": e.dispatches, "flops": e.flops,
        "bytes": e.bytes, "bound_by": e.bound_by,
    }  # fmt: skip


def _unit_row(u: Unit, chip: Chip) -> dict[str, Any]:
    ms = u.ms(chip)
    return {
        "name": u.name, "dispatches": u.times, "flops": u.flops, "bytes_in": u.bytes_in, "bytes_out": u.bytes_out,
        "copied": u.copied, "best_ms": ms.best, "worst_ms": ms.worst,
        "past_sram": u.bytes_in + u.bytes_out > SRAM_MB * 1e6,
    }  # fmt: skip


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The boundaries whose engine time is predicted shortest."""
    return min(rows, key=lambda r: float(r["engine_ms"]["middle"]))
