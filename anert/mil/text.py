"""Functions and Modules as canonical MIL text, in the dialect that their opset asks for; `parse` is the way back.

ios18 is printed as program(1.3), scalars as `int32(1)`; older ones as program(1.0), scalars as `tensor<int32, []>(1)`.
Layout, order of arguments and numbers are those of Apple's coremlc: parse(print_module(f)).main == f.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from anert.errors import InputError, UnsupportedError
from anert.mil.blob import storable
from anert.mil.graph import Function, Module, Op, Operand, TensorType, Value
from anert.mil.literal import format_array, format_scalar
from anert.mil.ops.table import Arg, lookup
from anert.mil.parser import parse
from anert.mil.syntax import RESERVED, parse_syntax, quote

__all__ = ["print_function", "print_module", "parse", "parse_syntax"]

BUILD_INFO: Mapping[str, str] = {
    "coremlc-component-MIL": "3510.2.1",
    "coremlc-version": "3505.4.1",
    "coremltools-component-milinternal": "",
    "coremltools-version": "9.0",
}
"""Printed where a Module has no buildInfo of its own: the engine wants the entry, whatever it says (ane_facts 3.1)."""

BLOB_THRESHOLD = 10
"""Constants of this many elements go to the weight file when there is one, as coremltools does it."""


class Weights(Protocol):
    """Where large constants go: `blob.BlobWriter` (one file) or `blob.BlobDirectory` (a file each)."""

    def place(self, name: str, array: np.ndarray) -> tuple[str, int]: ...


def print_module(module: Module | Function, blobs: Weights | None = None, blob_threshold: int = BLOB_THRESHOLD) -> str:
    """A whole program as MIL text. With `blobs`, constants of `blob_threshold` elements or more are placed there.

    Raises InputError for names that MIL cannot spell and for functions without outputs."""
    functions = [module] if isinstance(module, Function) else list(module.functions.values())
    if not functions:
        raise InputError("a program needs a function: this Module has none")
    modern = any(f.opset == "ios18" for f in functions)
    string = "string" if modern else "tensor<string, []>"
    info = (module.build_info if isinstance(module, Module) else None) or BUILD_INFO
    entries = ", ".join(f"{{{quote(k)}, {quote(v)}}}" for k, v in info.items())
    lines = [
        f"program({'1.3' if modern else '1.0'})",
        f"[buildInfo = dict<{string}, {string}>({{{entries}}})]",
        "{",
        *(_Printer(f, modern, blobs, blob_threshold).text() for f in functions),
        "}",
    ]
    return "\n".join(lines)


def print_function(function: Function, blobs: Weights | None = None, blob_threshold: int = BLOB_THRESHOLD) -> str:
    """One function as it stands inside a program: `    func main<ios18>(...) {...} -> (...);`."""
    return _Printer(function, function.opset == "ios18", blobs, blob_threshold).text()


class _Printer:
    def __init__(self, function: Function, modern: bool, blobs: Weights | None, threshold: int) -> None:
        self.function, self.modern, self.blobs, self.threshold = function, modern, blobs, threshold
        self.lines: list[str] = []
        self.names = {v.name for v in function.inputs}
        self.names.update(v.name for op in function.ops for v in op.outputs)
        self.labels: set[str] = set()
        self.constants: dict[tuple[str, str], str] = {}
        """(type, literal) -> the constant's name: equal attributes share one."""

    def text(self) -> str:
        f = self.function
        if not f.outputs:
            raise InputError(f"function {f.name!r} has no outputs: call returns()")
        for name in (f.name, f.opset, *self.names):
            if not (name.isascii() and name.isidentifier()) or name in RESERVED:
                raise InputError(f"{name!r} is not a name in MIL text: letters, digits, _, and no reserved word")
        for op in f.ops:
            self.const(op) if op.kind == "const" else self.op(op)
        params = ", ".join(f"{self.type(v.type)} {v.name}" for v in f.inputs)
        outputs = ", ".join(v.name for v in f.outputs)
        body = "".join(f"            {line};\n" for line in self.lines)
        return f"    func {f.name}<{f.opset}>({params}) {{\n{body}        }} -> ({outputs});"

    def const(self, op: Op) -> None:
        array, type = op.attrs["val"], self.type(op.out.type)
        literal = ""
        if self.blobs is not None and array.size >= self.threshold and storable(op.out.dtype):
            path, offset = self.blobs.place(op.out.name, array)
            string, number = self.scalar_type("string"), self.scalar_type("uint64")
            literal = f"BLOBFILE(path = {string}({quote(path)}), offset = {number}({offset}))"
        else:
            literal = format_array(array, op.out.dtype)
        self.lines.append(f"{type} {op.out.name} = const()[name = {self.label(op)}, val = {type}({literal})]")

    def op(self, op: Op) -> None:
        row = lookup(op.kind)
        words = {name: self.operand(v) for name, v in op.inputs.items()}
        for name in sorted(op.attrs):
            if self.printed(row.arg(name), op.attrs[name], op.kind):
                words[name] = self.attribute(op, row.arg(name), op.attrs[name])
        args = ", ".join(f"{name} = {words[name]}" for name in sorted(words))
        outputs = ", ".join(f"{self.type(v.type)} {v.name}" for v in op.outputs)
        self.lines.append(f"{outputs} = {op.kind}({args})[name = {self.label(op)}]")

    def printed(self, arg: Arg, value: Any, kind: str) -> bool:
        """Whether an attribute is written: not if it is absent, nor if the opset is older than the argument."""
        if value is None or self.function.opset >= arg.since:
            return value is not None
        if value != arg.default:
            message = (
                f"{kind}: argument {arg.name!r} = {value!r} needs {arg.since}, the function is {self.function.opset}"
            )
            raise UnsupportedError(message)
        return False

    def operand(self, operand: Operand) -> str:
        return operand.name if isinstance(operand, Value) else f"({', '.join(v.name for v in operand)})"

    def attribute(self, op: Op, arg: Arg, value: Any) -> str:
        """The name of a constant with this attribute's value, which is printed where it is first needed."""
        dtype = arg.type.replace("[]", "")
        if dtype == "fp":
            dtype = next((v.dtype for v in op.operands()), "fp16")
        if isinstance(value, tuple):
            shape = np.shape(value)
            type = f"tensor<{dtype}, [{', '.join(map(str, shape))}]>"
            literal = _nested(value, dtype)
        else:
            type, literal = self.scalar_type(dtype), format_scalar(dtype, value)
        name = self.constants.get((type, literal))
        if name is None:
            name = self.constants[type, literal] = self.unused(f"{op.out.name}_{arg.name}")
            label = self.unique(f"{op.label or op.out.name}_{arg.name}_0")
            self.lines.append(f"{type} {name} = const()[name = {label}, val = {type}({literal})]")
        return name

    def unused(self, base: str) -> str:
        n = 0
        while f"{base}_{n}" in self.names:
            n += 1
        self.names.add(f"{base}_{n}")
        return f"{base}_{n}"

    def label(self, op: Op) -> str:
        return self.unique(op.label or op.out.name)

    def unique(self, label: str) -> str:
        """A name attribute that no other statement of the function has, as a literal."""
        base, n = label, 0
        while label in self.labels:
            label, n = f"{base}_{n}", n + 1
        self.labels.add(label)
        return f"{self.scalar_type('string')}({quote(label)})"

    def type(self, type: TensorType) -> str:
        if not type.shape:
            return self.scalar_type(type.dtype)
        return f"tensor<{type.dtype}, [{', '.join(map(str, type.shape))}]>"

    def scalar_type(self, dtype: str) -> str:
        return dtype if self.modern else f"tensor<{dtype}, []>"


def _nested(value: Any, dtype: str) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_nested(v, dtype) for v in value)}]"
    return format_scalar(dtype, value)
