"""MIL text -> syntax tree: one compiled regex for the tokens, recursive descent for the grammar; knows no op.

The whole printed language is read: both spellings of scalars, missing attributes, literals as arguments, several
functions, `//` comments, flexible shapes. Meaning (types, operands, constants) is `parser.py`'s.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from anert.errors import InputError, MILSyntaxError, UnsupportedError

if sys.version_info < (3, 11, 5):  # whose re goes on from where a possessive group failed, not from where it began
    import regex as re
else:
    import re

MAX_DEPTH = 32
"""Deepest nesting of types and of literals; printed programs need 6."""

SCALARS = frozenset((
    "fp16", "fp32", "fp64", "bf16", "fp8e4m3fn", "fp8e5m2", "bool", "string", "int4", "int8", "int16", "int32", "int64",
    "uint1", "uint2", "uint3", "uint4", "uint6", "uint8", "uint16", "uint32", "uint64",
))  # fmt: skip
CONTAINERS = frozenset(("tensor", "list", "tuple", "dict", "state", "tensor_buffer"))
RESERVED = SCALARS | CONTAINERS | {"any", "program", "func", "true", "false"}
"""Words that no value may be named by (coremltools renames the same ones)."""

_PATTERN = r"""
      tensor\s*+<\s*+\w++\s*+,\s*+\[[\d\s,?]*+\]\s*+>                     # one token each: a tensor type,
    | [A-Za-z_]\w*+
    | [(){},;=<>?]
    | "(?:[^"\\\n]++|\\.)*+"
    | \[\s*+name\s*+=\s*+(?:string|tensor<string,\ ?\[\]>)\(\s*+"(?:[^"\\\n]++|\\.)*+"\s*+\)\s*+\]  # a name attribute,
    | \[[\[\s]{0,40}+[-+.\da-zA-Z,?\s]*+\]                              # the numbers of a literal, nested or not
        (?:[\s\]]*+,\s*+\[[\[\s]*+[-+.\da-zA-Z,?\s]*+\])*+(?:\s*+\])*+
    | [\[\]]
    | ->
    | [-+]?(?:0[xX][\da-fA-F]*\.?[\da-fA-F]*(?:[pP][-+]?\d++)?|(?:\d++\.?\d*+|\.\d++)(?:[eE][-+]?\d++)?|inf\b|nan\b)
"""
_GOOD = re.compile(_PATTERN, re.VERBOSE | re.ASCII)
_TOKEN = re.compile(rf"(?:\s++|//[^\n]*+)*+({_PATTERN} | \Z | (?s:.)++)", re.VERBOSE | re.ASCII)
"""The next token: '' at the end, the whole rest of the text where none begins."""
_TENSOR = re.compile(r"tensor\s*<\s*(\w+)\s*,\s*\[([\d\s,?]*)\]\s*>", re.ASCII)
_PYMIL = re.compile(r"\s*\w+\[\w+\]\(%")
_WORDS = frozenset(("true", "false", "inf", "nan"))
_ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "t": "\t", "r": "\r"}


class TypeSyntax(NamedTuple):
    """A type as written. `kind` is `scalar` or a container word; `dims` has None for `?`, and a list's length."""

    kind: str
    dtype: str = ""
    dims: tuple[int | None, ...] = ()
    args: tuple[TypeSyntax, ...] = ()

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.dims)
        if self.kind == "scalar":
            return self.dtype
        if self.kind in ("tensor", "tensor_buffer"):
            return f"{self.kind}<{self.dtype}, [{dims}]>"
        inner = ", ".join(map(str, self.args))
        return f"list<{inner}, {dims}>" if self.kind == "list" else f"{self.kind}<{inner}>"


class Compound(NamedTuple):
    """A bracketed literal that is not plain numbers: `open` is the bracket."""

    open: str
    items: tuple[Literal, ...]


class Blob(NamedTuple):
    """`BLOBFILE(path = .., offset = ..)`: where the metadata of a weight lies."""

    path: str
    offset: int


