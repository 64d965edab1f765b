"""MIL text both ways: parse(print(f)) == f, Apple's files, positions of errors, hostile input."""

from __future__ import annotations

import random
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mil_graphs import functions
from op_cases import CASES, Case, op_cases, trace

from anert.errors import AnertError, InputError, MILSyntaxError, ShapeError, UnsupportedError
from anert.mil import ops
from anert.mil.blob import BlobDirectory, BlobWriter
from anert.mil.graph import DTYPES, Function, Module, Value
from anert.mil.literal import hex_float
from anert.mil.syntax import Blob, Typed
from anert.mil.text import parse, parse_syntax, print_function, print_module


def examples(n: int) -> settings:
    """Drawing a graph takes a while, so hypothesis' limits on time are off."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=n, deadline=None, suppress_health_check=slow)


@pytest.fixture(scope="module")
def samples(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "mil").rglob("*.mil"))


def zero_weights(text: str) -> dict[str, bytes]:
    """Weight files with zeros at every place that a text's BLOBFILEs name."""
    wanted: dict[str, dict[int, int]] = {}
    for function in parse_syntax(text).functions:
        for statement in function.statements:
            for typed in (*statement.attrs.values(), *statement.args.values()):
                if isinstance(typed, Typed) and isinstance(typed.literal, Blob):
                    size = 2 * int(np.prod([d or 0 for d in typed.type.dims]))
                    wanted.setdefault(typed.literal.path, {})[typed.literal.offset] = size
    files = {}
    for path, blobs in wanted.items():
        data = bytearray(struct.pack("<II56x", len(blobs), 2))
        for offset, size in sorted(blobs.items()):
            data += bytes(offset - len(data)) + struct.pack("<IIQQ40x", 0xDEADBEEF, 1, size, offset + 64) + bytes(size)
            data += bytes(-len(data) % 16)
        files[path] = bytes(data)
    return files


def function_of(statements: str, opset: str = "ios18", params: str = "tensor<fp16, [2, 3]> a", out: str = "r") -> str:
    return f"program(1.3)\n{{\nfunc main<{opset}>({params}) {{\n{statements}\n}} -> ({out});\n}}"


