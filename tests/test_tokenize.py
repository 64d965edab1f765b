"""Texts to token files: every input and output, workers and shards, memory, interrupts; and the command line of it."""

import gzip
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_runs import run

from anert import cli, data
from anert.data import corpus, text, token_file
from anert.data.corpus import Options
from anert.errors import InputError
from anert.events import Notice, Progress
from anert.tokenizer import ByteBPETokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["token_runs"]


def expected(docs, tokenizer, bos=True, eos=False):
    return [i for d in docs if d.strip() for i in tokenizer.encode(d.strip(), bos, eos)]


# ---- inputs


DOCS = ["once upon a time", "  a fox\nand a bear ", "é日🙂", "", "the end\r\n"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["line", "blank", "endoftext", "jsonl"])
def test_every_kind_of_text(tokenizer, tmp_path, kind, packed):
    docs = [d.replace("\n", " ").replace("\r", "") for d in DOCS] if kind == "line" else DOCS
    join = {"line": "\n", "blank": "\n \n\n", "endoftext": "<|endoftext|>"}
    if kind == "jsonl":
        content = "".join(json.dumps({"id": i, "story": d}) + "\r\n\n" for i, d in enumerate(docs))
    else:
        content = join[kind].join(docs)
    raw = ("\ufeff" + content).encode()
    path = tmp_path / ("t.jsonl" if kind == "jsonl" else "t.txt")
    if packed:
        path = path.with_suffix(path.suffix + ".gz")
        raw = gzip.compress(raw[:20]) + gzip.compress(raw[20:])
    path.write_bytes(raw)
    options = Options(field="story", split="auto" if kind in ("jsonl", "endoftext") else kind)
    report, events = run([path], tokenizer, tmp_path / "out.bin", options)
    docs = [d.replace("\r\n", "\n") if kind != "jsonl" else d for d in docs]
    file = data.open_tokens(tmp_path / "out.bin")
    assert file.tokens.tolist() == expected(docs, tokenizer)
    assert (report.documents, report.tokens, report.bytes) == (4, len(file.tokens), path.stat().st_size)
    assert events[-1] == Progress("tokenize", len(raw), len(raw), "B")


@given(docs=st.lists(st.text("ab \né", max_size=12), min_size=1, max_size=9), size=st.integers(1, 40))
@pytest.mark.parametrize("kind", ["line", "blank", "endoftext", "jsonl"])
def test_parts_are_the_whole(tmp_path_factory, kind, docs, size):
    path = tmp_path_factory.getbasetemp() / f"parts.{'jsonl' if kind == 'jsonl' else 'txt'}"
    join = {"line": "\n", "blank": "\n\n", "endoftext": "<|endoftext|>"}
    rows = [json.dumps({"text": d}) for d in docs]
    content = "\n".join(rows) if kind == "jsonl" else join[kind].join(docs)
    path.write_bytes((content or " ").encode())
    source = text.Source(str(path), split=kind if kind != "jsonl" else "auto")
    parts = source.parts(size)
    assert [p.start for p in parts[1:]] == [p.end for p in parts[:-1]] and parts[0].start == 0
    assert [t for p in parts for t, _ in p.pieces()] == [t for t, _ in source.pieces()]
    assert all(p.end - p.start >= size for p in parts[:-1]) and parts[-1].end == path.stat().st_size


def test_a_mark_across_two_blocks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 7)
    (tmp_path / "t.txt").write_text("abcde<|endoftext|>fgh<|endoftext|>ij")
    parts = text.Source(str(tmp_path / "t.txt"), split="endoftext").parts(2)
    assert [[t for t, _ in p.pieces()] for p in parts] == [["abcde"], ["fgh"], ["ij"]]


