"""Gradients of weights out of what programs leave behind: by one native call each, alone or as a link of a Chain."""

from __future__ import annotations

from typing import Any

from anert.ffi import Pool, call, error, load

GEMM, ROWSUM, ADD = 0, 1, 2
"""anert_gradient's kinds."""


class WeightGradient:
    """dw (m, n), fp32 and contiguous at the float * `dw`, gains alpha times what `kind` makes of k positions.

    GEMM: a (m, k) b (k, n). ROWSUM: the sum over positions of tap a (m, k), None for ones, times cotangent b (m, k).
    ADD: the cotangent b (m, n). Operands are anert_matrix. precision: of a GEMM, ANERT_BF16 or ANERT_F32.

    native: the anert_gradient. Whoever binds it sets `first` where it is the first of a step to write dw: it sets it
    then, whatever it held, in a run that is `fresh`; and for a GEMM `squares`, where the sum of squares of dw is
    wanted.
    """

    __slots__ = ("_err", "_pool", "_run", "flops", "native")

    def __init__(self, pool: Pool, kind: int, dw: Any, shape: tuple[int, int], k: int, a: Any, b: Any,
                 precision: int = 0) -> None:  # fmt: skip
        module = load()
        self.native = module.ffi.new("anert_gradient *")
        g = self.native
        g.kind, g.precision, g.dw, (g.m, g.n), g.k, g.b = kind, precision, dw, shape, k, b
        if a is not None:
            g.a = a
        self.flops = 2 * shape[0] * shape[1] * k if kind == GEMM else 0
        """Of a run, multiply-adds as 2."""
        self._pool, self._run, self._err = pool, module.lib.anert_gradient_run, error()

    def run(self, alpha: float, fresh: bool) -> None:
        """Raises InputError where the operands' strides cannot be."""
        call(self._run, self._pool.ptr, self.native, alpha, fresh, err=self._err)
