"""Text to tokens to batches: documents, token files, datasets, the cursor."""

import dataclasses
import json
import os
import struct
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert import data
from anert.data import text as text_module
from anert.data import token_file
from anert.errors import InputError
from anert.tokenizer import ByteBPETokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return ByteBPETokenizer.train(["once upon a time there was a small fox and a small bear. " * 20], 300)


@pytest.fixture(scope="module")
def tok512(shared_data):
    return load_tokenizer(shared_data / "llama2c" / "tok512.bin")


def raw(path, ids, dtype="<u2"):
    np.asarray(ids, dtype).tofile(path)
    return path


# ---- documents


SPLITS = {
    "endoftext": lambda t: t.split("<|endoftext|>"),
    "blank": lambda t: text_module.regex.split(r"\n[^\S\n]*\n", t),
    "line": lambda t: t.split("\n"),
    "file": lambda t: [t],
}
PARTS = ["a", "bc ", " ", "\n", "\n\n", "\t", "\r\n", "\r", "<|endoftext|>", "<|endof", "text|>", "é", "日本", "\ufeff"]
pieces = st.lists(st.sampled_from(PARTS), max_size=30)


@settings(deadline=None)
@given(parts=pieces, split=st.sampled_from(list(SPLITS)), block=st.integers(1, 9), long=st.integers(1, 40))
def test_documents_are_the_definition_however_the_file_is_read(tmp_path_factory, parts, split, block, long):
    path = tmp_path_factory.getbasetemp() / "documents.txt"
    path.write_bytes("".join(parts).encode())
    whole = path.read_text(encoding="utf-8-sig")  # universal newlines
    expected = [d.strip() for d in SPLITS[split](whole) if d.strip()]
    before = text_module.BLOCK, text_module.LONG
    text_module.BLOCK, text_module.LONG = block, long
    try:
        assert list(data.documents(path, split)) == expected
    finally:
        text_module.BLOCK, text_module.LONG = before


def test_the_mark_decides_the_split(tmp_path, shared_data):
    assert data.detect_split(shared_data / "text" / "tinystories_10k.txt") == "endoftext"
    assert data.detect_split(shared_data / "text" / "tinyshakespeare.txt") == "file"
    (tmp_path / "late.txt").write_text("x" * (text_module.BLOCK - 5) + "<|endoftext|>y")
    assert data.detect_split(tmp_path / "late.txt") == "endoftext"


def test_bom_and_crlf_are_cleaned(shared_data):
    path = shared_data / "text" / "grimm_pg2591.txt"
    assert path.read_bytes().startswith(b"\xef\xbb\xbf") and b"\r\n" in path.read_bytes()
    (text,) = data.documents(path, "file")
    assert text == path.read_text(encoding="utf-8-sig").strip()


@given(st.integers(0, 3 * 7), st.integers(1, 9))
def test_bytes_that_are_not_utf8_are_named(tmp_path_factory, at, block):
    path = tmp_path_factory.getbasetemp() / "bad.txt"
    content = "a日é".encode() * 4
    at = next(i for i in range(at, len(content) + 1) if i == len(content) or content[i] & 0xC0 != 0x80)
    path.write_bytes(content[:at] + b"\xff" + content[at:])
    before, text_module.BLOCK = text_module.BLOCK, block
    try:
        with pytest.raises(InputError, match=f"not UTF-8 at byte {at}:"):
            list(data.documents(path, "file"))
    finally:
        text_module.BLOCK = before


def test_unknown_split(tmp_path):
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(InputError, match="expected auto, endoftext"):
        list(data.documents(tmp_path / "t.txt", "stories"))


# ---- tokenizing


def test_tokenized_stories_are_bos_and_ids(shared_data, tok512, tmp_path):
    source, seen = shared_data / "text" / "tinystories_10k.txt", []
    file = data.tokenize_file(
        source, tok512, tmp_path / "t.bin", progress=lambda done, total: seen.append(done / total)
    )
    stories = [s.strip() for s in source.read_text(encoding="utf-8").split("<|endoftext|>") if s.strip()]
    assert len(stories) == len(file.documents) == 1728
    expected = [i for s in stories for i in tok512.encode(s, bos=True)]
    assert file.tokens.tolist() == expected
    assert all(file.tokens[file.documents.astype(int)] == 1)
    assert (file.kind, file.vocab_size, file.bos_id, file.tokenizer_hash) == ("anert", 512, 1, tok512.hash)
    assert seen == sorted(seen) and seen[-1] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.bin"]


