"""Head: embedding, final norm, classifier and cross-entropy, with their backward; native, outside MIL (32,000 channels
exceed the engine's widths, and logits want fp32)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from anert import ffi
from anert.errors import InputError
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
        self._held: dict[int, tuple[np.ndarray, Any]] = {}
        self._loss, self._count = ffi.ffi.new("double *"), ffi.ffi.new("int64_t *")
        self._change, self._err = ffi.ffi.new("double *"), ffi.error()

    @staticmethod
    def _fp16(p: Param) -> Any:
        """The dense fp16 copy of a parameter: its caller placed one, or it is given so."""
        if p.given is not None:
            return ffi.ffi.cast("uint16_t *", p.given.ptr)
        for surface, slot in p.placements:
            if slot.dense:
                return ffi.ffi.cast("uint16_t *", surface.ptr)
        raise AssertionError(f"{p.name} has no dense copy")

    @property
    def flops(self) -> int:
        """Of loss and backward: three GEMMs (vocab, n, dim)."""
        return 3 * 2 * self.vocab * self.dim * self.n

    def hold(self, *ids: np.ndarray) -> None:
        """Take the addresses of arrays that are given to the next calls, int32 (n,): a step does that once, for
        all of them. InputError for another type or size."""
        for array in ids:
            if array.dtype != np.int32 or array.shape != (self.n,) or not array.flags.c_contiguous:
                raise InputError(f"expected {self.n} contiguous int32 ids, got {array.dtype} {array.shape}")
        self._held = {id(array): (array, ffi.ffi.from_buffer("int32_t[]", array)) for array in ids}

    def _address(self, ids: np.ndarray) -> Any:
        if id(ids) not in self._held:
            self.hold(ids)
        return self._held[id(ids)][1]

    def embed(self, tokens: np.ndarray, x: Location) -> None:
        """x (dim, n) = columns of the embedding. `tokens`: see `hold`."""
        call(ffi.lib.anert_embed, self.pool.ptr, self.table, self.embedding.rows, self.embedding.cols,
             self._address(tokens), self.n, x.pointer, x.slot.row_stride, err=self._err)  # fmt: skip
        x.surface.touch()

    def embeds(self, args: Any, tokens: np.ndarray, x: Location) -> None:
        """What `embed` is given, in the fields of an anert_positions; `tokens` must live as long."""
        args.table, args.vocab, args.dim, args.n = self.table, self.embedding.rows, self.embedding.cols, self.n
        args.tokens, args.x, args.x_stride = self._address(tokens), x.pointer, x.slot.row_stride

    def embed_backward(self, tokens: np.ndarray, dx: Location, alpha: float) -> None:
        """Embedding gradient += alpha * dx, scattered by token; its sum of squares, where that is known, follows."""
        call(ffi.lib.anert_embed_backward, self.pool.ptr, alpha, dx.pointer, dx.slot.row_stride,
             self._address(tokens), self.n, self.embedding.rows, self.embedding.cols,
             self.embedding.record.grad, self._change, err=self._err)  # fmt: skip
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
        a.targets = self._address(targets)
        a.x, a.x_stride, a.loss_scale, a.grad_alpha = x.pointer, x.slot.row_stride, scale, 1.0
        if dx is None:
            a.dx = a.dgain = a.dtable = ffi.ffi.NULL
        else:
            a.dx, a.dx_stride, a.dtable = dx.pointer, dx.slot.row_stride, self.output.record.grad
            if self.norm is not None:
                a.dgain = self.norm.record.grad
        call(ffi.lib.anert_head_loss, self.pool.ptr, a, self._loss, self._count, err=self._err)
        if dx is not None:
            dx.surface.touch()
        return self._loss[0], self._count[0]

    def classifies(self, x: Location) -> Any:
        """The native arguments of `logits`."""
        self.args.x, self.args.x_stride = x.pointer, x.slot.row_stride
        return self.args

    def logits(self, x: Location, columns: np.ndarray) -> np.ndarray:
        """fp32 logits (len(columns), vocab) of these positions."""
        a = self.classifies(x)
        columns = np.ascontiguousarray(columns, np.int32)
        out = np.empty((columns.size, self.vocab), np.float32)
        with x.surface.access(read_only=True):
            call(ffi.lib.anert_head_logits, self.pool.ptr, a, ffi.ffi.from_buffer("int32_t[]", columns),
                 columns.size, ffi.ffi.from_buffer("float[]", out), err=self._err)  # fmt: skip
        return out