def test_standard_input(tokenizer, tmp_path, monkeypatch):
    for content in (b"once upon<|endoftext|>a time", gzip.compress(b"once upon<|endoftext|>a time")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with ThreadPoolExecutor(1) as executor:
            report, events = run(["-"], tokenizer, tmp_path / "t.bin", executor=executor, force=True)
        assert data.open_tokens(tmp_path / "t.bin").tokens.tolist() == expected(["once upon", "a time"], tokenizer)
        assert isinstance(events[0], Notice) and (events[-1].total, report.bytes) == (0, len(content))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"a": "b"}\n{"a": "fox"}')))
    run(["-"], tokenizer, tmp_path / "j.bin", Options(form="jsonl", field="a"))
    assert data.open_tokens(tmp_path / "j.bin").tokens.tolist() == expected(["b", "fox"], tokenizer)


# ---- outputs


def test_raw_is_what_llama2c_reads(shared_data, stories, tmp_path):
    tok512 = load_tokenizer(shared_data / "llama2c" / "tok512.bin")
    run([stories], tok512, tmp_path / "raw.bin", Options(raw=True))
    docs = stories.read_text(encoding="utf-8").split("<|endoftext|>")
    ids = np.fromfile(tmp_path / "raw.bin", "<u2")
    assert ids.tolist() == expected(docs, tok512) and (ids == 1).sum() == 1728
    assert data.open_tokens(tmp_path / "raw.bin").kind == "raw"
    run([stories], tok512, tmp_path / "wide.bin", Options(raw=True, dtype="uint32"))
    assert np.fromfile(tmp_path / "wide.bin", "<u4").tolist() == ids.tolist()
    wide = data.open_tokens(tmp_path / "wide.bin")
    assert wide.tokens.dtype == np.uint32 and (wide.tokens == ids).all()
    run([stories], tok512, tmp_path / "ours.bin", Options(dtype="uint32"))
    ours = data.open_tokens(tmp_path / "ours.bin")
    assert ours.tokens.dtype == np.uint32 and (ours.tokens == ids).all() and len(ours.documents) == 1728


@pytest.mark.parametrize(
    ("ends", "bos", "eos"), [("auto", 1, 0), ("bos", 1, 0), ("eos", 0, 1), ("both", 1, 1), ("none", 0, 0)]
)
def test_ends(tokenizer, tmp_path, ends, bos, eos):
    (tmp_path / "t.txt").write_text("a fox<|endoftext|>a bear")
    run([tmp_path / "t.txt"], tokenizer, tmp_path / "t.bin", Options(ends=ends))
    ids = data.open_tokens(tmp_path / "t.bin").tokens.tolist()
    assert ids == expected(["a fox", "a bear"], tokenizer, bool(bos), bool(eos))


def test_validation_is_apart_by_document_and_never_a_copy(tokenizer, tmp_path):
    docs = [f"fox {i % 400}" for i in range(800)]
    (tmp_path / "t.txt").write_text("\n".join(docs))
    report, _ = run([tmp_path / "t.txt"], tokenizer, tmp_path / "t.bin", Options(split="line", val=0.2))

    def of(name):
        file = data.open_tokens(tmp_path / name)
        cut = np.split(np.asarray(file.tokens), file.documents[1:].astype(int))
        return [tokenizer.decode(ids[1:].tolist()) for ids in cut]

    train, val = of("t.bin"), of("t.val.bin")
    assert sorted(train + val) == sorted(docs) and not set(train) & set(val) and 80 < len(val) < 240
    assert report.files == [str(tmp_path / "t.bin"), str(tmp_path / "t.val.bin")]
    assert report.val_tokens == len(data.open_tokens(tmp_path / "t.val.bin").tokens)
    ds = data.prepare(tmp_path / "t.bin", tokenizer, tmp_path, 8, tmp_path / "t.val.bin")
    assert ds.val_tokens == report.val_tokens


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_workers_write_the_same_bytes(tokenizer, stories, tmp_path, monkeypatch, pool):
    monkeypatch.setattr(corpus, "PART_BYTES", 200_000)
    options = Options(val=0.1)
    run([stories, stories], tokenizer, tmp_path / "a.bin", options)
    with pool(2) as executor:
        run([stories, stories], tokenizer, tmp_path / "b.bin", options, executor)
        run([stories], tokenizer, tmp_path / "s", options, executor, shard_bytes=300_000)
    run([stories], tokenizer, tmp_path / "t", options, shard_bytes=300_000)
    for a, b in (("a.bin", "b.bin"), ("a.val.bin", "b.val.bin")):
        assert (tmp_path / a).read_bytes() == (tmp_path / b).read_bytes()
    for path in (tmp_path / "s").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "t" / path.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.val.bin", "b.bin", "b.val.bin", "s", "t"]


