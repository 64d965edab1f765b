"""`anert inspect`, `anert convert`, and model files of every format through `--init` and sampling."""

import gzip
import json
import struct

import numpy as np
import pytest
from model_files import SMALL, draw, model, same_tensors
from test_blzt import MHA, maderix, orion
from test_gguf import write as write_gguf

from anert import cli
from anert.convert import convert
from anert.errors import InputError
from anert.formats import WRITABLE, LlamaConfig, huggingface, llama2c, open_model_file, run_dir
from anert.inspect import inspect
from anert.mil.blob import BlobWriter


@pytest.fixture(scope="module")
def tiny(shared_data, tmp_path_factory):
    """stories260K's shape with one layer, in every format that is read, each able to say it all."""
    folder = tmp_path_factory.mktemp("formats")
    config = LlamaConfig(64, 96, 1, 4, 2, 512, 64)
    source = model(config, {n: w * np.float32(0.1) for n, w in draw(config).items()})
    for version in range(3):
        llama2c.write(folder / f"v{version}", source, version)
    huggingface.write(folder / "hf", source)
    run_dir.write(folder / "anert", source)
    write_gguf(folder / "gguf", config, {n: source.tensors[n] for n in source.tensors})
    whole = LlamaConfig(64, 96, 1, 4, 4, 512, 64)
    (folder / "blzt").write_bytes(maderix(whole, 4, draw(whole)))
    return folder


FORMATS = ("v0", "v1", "v2", "hf", "anert", "gguf", "blzt")


def run(capsys, *argv):
    """(exit code, stdout, stderr) of a command."""
    code = cli.main(list(map(str, argv)))
    return code, *capsys.readouterr()


# ---- inspect ----