class TestRoundTrip:
    @examples(250)
    @given(functions(), st.sampled_from(("inline", "one file", "a file each")), st.integers(0, 12))
    def test_parse_of_print_is_the_function(self, f: Function, where: str, threshold: int) -> None:
        weights = {"inline": None, "one file": BlobWriter(), "a file each": BlobDirectory()}[where]
        text = print_module(f, weights, threshold)
        again = parse(text, blobs=weights.files() if weights else None)
        assert again.main == f
        assert print_module(again.main, type(weights)() if weights else None, threshold) == text

    @pytest.mark.parametrize("kind", sorted(CASES))
    def test_every_op_in_both_dialects(self, kind: str) -> None:
        @examples(6)
        @given(op_cases(kind, 5), st.sampled_from(("ios16", "ios18")))
        def check(case: Case, opset: str) -> None:
            f = trace(kind, case)
            f.opset = opset
            try:
                text = print_module(f)
            except UnsupportedError as error:
                assert opset == "ios16" and "needs ios1" in str(error)
                return
            assert parse(text).main == f

        check()

    @examples(300)
    @given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4), st.randoms(), st.booleans())
    def test_constants_of_random_bits(self, dtype: str, shape: list[int], rng: random.Random, modern: bool) -> None:
        """Every bit pattern: infinities, NaNs, subnormals, -0.0; every shape, empty and scalar ones too."""
        n = int(np.prod(shape))
        if dtype == "bool":
            array = np.array([rng.random() < 0.5 for _ in range(n)], bool).reshape(shape)
        else:
            array = np.frombuffer(rng.randbytes(n * DTYPES[dtype].itemsize), DTYPES[dtype]).reshape(shape)
        f = Function("main", "ios18" if modern else "ios16")
        f.returns(f.const(array, dtype, "value"))
        assert parse(print_module(f)).main == f

    @pytest.mark.parametrize("opset", ["ios16", "ios18"])
    def test_all_halves(self, opset: str) -> None:
        halves = np.arange(65536, dtype=np.uint16).view(np.float16)
        f = Function("main", opset)
        f.returns(f.const(halves, name="halves"))
        again = parse(print_module(f)).main.outputs[0].const
        assert again is not None
        finite = ~np.isnan(halves)
        assert np.array_equal(again.view(np.uint16)[finite], halves.view(np.uint16)[finite])
        assert np.isnan(again[~finite]).all()

    @given(st.floats(width=16) | st.floats(width=32) | st.floats(allow_nan=False))
    def test_hex_floats_read_back(self, value: float) -> None:
        text = hex_float(value)
        assert re.fullmatch(r"-?0x[01](\.[0-9a-f]*[1-9a-f])?p[+-]\d+|-?inf|nan", text)
        back = float.fromhex(text)
        assert back.hex() == value.hex() or (back != back and value != value)

    def test_strings_with_quotes_and_control_characters(self) -> None:
        info = {'k\\"ey\n': 'a "quoted"\ttext \\ and ü', "empty": ""}
        f = Function()
        f.returns(f.input("a", (1,)))
        assert parse(print_module(Module({"main": f}, info))).build_info == info

    def test_several_functions_and_their_dialect(self) -> None:
        module = Module({}, {"made": "here"})
        for name, opset in (("first", "ios17"), ("second", "ios18")):
            f = module.functions[name] = Function(name, opset)
            f.returns(ops.relu(f.input("a", (2, 2))))
        text = print_module(module)
        assert text.startswith("program(1.3)") and parse(text) == module
        del module.functions["second"]
        assert print_module(module).startswith("program(1.0)") and parse(print_module(module)) == module

    def test_name_attributes_are_kept_and_unique(self) -> None:
        text = function_of(
            'tensor<fp16, [2, 3]> b = relu(x = a)[name = string("op/1")];\n'
            'tensor<fp16, [2, 3]> r = relu(x = b)[name = string("op/1")];'
        )
        f = parse(text).main
        assert [op.label for op in f.ops] == ["op/1", "op/1"]
        assert re.findall(r'name = string\("(.*?)"\)', print_function(f)) == ["op/1", "op/1_0"]


class TestPrinting:
    def test_scalars_in_both_dialects(self) -> None:
        for opset, boolean, half in (
            (
                "ios18",
                'bool r_keep_dims_0 = const()[name = string("r_keep_dims_0"), val = bool(true)];',
                "fp16(-0x1p-1)",
            ),
            ("ios16", "val = tensor<bool, []>(true)];", "tensor<fp16, []>(-0x1p-1)"),
        ):
            f = Function("main", opset)
            a = f.input("a", (2, 3))
            r = ops.reduce_sum(a, axes=(1,), keep_dims=True, name="r")
            f.returns(ops.mul(r, f.const(-0.5, name="half"), name="out"))
            text = print_module(f)
            assert boolean in text and half in text
            assert "reduce_sum(axes = r_axes_0, keep_dims = r_keep_dims_0, x = a)" in text

    def test_equal_attributes_share_a_constant(self) -> None:
        f = Function()
        a = f.input("a", (2, 3))
        f.returns(ops.softmax(ops.softmax(a, -1), -1), ops.softmax(a, 0))
        assert print_module(f).count("const()") == 2

    def test_nested_literals_and_subnormals_as_coremlc_prints_them(self) -> None:
        f = Function()
        f.returns(f.const(np.array([[0x0003, 0x80A8, 0x03FF], [0x0400, 0x8000, 0x3C00]], np.uint16).view(np.float16)))
        wanted = "tensor<fp16, [2, 3]>([[0x1.8p-23, -0x1.5p-17, 0x1.ff8p-15], [0x1p-14, -0x0p+0, 0x1p+0]])"
        assert wanted in print_module(f)

    def test_large_constants_go_to_the_file(self) -> None:
        f = Function()
        small, large, mask = f.const(np.ones(9)), f.const(np.ones((2, 5))), f.const(np.ones(64, bool))
        f.returns(small, large, mask)
        weights = BlobWriter()
        text = print_module(f, weights)
        assert text.count("BLOBFILE") == 1 and "offset = uint64(64)" in text
        assert len(weights.bytes()) == 64 + 64 + 20
        assert parse(text, blobs=weights.files()).main == f

    @pytest.mark.parametrize("name", ["tensor", "state", "fp16", "true", "a b", "", "1a", "ä", "a.b", "any"])
    def test_illegal_names_are_refused(self, name: str) -> None:
        f = Function()
        f.returns(f.input(name, (1,)))
        with pytest.raises(InputError, match="not a name in MIL"):
            print_module(f)

    def test_nothing_to_print(self) -> None:
        with pytest.raises(InputError, match="no outputs"):
            print_module(Function())
        with pytest.raises(InputError, match="needs a function"):
            print_module(Module())

    def test_an_argument_newer_than_the_opset(self) -> None:
        f = Function("main", "ios16")
        a = f.input("a", (2, 3))
        f.returns(ops.emit("reduce_argmax", {"x": a}, {"axis": 1, "keep_dims": False})[0])
        assert "output_dtype" not in print_module(f) and parse(print_module(f)).main == f
        g = Function("main", "ios16")
        g.returns(ops.emit("reduce_argmax", {"x": g.input("a", (2, 3))}, {"axis": 1, "output_dtype": "uint16"})[0])
        with pytest.raises(UnsupportedError, match="needs ios17, the function is ios16"):
            print_module(g)