Literal = str | Compound | Blob
"""A scalar or a list of plain numbers is its token (strings with their quotes); unquote() and the parser convert."""


@dataclass(slots=True)
class Typed:
    """`type(literal)`; an empty literal is ''."""

    type: TypeSyntax
    literal: Literal
    token: int


ArgSyntax = str | Typed | tuple["str | Typed", ...]
"""An argument: the name of a value, a literal, or a parenthesised tuple of those."""


class Formal(NamedTuple):
    """A declared name: a parameter or a statement's output."""

    type: TypeSyntax
    name: str
    token: int


@dataclass(slots=True)
class Statement:
    outputs: list[Formal]
    kind: str
    args: dict[str, ArgSyntax]
    attrs: dict[str, Typed]
    token: int
    version: str = ""
    """The opset behind the op's name, `tensor_buffer_to_tensor<ios17>`; rare."""


@dataclass(slots=True)
class FunctionSyntax:
    name: str
    opset: str
    params: list[Formal]
    attrs: dict[str, Typed]
    statements: list[Statement]
    outputs: list[tuple[str, int]]
    token: int


@dataclass(slots=True)
class Program:
    """A parsed text. `error(token, message)` makes an error that points at a token of it."""

    version: str
    attrs: dict[str, Typed]
    functions: list[FunctionSyntax]
    text: str = field(repr=False)
    source: str = "<mil>"

    def position(self, token: int) -> tuple[int, int]:
        """1-based line and column of a token."""
        return _position(self.text, token)


def parse_syntax(text: str, source: str = "<mil>") -> Program:
    """The syntax tree of a MIL program. Raises MILSyntaxError with line:column and what was expected,
    UnsupportedError for nested blocks, InputError for files that are not MIL text at all."""
    if text.startswith("version https://git-lfs"):
        raise InputError(f"{source}: a git-lfs pointer, not MIL text: fetch the file with `git lfs pull`")
    if _PYMIL.match(text):
        raise InputError(f"{source}: a coremltools PyMIL dump, not MIL text: compile the model and take its model.mil")
    return _Parser(text, source).program()


def unquote(token: str) -> str | None:
    """The string that a quoted token spells, or None if the token is no string."""
    if not token.startswith('"'):
        return None
    body = token[1:-1]
    if "\\" not in body:
        return body
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), body)


def quote(value: str) -> str:
    """A string as a MIL token."""
    value = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + value.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


def _position(text: str, token: int) -> tuple[int, int]:
    match = next(itertools.islice(_TOKEN.finditer(text), token, None))
    at = match.start(1)
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)


def _show(token: str) -> str:
    if not token:
        return "the end of the text"
    return repr(token if len(token) <= 24 else token[:21] + "...")


