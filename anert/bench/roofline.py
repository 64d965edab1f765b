"""What no machine can do: figures above the measured peak, faster than a dispatch, or above a chip's table are refused.

The seed of this project reported 94.4 TFLOPS on an engine whose peak is about 19: every evaluate had failed at once and
nobody had read its result. `implausible` says so of any such figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anert.errors import ImplausibleError

if TYPE_CHECKING:
    from anert.bench.measure import Case, Result

SLACK = 1.05
"""A measured peak is itself a measurement."""
DISPATCH_US = 50.0
"""No evaluate on a Neural Engine is faster (measured floors: 70 to 220 us; what fails at once takes 20 to 35)."""
CHIPS = {
    "m1": (5.5, 68.0),
    "m2": (7.9, 100.0),
    "m3": (18.0, 100.0),
    "m4": (19.0, 120.0),
    "m5": (19.0, 154.0),
}
"""chip -> (fp16 TFLOPS of 16 cores that somebody measured or the rating allows, GB/s of the base model's memory)."""


def implausible(
    ms: float, flops: float = 0.0, nbytes: float = 0.0, dispatches: int = 0, peak_gflops: float = 0.0,
    peak_gbps: float = 0.0, chip: str = "",
) -> str:  # fmt: skip
    """Why a run of `ms` milliseconds that does this much cannot have happened, in a sentence; empty if it can."""
    if ms <= 0:
        return "it took no time"
    reasons = []
    tflops, gbps = flops / ms / 1e9, nbytes / ms / 1e6
    if peak_gflops and tflops * 1e3 > SLACK * peak_gflops:
        reasons.append(f"{tflops * 1e3:.0f} GFLOP/s is above {SLACK:g} times the measured peak of {peak_gflops:.0f}")
    if peak_gbps and gbps > SLACK * peak_gbps:
        reasons.append(f"{gbps:.1f} GB/s is above {SLACK:g} times the measured peak of {peak_gbps:.1f}")
    if chip:
        top, memory = CHIPS[chip]
        if tflops > SLACK * top:
            reasons.append(f"{tflops:.1f} TFLOPS is above the {top:g} that an {chip.upper()}'s engine can do")
        if gbps > SLACK * memory:
            reasons.append(f"{gbps:.0f} GB/s is above the {memory:g} of an {chip.upper()}'s memory")
    if dispatches and ms * 1e3 < dispatches * DISPATCH_US:
        floor = dispatches * DISPATCH_US / 1e3
        reasons.append(f"{dispatches} dispatches take at least {floor:g} ms: evaluates that fail at once are this fast")
    return "; ".join(reasons)


def refuse_implausible(case: Case, result: Result, peak_gflops: float) -> None:
    """Raises ImplausibleError for a result above the measured peak (0: not known), or faster than its floor."""
    from anert.bench.measure import TIMES

    seconds = result.median / TIMES[result.unit] if result.unit in TIMES else case.amount / result.median
    why = implausible(seconds * 1e3, case.flops, case.nbytes, 0, peak_gflops)
    if case.floor_us and seconds * 1e6 < case.floor_us:
        why = f"{seconds * 1e6:.1f} us is under the floor of {case.floor_us:g} us: the call did not do its work"
    if why:
        raise ImplausibleError(
            f"bench {case.name}: {why}; the figure is refused: check that every call succeeded and what it computed, "
            "and that nothing else ran while the peak was measured"
        )
