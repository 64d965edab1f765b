"""Layers as compositions of MIL ops, in forms known to work on the Neural Engine (ane_facts 3.5): no slices by width,
no `rsqrt`, no `reduce_mean`, explicit additive masks. Values are fp16-typed, (C, T): channels by positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anert.errors import ShapeError
from anert.mil import ops
from anert.mil.graph import Function, Value

MASKED = -30000.0
"""Added to a masked attention score: exp underflows to exactly 0, and it stays finite in fp16 with a score beside
it."""


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x as a sum of two fp16 arrays, to 2^-24 of it: what fp16 holds of it, and of the rest."""
    high = x.astype(np.float16)
    return high, (x - high).astype(np.float16)


class Positions:
    """Where the T columns of a block's input stand: `batch` sequences of `seq_len`, one after another (N = batch *
    seq_len).

    In training the rotation tables and the causal mask are constants of the program, made once per Function.
    """

    def __init__(self, seq_len: int, batch: int = 1, theta: float = 10000.0) -> None:
        self.seq_len, self.batch, self.theta = seq_len, batch, theta
        self._consts: dict[tuple[int, str, int], Value] = {}

    def _const(self, fn: Function, kind: str, size: int, make: np.ndarray) -> Value:
        key = (id(fn), kind, size)
        value = self._consts.get(key)
        if value is None or value.function is not fn:
            value = self._consts[key] = fn.const(make, "fp16", kind)
        return value

    def angles(self, head_dim: int) -> np.ndarray:
        """(head_dim, T): channels 2i and 2i+1 turn by position * theta^(-2i/head_dim) (Su et al. 2021)."""
        frequency = self.theta ** (-np.arange(0, head_dim, 2) / head_dim)
        return np.repeat(np.outer(frequency, np.arange(self.seq_len)), 2, axis=0)

    def rotation(self, fn: Function, head_dim: int) -> tuple[Value, Value]:
        """cos and sin of `angles`, each (head_dim, N), a sum of two fp16 constants: rounded to one, they alone put
        logits off by 2e-3 of the largest where the interior is fp32."""
        angle = np.tile(self.angles(head_dim), (1, self.batch))  # (hd, N)
        return self._sum(fn, "cos", head_dim, np.cos(angle)), self._sum(fn, "sin", head_dim, np.sin(angle))

    def _sum(self, fn: Function, kind: str, size: int, make: np.ndarray) -> Value:
        """The sum of the two halves of `make`."""
        key = (id(fn), kind, size)
        value = self._consts.get(key)
        if value is None or value.function is not fn:
            high, low = halves(make)
            value = self._consts[key] = ops.add(
                fn.const(high, "fp16", f"{kind}_high"), fn.const(low, "fp16", f"{kind}_low"), name=kind
            )
        return value

    def mask(self, fn: Function) -> Value:
        """(T, T) additive: 0 where key <= query, MASKED above the diagonal."""
        t = self.seq_len
        return self._const(fn, "mask", t, np.triu(np.full((t, t), MASKED), 1))

    def past(self, k: Value, v: Value) -> Past | None:
        """What `causal_attention` sees beside k and v (KV, hd, N): nothing in training."""
        return None


class LonePositions(Positions):
    """T positions that do not see each other: attention passes on what each has. For finding out whether anything else
    in a block lets them."""


@dataclass(frozen=True, slots=True)
class Past:
    """Earlier positions as inputs: k and v (KV * hd, S), mask (1, S) additive: 0 where a position is, else MASKED."""

    k: Value
    v: Value
    mask: Value


class CachedPositions(Positions):
    """T positions of one sequence behind up to S cached ones: where they stand is an input, not a constant.

    Rotation tables become the inputs `cos<hd>`, `sin<hd>` (2 hd, T): `halves`, one above the other. The cache of the
    n-th attention of a block becomes the inputs `k<n>`, `v<n>` (KV * hd, S) and `past` (1, S), and its new keys and
    values the outputs `k<n>_new`, `v<n>_new` (KV * hd, T).
    """

    def __init__(self, seq_len: int, cached: int, theta: float = 10000.0) -> None:
        super().__init__(seq_len, 1, theta)
        self.cached = cached
        self.outputs: dict[str, Value] = {}
        self._inputs: dict[str, Value] = {}
        self._sums: dict[str, Value] = {}

    def _input(self, fn: Function, name: str, shape: tuple[int, int]) -> Value:
        if name not in self._inputs:
            self._inputs[name] = fn.input(name, shape)
        return self._inputs[name]

    def rotation(self, fn: Function, head_dim: int) -> tuple[Value, Value]:
        cos, sin = (self._halved(fn, f"{name}{head_dim}", head_dim) for name in ("cos", "sin"))
        return cos, sin

    def _halved(self, fn: Function, name: str, head_dim: int) -> Value:
        """The sum (1, head_dim, T) of an input's two halves."""
        if name not in self._sums:
            x = self._input(fn, name, (2 * head_dim, self.seq_len))
            parts = ops.reshape(x, shape=(2, head_dim, self.seq_len))
            self._sums[name] = ops.reduce_sum(parts, axes=(0,), keep_dims=True)
        return self._sums[name]

    def past(self, k: Value, v: Value) -> Past:
        fn, n, rows = k.function, len(self.outputs) // 2, k.shape[0] * k.shape[1]
        self.outputs |= {f"k{n}_new": merge(k), f"v{n}_new": merge(v)}
        shape = (rows, self.cached)
        return Past(
            self._input(fn, f"k{n}", shape), self._input(fn, f"v{n}", shape), self._input(fn, "past", (1, self.cached))
        )


