"""Head: embedding, final norm, classifier and cross-entropy, with their backward; native, outside MIL (32,000 channels
exceed the engine's widths, and logits want fp32)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from anert import ffi
from anert.ffi import Pool, call
from anert.param import Param
from anert.surface import Heap, Surface

if TYPE_CHECKING:
    from anert.network import Location


class Head:
    """For `n` positions. `table` embeds; `output` classifies (the same Param when tied); `norm` may be None.

    Precision of the classifier's GEMMs: `bf16`, else fp32.
    """

    def __init__(self, heap: Heap, pool: Pool, embedding: Param, output: Param, norm: Param | None, eps: float,
                 n: int, precision: str) -> None:  # fmt: skip
        self.pool, self.n = pool, n
        self.embedding, self.output, self.norm = embedding, output, norm
        self.vocab, self.dim = output.rows, output.cols
        self.args: Any = ffi.ffi.new("anert_head_args *")
        a = self.args
        a.vocab, a.dim, a.n, a.norm_eps = self.vocab, self.dim, n, eps
        a.precision = ffi.lib.ANERT_BF16 if precision == "bf16" else ffi.lib.ANERT_F32
        a.gain = ffi.ffi.cast("float *", norm.master.ctypes.data) if norm is not None else ffi.ffi.NULL
        size = ffi.lib.anert_head_scratch(self.vocab, self.dim, n, pool.threads)
        self._scratch = Surface(heap, max(64, size))
        a.scratch = self._scratch.ptr
        self.table = self._fp16(embedding)
        self.classes = self._fp16(output)
        a.table = self.classes
        self._targets = np.full(n, -1, np.int32)
        a.targets = ffi.ffi.cast("int32_t *", self._targets.ctypes.data)
        self._loss, self._count = ffi.ffi.new("double *"), ffi.ffi.new("int64_t *")
        self._change, self._err = ffi.ffi.new("double *"), ffi.error()

    @staticmethod
    def _fp16(p: Param) -> Any:
        """The dense fp16 copy of a parameter: its caller placed one."""
        for surface, slot in p.placements:
            if slot.dense:
                return ffi.ffi.cast("uint16_t *", surface.ptr)
        raise AssertionError(f"{p.name} has no dense copy")

    @property
    def flops(self) -> int:
        """Of loss and backward: three GEMMs (vocab, n, dim)."""
        return 3 * 2 * self.vocab * self.dim * self.n

    def embed(self, tokens: np.ndarray, x: Location) -> None:
        """x (dim, n) = columns of the embedding. `tokens` int32 (n,), C-contiguous."""
        call(ffi.lib.anert_embed, self.pool.ptr, self.table, self.embedding.rows, self.embedding.cols,
             ffi.ffi.from_buffer("int32_t[]", tokens), self.n, x.pointer, x.slot.row_stride, err=self._err)  # fmt: skip
        x.surface.touch()

    def embed_backward(self, tokens: np.ndarray, dx: Location, alpha: float) -> None:
        """Embedding gradient += alpha * dx, scattered by token; its sum of squares, where that is known, follows."""
        grad = self.embedding.grad
        assert grad is not None
        call(ffi.lib.anert_embed_backward, self.pool.ptr, alpha, dx.pointer, dx.slot.row_stride,
             ffi.ffi.cast("int32_t *", tokens.ctypes.data), self.n, self.embedding.rows, self.embedding.cols,
             ffi.ffi.cast("float *", grad.ctypes.data), self._change, err=self._err)  # fmt: skip
        self.embedding.squares += self._change[0]

    def loss(self, x: Location, targets: np.ndarray) -> tuple[float, int]:
        """Mean cross-entropy in nats over targets >= 0, and their number."""
        return self._run(x, targets, None, 1.0)

    def loss_backward(self, x: Location, targets: np.ndarray, dx: Location, scale: float,
                      fresh: bool = False) -> tuple[float, int]:  # fmt: skip
        """The loss; dx = scale * gradient; norm and classifier gradients are added to, unscaled. `fresh`: the
        classifier's is set, whatever it held."""
        self.args.table_beta = 0.0 if fresh else 1.0
        result = self._run(x, targets, dx, scale)
        self.output.squares = self.args.table_squares
        return result

    def _run(self, x: Location, targets: np.ndarray, dx: Location | None, scale: float) -> tuple[float, int]:
        a = self.args
        np.copyto(self._targets, targets)
        a.x, a.x_stride, a.loss_scale, a.grad_alpha = x.pointer, x.slot.row_stride, scale, 1.0
        if dx is None:
            a.dx = a.dgain = a.dtable = ffi.ffi.NULL
        else:
            assert self.output.grad is not None
            a.dx, a.dx_stride = dx.pointer, dx.slot.row_stride
            a.dtable = ffi.ffi.cast("float *", self.output.grad.ctypes.data)
            if self.norm is not None and self.norm.grad is not None:
                a.dgain = ffi.ffi.cast("float *", self.norm.grad.ctypes.data)
        call(ffi.lib.anert_head_loss, self.pool.ptr, a, self._loss, self._count)
        if dx is not None:
            dx.surface.touch()
        return self._loss[0], self._count[0]

    def logits(self, x: Location, columns: np.ndarray) -> np.ndarray:
        """fp32 logits (len(columns), vocab) of these positions."""
        a = self.args
        a.x, a.x_stride = x.pointer, x.slot.row_stride
        columns = np.ascontiguousarray(columns, np.int32)
        out = np.empty((columns.size, self.vocab), np.float32)
        with x.surface.access(read_only=True):
            call(ffi.lib.anert_head_logits, self.pool.ptr, a, ffi.ffi.from_buffer("int32_t[]", columns),
                 columns.size, ffi.ffi.from_buffer("float[]", out), err=self._err)  # fmt: skip
        return out