class TestSamples:
    def test_all_parse_and_print_again(self, samples: list[Path]) -> None:
        assert len(samples) >= 38
        flexible = []
        for path in samples:
            text = path.read_text()
            assert parse_syntax(text, path.name).functions
            try:
                module = parse(text, path.name, zero_weights(text))
            except UnsupportedError as error:
                assert "flexible shape" in str(error) or "op '" in str(error)
                flexible.append(path)
                continue
            weights = BlobWriter()
            assert parse(print_module(module, weights), blobs=weights.files()) == module
        assert {p.parent.name for p in flexible} <= {"TransposeEncoder.mlmodelc"}

    def test_add_model_is_printed_as_apple_printed_it(self, samples: list[Path]) -> None:
        (path,) = (p for p in samples if p.parent.name == "add_model.mlmodelc")
        assert print_module(parse(path.read_text())) == path.read_text().rstrip("\n")

    def test_apples_attributes_read(self, samples: list[Path]) -> None:
        path = next(p for p in samples if p.parent.name == "TokenDurationPrediction.mlmodelc")
        f = parse(path.read_text()).main
        assert [v.name for v in f.outputs] == ["token_id", "token_score", "duration_index"]
        assert [op.kind for op in f.ops[:2]] == ["slice_by_index", "slice_by_index"]
        assert f.ops[0].attrs["begin"] == (0,) and f.ops[0].attrs["end"] == (1025,) and f.ops[0].label == ""
        assert (f.ops[2].out.name, f.ops[2].label) == ("token_id", "op_14_cast_fp16")

    def test_a_training_program_parses_quickly(self, samples: list[Path]) -> None:
        path = next(p for p in samples if p.stem == "RWKVStyleFusedThreeLayerTwoStepGenerator")
        text = path.read_text()
        weights = zero_weights(text)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            parse(text, blobs=weights)
            times.append(time.perf_counter() - start)
        assert min(times) < 0.1  # 136 statements: 6 ms on a quiet machine


