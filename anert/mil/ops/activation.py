"""Activations: functions of one element that networks put between layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anert.mil.graph import Op, TensorType, Value
from anert.mil.ops.build import FLOAT, Arrays, Attrs, choice, differentiable, one, one_dtype, tensor, times
from anert.mil.ops.core import greater, select
from anert.mil.ops.elementwise import erf, exp, unary
from anert.mil.ops.table import Arg, OpDef, Types, define


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))


def _silu_grad(x: Value, y: Value, dout: Value) -> Value:
    """s + y (1 - s), with s = sigmoid(x) and y = x s."""
    s = sigmoid(x)
    return times(dout, s + y * (1.0 - s))


sigmoid = unary("sigmoid", _sigmoid, lambda x, y, dout: times(dout, y * (1.0 - y)), "1 / (1 + exp(-x)).")
tanh = unary("tanh", np.tanh, lambda x, y, dout: times(dout, 1.0 - y * y), "The hyperbolic tangent.")
relu = unary("relu", lambda x: np.maximum(x, 0.0), lambda x, y, dout: select(greater(x, 0.0), dout, 0.0), "max(x, 0).")
silu = unary("silu", lambda x: x * _sigmoid(x), _silu_grad, "x * sigmoid(x).", decompose=lambda x: x * sigmoid(x))
softplus = unary(
    "softplus", lambda x: np.logaddexp(0.0, x), lambda x, y, dout: times(dout, sigmoid(x)), "log(1 + exp(x))."
)  # fmt: skip


def _leaky_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    return [tensor("leaky_relu", one_dtype("leaky_relu", types, ("x",), FLOAT), types["x"].shape)]


def _leaky_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x, dout = op.inputs["x"], douts[0]
    assert isinstance(x, Value) and dout is not None
    return {"x": select(greater(x, 0.0), dout, dout * op.attrs["alpha"]) if differentiable(x) else None}


define(
    OpDef(
        "leaky_relu",
        (Arg("x"), Arg("alpha", "attr", "fp")),
        _leaky_infer,
        lambda i, a: np.where(i["x"] >= 0.0, i["x"], i["x"] * a["alpha"]),
        _leaky_grad,
    )
)


def leaky_relu(x: Value, alpha: float = 0.01, *, name: str | None = None) -> Value:
    """x where it is positive, else alpha * x."""
    return one("leaky_relu", {"x": x}, {"alpha": alpha}, name)


# gelu: x times the normal distribution's cumulative function, or one of two approximations (arXiv:1606.08415)

GELU_MODES = ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715
_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _gelu_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    choice("gelu", "mode", attrs["mode"], GELU_MODES)
    return [tensor("gelu", one_dtype("gelu", types, ("x",), FLOAT), types["x"].shape)]


def _gelu_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    x = inputs["x"]
    if attrs["mode"] == "EXACT":
        gate = 0.5 * _erfc(-x / math.sqrt(2.0))
    elif attrs["mode"] == "TANH_APPROXIMATION":
        gate = _sigmoid(2.0 * _SQRT_2_OVER_PI * (x + _CUBIC * x**3))  # 0.5 (1 + tanh u) = sigmoid(2 u)
    else:
        gate = _sigmoid(1.702 * x)
    return np.asarray(x * gate)


def _gelu_gate(x: Value, mode: str) -> Value:
    """What gelu multiplies x by."""
    if mode == "EXACT":
        return (erf(x * math.sqrt(0.5)) + 1.0) * 0.5
    if mode == "TANH_APPROXIMATION":
        return (tanh((x + x * x * x * _CUBIC) * _SQRT_2_OVER_PI) + 1.0) * 0.5
    return sigmoid(x * 1.702)


def _gelu_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """gate + x d(gate)/dx."""
    x, mode, dout = op.inputs["x"], op.attrs["mode"], douts[0]
    assert isinstance(x, Value) and dout is not None
    if not differentiable(x):
        return {"x": None}
    gate = _gelu_gate(x, mode)
    if mode == "EXACT":
        slope = exp(x * x * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))
    elif mode == "TANH_APPROXIMATION":
        inner = (x * x * (3.0 * _CUBIC) + 1.0) * (2.0 * _SQRT_2_OVER_PI)
        slope = gate * (1.0 - gate) * inner  # (1 - tanh^2) / 2 = 2 gate (1 - gate)
    else:
        slope = gate * (1.0 - gate) * 1.702
    return {"x": times(dout, gate + x * slope)}


define(
    OpDef(
        "gelu",
        (Arg("x"), Arg("mode", "attr", "string", "EXACT")),
        _gelu_infer,
        _gelu_numpy,
        _gelu_grad,
        category="composite",
        decompose=lambda inputs, attrs: inputs["x"] * _gelu_gate(inputs["x"], attrs["mode"]),
        native=frozenset({"ane"}),
    )
)


def gelu(x: Value, mode: str = "EXACT", *, name: str | None = None) -> Value:
    """The Gaussian error linear unit; mode is EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION."""
    return one("gelu", {"x": x}, {"mode": mode}, name)