# ---- bad input


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "cannot read the data: No such file"),
        ("t.txt", b"", "empty"),
        ("t.txt", b" \n\t ", "no text in it"),
        ("t.txt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("t.txt", "hällo".encode("utf-16"), "UTF-16"),
        ("t.txt", b"plain text " * 50000 + b"\xff", "not UTF-8 at byte 550,000"),
        ("t.txt", b"\0\1\2\3" * 99, r"holds tokens \(raw\), not text"),
        ("t.txt.gz", b"\x1f\x8bnothing", "damaged gzip"),
        ("t.txt.gz", gzip.compress(random.Random(1).randbytes(500_000).hex().encode(), mtime=0)[:-9], "damaged gzip"),
        ("t.txt.gz", gzip.compress(b"version https://git-lfs", mtime=0), None),
        ("t.bin.gz", gzip.compress(bytes(range(99)) * 9, mtime=0), "packed tokens"),
        ("t.jsonl", b"{}\n", "line 1: no field 'text'; there are none"),
        ("t.jsonl", b'{"text": "a"}\n\n{"text": 5}\n', "line 3: field 'text' is 5, not text"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2: not JSON"),
        ("t.jsonl", b'{"text": "a"}\n["b"]', "line 2: a JSON list, expected an object with the field 'text'"),
        ("t.jsonl", b'{"text": "a"}\n' + b"[" * 99999, "line 2: not JSON"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: not JSON"),
        (
            "t.jsonl",
            b'{"text": "a"}\n{"title": "b", "body": "c"}',
            "line 2: no field 'text'; there are 'title', 'body'",
        ),
    ],
)
def test_texts_that_cannot_be(tokenizer, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = set(tmp_path.iterdir())
    if says is None:
        run([tmp_path / name], tokenizer, tmp_path / "o.bin")
        return
    with pytest.raises(InputError, match=says):
        run([tmp_path / name], tokenizer, tmp_path / "o.bin")
    assert set(tmp_path.iterdir()) == before


def test_the_line_number_counts_from_the_file_in_every_part(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n' * 50 + "oops\n" + '{"text": "a"}\n' * 5)
    with ThreadPoolExecutor(2) as executor, pytest.raises(InputError, match="line 51: not JSON"):
        run([path], tokenizer, tmp_path / "s", Options(), executor, shard_bytes=100)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(ends="start"), "expected auto, bos"),
        (Options(val=1.0), "validation share 1.0"),
        (Options(dtype="int8"), "expected auto, uint16 or uint32"),
        (Options(form="csv"), "expected auto, text or jsonl"),
        (Options(split="story"), "expected auto, endoftext"),
    ],
)
def test_options_that_cannot_be(tokenizer, tmp_path, options, says):
    (tmp_path / "t.txt").write_text("a fox")
    with pytest.raises(InputError, match=says):
        run([tmp_path / "t.txt"], tokenizer, tmp_path / "o.bin", options)
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_outputs_that_cannot_be(tokenizer, tmp_path):
    source = tmp_path / "t.txt"
    source.write_text("a fox")
    (tmp_path / "o.bin").write_text("kept")
    with pytest.raises(InputError, match=r"o.bin is there already: .*--force"):
        run([source], tokenizer, tmp_path / "o.bin")
    assert (tmp_path / "o.bin").read_text() == "kept"
    run([source], tokenizer, tmp_path / "o.bin", force=True)
    assert data.open_tokens(tmp_path / "o.bin").tokens.size
    with pytest.raises(InputError, match="name one instead"):
        run([source], tokenizer, tmp_path / "p.bin", shard=(0, 2))
    with pytest.raises(InputError, match="shards go to a directory"):
        run([source], tokenizer, source)
    with pytest.raises(InputError, match="shard 2/2"):
        run([source], tokenizer, tmp_path / "s", shard=(2, 2))
    with pytest.raises(InputError, match="name files"):
        run([], tokenizer, tmp_path / "s")
    with pytest.raises(InputError, match="named twice"):
        run(["-", "-"], tokenizer, tmp_path / "s")
    with pytest.raises(InputError, match="cannot write the tokens: "):
        run([source], tokenizer, source / "x" / "o.bin")


