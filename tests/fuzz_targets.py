"""Everything of anert that reads what somebody else wrote, as fuzz targets: bytes in, our errors out, memory bounded.

    python tests/fuzz_targets.py mil -runs=100000 -seed=1     # coverage-guided, with atheris' (libFuzzer's) options
    python tests/fuzz_targets.py                              # the names

test_fuzz.py runs each for a bounded number of inputs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anert.errors import AnertError

if TYPE_CHECKING:
    from anert.formats import LlamaConfig

BASE_BYTES, PER_BYTE = 16 << 20, 100
"""What reading n bytes may allocate: BASE_BYTES + PER_BYTE * n: mostly a Python object a token of text."""

Seeds = Callable[[Path], Iterator[bytes]]


@dataclass(frozen=True)
class Target:
    """suffix: of the file that `run` gets; seeds: small valid files, made in a folder."""

    suffix: str
    seeds: Seeds
    run: Callable[[Path], object]


TARGETS: dict[str, Target] = {}


def target(name: str, suffix: str, seeds: Seeds) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def add(run: Callable[[Path], object]) -> Callable[[Path], object]:
        TARGETS[name] = Target(suffix, seeds, run)
        return run

    return add


@contextmanager
def bounded(n: int) -> Iterator[None]:
    """Fails if the block's peak allocation is beyond what n bytes of input may cost."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    limit = BASE_BYTES + PER_BYTE * n
    assert peak <= limit, f"{peak:,} bytes allocated for {n:,} bytes of input, at most {limit:,} are in order"


def offer(name: str, data: bytes, folder: Path) -> bool:
    """Give `data` to a target; whether it was taken. Anything but an AnertError of one line is a failure."""
    one = TARGETS[name]
    path = folder / f"fuzzed{one.suffix}"
    path.write_bytes(data)
    with bounded(len(data)):
        try:
            one.run(path)
        except AnertError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 2000, repr(text[:3000])
            return False
    return True


@functools.cache
def seeds(name: str) -> tuple[bytes, ...]:
    """Valid files. The target has run on each: what it makes once, such as the tables of a split, is made."""
    one = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        made = tuple(one.seeds(Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        for data in made:
            path = Path(folder) / f"seed{one.suffix}"
            path.write_bytes(data)
            with contextlib.suppress(AnertError):
                one.run(path)
    return made


# ---- MIL


def mil_seeds(folder: Path) -> Iterator[bytes]:
    from anert.mil import ops
    from anert.mil.graph import Function
    from anert.mil.text import print_module

    for opset in ("ios18", "ios16"):
        fn = Function("main", opset)
        x, w = fn.input("x", (1, 8, 1, 32)), fn.const(np.linspace(-1, 1, 64).reshape(8, 8, 1, 1), "fp16")
        y = ops.softmax(ops.conv(x, w), axis=-1)
        fn.returns(
            ops.concat((ops.reshape(y, shape=(1, 16, 1, 16)), fn.const(np.zeros((1, 16, 1, 16)), "fp16")), axis=1)
        )
        yield print_module(fn).encode()


@target("mil", ".mil", mil_seeds)
def read_mil(path: Path) -> object:
    from anert.mil.text import parse, print_module

    module = parse(path.read_bytes().decode("utf-8", "replace"), blobs={})
    return print_module(module)


@target("lint", ".mil", mil_seeds)
def lint_mil(path: Path) -> object:
    from anert.mil.lint import lint_text

    return lint_text(path.read_bytes().decode("utf-8", "replace"))


def blob_seeds(folder: Path) -> Iterator[bytes]:
    from anert.mil.blob import BlobWriter

    writer = BlobWriter()
    writer.add(np.arange(40, dtype=np.float16))
    writer.add(np.arange(7, dtype=np.int8))
    yield writer.bytes()


@target("blob", ".bin", blob_seeds)
def read_blobs(path: Path) -> object:
    from anert.mil.blob import read_blob

    data, found = path.read_bytes(), []
    for offset in range(64, min(len(data), 1024), 16):
        for dtype, shape in (("fp16", (40,)), ("int8", (7,)), ("fp16", (1 << 40,)), ("int4", (3, 5)), ("bf16", (0,))):
            try:
                found.append(read_blob(data, offset, dtype, shape))
            except AnertError:
                continue
    return found


# ---- tokenizers and text


def llama_seeds(folder: Path) -> Iterator[bytes]:
    from anert.tokenizer import load_tokenizer

    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "llama2c" / "tok512.bin"
    if data.exists():
        yield data.read_bytes()
        load_tokenizer(data).save(folder / "saved.bin")
        yield (folder / "saved.bin").read_bytes()
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % b for b in range(256)), b" a", b"b", b" ab"]
    body = b"".join(np.float32(-i).tobytes() + np.int32(len(p)).tobytes() + p for i, p in enumerate(pieces))
    yield np.int32(7).tobytes() + body


