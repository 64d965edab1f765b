"""MIL text -> Module: the syntax tree's statements become ops through the op table, with line:column in every error.

Constant arguments (axes, modes, epsilon) become attributes of their op and their `const` statements vanish; constants
that are data stay `const` ops. Names of values are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from anert.errors import AnertError, InputError, MILSyntaxError, ShapeError, UnsupportedError
from anert.mil import literal
from anert.mil.blob import read_blob, storable
from anert.mil.graph import DTYPES, Function, Module, Operand, TensorType, Value
from anert.mil.ops.table import Arg, OpDef, emit, lookup
from anert.mil.syntax import (
    ArgSyntax,
    Blob,
    Compound,
    Formal,
    FunctionSyntax,
    Program,
    Statement,
    Typed,
    TypeSyntax,
    parse_syntax,
    unquote,
)

MAX_RANK = 32
_OPSET = re.compile(r"ios1[3-8]")


def parse(
    text: str, source: str = "<mil>", blobs: Mapping[str, bytes] | None = None, placeholders: bool = False
) -> Module:
    """The Module that a MIL text spells; `blobs` maps BLOBFILE paths, as written, to the files' contents. With
    `placeholders`, constants of files that are not there are zeros (of one element's memory): enough to look at types.

    Raises MILSyntaxError (grammar, unknown or repeated names), ShapeError (an op's arguments, or declared types that
    differ from inferred ones), UnsupportedError (an op outside the table, state, flexible shapes) and InputError
    (weights), all with source:line:column.
    """
    tree = parse_syntax(text, source)
    module = Module(build_info=_build_info(tree.attrs.get("buildInfo")))
    for function in tree.functions:
        module.functions[function.name] = _Builder(tree, function, blobs or {}, placeholders).build()
    return module


def _build_info(attr: Typed | None) -> dict[str, str]:
    """The entries of a buildInfo dictionary that are strings."""
    entries: dict[str, str] = {}
    if attr is not None and isinstance(attr.literal, Compound):
        for pair in attr.literal.items:
            if isinstance(pair, Compound) and len(pair.items) == 2:
                key, value = (unquote(item) if isinstance(item, str) else None for item in pair.items)
                if key is not None and value is not None:
                    entries[key] = value
    return entries


class _Const:
    """A `const` statement: its literal, converted when first asked for, and how it is used."""

    __slots__ = ("typed", "statement", "used_as_attr", "used_as_data", "constant")

    def __init__(self, typed: Typed, statement: Statement) -> None:
        self.typed, self.statement = typed, statement
        self.used_as_attr = self.used_as_data = False
        self.constant: Any = None


class _Builder:
    """One function of the tree on its way into the graph."""

    def __init__(self, tree: Program, syntax: FunctionSyntax, blobs: Mapping[str, bytes], placeholders: bool) -> None:
        self.tree, self.syntax, self.blobs, self.placeholders = tree, syntax, blobs, placeholders
        self.function = Function(syntax.name, syntax.opset)
        self.values: dict[str, Value] = {}
        self.consts: dict[str, _Const] = {}
        self.defined: set[str] = set()
        self.types: dict[TypeSyntax, TensorType] = {}
        self.rows: dict[str, dict[str, Arg]] = {}
        self.repeated: set[int] = set()
        self.declared = {formal.name for formal in syntax.params}
        self.declared.update(formal.name for statement in syntax.statements for formal in statement.outputs)

    def build(self) -> Function:
        if not _OPSET.fullmatch(self.syntax.opset):
            raise self.at(UnsupportedError(f"opset {self.syntax.opset!r}: ios13 to ios18 are read"), self.syntax.token)
        for formal in self.syntax.params:
            self.define(formal)
            type = self.tensor_type(formal.type, formal.token)
            self.values[formal.name] = self.function.input(formal.name, type.shape, type.dtype)
        self.collect()
        for statement in self.syntax.statements:
            if statement.kind == "const":
                self.const(statement)
            else:
                self.op(statement)
        outputs = [self.value(name, token) for name, token in self.syntax.outputs]
        return self.function.returns(*outputs)

    def at(self, error: AnertError, token: int) -> AnertError:
        """The same error with the position in front."""
        line, column = self.tree.position(token)
        return type(error)(f"{self.tree.source}:{line}:{column}: {error}")

    def syntax_error(self, message: str, token: int) -> AnertError:
        return MILSyntaxError(message, *self.tree.position(token), self.tree.source)

    def define(self, formal: Formal) -> None:
        if formal.name in self.defined:
            raise self.syntax_error(f"name {formal.name!r} is already defined", formal.token)
        self.defined.add(formal.name)

    def collect(self) -> None:
        """Find all constants, and whether each is read as data, as an attribute, or both."""
        for statement in self.syntax.statements:
            if statement.kind == "const":
                self.declare_const(statement)
                continue
            args = self.rows.get(statement.kind)
            if args is None:
                args = self.rows[statement.kind] = self.row_args(statement)
            for name, value in statement.args.items():
                arg = args.get(name)
                for reference in value if type(value) is tuple else (value,):
                    const = self.consts.get(reference) if type(reference) is str else None
                    if const is not None and arg is not None:
                        if arg.kind == "attr":
                            const.used_as_attr = True
                        else:
                            const.used_as_data = True
        for name, _ in self.syntax.outputs:
            if name in self.consts:
                self.consts[name].used_as_data = True

    def row_args(self, statement: Statement) -> dict[str, Arg]:
        try:
            row: OpDef = lookup(statement.kind)
        except UnsupportedError as error:
            raise self.at(error, statement.token) from None
        return {a.name: a for a in row.args}

    def declare_const(self, statement: Statement) -> None:
        typed = statement.attrs.get("val") or statement.args.get("val")
        if not isinstance(typed, Typed) or len(statement.outputs) != 1:
            raise self.syntax_error("expected `type name = const()[val = type(literal)]`", statement.token)
        formal = statement.outputs[0]
        if formal.type != typed.type and self.tensor_or_string(formal.type) != self.tensor_or_string(typed.type):
            raise self.at(
                ShapeError(f"{formal.name} is declared {formal.type}, its value is {typed.type}"), formal.token
            )
        known = self.consts.get(formal.name)
        if known is None:
            self.consts[formal.name] = _Const(typed, statement)
        elif (known.typed.type, known.typed.literal) == (typed.type, typed.literal):
            self.repeated.add(statement.token)  # printed by Espresso's generator: the same constant once more

    def tensor_or_string(self, type: TypeSyntax) -> tuple[str, tuple[int | None, ...]] | TypeSyntax:
        """Both spellings of a scalar as one."""
        return (type.dtype, type.dims) if type.kind in ("scalar", "tensor") else type

    def const(self, statement: Statement) -> None:
        if statement.token in self.repeated:
            return
        formal = statement.outputs[0]
        self.define(formal)
        const = self.consts[formal.name]
        if (const.used_as_attr and not const.used_as_data) or const.typed.type.dtype == "string":
            return
        value = self.data_const(const.typed, formal.name)
        self.values[formal.name] = value
        label = self.label(statement)
        if value.op is not None and label != formal.name:
            value.op.label = label

    def data_const(self, typed: Typed, name: str) -> Value:
        """Append a `const` op holding a literal or a blob's array (a view of the file, not a copy)."""
        type = self.tensor_type(typed.type, typed.token)
        array = self.array(typed, type)
        array.setflags(write=False)
        return self.function.append("const", {}, {"val": array}, [type], name)[0]

    def array(self, typed: Typed, type: TensorType) -> np.ndarray:
        if isinstance(typed.literal, Blob):
            path = typed.literal.path
            if path not in self.blobs and self.placeholders:
                return np.broadcast_to(np.zeros((), DTYPES[type.dtype]), type.shape)
            if path not in self.blobs:
                known = ", ".join(self.blobs) or "none"
                raise self.at(InputError(f"weight file {path!r} was not given (given: {known})"), typed.token)
            if not storable(type.dtype):
                raise self.at(InputError(f"a weight blob cannot hold {type.dtype}"), typed.token)
            try:
                return read_blob(self.blobs[path], typed.literal.offset, type.dtype, type.shape, path)
            except InputError as error:
                raise self.at(error, typed.token) from None
        try:
            return literal.to_array(typed.literal, type.dtype, type.shape)
        except ValueError as error:
            raise self.syntax_error(f"expected {error} for {typed.type}", typed.token) from None

    def constant(self, typed: Typed) -> Any:
        """A literal as an attribute's Python value."""
        kind = typed.type
        if kind.dtype != "string":
            type = self.tensor_type(kind, typed.token)
            if isinstance(typed.literal, Blob):
                return literal.to_tuples(self.array(typed, type).tolist())
            dims: tuple[int | None, ...] = type.shape
        else:
            dims = kind.dims
        if isinstance(typed.literal, Blob) or None in dims:
            raise self.syntax_error(f"expected a literal for {kind}", typed.token)
        try:
            return literal.to_constant(typed.literal, kind.dtype, dims)  # type: ignore[arg-type]
        except ValueError as error:
            raise self.syntax_error(f"expected {error} for {kind}", typed.token) from None

    def tensor_type(self, syntax: TypeSyntax, token: int) -> TensorType:
        known = self.types.get(syntax)
        if known is not None:
            return known
        if syntax.kind not in ("scalar", "tensor"):
            what = "model state" if syntax.kind == "state" else f"type {syntax}"
            raise self.at(UnsupportedError(f"{what} is not supported: values are tensors of static shape"), token)
        if None in syntax.dims:
            raise self.at(UnsupportedError(f"flexible shape {syntax} is not supported: give the dimension"), token)
        if syntax.dtype not in DTYPES or len(syntax.dims) > MAX_RANK:
            what = f"values of type {syntax.dtype}" if syntax.dtype not in DTYPES else f"rank {len(syntax.dims)}"
            raise self.at(UnsupportedError(f"{what} are not supported"), token)
        try:
            type = TensorType(syntax.dtype, tuple(d for d in syntax.dims if d is not None))
        except ShapeError as error:
            raise self.at(error, token) from None
        self.types[syntax] = type
        return type

    def value(self, name: str, token: int) -> Value:
        value = self.values.get(name)
        if value is None:
            raise self.syntax_error(f"unknown name {name!r}: nothing above defines it as a tensor", token)
        return value

    def op(self, statement: Statement) -> None:
        kind, args = statement.kind, self.rows[statement.kind]
        inputs: dict[str, Operand | None] = {}
        attrs: dict[str, Any] = {}
        given: dict[str, ArgSyntax] = {**statement.attrs, **statement.args}  # old constexpr ops have operands in both
        given.pop("name", None)
        for name, syntax in given.items():
            arg = args.get(name)
            if arg is None:
                raise self.at(
                    ShapeError(f"{kind} has no argument {name!r}: it takes {', '.join(args)}"), statement.token
                )
            if arg.kind == "attr":
                attrs[name] = self.attribute(syntax, name, statement)
            else:
                inputs[name] = self.operand(syntax, arg, statement)
        outputs = statement.outputs
        if not outputs:
            raise self.at(UnsupportedError(f"{kind} without a result is not supported"), statement.token)
        for formal in outputs:
            self.define(formal)
        try:
            results = emit(kind, inputs, attrs, [f.name for f in outputs], self.function)
        except (ShapeError, UnsupportedError) as error:
            raise self.at(error, statement.token) from None
        self.check_results(statement, results)
        label = self.label(statement)
        if label != outputs[0].name and results[0].op is not None:
            results[0].op.label = label

    def check_results(self, statement: Statement, results: list[Value]) -> None:
        """Declared types against inferred ones."""
        if len(results) != len(statement.outputs):
            message = f"{statement.kind} has {len(results)} results, {len(statement.outputs)} are declared"
            raise self.at(ShapeError(message), statement.token)
        for formal, value in zip(statement.outputs, results, strict=True):
            declared = self.tensor_type(formal.type, formal.token)
            if declared != value.type:
                message = f"{statement.kind} gives {value.type}, {formal.name} is declared {declared}"
                raise self.at(ShapeError(message), formal.token)
            self.values[formal.name] = value

    def attribute(self, syntax: ArgSyntax, name: str, statement: Statement) -> Any:
        if isinstance(syntax, Typed):
            return self.constant(syntax)
        if isinstance(syntax, tuple):
            return tuple(self.attribute(item, name, statement) for item in syntax)
        const = self.consts.get(syntax)
        if const is None or syntax not in self.defined:
            if syntax in self.values:
                message = f"{statement.kind}: argument {name!r} must be a compile-time constant, {syntax} is computed"
                raise self.at(UnsupportedError(message), statement.token)
            raise self.syntax_error(f"unknown name {syntax!r}: nothing above defines it", statement.token)
        if const.constant is None:
            const.constant = self.constant(const.typed)
        return const.constant

    def operand(self, syntax: ArgSyntax, arg: Arg, statement: Statement) -> Operand:
        if isinstance(syntax, tuple) or arg.kind == "tensors":
            items = syntax if isinstance(syntax, tuple) else (syntax,)
            if arg.kind != "tensors":
                message = f"{statement.kind}: argument {arg.name!r} takes one value, got a tuple"
                raise self.at(ShapeError(message), statement.token)
            return tuple(self.single(item, arg, statement) for item in items)
        return self.single(syntax, arg, statement)

    def single(self, syntax: str | Typed, arg: Arg, statement: Statement) -> Value:
        if isinstance(syntax, str):
            return self.value(syntax, statement.token)
        base = statement.outputs[0].name if statement.outputs else statement.kind
        return self.data_const(syntax, self.unused(f"{base}_{arg.name}"))

    def unused(self, base: str) -> str:
        """A name for a constant that stood inline: one that the text itself gives to nothing, above or below."""
        name, n = base, 0
        while name in self.declared:
            name, n = f"{base}_{n}", n + 1
        self.declared.add(name)
        return name

    def label(self, statement: Statement) -> str:
        """The statement's name attribute, or its first result's name."""
        typed = statement.attrs.get("name")
        text = unquote(typed.literal) if typed is not None and isinstance(typed.literal, str) else None
        return statement.outputs[0].name if text is None else text