class TestGrammar:
    def test_odd_but_legal_spellings(self) -> None:
        text = """
        // a comment
        program(1.0)[]
        { func main<ios17>(tensor<fp16,[2,3]>a , tensor < fp16 , [ 2 , 3 ] > b)[Attr=string("kept out")]{
            tensor<fp16, [2, 3]> m = mul(y = tensor<fp16, [1]>([-0x1p+0]), x=a);  // inline, unsorted, no name
            tensor<int32, []> axis = const()[val = tensor<int32, []>(-1)];
            tensor<fp16, [2, 3]> s = softmax(axis = axis, x = m)[];
            tensor<fp16, [2, 6]> c = concat(axis=int32(1), interleave=bool(false), values=(s, b))[name=string("c")];
            tensor<fp16, [2, 2]> p, tensor<fp16, [2, 4]> q = split(axis = int32(1), split_sizes =
                tensor<int32, [2]>([2, // sizes
                4]), x = c);
            tensor<fp32, [2, 4]> w = cast(dtype = string("fp32"), x = q);
        } -> (p, w);
        }"""
        f = parse(text).main
        assert [op.kind for op in f.ops] == ["const", "mul", "softmax", "concat", "split", "cast"]
        inline = f.ops[1].inputs["y"]
        assert isinstance(inline, Value) and inline.const is not None and inline.const.tolist() == [-1.0]
        assert f.ops[4].attrs["split_sizes"] == (2, 4) and f.opset == "ios17"
        assert parse(print_module(f)).main == f

    def test_literals_that_are_not_hex(self) -> None:
        literal = "[1, -2.5, 1e-05, .5, -inf, nan, 4.0960000000000001e-05]"
        text = function_of(f"tensor<fp32, [7]> r = const()[val = tensor<fp32, [7]>({literal})];")
        value = parse(text).main.outputs[0].const
        wanted = np.array([1, -2.5, 1e-05, 0.5, -np.inf, np.nan, 4.096e-05], np.float32)
        assert value is not None and np.array_equal(value, wanted, equal_nan=True)

    def test_a_finite_number_beyond_fp16_is_infinite(self) -> None:
        f = parse(function_of("fp16 r = const()[val = fp16(-1e9)];")).main
        assert f.outputs[0].const == -np.inf

    def test_attribute_constants_vanish_and_data_constants_stay(self) -> None:
        text = function_of(
            'int32 n = const()[val = int32(1)]; string s = const()[val = string("unused")];\n'
            "fp16 half = const()[val = fp16(0.5)]; fp16 unused = const()[val = fp16(1)];\n"
            "tensor<fp16, [2, 3]> b = softmax(axis = n, x = a); tensor<fp16, [2, 3]> r = mul(x = b, y = half);"
        )
        assert [op.out.name for op in parse(text).main.ops] == ["half", "unused", "b", "r"]

    def test_the_same_constant_twice(self) -> None:
        """One of Espresso's fixtures prints its constants again: accepted if they say the same."""
        twice = "fp16 h = const()[val = fp16(0.5)]; fp16 h = const()[val = fp16({})]; " + R + "mul(x = a, y = h);"
        assert len(parse(function_of(twice.format("0.5"))).main.ops) == 2
        with pytest.raises(MILSyntaxError, match=r"4:41: name 'h' is already defined"):
            parse(function_of(twice.format("0.25")))

    def test_flat_and_nested_tensors(self) -> None:
        for literal in ("[1, 2, 3, 4]", "[[1, 2], [3, 4]]", "[[1,2],\n[3, 4] ]"):
            f = parse(function_of(f"tensor<int32, [2, 2]> r = const()[val = tensor<int32, [2, 2]>({literal})];")).main
            assert f.outputs[0].const.tolist() == [[1, 2], [3, 4]]  # type: ignore[union-attr]

    def test_syntax_outside_the_graph(self) -> None:
        """State, tensor buffers, flexible shapes, statements without results: a tree, though no Function."""
        text = function_of(
            "tensor_buffer<fp16, shape=[1,2], strides=[2, 1], interleave_factors=[1,1]> t =\n"
            'f<ios17>(x = a)[name=string("t")];'
            "write_state(data = a, input = k); list<tensor<int32, [?]>, 3> l = g();",
            params="tensor<fp16, [1, ?]> a, state<tensor<fp16, [2]>> k, dict<string, tuple<fp16, bool>> d",
            out="t",
        )  # fmt: skip
        (function,) = parse_syntax(text).functions
        assert [s.kind for s in function.statements] == ["f", "write_state", "g"]
        assert function.statements[0].version == "ios17" and function.statements[0].outputs[0].type.dims == (1, 2)
        assert [str(p.type) for p in function.params] == [
            "tensor<fp16, [1, ?]>", "state<tensor<fp16, [2]>>", "dict<string, tuple<fp16, bool>>",
        ]  # fmt: skip


