"""Model and Decoder: parameters, blocks and Positions; what a plugin subclasses.

A block is a plain function `block(cfg, x, w, pos) -> y` of (dim, N) values; `w.<name>` is a parameter of the layer that
it runs in. Embedding, final norm and (tied) classifier are the native head's. Backward passes are derived, never
written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from anert.errors import InputError, PluginError, ShapeError
from anert.mil.graph import Function, Value
from anert.nn import CachedPositions, LonePositions, Positions
from anert.param import Spec

Block = Callable[[Any, Value, Any, Positions], Value]


class _Weights:
    """Attribute access declares the parameter as the next input of the Function that is being traced."""

    _fn: Function
    _specs: Mapping[str, Spec]
    _block: str

    def __init__(self, fn: Function, specs: Mapping[str, Spec], block: str) -> None:
        self._fn, self._specs, self._block = fn, specs, block

    def __getattr__(self, name: str) -> Value:  # called for names that are not set yet
        if name not in self._specs:
            known = ", ".join(self._specs)
            raise PluginError(f"block {self._block!r} reads w.{name}, but layer_params has only: {known}")
        value = self._fn.input(name, self._specs[name].shape)
        setattr(self, name, value)
        return value


class Decoder:
    """A decoder-only language model: embedding, `n_layers` times `blocks`, RMSNorm, classifier (tied unless `tied` is
    False, here or in the config).

    `config` is a frozen dataclass with at least dim, n_layers, vocab_size, seq_len; norm_eps, rope_theta (0: no
    rotation), head_dim (0: dim / n_heads) and tied where they apply.
    """

    blocks: ClassVar[Sequence[Block]] = ()
    tied: bool = True
    final_norm: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        for name in ("dim", "n_layers", "vocab_size", "seq_len"):
            value = getattr(config, name, None)
            if not isinstance(value, int) or value < (0 if name == "n_layers" else 1):
                raise InputError(f"config {name} must be a positive integer, got {value!r}")
        heads = getattr(config, "n_heads", 0)
        if heads:
            kv = getattr(config, "n_kv_heads", heads)
            own = getattr(config, "head_dim", 0)
            if heads < 1 or kv < 1 or own < 0 or (not own and config.dim % heads) or heads % kv:
                raise InputError(
                    f"dim {config.dim}, n_heads {heads}, n_kv_heads {kv}: "
                    "dim must divide by n_heads (or head_dim be given) and n_heads by n_kv_heads"
                )
        self.config = config
        self.tied = bool(getattr(config, "tied", self.tied))

    def layer_params(self, cfg: Any) -> dict[str, Spec]:
        """Parameters of one layer by name; the same for all layers."""
        return {}

    def specs(self) -> dict[str, Spec]:
        """All parameters: `tok_embeddings`, `layers.<i>.<name>`, `norm`, and `output` when untied."""
        cfg = self.config
        specs = {"tok_embeddings": Spec.normal(cfg.vocab_size, cfg.dim)}
        layer = self.layer_params(cfg)
        for i in range(cfg.n_layers if self.blocks else 0):
            specs |= {f"layers.{i}.{name}": spec for name, spec in layer.items()}
        if self.final_norm:
            specs["norm"] = Spec.ones(cfg.dim)
        if not self.tied:
            specs["output"] = Spec.normal(cfg.vocab_size, cfg.dim)
        return specs

    @property
    def norm_eps(self) -> float:
        return getattr(self.config, "norm_eps", 1e-5)

    def positions(self, seq_len: int, batch: int) -> Positions:
        return Positions(seq_len, batch, getattr(self.config, "rope_theta", 10000.0))

    def trace(self, block: Block, seq_len: int, batch: int) -> Function:
        """One block as a Function: inputs `x` (dim, N) and the layer parameters that it reads; output `y` (dim, N)."""
        return self._trace(block, self.positions(seq_len, batch))

    def trace_cached(self, block: Block, seq_len: int, cached: int) -> Function:
        """The same block function for `seq_len` positions behind a cache of `cached`: see nn.CachedPositions for the
        further inputs and outputs."""
        return self._trace(block, CachedPositions(seq_len, cached, self.positions(1, 1).theta))

    def trace_alone(self, block: Block, seq_len: int) -> Function:
        """The same block function for positions that see each other nowhere but where attention would let them."""
        return self._trace(block, LonePositions(seq_len, 1, self.positions(1, 1).theta))

    def _trace(self, block: Block, pos: Positions) -> Function:
        cfg = self.config
        name = getattr(block, "__name__", "block")
        fn = Function(name)
        x = fn.input("x", (cfg.dim, pos.seq_len * pos.batch))
        y = block(cfg, x, _Weights(fn, self.layer_params(cfg), name), pos)
        if not isinstance(y, Value) or y.shape != x.shape:
            got = y.shape if isinstance(y, Value) else type(y).__name__
            raise ShapeError(f"block {name!r} must return a value of x's shape {x.shape}, got {got}")
        if y is x:
            raise PluginError(f"block {name!r} returns its input unchanged")
        outputs = {"y": y, **(pos.outputs if isinstance(pos, CachedPositions) else {})}
        for port, value in outputs.items():
            fn.claim(port, value)
        return fn.returns(*outputs.values())

    def describe(self) -> dict[str, Any]:
        """The config as plain values, for checkpoints and reports."""
        return dataclasses.asdict(self.config)
