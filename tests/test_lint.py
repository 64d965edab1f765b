"""Every rule of the catalogue fires on its failing example and is silent on its passing one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_grad import attention, cfg, ffn, shapes, trace

from anert.capabilities import ANE
from anert.errors import InputError, MILSyntaxError
from anert.kernel import build
from anert.mil import ops
from anert.mil.grad import differentiate
from anert.mil.graph import Function
from anert.mil.lint import as_json, as_sarif, as_text, lint, lint_text
from anert.mil.lint_rules import CHIPS, catalogue
from anert.stages import roles, split

INFO = '[buildInfo = dict<string, string>({{"coremlc-version", "3505.4.1"}})]'


def program(inputs: str, body: str, outputs: str, opset: str = "ios18", info: str = INFO) -> str:
    """`a:1,64,1,32 b:..` and statements `name:shape = op(args)`, each with its name attribute, as MIL text."""

    def formal(word: str) -> str:
        name, _, shape = word.partition(":")
        dtype, _, dims = shape.rpartition("/")
        return f"tensor<{dtype or 'fp16'}, [{dims}]> {name}"

    lines = []
    for line in filter(None, (line.strip() for line in body.split(";"))):
        out, _, call = line.partition(" = ")
        name = out.partition(":")[0]
        if call.startswith("const "):
            kind = formal(out).rpartition(" ")[0]
            lines.append(f'{formal(out)} = const()[name = string("{name}"), val = {kind}({call[6:]})];')
        else:
            tail = "" if call.endswith("]") else f'[name = string("{name}")]'
            lines.append(f"{formal(out)} = {call}{tail};")
    text = "\n".join(lines)
    params = ", ".join(map(formal, inputs.split()))
    return f"program(1.3)\n{info}\n{{\nfunc main<{opset}>({params}) {{\n{text}\n}} -> ({outputs});\n}}"


T, F = "bool(true)", "bool(false)"
ONE_BLOB = 'BLOBFILE(path = string("@model_path/w.bin"), offset = uint64(64))'
RELU = ("a:1,64,1,32", "r:1,64,1,32 = relu(x = a)", "r")
NINE = [f"i{n:02}:1,64,1,32" for n in range(9)]
SUM9 = "; ".join(f"s{n}:1,64,1,32 = add(x = {f's{n - 1}' if n > 1 else 'i00'}, y = i{n:02})" for n in range(1, 9))
SUM8 = "; ".join(SUM9.split("; ")[:7])
MM = "tensor<fp16, [1, 1, 64, 64]>"
CONV = "pad_type = string(\"valid\"), strides = tensor<int32, [2]>([1, 1]), pad = tensor<int32, [4]>([0, 0, 0, 0]), " \
    "dilations = tensor<int32, [2]>([1, 1]), groups = int32(1)"  # fmt: skip


def matmul(k: int) -> tuple[str, str, str]:
    return (
        f"a:1,1,64,{k} b:1,1,{k},64",
        f"r:1,1,64,64 = matmul(x = a, y = b, transpose_x = {F}, transpose_y = {F})",
        "r",
    )


def softmax(n: int) -> tuple[str, str, str]:
    return f"a:1,1,64,{n}", f"r:1,1,64,{n} = softmax(axis = int32(-1), x = a)", "r"


def conv(width: int) -> tuple[str, str, str]:
    out = 64 - width + 1
    return ("a:1,4,1,64", f"w:4,4,1,{width} = const {ONE_BLOB}; r:1,4,1,{out} = conv(x = a, weight = w, {CONV})", "r")


def column(name: str, begin: int, width: int = 32) -> str:
    sizes = f"size = tensor<int32, [4]>([1, 64, 1, {width}])"
    return f"{name}:1,64,1,{width} = slice_by_size(x = a, begin = tensor<int32, [4]>([0, 0, 0, {begin}]), {sizes})"


def joined(*begins: int) -> tuple[str, str, str]:
    body = "; ".join(column(f"c{n}", b) for n, b in enumerate(begins))
    values = ", ".join(f"c{n}" for n in range(len(begins)))
    out = f"r:1,{64 * len(begins)},1,32 = concat(axis = int32(1), interleave = {F}, values = ({values}))"
    return "a:1,64,1,96", f"{body}; {out}", "r"


def reduced(factor: str) -> tuple[str, str, str]:
    total = f"s:1,1,1,32 = reduce_sum(axes = tensor<int32, [1]>([1]), keep_dims = {T}, x = a)"
    return "a:1,64,1,32", f"{total}; k:1 = const [{factor}]; r:1,1,1,32 = mul(x = s, y = k)", "r"


def quantised(scale: str) -> tuple[str, str, str]:
    data = "quantized_data = tensor<int8, [2, 1]>([1, 2])"
    call = f"constexpr_affine_dequantize()[{data}, axis = int32(0), scale = {scale}, zero_point = int8(0)]"
    return "a:1,64,1,32", f"w:2,1 = {call}; r:1,64,1,32 = relu(x = a)", "r"


ROOT = "q:1,1,1,32 = sqrt(x = b); r:1,{}1,32 = mul(x = a, y = q)"
QKV = "q:1,2,64,64 k:1,2,64,64 v:1,2,64,64"
TURNED = ("a:1,64,32", "r:1,32,64 = transpose(perm = tensor<int32, [3]>([0, 2, 1]), x = a)", "r")
SPLIT = "begin = tensor<int32, [4]>([0, 0, 0, 0]), end = tensor<int32, [4]>([1, 32, 1, 32])"
MEAN = "r:1,1,1,32 = reduce_{}(axes = tensor<int32, [1]>([1]), keep_dims = " + T + ", x = a)"
SDPA = "r:1,2,64,64 = scaled_dot_product_attention(query = q, key = k, value = v{})"

EXAMPLES: dict[str, tuple[str, str]] = {
    "ANE101": (program("b:1,64,1,32 a:1,64,1,32", "r:1,64,1,32 = sub(x = a, y = b)", "r"),
               program("a:1,64,1,32 b:1,64,1,32", "r:1,64,1,32 = sub(x = a, y = b)", "r")),
    "ANE102": (program("a:1,64,1,32", "s:1,64,1,32 = relu(x = a); r:1,64,1,32 = exp(x = a)", "s, r"),
               program("a:1,64,1,32", "s:1,64,1,32 = relu(x = a); r:1,64,1,32 = exp(x = a)", "r, s")),
    "ANE103": (program(" ".join(NINE), SUM9, "s8"), program(" ".join(NINE[:8]), SUM8, "s7")),
    "ANE104": (program("a:fp32/1,64,1,32", 'r:1,64,1,32 = cast(dtype = string("fp16"), x = a)', "r"), program(*RELU)),
    "ANE105": (program("a:int32/1,64,1,32", 'r:1,64,1,32 = cast(dtype = string("fp16"), x = a)', "r"), program(*RELU)),
    "ANE106": (program("a:1,64,1,24", "r:1,64,1,24 = relu(x = a)", "r"), program(*RELU)),
    "ANE107": (program("a:1,64,1,16", "r:1,64,1,16 = relu(x = a)", "r"), program(*RELU)),
    "ANE108": (program("a:1,4,1,16416", "r:1,4,1,16416 = relu(x = a)", "r"),
               program("a:1,4,1,16384", "r:1,4,1,16384 = relu(x = a)", "r")),
    "ANE109": (program("a:1,65568,1,32", "r:1,65568,1,32 = relu(x = a)", "r"),
               program("a:1,65536,1,32", "r:1,65536,1,32 = relu(x = a)", "r")),
    "ANE110": (program("a:1,64,1,32 b:1,1,1,32", "r:1,64,1,32 = add(x = a, y = b)", "r"),
               program("a:1,64,1,32 b:1,64,1,32", "r:1,64,1,32 = add(x = a, y = b)", "r")),
    "ANE111": (program("a:1,64,1,32 b:1,64,1,32", RELU[1], "r"), program(*RELU)),
    "ANE120": (program("x:1,64,1,32", "r:1,64,1,32 = relu(x = x)", "r"), program(*RELU)),
    "ANE121": (program(*RELU), program(*RELU, opset="ios16")),
    "ANE122": (program("a:1,64,1,32", "r:1,64,1,32 = relu(x = a)[]", "r"), program(*RELU)),
    "ANE123": (program(*RELU, info=""), program(*RELU)),
    "ANE200": (program("a:1,64,1,32", "r:1,64,1,32 = cumsum(axis = int32(1), x = a)", "r"), program(*RELU)),
    "ANE201": (program("a:1,64,1,32", "r:1,64,1,32 = erf(x = a)", "r"), program(*RELU)),
    "ANE202": (program("a:1,64,1,32", "r:1,128,1,32 = tile(reps = tensor<int32, [4]>([1, 2, 1, 1]), x = a)", "r"),
               program(*RELU)),
    "ANE203": (program("a:1,64,1,32", "r:1,64,1,32 = argsort(axis = int32(1), x = a)", "r"), program(*RELU)),
    "ANE204": (program("a:1,64,1,32", MEAN.format("mean"), "r"), program("a:1,64,1,32", MEAN.format("sum"), "r")),
    "ANE205": (program("a:1,64,1,32", "r:1,64,1,32 = rsqrt(x = a)", "r"),
               program("a:1,64,1,32", "r:1,64,1,32 = pow(x = a, y = fp16(-0.5))", "r")),
    "ANE206": (program("a:1,64,1,32", "r:1,64,1,32 = gelu(x = a)", "r"),
               program("a:1,64,1,32", 'r:1,64,1,32 = gelu(mode = string("EXACT"), x = a)', "r")),
    "ANE207": (program(QKV + " m:1,1,64,64", SDPA.format(", attn_mask = m"), "r"), program(QKV, SDPA.format(""), "r")),
    "ANE208": (program("a:1,4,1,64 w:4,4,1,1", f"r:1,4,1,64 = conv(x = a, weight = w, {CONV})", "r"),
               program(*conv(1))),
    "ANE209": (program("a:1,1,64,64", f"b:1,1,64,64 = const {ONE_BLOB}; " + matmul(64)[1], "r"), program(*matmul(64))),
    "ANE210": (program(*matmul(48)), program(*matmul(64))),
    "ANE211": (program(*matmul(8192)), program(*matmul(4096))),
    "ANE212": (program("a:1,64,1,32", "r:1,128,1,32 = concat(axis = int32(1), values = (a, a))", "r"),
               program(*joined(0, 32))),
    "ANE213": (program(*softmax(257)), program(*softmax(256))),
    "ANE214": (program("a:1,64,1,96", column("r", 32), "r"), program("a:1,64,1,96", column("r", 0), "r")),
    "ANE215": (program(*joined(32, 64)), program(*joined(0, 64))),
    "ANE216": (program("a:1,64,1,32", f"r:1,32,1,32 = slice_by_index({SPLIT}, x = a)", "r"),
               program("a:1,64,1,32", f"b:1,64,1,32 = relu(x = a); r:1,32,1,32 = slice_by_index({SPLIT}, x = b)", "r")),
    "ANE217": (program(*reduced("0x0p+0")), program(*reduced("0x1p-6"))),
    "ANE218": (program(*quantised("tensor<fp16, [2, 1]>([[1], [2]])")),
               program(*quantised("tensor<fp16, [2]>([1, 2])"))),
    "ANE219": (program("a:1,32768", "r:1,32768 = relu(x = a)", "r"),
               program("a:1,16384", "r:1,16384 = relu(x = a)", "r")),
    "ANE220": (program("a:1,64,1,32 b:1,1,1,32", ROOT.format("64,"), "r"),
               program("a:1,1,1,32 b:1,1,1,32", ROOT.format("1,"), "r")),
    "ANE221": (program(*TURNED, "ios16"),
               program(*TURNED, "ios18")),
    "ANE222": (program(*conv(16)), program(*conv(15))),
    "ANE223": (program(*conv(14)), program(*conv(13))),
    "ANE301": (program("a:fp32/1,64,1,32", "r:fp32/1,64,1,32 = relu(x = a)", "r"), program(*RELU)),
    "ANE302": (program("a:1,64,1,32", "k:1,1,1,1 = const [-inf]; r:1,64,1,32 = add(x = a, y = k)", "r"),
               program("a:1,64,1,32", "k:1,1,1,1 = const [-10000]; r:1,64,1,32 = add(x = a, y = k)", "r")),
    "ANE303": (program("a:1,64,1024,1024", "b:1,64,1024,1024 = relu(x = a); r:1,64,1024,1024 = exp(x = b)", "r"),
               program(*RELU)),
    "ANE304": (program("a:1,4096,1,32", f"k:4096,4096,1,1 = const {ONE_BLOB}; "
                       f"r:1,4096,1,32 = conv(x = a, weight = k, {CONV})", "r"), program(*conv(1))),
}  # fmt: skip


def test_every_rule_has_examples() -> None:
    ids = [rule.id for rule in catalogue()]
    assert sorted(ids) == sorted(EXAMPLES) and len(set(ids)) == len(ids)
    for rule in catalogue():
        assert set(rule.levels) <= set(CHIPS) and rule.levels and rule.source and rule.fix and rule.summary
        assert {s for s, _ in rule.levels.values()} <= {"error", "warning", "note"}
        assert {c for _, c in rule.levels.values()} <= {"agreed", "disputed"}


@pytest.mark.parametrize("id", sorted(EXAMPLES))
def test_failing_and_passing_example(id: str) -> None:
    failing, passing = EXAMPLES[id]
    found = [f for f in lint_text(failing) if f.rule == id]
    assert found, as_text(lint_text(failing))
    assert not [f for f in lint_text(passing) if f.rule == id]
    (rule,) = (r for r in catalogue() if r.id == id)
    for f in found:
        assert all(rule.levels[chip] == (f.severity, f.confidence) for chip in f.targets)
        assert f.line > 0 and f.column > 0 and "\n" not in f.message + f.fix
    assert {chip for f in found for chip in f.targets} == set(rule.levels)


def test_a_good_kernel_has_no_findings_but_the_dialect() -> None:
    assert [f.rule for f in lint_text(program(*matmul(64)))] == ["ANE121"]
    assert lint_text(program(*matmul(64)), "m4") == [] == lint_text(program(*matmul(64), opset="ios16"))


def test_positions_and_targets() -> None:
    text = program(*matmul(48))
    (finding,) = [f for f in lint_text(text, "m4,m5") if f.rule == "ANE210"]
    assert finding.targets == ("m4", "m5") and (finding.line, finding.column) == (5, 27)
    assert text.splitlines()[4][26] == "r"
    (width,) = [f for f in lint_text(program(*softmax(24)), ["m2"]) if f.rule == "ANE106" and f.value == "a"]
    assert width.line == 4 and width.targets == ("m2",)


def test_a_function_without_text() -> None:
    f = Function()
    f.returns(ops.rsqrt(f.input("a", (1, 64, 1, 32))))
    (finding,) = lint(f, "m4")
    assert finding.rule == "ANE205" and (finding.line, finding.column) == (0, 0) and finding.value == "rsqrt"


def test_what_anert_cannot_read_is_said_and_no_verdict() -> None:
    findings = lint_text(program("a:1,64,1,32", "r:1,64,1,32 = warp_drive(x = a)", "r"), "m4")
    assert [(f.rule, f.severity) for f in findings] == [("ANE000", "warning")]
    assert "warp_drive" in findings[0].message


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no chip is called 'm9'"):
        lint_text(program(*RELU), "m1,m9")
    with pytest.raises(MILSyntaxError):
        lint_text("program(1.3) {")
    with pytest.raises(InputError, match="git-lfs"):
        lint_text("version https://git-lfs.github.com/spec/v1\n")


def test_text_json_and_sarif() -> None:
    findings = lint_text(program("b:1,64,1,24 a:1,64,1,24", "r:1,64,1,24 = rsqrt(x = b)", "r"), "m1,m4", "k.mil")
    text = as_text(findings, "k.mil")
    assert re.search(r"^k\.mil:\d+:\d+: error ANE205 \[m1,m4\]: rsqrt does not compile\n    fix: pow", text, re.M)
    assert json.loads(json.dumps(as_json(findings)))[0]["severity"] == "error"
    log = json.loads(json.dumps(as_sarif(findings, "k.mil")))
    (run,) = log["runs"]
    rules = {r["id"] for r in run["tool"]["driver"]["rules"]}
    assert log["version"] == "2.1.0" and len(run["results"]) == len(findings)
    for entry in run["results"]:
        assert entry["ruleId"] in rules and entry["level"] in ("error", "warning", "note")
        assert entry["locations"][0]["physicalLocation"]["region"]["startLine"] > 0


@pytest.mark.parametrize("layout", ["ports", "packed"])
@pytest.mark.parametrize("block", [attention, ffn])
def test_our_kernels_have_no_agreed_error(block: Any, layout: str) -> None:
    """Forward and backward of a decoder block, every stage of it, on every chip."""
    config = cfg(dim=768, hidden_dim=2048, n_heads=12, n_kv_heads=4)
    gradient = differentiate(trace(block, config, 256, 1), ["x"], shapes(config, block))
    for function in (gradient.forward, gradient.backward):
        role = roles(function, shapes(config, block))
        for stage in split(function, role):
            kernel = build(stage, role, layout, ANE, "k")
            found = lint_text(kernel.text, blobs=kernel.blobs)
            assert not [f for f in found if (f.severity, f.confidence) == ("error", "agreed")], as_text(found)


def test_the_sample_files_can_be_linted(shared_data: Path) -> None:
    paths = sorted((shared_data / "mil").rglob("*.mil"))
    assert paths
    for path in paths:
        assert {
            f.rule for f in lint_text(path.read_text(), source=path.name)
        }  # the corpus is of no chip's liking whole