class _Parser:
    """Recursive descent over a list of token strings; positions are found again only when an error is raised."""

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source
        self.tokens: list[str] = _TOKEN.findall(text)
        self.i = 0
        self.depth = 0
        self.types: dict[str, TypeSyntax] = {s: TypeSyntax("scalar", s) for s in SCALARS}
        while len(self.tokens) > 1 and not self.tokens[-2]:  # blanks at the end make a second empty match
            self.tokens.pop()
        if len(self.tokens) > 1 and not _GOOD.fullmatch(self.tokens[-2]):
            self.i = len(self.tokens) - 2
            self.fail("the closing quote of a string" if self.tokens[self.i][0] == '"' else "a token of MIL text")
        self.tokens += ["", ""]  # looking two tokens ahead is always possible

    def error(self, message: str, token: int) -> MILSyntaxError:
        return MILSyntaxError(message, *_position(self.text, token), self.source)

    def fail(self, expected: str) -> NoReturn:
        raise self.error(f"expected {expected}, found {_show(self.tokens[self.i])}", self.i)

    def expect(self, token: str, where: str) -> None:
        if self.tokens[self.i] != token:
            self.fail(f"{token!r} {where}")
        self.i += 1

    def name(self, what: str) -> str:
        """An identifier that may name a value."""
        token = self.tokens[self.i]
        if not token.isidentifier():
            self.fail(what)
        if token in RESERVED:
            self.fail(f"{what} (a reserved word cannot be one)")
        self.i += 1
        return token

    def word(self, what: str) -> str:
        """Any identifier, reserved or not."""
        token = self.tokens[self.i]
        if not token.isidentifier():
            self.fail(what)
        self.i += 1
        return token

    def deeper(self, what: str) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"{what} nested deeper than {MAX_DEPTH}", self.i)

    def program(self) -> Program:
        if self.tokens[0] != "program":
            self.fail("'program(1.3)' or 'program(1.0)' (is this a MIL text?)")
        self.i = 1
        self.expect("(", "after 'program'")
        version = self.tokens[self.i]
        if not re.fullmatch(r"\d+\.\d+", version):
            self.fail("a version such as 1.3")
        self.i += 1
        self.expect(")", "after the version")
        attrs = self.attributes()
        self.expect("{", "before the functions")
        functions: dict[str, FunctionSyntax] = {}
        while self.tokens[self.i] == "func":
            function = self.function()
            if function.name in functions:
                raise self.error(f"function {function.name!r} is already defined", function.token)
            functions[function.name] = function
        if not functions:
            self.fail("'func'")
        self.expect("}", "or 'func' after a function")
        if self.tokens[self.i]:
            self.fail("the end of the text")
        return Program(version, attrs, list(functions.values()), self.text, self.source)

    def function(self) -> FunctionSyntax:
        self.i += 1
        start = self.i
        name = self.name("the function's name")
        self.expect("<", "and an opset after the function's name")
        opset = self.word("an opset such as ios18")
        self.expect(">", "after the opset")
        params = self.params()
        attrs = self.attributes()
        self.expect("{", "before the function's statements")
        statements = []
        while self.tokens[self.i] not in ("}", ""):
            statements.append(self.statement())
        self.expect("}", "after the function's statements")
        self.expect("->", "and the outputs after the function's block")
        outputs = self.returns()
        self.expect(";", "after the function")
        return FunctionSyntax(name, opset, params, attrs, statements, outputs, start)

    def params(self) -> list[Formal]:
        self.expect("(", "before the parameters")
        params: list[Formal] = []
        if self.tokens[self.i] == ")":
            self.i += 1
            return params
        while True:
            type = self.type()
            token = self.i
            params.append(Formal(type, self.name("the parameter's name"), token))
            if self.tokens[self.i] == ")":
                self.i += 1
                return params
            self.expect(",", "or ')' after a parameter")

    def returns(self) -> list[tuple[str, int]]:
        self.expect("(", "before the outputs")
        outputs = []
        while True:
            token = self.i
            outputs.append((self.name("an output's name"), token))
            if self.tokens[self.i] == ")":
                self.i += 1
                return outputs
            self.expect(",", "or ')' after an output")

    def statement(self) -> Statement:
        tokens, types = self.tokens, self.types
        outputs: list[Formal] = []
        token = tokens[self.i]
        if token in types or token in CONTAINERS or "<" in token:
            while True:
                type = types.get(tokens[self.i])
                if type is None:
                    type = self.type()
                else:
                    self.i += 1
                outputs.append(Formal(type, self.name("a name for the statement's result"), self.i - 1))
                token = tokens[self.i]
                self.i += 1
                if token == "=":
                    break
                if token != ",":
                    self.i -= 1
                    self.fail("'=' or ',' after the result's name")
        start = self.i
        kind = tokens[start]
        if not kind.isidentifier():
            self.fail("an op's name" if outputs else "a statement or '}'")
        self.i += 1
        version = ""
        if tokens[self.i] == "<":
            self.i += 1
            version = self.word("an opset such as ios18")
            self.expect(">", "after the opset")
        self.expect("(", "after the op")
        args = self.arguments()
        attrs = self.attributes()
        if tokens[self.i] == "{" or tokens[self.i] == "block":
            line, column = _position(self.text, self.i)
            raise UnsupportedError(
                f"{self.source}:{line}:{column}: {kind}: nested blocks (cond, while_loop) are not supported"
            )
        self.expect(";", "after the statement")
        return Statement(outputs, kind, args, attrs, start, version)

    def arguments(self) -> dict[str, ArgSyntax]:
        tokens, i = self.tokens, self.i
        args: dict[str, ArgSyntax] = {}
        if tokens[i] == ")":
            self.i = i + 1
            return args
        while True:
            name, value = tokens[i], tokens[i + 2] if tokens[i + 1] else ""
            self.i = i
            if not name.isidentifier():
                self.fail("an argument's name")
            if name in args:
                raise self.error(f"argument {name!r} is given twice", i)
            if tokens[i + 1] != "=":
                self.i = i + 1
                self.fail(f"'=' after the argument {name!r}")
            self.i = i + 2
            if value == "(":
                self.i += 1
                args[name] = self.values()
            else:
                args[name] = self.argument()
            i = self.i
            if tokens[i] == ")":
                self.i = i + 1
                return args
            if tokens[i] != ",":
                self.fail("',' or ')' after an argument")
            i += 1

    def argument(self) -> str | Typed:
        token = self.tokens[self.i]
        if token.isidentifier() and token not in RESERVED:
            self.i += 1
            return token
        if token in self.types or token in CONTAINERS or "<" in token:
            return self.typed()
        self.fail("the name of a value or a typed literal such as int32(1)")

    def values(self) -> tuple[str | Typed, ...]:
        values = []
        if self.tokens[self.i] == ")":
            self.i += 1
            return ()
        while True:
            values.append(self.argument())
            if self.tokens[self.i] == ")":
                self.i += 1
                return tuple(values)
            self.expect(",", "or ')' after a value")

    def attributes(self) -> dict[str, Typed]:
        token = self.tokens[self.i]
        if token != "[":
            if not token.startswith("["):
                return {}
            if "=" in token:
                self.i += 1
                name = token[token.index('"') : token.rindex('"') + 1]
                return {"name": Typed(self.types["string"], name, self.i - 1)}
            if token.strip("[] \t\r\n") or token.count("[") != 1 or token.count("]") != 1:
                self.fail('attributes such as [name = string("x")]')
            self.i += 1
            return {}
        self.i += 1
        attrs: dict[str, Typed] = {}
        while True:
            name = self.word("an attribute's name")
            if name in attrs:
                raise self.error(f"attribute {name!r} is given twice", self.i - 1)
            self.expect("=", "after the attribute's name")
            attrs[name] = self.typed()
            token = self.tokens[self.i]
            self.i += 1
            if token == "]":
                return attrs
            if token != ",":
                self.i -= 1
                self.fail("',' or ']' after an attribute")

    def typed(self) -> Typed:
        start = self.i
        type = self.types.get(self.tokens[start])
        if type is None:
            type = self.type()
        else:
            self.i = start + 1
        self.expect("(", "and a literal after the type")
        token = self.tokens[self.i]
        if token == ")":
            self.i += 1
            return Typed(type, "", start)
        literal = self.blob() if token == "BLOBFILE" else self.literal()
        self.expect(")", "after the literal")
        return Typed(type, literal, start)

    def blob(self) -> Blob:
        self.i += 1
        self.expect("(", "after BLOBFILE")
        values: dict[str, str] = {}
        for position, name in enumerate(("path", "offset")):
            if position:
                self.expect(",", "between BLOBFILE's path and offset")
            if self.tokens[self.i] != name:
                self.fail(f"BLOBFILE's {name!r}")
            self.i += 1
            self.expect("=", f"after {name!r}")
            start = self.i
            literal = self.typed().literal
            good = isinstance(literal, str) and (literal.isdecimal() if name == "offset" else unquote(literal))
            if not good or len(str(literal)) > 4096:
                self.i = start
                self.fail(f"BLOBFILE's {name!r} as {'uint64(64)' if position else 'a string'}")
            values[name] = str(literal)
        self.expect(")", "after BLOBFILE's arguments")
        return Blob(unquote(values["path"]) or "", int(values["offset"][:20]))

    def literal(self) -> Literal:
        token = self.tokens[self.i]
        if token in ("(", "{", "["):
            return self.compound(token)
        first = token[:1]
        if first == "[" and "=" not in token:
            if token.count("[") != token.count("]"):
                self.fail("a literal with as many '[' as ']'")
        elif not (first == '"' or first.isdigit() or (first in ("-", "+", ".") and token != "->") or token in _WORDS):
            self.fail("a literal")
        self.i += 1
        return token

    def compound(self, open: str) -> Compound:
        self.deeper("a literal")
        close = {"(": ")", "{": "}", "[": "]"}[open]
        self.i += 1
        items: list[Literal] = []
        if self.tokens[self.i] == close:
            self.i += 1
        else:
            while True:
                items.append(self.literal())
                token = self.tokens[self.i]
                if token == close:
                    self.i += 1
                    break
                self.expect(",", f"or {close!r} in a literal")
        self.depth -= 1
        return Compound(open, tuple(items))

    def type(self) -> TypeSyntax:
        """The type at the cursor; every spelling of a tensor type is read once a text."""
        token = self.tokens[self.i]
        known = self.types.get(token)
        if known is None:
            match = _TENSOR.fullmatch(token)
            if match is None:
                return self.container()
            if match[1] not in SCALARS:
                self.fail("a tensor of a scalar type such as fp16")
            known = self.types[token] = TypeSyntax("tensor", match[1], self.dims(match[2]))
        self.i += 1
        return known

    def dims(self, text: str) -> tuple[int | None, ...]:
        if not text.strip():
            return ()
        dims: list[int | None] = []
        for d in (d.strip() for d in text.split(",")):
            if d != "?" and not (d.isdecimal() and len(d) < 20):
                self.fail("dimensions such as [1, 64, ?]")
            dims.append(None if d == "?" else int(d))
        return tuple(dims)

    def container(self) -> TypeSyntax:
        kind = self.tokens[self.i]
        if kind not in CONTAINERS:
            self.fail("a type")
        self.deeper("a type")
        self.i += 1
        self.expect("<", f"after {kind!r}")
        if kind in ("tensor", "tensor_buffer"):
            type = self.buffer(kind)
        elif kind == "list":
            element = self.type()
            self.expect(",", "and a length after the list's element type")
            length = self.dims(self.tokens[self.i])
            if len(length) != 1:
                self.fail("the list's length")
            self.i += 1
            type = TypeSyntax(kind, dims=length, args=(element,))
        else:
            args = [self.type()]
            while self.tokens[self.i] == ",":
                self.i += 1
                args.append(self.type())
            wanted = {"dict": 2, "state": 1}.get(kind, len(args))
            if len(args) != wanted:
                self.fail(f"{wanted} type arguments of {kind!r}")
            type = TypeSyntax(kind, args=tuple(args))
        self.expect(">", f"after the arguments of {kind!r}")
        self.depth -= 1
        return type

    def buffer(self, kind: str) -> TypeSyntax:
        """The inside of `tensor_buffer<fp16, shape = [..], strides = [..], ..>`, and of a tensor with odd spacing."""
        dtype = self.tokens[self.i]
        if dtype not in SCALARS:
            self.fail(f"the scalar type of {kind!r}")
        self.i += 1
        shape: tuple[int | None, ...] = ()
        while self.tokens[self.i] == ",":
            self.i += 1
            field = "shape"
            if kind == "tensor_buffer":
                field = self.word("a field of tensor_buffer")
                self.expect("=", f"after {field!r}")
            token = self.tokens[self.i]
            if not token.startswith("[") or not token.endswith("]") or token.count("[") != 1:
                self.fail("dimensions such as [1, 64, ?]")
            dims = self.dims(token[1:-1])
            shape = dims if field == "shape" else shape
            self.i += 1
        return TypeSyntax(kind, dtype, shape)