R = "tensor<fp16, [2, 3]> r = "
MALFORMED = [
    ("", MILSyntaxError, "1:1: expected 'program"),
    ("program(x)", MILSyntaxError, "1:9: expected a version such as 1.3, found 'x'"),
    ("program(1.3) {}", MILSyntaxError, "1:15: expected 'func', found '}'"),
    ("program(1.3) {\n  func f<ios18>() { } -> ();\n}", MILSyntaxError, "2:27: expected an output's name, found '.'"),
    ("program(1.3)\n{ # }", MILSyntaxError, "2:3: expected a token of MIL text, found '# }'"),
    (function_of(R + "relu(x = a)"), MILSyntaxError, "5:1: expected ';' after the statement"),
    (function_of(R + "relu(x a);"), MILSyntaxError, "4:33: expected '=' after the argument 'x', found 'a'"),
    (function_of(R + "relu(x = a, x = a);"), MILSyntaxError, "4:38: argument 'x' is given twice"),
    (function_of("fp16 tensor = relu(x = a);"), MILSyntaxError, "4:6: .* reserved word"),
    (function_of("tensor<fp17, [2, 3]> r = relu(x = a);"), MILSyntaxError, "4:1: expected a tensor of a scalar type"),
    (function_of("tensor<fp16, [2, -3]> r = relu(x = a);"), MILSyntaxError, "4:14: expected dimensions"),
    (function_of(R + "relu(x = 1);"), MILSyntaxError, "4:35: expected the name of a value or a typed"),
    (function_of(R + "relu(x = b);"), MILSyntaxError, "4:26: unknown name 'b'"),
    (function_of("", out="q"), MILSyntaxError, "5:7: unknown name 'q'"),
    (function_of("fp16 a = relu(x = a);", out="a"), MILSyntaxError, "4:6: name 'a' is already defined"),
    (function_of(R + 'relu(x = a)[name = string("r)];'), MILSyntaxError, "4:52: expected the closing quote"),
    (function_of("int32 r = const()[val = int32(1.5)];"), MILSyntaxError, "4:25: expected literals of type int32"),
    (function_of("uint8 r = const()[val = uint8(256)];"), MILSyntaxError, "4:25: expected integers from 0 to 255"),
    (function_of("bool r = const()[val = bool(1)];"), MILSyntaxError, "4:24: expected literals of type bool"),
    (function_of("fp16 r = const()[val = fp16(0x)];"), MILSyntaxError, "4:24: expected literals of type fp16"),
    (function_of("fp16 r = const()[val = fp16([1])];"), MILSyntaxError, "4:24: expected one number for fp16"),
    (function_of("fp16 r = const()[val = tensor<fp16, [2]>([1, 2, 3])];"), ShapeError, "4:6: r is declared fp16"),
    (function_of(R + "const()[val = tensor<fp16, [2, 3]>([1, 2])];"), MILSyntaxError, "4:40: expected 6 numbers"),
    (function_of(R + "const()[val = tensor<fp16, [2, 3]>([1_0])];"), MILSyntaxError, "4:63: expected ',' or ']'"),
    (function_of("int32 r = const();"), MILSyntaxError, "4:11: expected `type name = const"),
    (function_of("fp16 r = cond(x = a) { };"), UnsupportedError, "4:22: cond: nested blocks"),
    (function_of(R + "warp_drive(x = a);"), UnsupportedError, "4:26: op 'warp_drive' is not in anert's op"),
    (function_of("int32 r = relu(x = a);"), ShapeError, r"4:7: relu gives fp16\[2, 3\], r is declared int32"),
    (function_of(R + "relu(z = a);"), ShapeError, "4:26: relu has no argument 'z': it takes x"),
    (function_of(R + "relu();"), ShapeError, "4:26: relu needs the operand 'x'"),
    (function_of(R + "relu(x = (a, a));"), ShapeError, "4:26: relu: argument 'x' takes one value, got a tuple"),
    (function_of(R + "softmax(axis = int32(2), x = a);"), ShapeError, "4:26: softmax"),
    (function_of("fp16 q, fp16 r = relu(x = a);"), ShapeError, "4:18: relu has 1 results, 2 are declared"),
    (function_of("relu(x = a);"), UnsupportedError, "4:1: relu without a result"),
    (function_of("fp16 r = const()[val = fp32(1)];"), ShapeError, "4:6: r is declared fp16, its value is fp32"),
    (function_of("", params="tensor<fp16, [?, 3]> r"), UnsupportedError, "3:39: flexible shape"),
    (function_of("", params="state<tensor<fp16, [2]>> r"), UnsupportedError, "3:43: model state is not supported"),
    (function_of("", params="tensor<bf16, [2]> r"), UnsupportedError, "3:36: values of type bf16"),
    (function_of("", opset="CoreML9"), UnsupportedError, "3:6: opset 'CoreML9'"),
    (
        function_of(R + "softmax(axis = a, x = a);"),
        UnsupportedError,
        "4:26: softmax: argument 'axis' must be a compile",
    ),
    (
        function_of('fp16 r = const()[val = fp16(BLOBFILE(path = string("w.bin"), offset = uint64(64)))];'),
        InputError,
        "4:24: weight file 'w.bin' was not given",
    ),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", InputError, "git-lfs pointer"),
    ("main[CoreML8](%x: (1, 1024, fp16)(Tensor)) {\n  block0() {", InputError, "PyMIL dump"),
]


