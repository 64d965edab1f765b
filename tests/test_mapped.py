"""Weights that a file holds as fp16 are read where it is mapped: no copy, the same text, and nobody writes them."""

from __future__ import annotations

import functools
import gc
import json
import mmap
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_ane_backend import backend_of
from test_gguf import write as write_gguf
from test_quant import linear

from anert import ffi
from anert.cli import main
from anert.convert import convert
from anert.decode import Session
from anert.errors import InputError, ShapeError, StateError
from anert.events import Text
from anert.ffi import Pool, call
from anert.formats import huggingface, llama2c, open_model_file
from anert.inputs import open_model
from anert.kernel import Slot
from anert.mapped import map_of
from anert.param import ParamStore, Spec
from anert.plugin import load
from anert.runtime import Runtime
from anert.sample import open_engine, sample
from anert.surface import Heap, ReadOnlySurface, Surface

ROOT = Path(__file__).resolve().parents[1]
STORIES = str(ROOT / "plugins" / "stories.py")
HUGE_PAGE = 2 << 20


def mapped(path: Path, content: bytes, dtype=np.uint8, offset=0):
    """An array over a file of this content, mapped read-only."""
    path.write_bytes(content)
    return np.frombuffer(np.memmap(path, np.uint8, "r"), dtype, offset=offset)


@pytest.fixture(scope="module")
def files(shared_data, tmp_path_factory):
    """stories260K: llama2.c's file, and the same weights in fp16 as a run, as a Hugging Face directory and as GGUF."""
    folder, llama = tmp_path_factory.mktemp("mapped"), shared_data / "llama2c"
    source = folder / "model.bin"
    shutil.copy(llama / "stories260K.bin", source)
    tokenizer = str(llama / "tok512.bin")
    for to, name in (("anert", "run"), ("hf", "hf")):
        argv = ["convert", source, folder / name, "--to", to, "--dtype", "fp16", "--tokenizer", tokenizer]
        assert main(list(map(str, argv))) == 0
    model = open_model_file(source)
    halves = {n: a.astype(np.float16) if a.ndim == 2 else a for n, a in model.tensors.items()}
    write_gguf(folder / "gguf", model.llama(), halves)
    return folder, tokenizer


def opened(path: Path, tokenizer: str, **options):
    model, tensors, _ = open_model(load(STORIES), path, tokenizer, hashed=False)
    return open_engine(model, tensors, backend="cpu", threads=1, **options)


def text(capsys, path: Path, tokenizer: str, *options: str) -> str:
    argv = ["sample", str(path), "--tokenizer", tokenizer, "--plugin", STORIES, "-n", "40", "--backend", "cpu"]
    assert main([*argv, *options]) == 0
    return capsys.readouterr().out


def widened(path: Path) -> dict[str, np.ndarray]:
    """The same weights as fp32 in memory: what is written to copies."""
    return {n: t.astype(np.float32) for n, t in open_model_file(path).tensors.items()}


def placed(store: ParamStore) -> set[str]:
    """Matrices that have a written copy."""
    return {name.rpartition(".")[2] for name, p in store.items() if p.cols > 1 and p.placements}


# ---- one text, no copy


@pytest.mark.parametrize("name", ["run", "gguf"])
@pytest.mark.parametrize("options", [("--temperature", "0"), ("--temperature", "1", "--seed", "5")])
def test_the_text_is_the_fp32_files(files, capsys, name, options):
    folder, tokenizer = files
    want = text(capsys, folder / "model.bin", tokenizer, *options)
    assert len(want) > 60 and text(capsys, folder / name, tokenizer, *options) == want


def test_the_tokenizer_goes_with_the_weights(files, capsys):
    folder, tokenizer = files
    argv = ["--plugin", STORIES, "-n", "9", "--temperature", "0", "--backend", "cpu"]
    for name in ("run", "hf"):
        assert main(["sample", str(folder / name), *argv]) == 0
        assert capsys.readouterr().out.strip() == text(capsys, folder / name, tokenizer, *argv[2:]).strip()


