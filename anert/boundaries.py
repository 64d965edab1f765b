"""Where programs begin and end: every choice that an engine's limits allow, ranked by the time that a training step is
predicted to take.

    t(kernel) = dispatch floor + FLOPs / matmul rate + bytes of its ports / memory rate

Rates are intervals over what was published (ane_facts 5.3, 6.1), so a prediction is one too. The engine's and the
host's work are added where the schedule lets one wait for the other, and the longer one counts where they overlap.
Nothing here was measured by anert on a Neural Engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from anert.backend.base import written_flops
from anert.blocks import BlockKernels, build_blocks
from anert.capabilities import ANE, Capabilities, machine_key
from anert.errors import EngineRefused, InputError, Unpackable
from anert.kernel import Kernel, Slot, round_up
from anert.mil.text import parse
from anert.model import Decoder
from anert.runtime import Runtime
from anert.stages import Boundaries

Built = TypeVar("Built")


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
"""Host products on NEON: 4 performance cores at 4.4 GHz with four fp32 FMA pipes peak at 0.56; the other end is a
cautious half. Nobody has measured it."""
BLAS_TFLOPS = (0.759, 1.76)
"""Host products on the matrix unit, by Accelerate, as anert ships them: the published step's classifier (10.9 GFLOP in
14.3 ms), and libxsmm's 512^3 product on an M4 (1,755 GFLOPS, scalable.uni-jena.de/opt/sme). Nobody has measured
anert's."""


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

    @property
    def past_sram(self) -> bool:
        return self.bytes_in + self.bytes_out > SRAM_MB * 1e6

    def ms(self, chip: Chip) -> Interval:
        """Of all its dispatches."""
        ends = []
        best = chip.rate[0] if self.past_sram else chip.rate[1]
        for floor, rate in ((chip.floor[1], best), (chip.floor[0], chip.rate[0])):
            traffic = (self.bytes_in + self.bytes_out) / chip.memory / 1e6
            ends.append((floor / 1e3 + self.flops / rate / 1e9 + traffic) * self.times)
        return Interval(ends[0], ends[1])


@dataclass(slots=True)
class Design:
    """Who does what in a step. host_ms: elementwise work of the host that nothing overlaps, as published; head_flops:
    classifier with its backward; grad_flops: weight gradients; grads_beside_forward: whether those of a step may go on
    during the next forward pass."""

    name: str
    bounds: Boundaries | None = None
    """Of anert's own."""
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


def design_of(model: Decoder, seq_len: int, batch: int, bounds: Boundaries, caps: Capabilities = ANE) -> Design:
    """What a run of `model` dispatches with these boundaries.

    Raises Unpackable for a kernel that layout `packed` cannot carry, InputError for a group that does not divide.
    """
    blocks = build_blocks(model, seq_len, batch, True, bounds, caps)
    n, cfg = seq_len * batch, model.config
    runs = cfg.n_layers // max(bounds.group, 1)
    design = Design(bounds.label, bounds, head_flops=6.0 * cfg.vocab_size * cfg.dim * n)
    for block in blocks:
        width = round_up(n, caps.width_multiple)
        env = {name: Slot(name, cfg.dim, n, 0, width, 1) for name in ("x", "cot_y")}
        design.forward += [_unit(k, env, set(block.params), runs) for k in block.forward]
        design.backward += [_unit(k, env, set(block.params), runs) for k in block.backward]
        design.grad_flops += runs * _grad_flops(block, model, n)
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
    specs = model.specs()
    return sum(2.0 * specs[block.stored(0, r.param)].size * n for r in block.gradient.recipes if r.kind == "gemm")


# ---- the choice

GROUPS = (1, 2)
"""Layers in one that are tried, beside blocks apart."""
PACKED_TENSORS = 64
"""Side by side in one packed input, at most: its width is the limit that counts."""


def candidates(caps: Capabilities, layout: str = "auto", fusion: str = "auto") -> list[Boundaries]:
    """The boundaries that an engine of these capabilities may be given, the portable ones first. Separate ports only
    where a probe has found that the engine binds them in order (caps.layout), or layout asks for them.

    fusion: `auto`, `blocks` (apart, cut alike on every backend) or how many layers in one.
    """
    layouts = [layout] if layout != "auto" else ["ports", "packed"] if caps.layout == "ports" else ["packed"]
    groups = (0, *GROUPS) if fusion == "auto" else (0,) if fusion == "blocks" else (int(fusion),)
    found = []
    portable = caps.max_inputs >= ANE.max_inputs and caps.max_width >= ANE.max_width
    for name in layouts:
        if portable and 0 in groups:
            found.append(Boundaries(name))
        own = replace(ANE, max_inputs=caps.max_inputs, max_width=caps.max_width)
        if name == "packed":
            own = replace(own, max_inputs=PACKED_TENSORS)
        if fusion != "blocks" or not portable:
            found += [Boundaries(name, g, own, packable=name == "packed") for g in groups]
    return found


