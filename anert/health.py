"""Health of a training run: which steps are usable, and when a run has to go back to a checkpoint."""

from __future__ import annotations

import math
from typing import Any

SETTLED = 50
"""Usable steps before the running mean says anything about a spike."""

DECAY = 0.98
"""Of the running mean and variance of the loss, a step."""

ABOVE = 1.25
"""A spike is also this much above the mean: a loss that hardly varies has a tiny deviation."""


class Health:
    """Judges each step before its update is applied. `bad`: steps in a row that were not usable.

    patience: how many of them a run may have. spike: standard deviations above the running mean of the loss that make
    a step a spike; 0: none is.
    """

    def __init__(self, patience: int, spike: float) -> None:
        self.patience, self.spike = patience, spike
        self.bad = self.steps = 0
        self.suspect = False
        """The weights may have been led astray: a step since the last usable one had no finite loss, or spiked."""
        self.mean = self.variance = 0.0

    @property
    def exhausted(self) -> bool:
        return self.bad > self.patience

    def judge(self, loss: float, finite: bool) -> str:
        """What is wrong with a step of this mean loss whose gradients are `finite`; "" where it is usable."""
        if not math.isfinite(loss):
            why = f"the loss is {loss}"
        elif not finite:
            why = "gradients overflow"
        elif self._spikes(loss):
            why = f"the loss {loss:.4g} is far above its running mean {self.mean:.4g}"
        else:
            self.bad, self.suspect = 0, False
            self._add(loss)
            return ""
        self.bad += 1
        self.suspect = self.suspect or finite or not math.isfinite(loss)
        return why

    def _spikes(self, loss: float) -> bool:
        if not self.spike or self.steps < SETTLED:
            return False
        return loss > max(self.mean + self.spike * math.sqrt(self.variance), ABOVE * self.mean)

    def _add(self, loss: float) -> None:
        """Exponential mean and variance (West 1979), exact for the first 1 / (1 - DECAY) steps."""
        self.steps += 1
        weight = max(1.0 - DECAY, 1.0 / self.steps)
        off = loss - self.mean
        self.mean += weight * off
        self.variance = (1.0 - weight) * (self.variance + weight * off * off)

    def state_dict(self) -> dict[str, float]:
        return {
            "bad": self.bad,
            "suspect": self.suspect,
            "steps": self.steps,
            "mean": self.mean,
            "variance": self.variance,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad, self.suspect, self.steps = int(state["bad"]), bool(state["suspect"]), int(state["steps"])
        self.mean, self.variance = float(state["mean"]), float(state["variance"])