@pytest.mark.parametrize(("name", "copied"), [("run", set()), ("gguf", set()), ("hf", {"wq", "wk"})])
def test_only_what_lies_otherwise_is_copied(files, name, copied):
    """Hugging Face's rows of q and k stand in another order; all else is the file's own memory."""
    folder, tokenizer = files
    session = opened(folder / name, tokenizer)
    fp32 = open_engine(session.model, widened(folder / name), backend="cpu", threads=1)
    store = session.store
    assert placed(store) == copied
    matrices = {n: p for n, p in store.items() if p.cols > 1}
    given = [p.given for n, p in matrices.items() if n.rpartition(".")[2] not in copied]
    assert all(s.read_only and s.seed == 0 for s in given)
    kept = sum(2 * p.spec.size for p in matrices.values() if not p.placements)
    assert fp32.runtime.heap.nbytes - session.runtime.heap.nbytes >= kept - HUGE_PAGE
    assert store.copy_bytes == sum(2 * p.spec.size for p in store.values()) - kept
    assert np.array_equal(session.extend([1, 5, 9]), fp32.extend([1, 5, 9]))
    assert session.store.sync() == 0, "nothing is past fp16"


def test_a_run_of_110m_weights_allocates_none(tmp_path):
    """Of a larger model: the heap grows by what sampling needs beside the weights, and they are in the process once."""
    preset = load(STORIES).preset("15m")
    model = preset.model(preset.config)
    rng = np.random.default_rng(0)
    tensors = {n: (rng.random(s.shape, np.float32) - 0.5).astype(np.float16) for n, s in model.specs().items()}
    blob = b"".join(t.tobytes() for t in tensors.values())
    data, at = mapped(tmp_path / "weights", blob, np.float16), 0
    views = {}
    for name, t in tensors.items():
        views[name], at = data[at : at + t.size].reshape(t.shape), at + t.size
    rt = Runtime("cpu", "fp32", threads=1)
    store = ParamStore(rt.heap, rt.pool, model.specs(), False, views)
    before = rt.heap.nbytes
    session = Session(rt, model, store, widths=(1,))
    assert store.sync() == 0 and placed(store) == set()
    assert rt.heap.nbytes - before < session.cache_bytes + 6 * HUGE_PAGE < len(blob) // 2
    assert np.isfinite(session.extend([1])).all()


def test_a_trained_run(files, tmp_path, capsys):
    """train -> convert -> sample, as a user goes."""
    folder, tokenizer = files
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat.\n" * 200)
    argv = ["run", STORIES, "train", "--init", folder / "run", "--data", tmp_path / "text.txt", "--steps", 2, "--batch",
            1, "--out", tmp_path / "run", "--tokenizer", tokenizer, "--ui", "off", "--sample-every", 0,
            "--backend", "cpu"]  # fmt: skip
    assert main(list(map(str, argv))) == 0, "masters are fp32 where weights change"
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "half"), "--to", "anert", "--dtype", "fp16"]) == 0
    assert capsys.readouterr().out.count("and tokenizer.bin") == 1
    found = open_model_file(tmp_path / "half")
    assert found.step == 2 and list(found.tensors.encodings()) == ["F16", "F32"] and found.about["plugin"] == "stories"
    options = ("--temperature", "1", "--seed", "3")
    assert text(capsys, tmp_path / "half", tokenizer, *options) == text(capsys, tmp_path / "run", tokenizer, *options)


def test_eval_reads_them_too(files, tmp_path, capsys):
    folder, tokenizer = files
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat.\n" * 40)
    losses = []
    for name in ("model.bin", "run", "gguf"):
        argv = ["eval", folder / name, "--plugin", STORIES, "--tokenizer", tokenizer, "--data", tmp_path / "text.txt",
                "--backend", "cpu", "--json"]  # fmt: skip
        assert main(list(map(str, argv))) == 0
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("name", ["run", "hf"])
def test_int8_is_encoded_from_the_halves(files, name):
    folder, tokenizer = files
    session = opened(folder / name, tokenizer, weights="int8")
    want = open_engine(session.model, widened(folder / name), backend="cpu", threads=1, weights="int8")
    for n, p in session.store.items():
        if p.encoded is not None:
            assert p.encoded.array(np.uint8).tobytes() == want.store[n].encoded.array(np.uint8).tobytes()
    assert np.array_equal(session.extend([1, 7]), want.extend([1, 7]))


def test_the_engine_gets_copies(fake_ane, files):
    """An IOSurface cannot lie over a file; the embedding, which the host reads, stays in it."""
    folder, tokenizer = files
    model, tensors, _ = open_model(load(STORIES), folder / "run", tokenizer, hashed=False)
    rt = Runtime("cpu", "fp32", threads=1)
    rt.backend = backend_of(fake_ane(seal=1))
    logits = []
    for weights in (widened(folder / "run"), tensors):
        store = ParamStore(rt.heap, rt.pool, model.specs(), False, weights)
        session = Session(rt, model, store, widths=(1,))
        store.sync()
        logits.append(session.extend([1, 5]))
    assert {n for n, p in store.items() if p.given is not None} == {"tok_embeddings"}
    assert all(s.shared for n, p in store.items() if p.cols > 1 for s, _ in p.placements)
    assert np.array_equal(*logits)