@target("tokenizer-llama", ".bin", llama_seeds)
def read_llama(path: Path) -> object:
    from anert.tokenizer import load_tokenizer

    t = load_tokenizer(path)
    return t.decode(t.encode("a b ab\u00e9"))


def byte_seeds(folder: Path) -> Iterator[bytes]:
    from anert.tokenizer import ByteBPETokenizer

    made = ByteBPETokenizer.train(["the cat sat on the mat and the bat"] * 9, 280)
    made.save(folder / f"made{made.suffix}")
    yield (folder / f"made{made.suffix}").read_bytes()


@target("tokenizer-json", ".json", byte_seeds)
def read_bpe(path: Path) -> object:
    from anert.tokenizer import load_tokenizer

    t = load_tokenizer(path)
    return t.decode(t.encode("the cat\u00e9"))


def rank_seeds(folder: Path) -> Iterator[bytes]:
    import base64

    ranks = [bytes([b]) for b in range(256)] + [b"th", b"the"]
    yield b"".join(base64.b64encode(r) + b" %d\n" % i for i, r in enumerate(ranks))


TARGETS["tokenizer-ranks"] = Target(".tiktoken", rank_seeds, read_bpe)


def text_seeds(folder: Path) -> Iterator[bytes]:
    yield b"Once upon a time.\n\nThe end.<|endoftext|>Another \xe2\x80\x94 one.\r\nMore."
    yield b'{"text": "one"}\n{"text": "two \\u00e9"}\n'


@target("text", ".txt", text_seeds)
def read_text(path: Path) -> object:
    from anert.data.text import documents

    return sum(len(d) for d in documents(path))


def token_seeds(folder: Path) -> Iterator[bytes]:
    from anert.data.token_file import TokenWriter

    with TokenWriter(folder / "t.tokens", vocab_size=512, bos_id=1, tokenizer_hash="ab" * 32) as w:
        for document in ([1, 5, 9], [1, 7], [1, *range(200)]):
            w.start_document()
            w.write(document)
    yield (folder / "t.tokens").read_bytes()
    yield np.array([20240520, 1, 100] + [0] * 253, np.int32).tobytes() + np.arange(100, dtype=np.uint16).tobytes()
    yield np.arange(300, dtype=np.uint16).tobytes()


@target("tokens", ".bin", token_seeds)
def read_tokens(path: Path) -> object:
    from anert.data.dataset import TokenDataset

    data = TokenDataset(path, 16, 0.1, vocab_size=512)
    return next(data.train_batches(2, 1))


# ---- checkpoints


def read_model(path: Path) -> object:
    """Every tensor, and the tokenizer if there is one: formats read when they are asked."""
    from anert.formats import open_model_file

    model = open_model_file(path)
    if model.tokenizer is not None:
        model.tokenizer()
    return [model.tensors[name].sum() for name in model.tensors]


def model_seeds(folder: Path) -> Iterator[bytes]:
    from model_files import model

    from anert.formats import WRITABLE, LlamaConfig

    for version in ("v0", "v1", "v2"):
        WRITABLE[version](folder / version, model(LlamaConfig(64, 64, 1, 2, 1, 16, 4)))
        yield (folder / version).read_bytes()


TARGETS["model-llama2c"] = Target(".bin", model_seeds, read_model)


def blzt_seeds(folder: Path) -> Iterator[bytes]:
    from test_blzt import FILES

    yield from (content for _, content, arch, *_ in FILES.values() if not arch)


TARGETS["model-blzt"] = Target(".bin", blzt_seeds, read_model)


def gguf_seeds(folder: Path) -> Iterator[bytes]:
    from model_files import draw

    from anert.formats import LlamaConfig

    config = LlamaConfig(32, 64, 1, 2, 1, 259, 4)
    yield gguf_bytes(folder / "m.gguf", config, draw(config))