@pytest.mark.parametrize("name", FORMATS)
def test_inspect_names_format_architecture_and_sizes(tiny, name, capsys):
    code, out, _ = run(capsys, "inspect", tiny / name, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["kind"] == "model" and facts["format"] == name and facts["architecture"] == "llama"
    assert facts["config"]["dim"] == 64 and facts["config"]["n_layers"] == 1
    found = open_model_file(tiny / name)
    assert facts["parameters"] == found.llama().n_params() and facts["tensors"] == 11
    files = [tiny / name] if (tiny / name).is_file() else [p for p in (tiny / name).rglob("*") if p.is_file()]
    assert facts["bytes"] == sum(p.stat().st_size for p in files)
    if name in ("blzt", "anert"):
        assert facts["step"] == {"blzt": 1234, "anert": 0}[name]
    code, out, _ = run(capsys, "inspect", tiny / name)
    assert code == 0 and name in out and "dim 64" in out


def test_inspect_orion(tmp_path):
    (tmp_path / "x").write_bytes(orion(MHA, draw(MHA)))
    facts = inspect(tmp_path / "x")
    assert (facts["writer"], facts["trained_as"], facts["loss"]) == ("orion", "norope", 2.5)


def test_inspect_names_what_is_no_model(tmp_path, shared_data):
    from anert.data import TokenWriter

    llama, gpt2 = shared_data / "llama2c", shared_data / "gpt2"
    with TokenWriter(tmp_path / "ours.bin", 512, 1, 2, "ab" * 32) as w:
        w.start_document()
        w.write([1, 5, 511])
    np.arange(300, dtype="<u2").tofile(tmp_path / "raw.bin")
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, 4
    (tmp_path / "llmc.bin").write_bytes(head.tobytes() + np.arange(4, dtype="<u2").tobytes())
    blob = BlobWriter()
    blob.add(np.zeros((3, 4), np.float16))
    blob.add(np.ones(5, np.float32))
    (tmp_path / "w.bin").write_bytes(blob.bytes())
    huggingface.write(tmp_path / "hf", model(SMALL))
    for path, want in (
        (tmp_path / "ours.bin", {"kind": "tokens", "tokens": 3, "vocab_size": 512, "documents": 1, "largest_id": 511}),
        (tmp_path / "raw.bin", {"kind": "tokens", "tokens": 300, "largest_id": 299}),
        (tmp_path / "llmc.bin", {"kind": "tokens", "format": "llm.c token file", "tokens": 4}),
        (llama / "tokenizer.bin", {"kind": "tokenizer", "vocab_size": 32000, "bos_id": 1}),
        (llama / "tok512.bin", {"kind": "tokenizer", "vocab_size": 512}),
        (llama / "tokenizer.model", {"kind": "tokenizer", "vocab_size": 32000}),
        (gpt2 / "gpt2_vocab.json", {"kind": "tokenizer", "vocab_size": 50257}),
        (shared_data / "text" / "grimm_pg2591.txt", {"kind": "text"}),
        (tmp_path / "w.bin", {"kind": "weight blob", "blobs": 2}),
        (tmp_path / "hf" / "model.safetensors", {"kind": "tensors", "tensors": 20}),
    ):
        facts = inspect(path)
        assert facts | want == facts, (path, facts)
        assert facts["bytes"] == path.stat().st_size
    rows = inspect(tmp_path / "w.bin")["list"]
    assert [(r["dtype"], r["bytes"]) for r in rows] == [("fp16", 24), ("fp32", 20)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none", None, "No such file"),
        ("empty.bin", b"", "empty"),
        ("lfs.bin", b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "git lfs pull"),
        ("cut.bin", struct.pack("<7i", 288, 768, 6, 6, 6, 32000, 256) + bytes(5001), "has 60,816,028 bytes: truncated"),
        ("x.gz", gzip.compress(b"\xff\xfe\0bin", mtime=0)[:-9], "x.gz"),
        ("cut.gguf", b"GGUF\3\0\0\0", "truncated"),
        ("odd.bin", bytes(range(256)) * 3 + b"x", "no uint16 ids"),
    ],
)
def test_inspect_refuses_in_one_line(tmp_path, capsys, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run(capsys, "inspect", tmp_path / name)
    assert code == 2 and says in err and err.count("\n") == 1 and name in err and not out


def test_inspect_an_empty_directory(tmp_path, capsys):
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and "no model in this directory" in err


# ---- convert ----


@pytest.mark.parametrize("to", WRITABLE)
@pytest.mark.parametrize("name", FORMATS)
def test_from_every_format_to_every_other(tiny, tmp_path, name, to):
    """All weights arrive, bit for bit where the target is not int8."""
    report = convert(tiny / name, tmp_path / "out", to)
    before, after = open_model_file(tiny / name), open_model_file(tmp_path / "out")
    assert report["to"] == to == after.format and report["parameters"] == before.llama().n_params()
    assert after.llama() == before.llama()
    if to != "v2" or name == "v2":
        assert same_tensors(after, before)
    if to == name and to.startswith("v"):
        assert (tmp_path / "out").read_bytes() == (tiny / name).read_bytes()


def test_the_command(tiny, tmp_path, capsys, shared_data):
    tokenizer = shared_data / "llama2c" / "tok512.bin"
    code, out, _ = run(capsys, "convert", tiny / "v0", tmp_path / "hf", "--to", "hf", "--tokenizer", tokenizer,
                       "--dtype", "bf16", "--shard-mb", "0.05", "--json")  # fmt: skip
    done = json.loads(out)
    assert code == 0 and done["tokenizer"] == "tokenizer.json" and done["from"] == "v0"
    found = open_model_file(tmp_path / "hf")
    assert found.tensors.encodings() == {"BF16": found.llama().n_params()} and found.about["files"] > 1
    code, out, err = run(capsys, "convert", tmp_path / "hf", tmp_path / "v2", "--to", "v2", "--group-size", 32)
    assert code == 0 and "wrote" in out and "no place for a tokenizer: keep tokenizer.json" in err
    assert open_model_file(tmp_path / "v2").about["group_size"] == 32


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["v0", "{}/x", "--to", "v3"], "v3"),
        (["v0", "{}/x"], "--to"),
        (["none", "{}/x", "--to", "v0"], "No such file"),
        (["v0", "{}/there", "--to", "v0"], "is there already"),
        (["v0", "{}/no/where", "--to", "v0"], "no directory"),
        (["v0", "{}/x", "--to", "v0", "--dtype", "bf16"], "--to v0 has no use for --dtype"),
        (["v0", "{}/x", "--to", "hf", "--group-size", "3"], "no use for --group-size"),
        (["v0", "{}/x", "--to", "v2", "--group-size", "7"], "group size 7 does not divide"),
        (["v0", "{}/x", "--to", "v1", "--arch", "rope"], "no choice of --arch"),
        (["v0", "{}/x", "--to", "hf", "--tokenizer", "none"], "cannot read the tokenizer"),
        (["v0", "{}/folder", "--to", "hf", "--force"], "a directory of something else"),
    ],
)
def test_convert_refuses_in_one_line(tiny, tmp_path, capsys, argv, says, monkeypatch):
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_bytes(b"mine")
    monkeypatch.chdir(tiny)
    code, _, err = run(capsys, "convert", *(a.format(tmp_path) for a in argv))
    assert code == 2 and says in err and err.count("\n") == 1
    assert (tmp_path / "there").read_bytes() == b"mine" and (tmp_path / "folder" / "mine").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "there"]