# ---- where they lie


@pytest.mark.parametrize(("shift", "in_place"), [(8, True), (2, True), (1, False)])
def test_any_even_address_will_do(files, tmp_path, shift, in_place):
    """A header may have any length: from odd addresses, where no fp16 array can be, weights are copied."""
    folder, tokenizer = files
    want = opened(folder / "run", tokenizer).extend([1, 5, 9])
    step = next((shutil.copytree(folder / "run", tmp_path / "run")).glob("step-*"))
    content = (step / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little") + shift
    header = content[8 : 8 + length - shift].ljust(length)
    (step / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + content[8 + length - shift :])
    state = json.loads((step / "state.json").read_text())
    state["files"]["model.safetensors"]["size"] += shift
    (step / "state.json").write_text(json.dumps(state))
    session = opened(tmp_path / "run", tokenizer)
    assert bool(placed(session.store)) != in_place
    assert np.array_equal(session.extend([1, 5, 9]), want)


@pytest.mark.parametrize(("bad", "survives"), [(np.inf, False), (-np.inf, False), (np.nan, True)])
def test_what_is_not_finite_is_treated_as_in_any_file(files, tmp_path, bad, survives):
    """inf is 65504 to all programs, as from an fp32 file; the file itself stays."""
    folder, tokenizer = files
    model, tensors, _ = open_model(load(STORIES), folder / "run", tokenizer, hashed=False)
    name, values = "layers.1.w1", np.array(tensors["layers.1.w1"])
    values[3, 4] = bad
    array = mapped(tmp_path / "w1", values.tobytes(), np.float16).reshape(values.shape)
    told = [open_engine(model, {**tensors, name: w}, backend="cpu", threads=1) for w in (array, values.astype("f4"))]
    store = told[0].store
    assert not placed(store) and (tmp_path / "w1").read_bytes() == values.tobytes()
    got, values[3, 4] = store[name].given.array(shape=values.shape), bad if survives else np.copysign(65504, bad)
    assert got.tobytes() == values.tobytes() and not got.flags.writeable
    assert store.sync() == 0, "they are clamped once"
    rows = [session.extend([1, 5]) for session in told]
    assert rows[0].tobytes() == rows[1].tobytes()


def test_the_map_outlives_all_but_its_readers(files, tmp_path):
    folder, tokenizer = files
    want = opened(folder / "model.bin", tokenizer).extend([1, 5, 9])
    shutil.copytree(folder / "run", tmp_path / "run")
    session = opened(tmp_path / "run", tokenizer)
    shutil.rmtree(tmp_path / "run")
    session.store = None
    gc.collect()
    assert np.array_equal(session.extend([1, 5, 9]), want)


def test_only_maps_that_nobody_writes_count(tmp_path):
    plain = np.zeros(8, np.float16)
    read = mapped(tmp_path / "r", bytes(64), np.float16)
    assert map_of(plain) is None and map_of(plain.astype(np.float32).reshape(2, 4)) is None
    assert isinstance(map_of(read), mmap.mmap) and map_of(read[2:6].reshape(2, 2)) is map_of(read)
    for mode in ("r+", "c"):
        assert map_of(np.memmap(tmp_path / "r", np.float16, mode)) is None


# ---- copies in other layouts


@pytest.mark.parametrize("shape", [(3000, 512), (17, 70_000), (5, 32)])
def test_copies_of_halves_are_those_of_a_master(shape):
    """In rows of a mebi of weights at a time: straight, transposed, padded and int8."""
    rows, cols = shape
    halves = np.random.default_rng(1).standard_normal(shape).astype(np.float16)
    halves[rows // 2, 3] = np.inf
    copies = []
    for source in (halves, halves.astype(np.float32)):
        heap = Heap()
        store = ParamStore(heap, Pool(2), {"w": Spec.normal(*shape)}, False, {"w": source})
        make = functools.partial(Surface, heap)
        layouts = ((0, cols, 1), (8, 1, rows + 3), (4, 2 * cols, 2))
        slots = [Slot("", rows, cols, *layout) for layout in layouts]
        found = [store.copy_of("w", s, 2 * (8 + 4 * rows * cols + 3 * cols), make, True) for s in slots]
        if cols % 32 == 0:
            found.append(store.encoded_copy("w", make))
        assert store.sync() == 1, "inf is written as 65504"
        copies.append([s.array(np.uint8).tobytes() for s in found])
    assert copies[0] == copies[1]


def test_bad_halves():
    pool, lib = Pool(1), ffi.lib
    param = ffi.ffi.new("anert_param[1]")
    param[0].rows, param[0].cols = 2, -1
    param[0].halves = half = ffi.ffi.new("uint16_t[4]")
    with pytest.raises(InputError, match=r"halves \(2, -1\)"):
        call(lib.anert_params_sync, pool.ptr, param, 1, ffi.ffi.NULL)
    with pytest.raises(InputError, match="1 arrays"):
        call(lib.anert_f16_finite, pool.ptr, ffi.ffi.NULL, ffi.ffi.NULL, 1, ffi.ffi.NULL)
    arrays, finite = ffi.ffi.new("uint16_t *[]", [half]), ffi.ffi.new("int32_t *")
    sizes = ffi.ffi.new("size_t[]", [1 << 63])
    with pytest.raises(InputError, match="too many"):
        call(lib.anert_f16_finite, pool.ptr, arrays, sizes, 1, finite)


# ---- a surface to be read alone


def test_a_surface_over_a_file_is_read_alone(tmp_path):
    values = np.arange(1000, dtype=np.float16)
    surface = ReadOnlySurface(mapped(tmp_path / "v", b"x" + values.tobytes(), np.uint8, offset=1))
    array = surface.array(np.float16)
    assert np.array_equal(array, values) and surface.nbytes == 2000 and surface.read_only and not surface.shared
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    for held in (surface.lock, surface.access):
        with pytest.raises(StateError, match="read alone; write to a copy"), held():
            pass
        with held(read_only=True), surface.lock(read_only=True):
            pass
    surface.touch()
    assert surface.seed == 0
    with pytest.raises(ShapeError, match="does not fit"):
        surface.array(np.float16, 1001)
    with pytest.raises(StateError, match="to be written, the surface is read-only"):
        ParamStore(Heap(), Pool(1), {"w": Spec.normal(2, 2)}, True)["w"].place(surface, Slot("w", 2, 2, 0, 2, 1))
    given = ParamStore(Heap(), Pool(1), {"w": Spec.normal(10, 100)}, False, {"w": values})["w"]
    with pytest.raises(StateError, match="no master to change"):
        given.master *= 2
    del surface
    gc.collect()
    (tmp_path / "v").unlink()
    assert np.array_equal(array, values), "an array keeps the map"


def test_no_program_writes_to_it():
    rt = Runtime("cpu", "fp32", threads=1)
    program = rt.backend.compile(linear())
    ports = {p.name: rt.backend.surface(p.nbytes) for p in (*program.inputs, *program.outputs)}
    memory = np.zeros(1 << 16, np.uint8)
    program.bind({**ports, program.inputs[0].name: ReadOnlySurface(memory)}).run()
    with pytest.raises(StateError, match="is written, its surface is read-only"):
        program.bind({**ports, program.outputs[0].name: ReadOnlySurface(memory)})


def test_bad_surfaces():
    for array in (np.zeros((4, 4))[:, 1], np.zeros(0), np.zeros((4, 4)).T):
        with pytest.raises(ShapeError, match="over bytes in a row"):
            ReadOnlySurface(array)
    out = ffi.ffi.new("anert_surface **")
    for arguments in ((ffi.ffi.NULL, 4, out), (out, 0, out), (out, 4, ffi.ffi.NULL)):
        with pytest.raises(InputError, match=r"no surface can be|out is NULL"):
            call(ffi.lib.anert_surface_over, *arguments)


# ---- huge pages


def settle(array: np.ndarray) -> int:
    settled = ffi.ffi.new("size_t *")
    call(ffi.lib.anert_pages_settle, ffi.ffi.cast("void *", array.ctypes.data), array.nbytes, settled)
    return settled[0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot move pages: nothing happens there")
def test_bytes_and_addresses_stay_when_pages_become_huge(tmp_path):
    """Readers go on meanwhile; afterwards the file may change, and nobody can write the pages."""
    content = np.random.default_rng(0).integers(0, 256, 5 * HUGE_PAGE + 12_345, np.uint8)
    array = mapped(tmp_path / "v", content.tobytes())
    wrong, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            wrong.extend([] if np.array_equal(array, content) else [1])

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    moved = [settle(array[77:]) for _ in range(3)]
    done.set()
    for reader in readers:
        reader.join()
    assert moved == [moved[0]] * 3 and 4 * HUGE_PAGE <= moved[0] <= 5 * HUGE_PAGE
    assert not wrong and np.array_equal(array, content)
    first = 77 + -(array.ctypes.data + 77) % HUGE_PAGE
    with open(tmp_path / "v", "r+b") as f:
        f.write(bytes(content.size))
    assert np.array_equal(array[first : first + moved[0]], content[first : first + moved[0]])
    lines = Path("/proc/self/maps").read_text().splitlines()
    address = array.ctypes.data + first
    spans = [(*(int(x, 16) for x in line.split()[0].split("-")), line.split()[1]) for line in lines]
    assert [rights for start, end, rights in spans if start <= address < end] == ["r--p"]


def test_a_small_map_stays(tmp_path):
    array = mapped(tmp_path / "v", bytes(HUGE_PAGE - 1))
    assert settle(array) == 0
    with pytest.raises(InputError, match="no map can be"):
        call(ffi.lib.anert_pages_settle, ffi.ffi.NULL, 1, ffi.ffi.NULL)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot move pages: nothing happens there")
def test_a_store_settles_where_there_is_memory(tmp_path):
    spec, rng = Spec.normal(1024, 2048), np.random.default_rng(3)
    tensors = {n: rng.random(spec.shape, np.float32).astype(np.float16) for n in "abc"}
    data = mapped(tmp_path / "w", b"".join(t.tobytes() for t in tensors.values()), np.float16)
    views = {n: data[i * spec.size : (i + 1) * spec.size].reshape(spec.shape) for i, n in enumerate(tensors)}
    for available, least in ((0, 0), (1 << 30, 4 * HUGE_PAGE)):
        store = ParamStore(Heap(), Pool(1), dict.fromkeys(tensors, spec), False, views)
        store.settle_ahead(available)
        moved = store._settling.result() if store._settling else 0
        assert least <= moved <= 6 * HUGE_PAGE and (available or not moved)
        slot = Slot("", *spec.shape, 0, spec.shape[1], 1)
        for n, t in tensors.items():
            surface = store.copy_of(n, slot, 2 * spec.size, lambda n: pytest.fail("copied"), True)
            assert surface.array().tobytes() == t.tobytes()


@pytest.mark.parametrize(("tokens", "times"), [(8, 0), (40, 1)])
def test_a_long_text_settles_its_weights_once(files, monkeypatch, capsys, tokens, times):
    """Behind its first new token, and the text goes on as it would have."""
    folder, tokenizer = files
    seen, said = [], []
    monkeypatch.setattr(ParamStore, "settle_ahead", lambda self, available: seen.append((available > 0, list(said))))
    for event in sample(folder / "run", "Once upon", load(STORIES), tokenizer, max_tokens=tokens, temperature=0.0):
        said += [event]
    assert len(seen) == times
    assert all(free and [type(e) for e in before] == [Text, Text] for free, before in seen)
    told = text(capsys, folder / "run", tokenizer, "--prompt", "Once upon", "-n", str(tokens), "--temperature", "0")
    assert told.strip() == "".join(e.text for e in said if isinstance(e, Text)).strip()


# ---- files that are refused


def test_a_truncated_file_is_refused(files, tmp_path, capsys):
    folder, tokenizer = files
    for name in ("run", "hf", "gguf"):
        copy = tmp_path / name
        (shutil.copytree if name != "gguf" else shutil.copy)(folder / name, copy)
        file = next(copy.rglob("model.safetensors")) if name != "gguf" else copy
        os.truncate(file, file.stat().st_size - 2)
        argv = ["sample", str(copy), "--tokenizer", tokenizer, "--plugin", STORIES, "--backend", "cpu"]
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and str(copy) in err


def test_what_fp16_cannot_hold_is_refused(files, tmp_path, capsys):
    folder, _ = files
    argv = ["convert", str(folder / "model.bin"), str(tmp_path / "x"), "--to", "anert", "--dtype"]
    assert main([*argv, "bf16"]) == 2
    assert "--to anert holds fp32 or fp16, not bf16" in capsys.readouterr().err
    source = open_model_file(folder / "model.bin")
    big = {n: np.array(t) for n, t in source.tensors.items()}
    big["layers.0.wo"][0, 0] = 7e4
    source.tensors = type(source.tensors).of(big)
    llama2c.write(tmp_path / "big.bin", source, 0)
    for to in ("anert", "hf"):
        assert main(["convert", str(tmp_path / "big.bin"), str(tmp_path / "x"), "--to", to, "--dtype", "fp16"]) == 2
        err = capsys.readouterr().err
        assert "past 65504" in err and err.count("\n") == 1 and not (tmp_path / "x").exists()
    convert(folder / "model.bin", tmp_path / "x", "anert")
    assert list(open_model_file(tmp_path / "x").tensors.encodings()) == ["F32"]
    assert huggingface.sniff(folder / "hf")