def ranked(model: Decoder, seq_len: int, batch: int, choices: Iterable[Boundaries], caps: Capabilities,
           chip: Chip) -> list[tuple[Design, Interval]]:  # fmt: skip
    """The designs of `choices` that can be, with the time of engine and copies: whose kernels fit the SRAM come first,
    then the shortest."""
    found = []
    for bounds in choices:
        if bounds.group and model.config.n_layers % bounds.group:
            continue
        try:
            design = design_of(model, seq_len, batch, bounds, caps)
        except Unpackable:
            continue
        found.append((design, engine_time(predict(design, chip, BLAS_TFLOPS))))
    return sorted(found, key=lambda row: (any(u.past_sram for u in row[0].units), row[1].middle))


def engine_time(e: Estimate) -> Interval:
    """Of a step: the engine's and of the copies before it, which boundaries decide."""
    p = e.parts
    return p["forward"] + p["backward"] + p["copies forward"] + p["copies backward"] + p["host elementwise"]


def chip_here() -> str:
    """The chip of this machine as CHIPS has it; `m4` where it has not."""
    found = re.search(r"\bM(\d+)\b", machine_key()["chip"])
    name = f"m{found[1]}" if found else ""
    return name if name in CHIPS else "m4"


def settle(runtime: Runtime, model: Decoder, seq_len: int, batch: int, resumed: Mapping[str, Any] | None = None) -> str:
    """Choose the boundaries of a training run on the Neural Engine, once for `runtime`, and return what was chosen and
    why, in a sentence; empty where there is nothing to choose: on other backends they are those that were asked for.

    resumed: the run that goes on, by the `state` of its checkpoint; it keeps its boundaries where the engine still
    takes them, since ports round.
    """
    if runtime.backend.name != "ane" or runtime.baked is not None or not model.blocks:
        return ""
    caps, layout, fusion = runtime.backend.capabilities, runtime.asked_layout, runtime.fusion
    choices = candidates(caps, layout, fusion)
    before = from_state(resumed["state"].get("boundaries")) if resumed else None
    if before is not None and before in choices:
        runtime.boundaries = before
        return f"kernel boundaries: {before.label}, as the run began"
    name = chip_here()
    rows = ranked(model, seq_len, batch, choices, caps, CHIPS[name])
    if not rows:
        raise InputError(
            f"--layout {layout} --fusion {fusion}: no kernels of {model.config.n_layers} layers within "
            f"{caps.max_inputs} inputs and a width of {caps.max_width}: see anert lint"
        )
    design, time = rows[0]
    assert design.bounds is not None
    runtime.boundaries = design.bounds
    others = f", of {len(rows)} choices" if len(rows) > 1 else ""
    text = f"kernel boundaries: {design.name}: {time.best:.0f} to {time.worst:.0f} ms a step{others} on paper"
    if layout == "auto" and caps.layout != "ports":
        text += f" ({name}); separate ports wait for `anert doctor` to find that the engine binds them in order"
    else:
        text += f" ({name})"
    return text


def accepted(runtime: Runtime, build: Callable[[], Built]) -> tuple[Built, str]:
    """What `build` compiles on the runtime. Where the engine refuses kernels of boundaries chosen on paper, it
    is built again with those that every backend has, and a sentence says so; those that were asked for are not changed.

    Raises EngineRefused.
    """
    chosen = runtime.boundaries
    try:
        return build(), ""
    except EngineRefused as error:
        if runtime.fusion != "auto" or chosen.portable:
            raise
        runtime.boundaries = Boundaries(chosen.layout)
        text = f"kernel boundaries: the engine refuses {chosen.label} ({error}): {runtime.boundaries.label} instead"
    return build(), text


def to_state(bounds: Boundaries) -> dict[str, Any]:
    """For a checkpoint: what decides where ports round."""
    limits = bounds.limits
    return {
        "layout": bounds.layout, "group": bounds.group, "packable": bounds.packable, "max_inputs": limits.max_inputs,
        "max_width": limits.max_width,
    }  # fmt: skip


def from_state(found: Any) -> Boundaries | None:
    """The Boundaries that an engine's run was saved with; None for what is none."""
    try:
        limits = replace(ANE, max_inputs=int(found["max_inputs"]), max_width=int(found["max_width"]))
        return Boundaries(str(found["layout"]), int(found["group"]), limits, bool(found["packable"]))
    except (KeyError, TypeError, ValueError):
        return None