class TestErrors:
    @pytest.mark.parametrize(("text", "kind", "message"), MALFORMED)
    def test_message_and_position(self, text: str, kind: type[AnertError], message: str) -> None:
        with pytest.raises(kind, match=message) as caught:
            parse(text, "m.mil")
        assert type(caught.value) is kind
        assert str(caught.value).startswith("m.mil:") and "\n" not in str(caught.value)

    def test_position_is_an_attribute_too(self) -> None:
        with pytest.raises(MILSyntaxError) as caught:
            parse("program(1.3)\n  oops", "m.mil")
        assert (caught.value.line, caught.value.column, caught.value.source) == (2, 3, "m.mil")


FEATURES = """program(1.3)
[buildInfo = dict<string, string>({{"coremlc-version", "3505.4.1"}})]
{
    func main<ios18>(tensor<fp16, [1, 4, 1, 8]> x, tensor<fp16, [4, 4, 1, 1]> w) [Shapes = tuple<string, list<tensor<int32, [2]>, ?>>(("R", [[1, 2], [3, 4]]))] {
        tensor<int32, [1]> axes = const()[name = string("axes"), val = tensor<int32, [1]>([1])];
        bool keep = const()[name = string("keep"), val = bool(true)];
        tensor<fp16, [1, 1, 1, 8]> s = reduce_sum(axes = axes, keep_dims = keep, x = x)[name = string("s")];
        tensor<fp16, [1, 4, 1, 1]> g = const()[name = string("g"), val = tensor<fp16, [1, 4, 1, 1]>(BLOBFILE(path = string("@model_path/weights/weight.bin"), offset = uint64(64)))];
        tensor<fp16, [1, 4, 1, 8]> y = mul(x = x, y = g)[name = string("y")];
        tensor<fp16, [1, 4, 1, 8]> z = clip(alpha = fp16(-0x1.8p+1), beta = fp16(inf), x = y)[name = string("z")];
        int32 one = const()[name = string("one"), val = int32(1)];
        bool no = const()[name = string("no"), val = bool(false)];
        tensor<fp16, [1, 5, 1, 8]> c = concat(axis = one, interleave = no, values = (z, s))[name = string("c")];
        tensor<fp16, [1, 2, 1, 8]> p, tensor<fp16, [1, 3, 1, 8]> q = split(axis = one, split_sizes = tensor<int32, [2]>([2, 3]), x = c);
        tensor<fp32, [1, 3, 1, 8]> r = cast(dtype = string("fp32"), x = q)[name = string("r")];
    } -> (p, r);
}
"""  # noqa: E501