def test_force_replaces_but_never_the_source(tiny, tmp_path):
    convert(tiny / "v0", tmp_path / "x", "v0")
    convert(tiny / "v0", tmp_path / "x", "v1", force=True)
    assert open_model_file(tmp_path / "x").format == "v1"
    for to in ("v0", "hf"):
        with pytest.raises(InputError, match="that is to be converted"):
            convert(tmp_path / "x", tmp_path / "x", to, force=True)
    convert(tiny / "hf", tmp_path / "y", "hf")
    convert(tiny / "v0", tmp_path / "y", "hf", force=True)
    assert open_model_file(tmp_path / "y").format == "hf"


# ---- the trainer and the sampler read them all ----


@pytest.mark.parametrize("name", FORMATS)
def test_init_and_sample(tiny, tmp_path, name, capsys, shared_data):
    tokenizer = shared_data / "llama2c" / "tok512.bin"
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat.\n" * 200)
    common = ["--tokenizer", tokenizer, "--json"]
    code, out, err = run(capsys, "run", "plugins/stories.py", "train", "--init", tiny / name, "--data",
                         tmp_path / "text.txt", "--steps", 1, "--batch", 1, "--out", tmp_path / "run", "--ui", "plain",
                         "--sample-every", 0, *common)  # fmt: skip
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == 1 and "the model follows the checkpoint: " in err
    code, out, err = run(capsys, "run", "plugins/stories.py", "sample", "--checkpoint", tiny / name, "-n", 3, *common)
    assert code == 0 and json.loads(out.splitlines()[-1])["samples"][0].startswith("Once upon a time"), err


def test_a_trained_run_goes_out_to_llama2c_and_back(tiny, tmp_path, capsys, shared_data):
    """What training made, as run.c's program would find it: read with our own eyes, tensor by tensor."""
    tokenizer = shared_data / "llama2c" / "tok512.bin"
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat.\n" * 200)
    code, _, err = run(capsys, "run", "plugins/stories.py", "train", "--init", tiny / "v0", "--data",
                       tmp_path / "text.txt", "--steps", 3, "--set", "seq_len=32", "--out", tmp_path / "run",
                       "--tokenizer", tokenizer, "--ui", "plain", "--sample-every", 0, "--json")  # fmt: skip
    assert code == 0, err
    trained = open_model_file(tmp_path / "run")
    assert trained.step == 3 and trained.llama().seq_len == 32
    assert not same_tensors(trained, open_model_file(tiny / "v0"))
    convert(tmp_path / "run", tmp_path / "m.bin", "v0")
    header = struct.unpack("<7i", (tmp_path / "m.bin").read_bytes()[:28])
    assert header == (64, 96, 1, 4, 2, 512, 32)
    data, at = np.fromfile(tmp_path / "m.bin", "<f4", offset=28), 0
    sizes = {"tok_embeddings": (512, 64)}
    sizes |= {f"layers.0.{k}": s for k, s in {"attn_norm": (64,), "wq": (64, 64), "wk": (32, 64), "wv": (32, 64),
              "wo": (64, 64), "ffn_norm": (64,), "w1": (96, 64), "w2": (64, 96), "w3": (96, 64)}.items()}  # fmt: skip
    for name, shape in (sizes | {"norm": (64,)}).items():
        n = int(np.prod(shape))
        assert (data[at : at + n].reshape(shape) == trained.tensors[name]).all()
        at += n
    assert data.size == at + 2 * 32 * 8


def test_converted_weights_are_no_run_to_resume(tiny, capsys):
    code, _, err = run(capsys, "run", "plugins/stories.py", "--resume", tiny / "anert", "--ui", "off")
    assert code == 2 and "start one by --init" in err


def test_a_model_that_the_plugin_cannot_be_is_refused(tmp_path, capsys, tiny):
    """bigram has no heads: what a Llama's config says is not dropped in silence."""
    code, _, err = run(capsys, "run", "plugins/bigram.py", "--init", tiny / "v0", "--ui", "off")
    assert code == 2 and "its config has hidden_dim 96" in err
