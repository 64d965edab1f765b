"""Strided views: how reshape, transpose, slice and broadcast change where an element lies, without moving it.

A Layout places a box of indices in a buffer, in elements: offset + sum(index[d] * strides[d]). A transform is a tuple
(name, argument); `apply` gives None where strides cannot express it, and then somebody has to copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Transform = tuple[str, Any]
"""("reshape", shape) | ("transpose", perm) | ("slice", ((begin, size, step), ...)) | ("broadcast", shape)."""


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of a shape, in elements."""
    strides, step = [0] * len(shape), 1
    for d in range(len(shape) - 1, -1, -1):
        strides[d] = step
        step *= shape[d]
    return tuple(strides)


@dataclass(frozen=True, slots=True)
class Layout:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def of(cls, shape: Sequence[int]) -> Layout:
        """The row-major layout of a buffer of its own."""
        return cls(tuple(shape), contiguous(shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def is_flat(self) -> bool:
        """Whether index order is memory order, from offset 0 on (dims of 1 do not matter)."""
        return self.offset == 0 and same_strides(self.shape, self.strides, contiguous(self.shape))

    def apply(self, transform: Transform) -> Layout | None:
        """This layout after one transform, or None if it needs a copy."""
        name, arg = transform
        if name == "reshape":
            return self._reshape(arg)
        if name == "transpose":
            return Layout(tuple(self.shape[p] for p in arg), tuple(self.strides[p] for p in arg), self.offset)
        if name == "slice":
            offset = self.offset + sum(b * s for (b, _, _), s in zip(arg, self.strides, strict=True))
            strides = tuple(s * step for (_, _, step), s in zip(arg, self.strides, strict=True))
            return Layout(tuple(n for _, n, _ in arg), strides, offset)
        assert name == "broadcast", name
        lead = len(arg) - len(self.shape)
        own = (0,) * lead + tuple(0 if d == 1 else s for d, s in zip(self.shape, self.strides, strict=True))
        return Layout(tuple(arg), own, self.offset)

    def _reshape(self, shape: tuple[int, ...]) -> Layout | None:
        """Match runs of old dims with runs of new ones of the same product; each old run must be contiguous."""
        old = [(d, s) for d, s in zip(self.shape, self.strides, strict=True) if d != 1]
        strides = [0] * len(shape)
        new = [i for i, d in enumerate(shape) if d != 1]
        i = j = 0
        while j < len(new):
            have, need = old[i][0], shape[new[j]]
            i0, j0 = i, j
            while have != need:
                if have < need:
                    i += 1
                    have *= old[i][0]
                else:
                    j += 1
                    need *= shape[new[j]]
            if any(old[k][1] != old[k + 1][1] * old[k + 1][0] for k in range(i0, i)):
                return None
            step = old[i][1]
            for k in range(j, j0 - 1, -1):
                strides[new[k]] = step
                step *= shape[new[k]]
            i, j = i + 1, j + 1
        return Layout(tuple(shape), tuple(strides), self.offset)

    def split(self, dims: Sequence[int]) -> tuple[int, ...] | None:
        """Strides of the same elements over `dims`, a finer factorisation of the shape; None if it is not one."""
        strides, at = [0] * len(dims), 0
        for extent, stride in zip(self.shape, self.strides, strict=True):
            if extent == 1:
                continue
            left = extent
            first = at
            while left > 1:
                if at >= len(dims) or left % dims[at]:
                    return None
                left //= dims[at]
                at += 1
            step = stride
            for k in range(at - 1, first - 1, -1):
                strides[k] = step
                step *= dims[k]
        return tuple(strides) if all(d == 1 for d in dims[at:]) else None


def same_strides(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two strides address alike; dims of 1 do not matter."""
    return all(d == 1 or x == y for d, x, y in zip(shape, a, b, strict=True))


def refine(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    """The coarsest shape that both shapes are merges of, without dims of 1; None if they have none."""
    xs, ys = [d for d in a if d != 1], [d for d in b if d != 1]
    out: list[int] = []
    i = j = 0
    x = xs[0] if xs else 1
    y = ys[0] if ys else 1
    while i < len(xs) and j < len(ys):
        small, large = min(x, y), max(x, y)
        if large % small:
            return None
        out.append(small)
        x //= small
        y //= small
        if x == 1:
            i += 1
            x = xs[i] if i < len(xs) else 1
        if y == 1:
            j += 1
            y = ys[j] if j < len(ys) else 1
    return tuple(out) if i == len(xs) and j == len(ys) and x == y == 1 else None