class TestHostile:
    def test_mutations_raise_only_our_errors(self) -> None:
        rng = random.Random(7)
        weights = zero_weights(FEATURES)
        assert len(parse(FEATURES, blobs=weights).main.ops) == 7
        tokens = re.findall(r"\w+|\s+|.", FEATURES)
        parsed = 0
        for _ in range(1500):
            mutant = list(tokens)
            for _ in range(rng.randint(1, 3)):
                i, j = rng.randrange(len(mutant)), rng.randrange(len(mutant))
                edit = rng.randrange(5)
                if edit == 0:
                    del mutant[i]
                elif edit == 1:
                    mutant[i] = mutant[j]
                elif edit == 2:
                    mutant.insert(i, mutant[j])
                elif edit == 3:
                    mutant[i], mutant[j] = mutant[j], mutant[i]
                else:
                    mutant[i] = rng.choice(
                        ["0", "-1", "99999999999", "?", "[", "]", '"', "\0", "é", "//", "0x", "1e999", "nan"]
                    )
            text = "".join(mutant)
            start = time.perf_counter()
            try:
                parse(text, blobs=weights)
                parsed += 1
            except AnertError as error:
                assert "\n" not in str(error)
            assert time.perf_counter() - start < 2
        assert parsed < 1000

    def test_truncations_and_deleted_bytes(self) -> None:
        weights = zero_weights(FEATURES)
        body = FEATURES.rstrip()
        for n in range(len(body)):
            with pytest.raises(AnertError):
                parse(body[:n], blobs=weights)

    @examples(200)
    @given(st.text(max_size=60))
    def test_any_text(self, text: str) -> None:
        for candidate in (text, "program(1.3){func main<ios18>(fp16 a){" + text):
            with pytest.raises(AnertError):
                parse(candidate)

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 10**6,
            function_of("fp16 r = const()[val = fp16(" + "[" * 10**6),
            function_of("fp16 r = const()[val = fp16(" + "(" * 10**5),
            function_of("fp16 r = const()[val = fp16(" + "{" * 10**5),
            function_of("fp16 r = const()[val = fp16(" + "[1],[1," * 10**5),
            function_of("list<" * 10**5),
            function_of('"\\' * 10**6),
            function_of("tensor<fp16, [" + "1," * 10**6),
            function_of("fp16 r = const()[val = fp16(" + "1" * 10**6 + ")];").replace("fp16", "int32"),
            function_of("", params="tensor<fp16, [99999999999, 99999999999]> r"),
            function_of("", params=f"tensor<fp16, [{', '.join(['1'] * 50000)}]> r"),
            function_of("tensor<fp16, [99999999, 9999]> r = const()[val = tensor<fp16, [99999999, 9999]>([1])];"),
        ],
    )
    def test_deep_and_huge_is_refused_quickly(self, text: str) -> None:
        start = time.perf_counter()
        with pytest.raises(AnertError) as caught:
            parse(text)
        assert time.perf_counter() - start < 10
        assert len(str(caught.value)) < 400

    def test_a_million_numbers_in_linear_time(self) -> None:
        times = []
        for n in (10**5, 10**6):
            numbers = ", ".join(["0x1.8p-3", "-0x1p+0"] * (n // 2))
            text = function_of(f"tensor<fp16, [{n}]> r = const()[val = tensor<fp16, [{n}]>([{numbers}])];")
            start = time.perf_counter()
            value = parse(text).main.outputs[0].const
            times.append(time.perf_counter() - start)
            assert value is not None and value.sum(dtype=np.float64) == (0.1875 - 1) * n / 2
        assert times[1] < 40 * times[0] + 1