def test_a_vocabulary_too_large_and_one_without_ends(tmp_path):
    (tmp_path / "t.txt").write_text("a fox")
    wide = ByteBPETokenizer.from_ranks({bytes([b]): b for b in range(256)}, "gpt2", {"<|end|>": 1000})
    wide.vocab_size = 70_000
    with pytest.raises(InputError, match="uint16 holds ids up to 65,535, the vocabulary has 70,000: use uint32"):
        run([tmp_path / "t.txt"], wide, tmp_path / "o.bin", Options(dtype="uint16"))
    for ends in ("bos", "eos", "both"):
        with pytest.raises(InputError, match=r"the tokenizer has no (bos|eos) token"):
            run([tmp_path / "t.txt"], wide, tmp_path / "o.bin", Options(ends=ends))


def test_what_a_killed_process_left_is_removed(tokenizer, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = token_file.platform.node()
    left, mine = tmp_path / f".o.bin.{host}-{dead.pid}.tmp", tmp_path / f".o.bin.{host}-1.tmp"
    other = tmp_path / f".o.bin.another-{dead.pid}.tmp"
    for path in (left, mine, other):
        path.write_text("half")
    (tmp_path / "t.txt").write_text("a fox")
    run([tmp_path / "t.txt"], tokenizer, tmp_path / "o.bin")
    assert not left.exists() and mine.exists() and other.exists()


# ---- the command line


def anert(*args, **kwargs):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "anert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, **kwargs)


def test_tokenize_from_the_command_line(tokenizer, tokenizer_file, stories, tmp_path, capsys):
    out = str(tmp_path / "o.bin")
    assert cli.main(["tokenize", str(stories), "--tokenizer", tokenizer_file, "-o", out, "--val", "0.1", "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["tokens"] == len(data.open_tokens(out).tokens) and report["documents"] == 1728
    assert "tokenize  1.4 of 1.4 MB  100%" in shown.err and "MB/s  ETA 0:00" in shown.err
    assert cli.main(["tokenize", str(stories), "--tokenizer", tokenizer_file, "-o", out]) == 2
    assert "is there already" in capsys.readouterr().err
    shard = ["--shard", "1/2", "--shard-mb", "0.5", "-o", str(tmp_path / "s")]
    assert cli.main(["tokenize", str(stories), "--tokenizer", tokenizer_file, *shard]) == 0
    assert "1,728" not in (line := capsys.readouterr().out) and "other shards are not finished" in line
    for words in (["--shard", "2/2"], ["--workers", "0"], ["--ends", "all"], ["--val", "x"]):
        assert cli.main(["tokenize", str(stories), "--tokenizer", tokenizer_file, "-o", out, *words]) == 2


def test_two_workers_from_the_command_line(tokenizer_file, stories, tmp_path):
    done = anert("tokenize", stories, "--tokenizer", tokenizer_file, "-o", tmp_path / "o.bin", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert len(data.open_tokens(tmp_path / "o.bin").documents) == 1728


def test_a_full_disk_leaves_nothing(tokenizer_file, stories, tmp_path):
    """RLIMIT_FSIZE: the system itself refuses to write on, as a full disk does."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    for out in ("o.bin", "s"):
        done = anert("tokenize", stories, "--tokenizer", tokenizer_file, "-o", tmp_path / out, preexec_fn=limit)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "cannot write the tokens: File too large" in done.stderr
    assert [p.name for p in tmp_path.rglob("*")] == ["s"]


def test_a_worker_leaves_though_its_end_fell_into_a_finalizer():
    """Nothing can be raised there: neither is it said, nor does the worker go on."""
    code = """
import os, signal, time
from anert.cli.meter import as_worker

def blocks():
    try:
        yield
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

as_worker()
made = blocks()
next(made)
del made
time.sleep(20)
print("went on")
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupt_leaves_no_half_file(tokenizer_file, stories, tmp_path, how, workers):
    big = tmp_path / "big.txt"
    big.write_bytes(stories.read_bytes() * 30)
    out = tmp_path / "out"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "anert", "tokenize", big, "--tokenizer", tokenizer_file, "-o", out / "o.bin"]
    child = subprocess.Popen(
        [*map(str, command), "--workers", str(workers)], env=env, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not any(p.stat().st_size > 256 for p in out.rglob("*.tmp")):
        assert time.monotonic() < until and child.poll() is None
        time.sleep(0.05)
    child.send_signal(how)
    _, err = child.communicate(timeout=90)
    assert child.returncode == 130 and "Traceback" not in err, err
    assert list(out.iterdir()) == []


def test_memory_does_not_grow_with_the_stream(tokenizer_file, stories, tmp_path):
    """Peak memory of a stream 8 times as long, whose documents are many and whose words differ."""
    code = (
        "import random, sys\n"
        "rng, text = random.Random(1), open(sys.argv[1], encoding='utf-8').read()[:500_000]\n"
        "for i in range(int(sys.argv[2])):\n"
        "    sys.stdout.write(text)\n"
        "    sys.stdout.write(' '.join(str(rng.random()) + '\\n' for _ in range(2000)))\n"
    )
    measure = (
        "import resource, sys; from anert.cli import main; from anert.tokenizer import base; base.CACHE_WORDS = 4096\n"
        "code = main(sys.argv[1:]); print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for n in (3, 24):
        made = subprocess.Popen([sys.executable, "-c", code, str(stories), str(n)], stdout=subprocess.PIPE)
        words = ["tokenize", "-", "--split", "line", "--tokenizer", tokenizer_file, "-o", str(tmp_path / f"{n}.bin")]
        done = subprocess.run(
            [sys.executable, "-c", measure, *words], stdin=made.stdout, capture_output=True, text=True, cwd=ROOT
        )
        made.wait()
        status, peak = done.stdout.split()[-2:]
        assert status == "0", done.stderr
        peaks.append(int(peak))
    assert len(data.open_tokens(tmp_path / "24.bin").documents) > 80_000
    assert peaks[1] - peaks[0] < 4 << 10, peaks  # KiB, where the longer text alone is 30 MiB longer


# ---- anert tokenizer


@pytest.mark.parametrize(("name", "kind"), [("t.json", "byte-bpe"), ("t.model", "llama"), ("t.bin", "llama")])
def test_train_a_tokenizer_from_the_command_line(stories, tmp_path, capsys, name, kind):
    small = tmp_path / "small.jsonl"
    rows = stories.read_text(encoding="utf-8").split("<|endoftext|>")[:300]
    small.write_text("\n".join(json.dumps({"story": r}) for r in rows))
    out = str(tmp_path / name)
    words = ["tokenizer", "train", str(small), "--vocab", "500", "--field", "story", "-o", out]
    assert cli.main([*words, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    made = load_tokenizer(out)
    assert (about["kind"], about["vocab_size"], about["hash"]) == (kind, 500, made.hash) and made.kind == kind
    assert made.decode(made.encode(rows[0])) == rows[0]
    assert cli.main(words) == 2 and "is there already" in capsys.readouterr().err
    assert cli.main(["tokenizer", "show", out, "Once upon"]) == 0
    assert made.hash in capsys.readouterr().out


def test_specials_and_patterns_of_a_trained_tokenizer(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("abc abc 123<|x|>45")
    out = str(tmp_path / "t.json")
    words = ["tokenizer", "train", str(tmp_path / "t.txt"), "--vocab", "300", "-o", out, "--pattern", "cl100k"]
    assert cli.main([*words, "--special", "<|x|>", "--special", "<|y|>"]) == 0
    assert "no other pair occurs twice" in capsys.readouterr().out
    made = load_tokenizer(out)
    assert list(made.specials) == ["<|x|>", "<|y|>"] and made.encode_with_specials("<|y|>") == [made.vocab_size - 1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--vocab", "100"], "needs at least 257"),
        (["--vocab", "100", "--kind", "llama"], "needs at least 260"),
        (["--vocab", "300", "-o", "x.txt"], "byte-level is .json"),
        (["--vocab", "300", "--kind", "llama", "-o", "x.json"], "a llama tokenizer cannot be a .json file"),
        (["--vocab", "x"], "expected a whole number"),
        (["--vocab", "300", "--pattern", "["], "not a pattern"),
        ([], "--vocab"),
    ],
)
def test_training_that_cannot_be(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("abc abc")
    assert cli.main(["tokenizer", "train", "t.txt", *words]) == 2
    assert says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_tokenizer_without_an_action(capsys):
    assert cli.main(["tokenizer"]) == 2 and "train" in capsys.readouterr().out
    assert cli.main(["tokenizer", "--help"]) == 0
    assert cli.main(["tokenizer", "paint"]) == 2


def test_the_benchmark_compares_equal_ids(stories, tokenizer_file, tmp_path, capsys, monkeypatch):
    for module in ("tiktoken", "tokenizers", "sentencepiece"):
        pytest.importorskip(module)
    (tmp_path / "t.txt").write_text(stories.read_text(encoding="utf-8")[:60_000].replace("<|endoftext|>", ""))
    fast = ["--rounds", "2", "--warmup", "1", "--max-spread", "1000", "--no-wait"]
    words = ["bench", "tokenizer", "--text", str(tmp_path / "t.txt"), *fast, "--json"]
    for more in ([], ["--tokenizer", tokenizer_file]):
        assert cli.main([*words, *more]) == 0
        rows = {r["name"]: r for r in json.loads(capsys.readouterr().out.splitlines()[-1])["results"]}
        assert len(rows) == (6 if more else 9)
        for name, r in rows.items():
            assert r["unit"] == "MB/s" and r["n"] == 2 and 0 < r["p10"] <= r["median"] <= r["p90"]
            if r["baseline"]:
                assert r["ratio"] == pytest.approx(r["median"] / rows[r["baseline"]]["median"]) and "to" in name
    assert cli.main(["bench", "tokenizer", "--text", str(tmp_path / "none.txt")]) == 2
    assert cli.main(["bench", "tokenizer"]) == 2 and "--text FILE" in capsys.readouterr().err
    assert cli.main([*words, "--tokenizer", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    with monkeypatch.context() as m:
        m.setattr("anert.bench.tokenizer.tiktoken_of", lambda tokenizer: lambda text: tokenizer.encode(text)[1:])
        assert cli.main(words) == 1 and "tiktoken has other ids" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text(" ")
    assert cli.main(words) == 2 and "no text in it" in capsys.readouterr().err