def gguf_bytes(path: Path, c: LlamaConfig, tensors: dict[str, np.ndarray]) -> bytes:
    """A small Llama by the gguf package's own writer."""
    import gguf

    w = gguf.GGUFWriter(path, "llama")
    for key, value in (("context_length", c.seq_len), ("embedding_length", c.dim), ("block_count", c.n_layers),
                       ("feed_forward_length", c.hidden_dim), ("attention.head_count", c.n_heads),
                       ("attention.head_count_kv", c.n_kv_heads), ("rope.dimension_count", c.head_dim)):  # fmt: skip
        w.add_uint32(f"llama.{key}", value)
    w.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    w.add_string("tokenizer.ggml.model", "llama")
    w.add_array("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])
    w.add_array("tokenizer.ggml.scores", [float(-i) for i in range(c.vocab_size)])
    w.add_array("tokenizer.ggml.token_type", [2, 3, 3] + [6] * 256)
    names = {"attn_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
             "ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}  # fmt: skip
    top = {"tok_embeddings": "token_embd", "norm": "output_norm"}
    for name, value in tensors.items():
        parts = name.split(".")
        theirs = top[name] if name in top else f"blk.{parts[1]}.{names[parts[2]]}"
        w.add_tensor(f"{theirs}.weight", value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path.read_bytes()


TARGETS["model-gguf"] = Target(".gguf", gguf_seeds, read_model)


def hf_directory(folder: Path) -> Path:
    from model_files import model

    from anert.formats import WRITABLE, LlamaConfig

    path = folder / "hf"
    if not path.exists():
        WRITABLE["hf"](path, model(LlamaConfig(8, 16, 1, 2, 1, 32, 8)), shard_bytes=600)
    return path


def config_seeds(folder: Path) -> Iterator[bytes]:
    yield (hf_directory(folder) / "config.json").read_bytes()


@target("model-hf-config", ".json", config_seeds)
def read_hf_config(path: Path) -> object:
    path.replace(hf_directory(path.parent) / "config.json")
    return read_model(path.parent / "hf")


def index_seeds(folder: Path) -> Iterator[bytes]:
    yield (hf_directory(folder) / "model.safetensors.index.json").read_bytes()


@target("model-hf-index", ".json", index_seeds)
def read_hf_index(path: Path) -> object:
    path.replace(hf_directory(path.parent) / "model.safetensors.index.json")
    return read_model(path.parent / "hf")


def state_seeds(folder: Path) -> Iterator[bytes]:
    from anert import checkpoint

    step = checkpoint.save(folder, 3, {"w": np.ones((2, 2), np.float32)}, {}, {"data": {"position": 1}}, None)
    yield (step / "state.json").read_bytes()


@target("state", ".json", state_seeds)
def read_state(path: Path) -> object:
    from anert import checkpoint

    step = path.parent / "step-00000003"
    step.mkdir(exist_ok=True)
    path.replace(step / "state.json")
    for name in ("model.safetensors", "optim.safetensors"):
        (step / name).write_bytes(b"")
    return checkpoint.load(step)


def safetensors_seeds(folder: Path) -> Iterator[bytes]:
    from safetensors.numpy import save

    yield save({"w": np.ones((2, 2), np.float32), "norm": np.zeros(3, np.float16)})


@target("safetensors", ".safetensors", safetensors_seeds)
def read_safetensors(path: Path) -> object:
    from anert import checkpoint

    return checkpoint._read_tensors(path)


# ---- what a run is told


def toml_seeds(folder: Path) -> Iterator[bytes]:
    yield b'steps = 5\nlr = 1e-3\ntime_budget = "90s"\npreset = "260k"\n[config]\ndim = 64\n'


@target("config", ".toml", toml_seeds)
def read_config(path: Path) -> object:
    from anert.options import resolve
    from anert.plugin import load_file

    plugin = load_file(Path(__file__).resolve().parents[1] / "plugins" / "stories.py")
    return resolve(plugin, {"config": path})


def plugin_seeds(folder: Path) -> Iterator[bytes]:
    data = {"key": {"chip": "x"}, "capabilities": {"opset": "ios16", "max_width": 65536}, "rules": {"ANE101": True}}
    yield json.dumps(data).encode()


@target("record", ".json", plugin_seeds)
def read_record(path: Path) -> object:
    import os

    from anert import capabilities

    os.environ["ANERT_CAPABILITIES"] = str(path)
    capabilities.machine_key = lambda: {"chip": "x"}
    return capabilities.load_record()


# ---- coverage-guided


def main(argv: list[str]) -> None:
    if len(argv) < 2 or argv[1] not in TARGETS:
        raise SystemExit(f"usage: {argv[0]} TARGET [libFuzzer options]; targets: {', '.join(TARGETS)}")
    import atheris

    name = argv[1]
    with atheris.instrument_imports(include=["anert"]):
        for data in seeds(name):  # loads, instrumented, all that the target uses
            with tempfile.TemporaryDirectory() as folder:
                offer(name, data, Path(folder))
    with tempfile.TemporaryDirectory() as corpus, tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(seeds(name)):
            (Path(corpus) / str(i)).write_bytes(data)

        def test_one_input(data: bytes) -> None:
            offer(name, data, Path(folder))

        atheris.Setup([argv[0], *argv[2:], corpus], test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