def test_a_long_document_is_encoded_as_one(shared_data, tok512, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONG", 5000)
    source = shared_data / "text" / "tinyshakespeare.txt"
    short = tmp_path / "s.txt"
    short.write_text(source.read_text()[:300_000])
    file = data.tokenize_file(short, tok512, tmp_path / "t.bin", eos=True)
    assert file.tokens.tolist() == tok512.encode(short.read_text().strip(), bos=True, eos=True)


def test_a_vocabulary_without_bos_ends_documents_with_eos(tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    path = tmp_path / "t.txt"
    path.write_text("a<|endoftext|>b")
    plain = ByteBPETokenizer.from_ranks(ranks, "gpt2")
    assert data.tokenize_file(path, plain, tmp_path / "a.bin").tokens.tolist() == [97, 98]
    ending = ByteBPETokenizer(dataclasses.replace(ByteBPETokenizer.train([""], 257).vocabulary, bos_id=-1))
    assert data.tokenize_file(path, ending, tmp_path / "b.bin").tokens.tolist() == [97, 256, 98, 256]


def test_big_vocabularies_take_four_bytes(tmp_path):
    with token_file.TokenWriter(tmp_path / "t.bin", 70_000) as writer:
        writer.write([0, 69_999])
    file = data.open_tokens(tmp_path / "t.bin")
    assert file.tokens.dtype == np.uint32 and file.tokens.tolist() == [0, 69_999] and file.documents is None


def test_nothing_is_left_of_an_interrupted_write(shared_data, tokenizer, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.tokenize_file(shared_data / "text" / "tinystories_10k.txt", tokenizer, tmp_path / "t.bin", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(shared_data, tokenizer, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(token_file.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        data.tokenize_file(shared_data / "text" / "tinystories_10k.txt", tokenizer, tmp_path / "t.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
def test_no_text(tokenizer, tmp_path, content):
    path = tmp_path / "t.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="nothing to train on"):
        data.prepare(path, tokenizer, tmp_path / "cache", 8)
    with pytest.raises(InputError, match="No such file"):
        data.prepare(tmp_path / "missing.txt", tokenizer, tmp_path / "cache", 8)


# ---- token files


def test_every_kind_of_file_is_told_by_its_content(shared_data, tmp_path):
    ids = np.random.default_rng(1).integers(0, 32000, 5000)
    llmc = np.zeros(256, "<i4")
    llmc[:3] = 20240520, 1, ids.size
    (tmp_path / "llmc.bin").write_bytes(llmc.tobytes() + ids.astype("<u2").tobytes())
    llmc[:3] = 20240801, 7, ids.size
    (tmp_path / "llama3.bin").write_bytes(llmc.tobytes() + ids.astype("<u4").tobytes())
    raw(tmp_path / "raw.bin", ids)
    with token_file.TokenWriter(tmp_path / "ours.bin", 32000) as writer:
        writer.write(ids.tolist())
    for name, kind in (("llmc", "llm.c"), ("llama3", "llm.c"), ("raw", "raw"), ("ours", "anert")):
        file = data.open_tokens(tmp_path / f"{name}.bin")
        assert file.kind == kind and file.tokens.tolist() == ids.tolist()
    raw(tmp_path / "small.bin", np.arange(300) % 200)
    assert data.sniff(tmp_path / "small.bin") == "raw"
    for path in (shared_data / "text").iterdir():
        assert data.sniff(path) == "text"


@pytest.mark.parametrize(
    ("ids", "dtype", "guess"),
    [
        (np.random.default_rng(1).integers(0, 32000, 5000), "<u2", "uint16"),
        (np.random.default_rng(1).integers(0, 32000, 5000), "<u4", "uint32"),
        (np.random.default_rng(2).integers(0, 200_000, 5000), "<u4", "uint32"),
        (np.random.default_rng(3).integers(0, 90, 5000), "<u4", "uint32"),  # characters
        (np.random.default_rng(3).integers(0, 90, 5000), "<u2", "uint16"),
        (np.random.default_rng(4).integers(0, 12, 5000), "<u2", "uint16"),
        (np.arange(10), "<u2", "uint16"),
        (np.zeros(300), "<u2", "uint16"),
        (np.array([5, 300, 7000]), "<u4", ""),  # or 5, 0, 300, 0, 7000, 0
        (np.array([1000, 3, 2000, 2]), "<u2", ""),  # or 197,608 and 133,072
    ],
)
def test_raw_ids_are_of_the_dtype_that_shows_or_is_told(tmp_path, ids, dtype, guess):
    path = raw(tmp_path / "t.bin", ids, dtype)
    if guess:
        file = data.open_tokens(path)
        assert file.tokens.dtype.name == guess == np.dtype(dtype).name and file.tokens.tolist() == ids.tolist()
        assert ("--data-dtype uint16" in file.note) == (guess == "uint32")
    else:
        with pytest.raises(InputError, match=r"raw uint16 ids or . uint32 ones.*: give --data-dtype uint16 or uint32"):
            data.open_tokens(path)
    for told in ("uint16", "uint32"):
        if path.stat().st_size % np.dtype(told).itemsize == 0:
            file = data.open_tokens(path, told)
            assert file.tokens.tolist() == np.fromfile(path, told).tolist() and not file.note
    with pytest.raises(InputError, match="expected auto, uint16 or uint32"):
        data.open_tokens(path, "int8")


def test_a_told_dtype_reaches_the_dataset_and_a_guess_is_noted(tmp_path):
    wide = raw(tmp_path / "wide.bin", np.arange(1000), "<u4")
    guessed, told = data.TokenDataset(wide, 8), data.prepare(wide, None, tmp_path, 8, wide, 1000, dtype="uint16")
    assert guessed.train_tokens + guessed.val_tokens == 1000 and "read as uint32" in guessed.note
    assert told.train_tokens == told.val_tokens == 2000 and told.note == ""
    with pytest.raises(InputError, match="6 bytes are no uint32 ids"):
        data.open_tokens(raw(tmp_path / "odd.bin", np.arange(3)), "uint32")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("hällo".encode("utf-16"), "UTF-16"),
        ("Das Märchen von dem Bären. ".encode("latin-1") * 5, "not UTF-8 at byte 5"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"PK\x03\x04....", "zip"),
        (b"\x93NUMPY\x01\0", "NumPy"),
        (b"\0\1\0", "3 bytes are no uint16 ids"),
        (b"plain text", "text, not tokens"),
        (b"anertTOK", "truncated token file"),
    ],
)
def test_files_that_hold_no_tokens(tmp_path, content, says):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InputError, match=says):
        data.open_tokens(tmp_path / "f")


def test_headers_that_lie(tmp_path):
    path = tmp_path / "t.bin"
    with token_file.TokenWriter(path, 100) as writer:
        writer.start_document()
        writer.write([1, 2, 3])
    good = path.read_bytes()
    assert len(good) == 256 + 8 + 8
    for cut in range(8, len(good)):
        path.write_bytes(good[:cut])
        with pytest.raises(InputError, match="truncated"):
            data.open_tokens(path)
    for at, value, says in (
        (8, 2, "update anert"),
        (12, 3, "ids of 3 bytes"),
        (16, 1 << 50, "header says"),
        (24, 1 << 50, "header says"),
    ):
        path.write_bytes(
            good[:at] + struct.pack("<Q" if value > 9 else "<I", value) + good[at + (8 if value > 9 else 4) :]
        )
        with pytest.raises(InputError, match=says):
            data.open_tokens(path)
    llmc = np.zeros(256, "<i4")
    llmc[:3] = 20240520, 1, 10
    path.write_bytes(llmc.tobytes() + bytes(18))
    with pytest.raises(InputError, match=r"1,042 bytes, its llm\.c header says 1,044"):
        data.open_tokens(path)


# ---- datasets


def test_windows_are_aligned_and_every_epoch_has_each_once(tmp_path):
    seq_len, ids = 8, np.arange(1000) % 60000
    ds = data.TokenDataset(raw(tmp_path / "t.bin", ids), seq_len, 0.0)
    assert (ds.n_windows, ds.n_val_windows, ds.train_tokens, ds.val_tokens) == (124, 0, 1000, 0)
    assert list(ds.val_windows()) == []
    batches = ds.train_batches(4, seed=3)
    epochs = []
    for _ in range(3):
        starts = []
        for _ in range(31):
            inputs, targets = next(batches)
            assert inputs.shape == targets.shape == (32,) and inputs.dtype == targets.dtype == np.int32
            assert (targets == inputs + 1).all()
            rows = inputs.reshape(4, seq_len)
            assert (rows == rows[:, :1] + np.arange(seq_len)).all()
            starts += (rows[:, 0] // seq_len).tolist()
        assert sorted(starts) == list(range(124))
        epochs.append(starts)
    assert epochs[0] != epochs[1] != epochs[2] and batches.epoch == 3
    assert next(ds.train_batches(4, seed=3))[0][0] == epochs[0][0] * seq_len
    assert [next(ds.train_batches(124, seed=s))[0][::seq_len].tolist() for s in (3, 4)][1] != epochs[0]


def test_steps_reuse_two_arrays(tmp_path):
    batches = data.TokenDataset(raw(tmp_path / "t.bin", np.arange(200)), 8, 0.0).train_batches(2, 0)
    first = next(batches)
    assert all(a is b for a, b in zip(first, next(batches), strict=True))


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 5))
def test_a_cursor_goes_on_exactly(tmp_path_factory, steps, batch, other):
    path = tmp_path_factory.getbasetemp() / "cursor.bin"
    ds = data.TokenDataset(raw(path, np.arange(150)), 8, 0.0)
    straight = ds.train_batches(batch, 7)
    for _ in range(steps):
        next(straight)
    resumed = ds.train_batches(batch, 7)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for a, b in islice(zip(straight, resumed, strict=False), 12):
        assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
    wider = ds.train_batches(other, 7)
    wider.load_state_dict(straight.state_dict())
    assert next(wider)[0][:8].tolist() == next(straight)[0][:8].tolist()


def test_a_cursor_of_other_data_is_refused(tmp_path):
    ds = data.TokenDataset(raw(tmp_path / "t.bin", np.arange(150)), 8, 0.0)
    state = ds.train_batches(2, 7).state_dict()
    for key in ("seed", "n_windows", "seq_len"):
        with pytest.raises(InputError, match=f"cannot resume: the run's data had {key}"):
            ds.train_batches(2, 7).load_state_dict(state | {key: 5})
    with pytest.raises(InputError, match="batch 0"):
        ds.train_batches(0, 1)


@given(st.integers(10, 400), st.integers(1, 20), st.floats(0.01, 0.9))
def test_held_out_tokens_are_never_trained_on(tmp_path_factory, n, seq_len, fraction):
    path = tmp_path_factory.getbasetemp() / "split.bin"
    if n < seq_len + 2:
        return
    ds = data.TokenDataset(raw(path, np.arange(n)), seq_len, fraction)
    seen = set(np.concatenate([b for _ in range(1) for b in next(ds.train_batches(ds.n_windows, 0))]).tolist())
    held = {i for inputs, targets in ds.val_windows() for i in (*inputs.tolist(), *targets.tolist())}
    assert seen and not seen & held and ds.n_windows >= 1
    assert bool(held) == (not ds.note)
    if held:
        assert ds.train_tokens + ds.val_tokens == n and max(held) == n - 1
        assert ds.n_val_windows == max(1, round(fraction * ((n - 1) // seq_len)))


def test_validation_is_the_same_every_time_and_spread_evenly(tmp_path):
    ds = data.TokenDataset(raw(tmp_path / "t.bin", np.arange(2000)), 8, 0.4)
    everything = [i.copy() for i, _ in ds.val_windows()]
    assert len(everything) == ds.n_val_windows == 100
    some = [i for i, _ in ds.val_windows(tokens=80)]
    assert len(some) == 10 and [int(i[0]) for i in some] == [int(everything[10 * k][0]) for k in range(10)]
    batched = [i for i, _ in ds.val_windows(batch=3, tokens=80)]
    assert [i.shape for i in batched] == [(24,)] * 3
    (wrapped,) = [i for i, _ in data.TokenDataset(tmp_path / "t.bin", 800, 0.4).val_windows(batch=2)]
    assert wrapped.shape == (1600,) and (wrapped[:800] == wrapped[800:]).all()


def test_a_file_of_its_own_for_validation(tmp_path):
    train, val = raw(tmp_path / "a.bin", np.arange(100)), raw(tmp_path / "b.bin", np.arange(500, 600))
    ds = data.TokenDataset(train, 8, val)
    assert (ds.train_tokens, ds.val_tokens, ds.n_val_windows) == (100, 100, 12)
    assert next(iter(ds.val_windows()))[0].tolist() == list(range(500, 508))


def test_unigram_entropy(tmp_path):
    ids = np.random.default_rng(0).choice([3, 300, 7, 9], 10_000, p=[0.5, 0.25, 0.125, 0.125])
    ds = data.TokenDataset(raw(tmp_path / "t.bin", ids), 8, 0.0)
    p = np.unique(ids, return_counts=True)[1] / ids.size
    assert ds.unigram_entropy() == pytest.approx(-(p * np.log(p)).sum())


def test_too_short(tmp_path):
    path = raw(tmp_path / "t.bin", np.arange(9))
    with pytest.raises(InputError, match=r"needs 10 tokens for seq_len 8, has 9: give more text, or a smaller seq_len"):
        data.TokenDataset(path, 8)
    ds = data.TokenDataset(raw(path, np.arange(10)), 8)
    assert ds.n_windows == 1 and ds.n_val_windows == 0 and "18 at least" in ds.note
    assert data.TokenDataset(raw(path, np.arange(18)), 8).n_val_windows == 1
    for fraction in (-0.1, 1.0):
        with pytest.raises(InputError, match="validation fraction"):
            data.TokenDataset(path, 8, fraction)


def test_an_id_past_the_vocabulary_is_named(tmp_path):
    ids = np.arange(100)
    ids[70] = 511
    path = raw(tmp_path / "t.bin", ids)
    with pytest.raises(InputError, match="token 511 at position 70 is past the vocabulary of 300"):
        data.TokenDataset(path, 8, 0.0, vocab_size=300)
    data.TokenDataset(path, 8, 0.0, vocab_size=512)


def test_tokens_of_another_tokenizer_are_refused(tokenizer, tok512, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("once upon a time " * 20)
    data.tokenize_file(path, tokenizer, tmp_path / "t.bin")
    with pytest.raises(InputError, match="tokenize the text again"):
        data.prepare(tmp_path / "t.bin", tok512, tmp_path, 8)
    assert data.prepare(tmp_path / "t.bin", tokenizer, tmp_path, 8).train_tokens > 8


def test_prepare_takes_text_once_and_tokens_as_they_are(tokenizer, tok512, tmp_path, monkeypatch):
    path, cache = tmp_path / "story.txt", tmp_path / "cache"
    path.write_text("once upon a time there was a small fox. " * 20)
    ds = data.prepare(path, tokenizer, cache, 8, "0.1")
    assert ds.path.parent == cache and ds.n_val_windows > 0 and ds.name == str(path)
    calls = []
    original = data.tokenize_file
    monkeypatch.setattr(data, "tokenize_file", lambda *a, **k: calls.append(a) or original(*a, **k))
    data.prepare(path, tokenizer, cache, 8, 0.1)
    assert not calls
    data.prepare(path, tok512, cache, 8, 0.1)
    path.write_text("there was a small bear. " * 30)
    data.prepare(path, tokenizer, cache, 8, path)
    assert len(calls) == 2 and len(list(cache.iterdir())) == 3
    assert data.prepare(ds.path, None, cache, 8).path == ds.path
    with pytest.raises(InputError, match="needs a tokenizer"):
        data.prepare(path, None, cache, 8)