def _mean(x: Value, whole: int = 1) -> Value:
    """Over channels (1, T), the mean of what x is a `whole`th of, by one division: x (C, T)."""
    return ops.real_div(ops.reduce_sum(x, axes=(0,), keep_dims=True), x.shape[0] / whole)


def _normed(x: Value, eps: float) -> tuple[Value, Value, Value]:
    """x r with r = 1 / sqrt(mean(x^2) + eps) over channels, x / 16, and r (1, T).

    Squares are taken of x / 16 and their sum divided by C / 256, both exact: 768 squared activations of 10 already pass
    65504.
    """
    small = x * 0.0625
    r = ops.pow(_mean(small * small, 256) + eps, -0.5)
    return x * r, small, r


def _rmsnorm_slope(n: Value, dn: Value, values: tuple[Value, ...]) -> tuple[Value | None, ...]:
    """dx = r dn - n r mean(dn n) with n = x r, from x, x / 16 and r.

    The rules of its ops one after the other would form the cube of r, which is 50 for a fresh embedding. Here the
    largest intermediate is the sum of dn n / 16, taken as (r dn) (x / 16), so that it costs no op of its own.
    """
    _, small, r = values
    dx = dn * r
    return dx - n * (_mean(dx * small, 16) * r), None, None


def _layernorm_slope(n: Value, dn: Value, values: tuple[Value, ...]) -> tuple[Value | None, ...]:
    """dx = dc - mean(dc), with dc the gradient of the centred x, of which `values` has the sixteenth."""
    dc, *_ = _rmsnorm_slope(n, dn, values)
    assert dc is not None
    return dc - _mean(dc * 0.0625, 16), None, None


def _check_gain(kind: str, x: Value, gain: Value) -> None:
    if gain.shape != (x.shape[0], 1):
        raise ShapeError(f"{kind}: gain is {gain.shape}, x {x.shape} needs ({x.shape[0]}, 1)")


def rmsnorm(x: Value, gain: Value, eps: float = 1e-5) -> Value:
    """x / sqrt(mean(x^2) + eps) * gain over channels (Zhang & Sennrich 2019). x (C, T), gain (C, 1) -> (C, T)."""
    _check_gain("rmsnorm", x, gain)
    n, small, r = _normed(x, eps)
    return x.function.custom_vjp(n, (x, small, r), _rmsnorm_slope) * gain


def layernorm(x: Value, gain: Value, bias: Value, eps: float = 1e-5) -> Value:
    """(x - mean) / sqrt(var + eps) * gain + bias over channels (Ba et al. 2016). x (C, T); gain, bias (C, 1)."""
    _check_gain("layernorm", x, gain)
    n, small, r = _normed(x - _mean(x), eps)
    return x.function.custom_vjp(n, (x, small, r), _layernorm_slope) * gain + bias


def silu(x: Value) -> Value:
    """x * sigmoid(x), elementwise."""
    return x * ops.sigmoid(x)


def gelu(x: Value) -> Value:
    """Gaussian error linear unit by tanh (Hendrycks & Gimpel 2016), elementwise."""
    return ops.gelu(x, mode="TANH_APPROXIMATION")


