"""Optimizers: one fused native pass over a Param, reading gradient and moments, writing master and every fp16 copy;
and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from anert import ffi
from anert.errors import InputError, PluginError, StateError
from anert.ffi import call
from anert.param import Param, ParamStore
from anert.surface import locked

Schedule = Callable[[int], float]


def warmup_cosine(lr: float, min_lr: float, warmup: int, steps: int) -> Schedule:
    """lr(step) for optimizer steps 0, 1, ...: linear to `lr` over `warmup` steps, then a half cosine to `min_lr` at
    `steps`."""

    def at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * progress))

    return at


class Optimizer:
    """Base: `step` updates every Param of a store; subclasses say in `update` how some of them are.

    `args`: `lr`, `grad_scale`, `beta1`, `beta2`, `eps`, `weight_decay`, and `bias1`, `bias2` (1 - beta^t) of the step
    that has begun; `t`: its number, 1 at first.
    """

    name = ""

    def __init__(self, store: ParamStore, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
        for label, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 <= beta < 1.0:
                raise InputError(f"{label} must be in [0, 1), got {beta}")
        if type(self).update is Optimizer.update:
            raise PluginError(
                f"optimizer {type(self).__name__} has no update(params), by which weights change: write one"
            )
        if store.table is None:
            raise StateError("an optimizer updates the Params of a store that is made to train: pass train=True")
        self.store, self.t, self.clamped = store, 0, 0
        self._all = tuple(store.values())
        names = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        self.args = ffi.ffi.new("anert_adamw_args *", names)
        self._table, self._err = ffi.ffi.new("anert_param[]", len(store)), ffi.error()
        self._clamped = ffi.ffi.new("uint64_t *")
        self._sum, self._squares = ffi.ffi.new("double *"), ffi.ffi.from_buffer("double[]", store.squares)

    def grad_norm(self) -> tuple[float, bool]:
        """Global L2 norm of the gradients (float64 sum in fixed order), and whether all are finite. Reads those alone
        that were not summed up when they were written."""
        store = self.store
        call(ffi.lib.anert_grad_squares, store.pool.ptr, store.table, len(store), self._squares, self._sum,
             err=self._err)  # fmt: skip
        total = self._sum[0]
        return math.sqrt(total) if total >= 0 else math.nan, math.isfinite(total)

    def step(self, lr: float, grad_scale: float) -> int:
        """Update all Params with gradients times `grad_scale`; returns how many weights were clamped on their way to
        fp16."""
        self.begin(lr, grad_scale)
        self.apply(self._all)
        return self.clamped

    def begin(self, lr: float, grad_scale: float) -> None:
        """Begin a step: every Param is then to be given to `apply` once, in any order."""
        self.t += 1
        a = self.args
        a.lr, a.grad_scale = lr, grad_scale
        a.bias1, a.bias2 = 1.0 - a.beta1**self.t, 1.0 - a.beta2**self.t
        self.clamped = 0

    def apply(self, params: Sequence[Param]) -> None:
        """Update some Params in the step that has begun, and count in `clamped`."""
        written = self.store.shared if params is self._all else dict.fromkeys(s for p in params for s in p.shared)
        with locked(list(written)):
            self.update(params)
        self.clamped += self._clamped[0]

    def update(self, params: Sequence[Param]) -> None:
        """Change masters (`p.master`, by `p.grad` times `args.grad_scale`, with `p.m` and `p.v` as moments) and write
        their copies: what a subclass says. One in Python ends with `write_copies(params)`."""
        raise NotImplementedError

    def write_copies(self, params: Sequence[Param]) -> None:
        """Write the masters of some Params to every fp16 copy that programs read."""
        self._run(ffi.lib.anert_params_sync, params)

    def _run(self, native: Callable[..., int], params: Sequence[Param], *settings: Any) -> None:
        table = self.store.table
        if params is not self._all:
            table = self._table
            for i, p in enumerate(params):
                table[i] = p.record[0]
        call(native, self.store.pool.ptr, table, len(params), *settings, self._clamped, err=self._err)


class AdamW(Optimizer):
    """m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w -= lr (m^ / (sqrt(v^) + eps) + wd w) (Loshchilov & Hutter 2019)."""

    name = "adamw"

    def update(self, params: Sequence[Param]) -> None:
        self._run(ffi.lib.anert_adamw, params, self.args[0])


class Lion(Optimizer):
    """w -= lr (sign(b1 m + (1-b1) g) + wd w); m = b2 m + (1-b2) g (Chen et al. 2023)."""

    name = "lion"

    def update(self, params: Sequence[Param]) -> None:
        self._run(ffi.lib.anert_lion, params, self.args[0])


OPTIMIZERS: dict[str, type[Optimizer]] = {c.name: c for c in (AdamW, Lion)}


class LossScale:
    """Dynamic loss scale (Micikevicius et al. 2018): halved when a step overflows, doubled after `window` good ones.

    A scale given as a number stays. It changes between optimizer steps only.
    """

    def __init__(self, value: str = "dynamic", window: int = 500) -> None:
        self.dynamic = value == "dynamic"
        self.window, self.good = window, 0
        try:
            self.scale = 1024.0 if self.dynamic else float(value)
        except ValueError:
            raise InputError(f"--loss-scale takes `dynamic` or a number, got {value!r}") from None
        if not self.scale > 0 or math.isinf(self.scale):
            raise InputError(f"--loss-scale must be a positive number, got {value!r}")

    def update(self, finite: bool) -> None:
        if not self.dynamic:
            return
        if not finite:
            self.scale, self.good = max(self.scale / 2, 2.0**-14), 0
        else:
            self.good += 1
            if self.good >= self.window:
                self.scale, self.good = min(self.scale * 2, 2.0**24), 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.good = float(state["scale"]), int(state["good"])