def heads(x: Value, n_heads: int) -> Value:
    """(n * hd, N) -> (n, hd, N)."""
    c, n = x.shape
    if c % n_heads:
        raise ShapeError(f"heads: {c} channels do not divide into {n_heads} heads")
    return ops.reshape(x, shape=(n_heads, c // n_heads, n))


def merge(x: Value) -> Value:
    """(n, hd, N) -> (n * hd, N)."""
    h, d, n = x.shape
    return ops.reshape(x, shape=(h * d, n))


def rope(x: Value, pos: Positions) -> Value:
    """Rotary embedding over adjacent channel pairs (Su et al. 2021, llama2.c's order). x (n, hd, N) -> (n, hd, N);
    x itself where theta is 0.

    The pair swap (a, b) -> (-b, a) is a grouped 1x1 convolution with a constant signed permutation: no slice, no
    gather.
    """
    n, hd, width = x.shape
    if hd % 2:
        raise ShapeError(f"rope: head_dim {hd} is odd")
    if not pos.theta:
        return x
    cos, sin = pos.rotation(x.function, hd)
    swap = np.zeros((hd, hd))
    even = np.arange(0, hd, 2)
    swap[even, even + 1], swap[even + 1, even] = -1.0, 1.0
    weight = pos._const(x.function, "swap", n * hd, np.tile(swap, (n, 1))[:, :, None, None])  # (n*hd, hd, 1, 1)
    flat = ops.reshape(x, shape=(1, n * hd, 1, width))
    turned = ops.reshape(ops.conv(flat, weight, groups=n), shape=(n, hd, width))
    return x * cos + turned * sin


def causal_attention(q: Value, k: Value, v: Value, pos: Positions) -> Value:
    """softmax(q^T k / sqrt(hd) + mask) v^T per head (Vaswani et al. 2017); grouped queries where k, v have fewer heads.

    q (H, hd, N), k and v (KV, hd, N) with H a multiple of KV -> (H, hd, N). Sequences of a batch do not see each other.
    """
    h, hd, n = q.shape
    kv = k.shape[0]
    if h % kv or k.shape != v.shape or k.shape[1:] != (hd, n):
        raise ShapeError(f"attention: q {q.shape} does not go with k {k.shape}, v {v.shape}")
    t, b = pos.seq_len, pos.batch
    if n != t * b:
        raise ShapeError(f"attention: {n} positions are not {b} sequences of {t}")
    if isinstance(pos, LonePositions):
        alone = ops.reshape(q, shape=(kv, h // kv, hd, n)) + ops.reshape(v, shape=(kv, 1, hd, n))
        return ops.reshape(alone, shape=(h, hd, n))
    group = (kv, h // kv) if h != kv else (h,)

    def split(x: Value, lead: tuple[int, ...]) -> Value:
        """(.., hd, N) -> ([B,] .., hd, T)."""
        x = ops.reshape(x, shape=(*lead, hd, t) if b == 1 else (*lead, hd, b, t))
        r = len(lead)
        return x if b == 1 else ops.transpose(x, perm=(r + 1, *range(r + 1), r + 2))

    shared = group if h == kv else (kv, 1)
    past = pos.past(k, v)
    q, k, v = split(q, group), split(k, shared), split(v, shared)
    if past is not None:
        return ops.reshape(_attend(q, k, v, past, pos), shape=(h, hd, n))
    scores = ops.matmul(q, k, transpose_x=True) * (hd**-0.5) + pos.mask(q.function)  # (.., T, T)
    out = ops.matmul(v, ops.softmax(scores, axis=-1), transpose_y=True)  # (.., hd, T)
    if b != 1:
        r = len(group)
        out = ops.transpose(out, perm=(*range(1, r + 2), 0, r + 2))
    return ops.reshape(out, shape=(h, hd, n))


def _attend(q: Value, k: Value, v: Value, past: Past, pos: Positions) -> Value:
    """One softmax over cached and new keys, without joining them: no copy of the cache, no slice by width.

    q (.., hd, T), k and v (.., hd, T) -> (.., hd, T).
    """
    old_k, old_v = (ops.reshape(x, shape=(*k.shape[:-1], x.shape[1])) for x in (past.k, past.v))
    scale = q.shape[-2] ** -0.5
    old = ops.matmul(q, old_k, transpose_x=True) * scale + past.mask  # (.., T, S)
    new = ops.matmul(q, k, transpose_x=True) * scale  # (.., T, T)
    if pos.seq_len > 1:
        new = new + pos.mask(q.function)
    top = ops.maximum(ops.reduce_max(old, axes=(-1,), keep_dims=True), ops.reduce_max(new, axes=(-1,), keep_dims=True))
    old, new = ops.exp(old - top), ops.exp(new - top)
    total = ops.reduce_sum(old, axes=(-1,), keep_dims=True) + ops.reduce_sum(new, axes=(-1,), keep_dims=True)
    old, new = ops.real_div(old, total), ops.real_div(new, total)
    return ops.matmul(old_v, old, transpose_y=True) + ops.matmul(v, new, transpose_y=True)
