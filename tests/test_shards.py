"""Token shards: as one file, shared by machines, gone on with, damaged, verified, inspected."""

import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_runs import run

from anert import cli, data
from anert.data import shards
from anert.data.corpus import Options
from anert.errors import InputError
from anert.events import Notice
from anert.tokenizer import ByteBPETokenizer

pytest_plugins = ["token_runs"]


def test_shards_are_one_file(tokenizer, stories, tmp_path):
    report, _ = run([stories], tokenizer, tmp_path / "s", shard_bytes=300_000)
    assert report.complete and report.shards == 5
    run([stories], tokenizer, tmp_path / "one.bin")
    one, many = data.open_tokens(tmp_path / "one.bin"), data.open_tokens(tmp_path / "s")
    assert many.kind == "shards" and len(many.tokens) == report.tokens == len(one.tokens)
    assert np.asarray(many.tokens).tolist() == one.tokens.tolist()
    assert (many.vocab_size, many.tokenizer_hash) == (tokenizer.vocab_size, tokenizer.hash)
    a, b = (data.prepare(tmp_path / n, tokenizer, tmp_path, 64, 0.1, 300) for n in ("one.bin", "s"))
    assert (a.n_windows, a.n_val_windows) == (b.n_windows, b.n_val_windows)
    for _, x, y in zip(range(200), a.train_batches(3, 1), b.train_batches(3, 1), strict=False):
        assert (x[0] == y[0]).all() and (x[1] == y[1]).all()
    for x, y in zip(a.val_windows(), b.val_windows(), strict=True):
        assert (x[0] == y[0]).all()
    assert a.unigram_entropy() == pytest.approx(b.unigram_entropy())
    assert data.open_tokens(tmp_path / "s" / "manifest.json").tokenizer_hash == tokenizer.hash
    for entry in json.loads((tmp_path / "s" / "manifest.json").read_text())["files"]:
        assert entry["sha256"] == hashlib.sha256((tmp_path / "s" / entry["name"]).read_bytes()).hexdigest()


def test_a_slice_within_a_shard_is_a_view():
    parts = [np.arange(a, b, dtype="<u2") for a, b in ((0, 5), (5, 5), (5, 12))]
    joined = shards.Joined(parts)
    assert np.shares_memory(joined[6:9], parts[2]) and joined[6:9].tolist() == [6, 7, 8]
    assert len(joined) == 12 and [joined[i] for i in range(12)] == list(range(12)) and joined[-1] == 11
    with pytest.raises(IndexError):
        joined[12]
    assert len(shards.Joined([])) == 0 and len(shards.Joined([])[:]) == 0


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=5), st.integers(-2, 30), st.integers(-2, 30))
def test_joined_is_the_concatenation(parts, a, b):
    whole = [i for p in parts for i in p]
    joined = shards.Joined([np.array(p, "<u2") for p in parts])
    assert np.asarray(joined[a:b]).tolist() == whole[a:b]
    assert np.asarray(joined[a:][:b]).tolist() == whole[a:][:b]


def test_shards_with_validation_give_it_to_the_trainer(tokenizer, stories, tmp_path):
    for raw in (False, True):
        out = tmp_path / f"s{raw}"
        report, _ = run([stories], tokenizer, out, Options(val=0.05, raw=raw), shard_bytes=500_000)
        ds = data.TokenDataset(out, 64, 0.3, 300, tokenizer.hash)
        assert (ds.train_tokens, ds.val_tokens) == (report.tokens, report.val_tokens) and report.val_tokens > 1000
        assert len(list(ds.val_windows())) == (report.val_tokens - 1) // 64


def test_machines_share_the_shards_and_the_last_writes_the_manifest(tokenizer, stories, tmp_path):
    out = tmp_path / "s"
    for i in (2, 0, 1):
        report, _ = run([stories], tokenizer, out, shard=(i, 3), shard_bytes=300_000)
        assert report.complete == (i == 1) and report.shards == (1 if i == 2 else 2)
        if i != 1:
            with pytest.raises(InputError, match=r"no manifest.json, . shards finished: run the same"):
                data.open_tokens(out)
    run([stories], tokenizer, tmp_path / "one.bin")
    assert np.asarray(data.open_tokens(out).tokens).tolist() == data.open_tokens(tmp_path / "one.bin").tokens.tolist()


def test_finished_shards_are_skipped_and_others_made_again(tokenizer, stories, tmp_path):
    out = tmp_path / "s"
    run([stories], tokenizer, out, shard_bytes=300_000)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob("*.bin")}
    (out / "shard-00001.bin").write_bytes(b"half")
    (out / "shard-00003.json").unlink()
    with pytest.raises(InputError, match=r"4 bytes, .* expected: delete shard-00001.json"):
        data.open_tokens(out)
    report, events = run([stories], tokenizer, out, shard_bytes=300_000)
    assert report.skipped == 3 and isinstance(events[0], Notice)
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob("*.bin")}
    assert {n for n in after if after[n][0] != before[n][0]} == {"shard-00001.bin", "shard-00003.bin"}
    assert {n: b for n, (_, b) in after.items()} == {n: b for n, (_, b) in before.items()}


def test_a_directory_of_something_else_is_refused(tokenizer, stories, tmp_path):
    out = tmp_path / "s"
    run([stories], tokenizer, out, shard_bytes=300_000)
    other = ByteBPETokenizer.train(["abc abc"], 258)
    with pytest.raises(InputError, match="made of other texts, options or tokenizer"):
        run([stories], other, out, shard_bytes=300_000)
    with pytest.raises(InputError, match="made of other texts"):
        run([stories], tokenizer, out, shard_bytes=600_000)
    report, _ = run([stories], other, out, shard_bytes=600_000, force=True)
    assert report.shards == 3 and len(list(out.glob("*.bin"))) == 3
    assert data.open_tokens(out).tokenizer_hash == other.hash
    with pytest.raises(InputError, match="tokenize the text again"):
        data.TokenDataset(out, 64, 0.1, 300, tokenizer.hash)


def flip(path, at):
    """Turn one bit of a file over."""
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 8]))


@pytest.mark.parametrize("raw", [False, True])
def test_a_flipped_bit_in_a_shard_is_found_and_named_and_mended(
    tokenizer, tokenizer_file, stories, tmp_path, capsys, raw
):
    out, more = tmp_path / "s", ["--raw"] if raw else []
    argv = ["tokenize", str(stories), "--tokenizer", tokenizer_file, "-o", str(out), "--shard-mb", "0.3", *more]
    assert cli.main([*argv, "--val", "0.1"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", "tokens", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ok"] and {c["id"] for c in told["checks"]} == {p.name for p in out.glob("*.bin")}
    good = {p.name: p.read_bytes() for p in out.glob("*.bin")}
    flip(out / "shard-00002.bin", 5000)
    flip(out / "shard-00003.val.bin", len(good["shard-00003.val.bin"]) - 1)
    assert len(data.open_tokens(out).tokens) > 0  # sizes and headers are right
    assert cli.main(["verify", "tokens", str(out / "manifest.json")]) == 1
    bad = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert bad == ["shard-00002.bin", "shard-00003.val.bin"]
    assert cli.main([*argv, "--val", "0.1"]) == 0  # the same command again makes them again, and says so
    err = capsys.readouterr().err
    assert "shard-00002.bin: its sha256" in err and "shard-00003.val.bin: its sha256" in err
    assert {p.name: p.read_bytes() for p in out.glob("*.bin")} == good
    (out / "shard-00001.bin").unlink()
    flip(out / "shard-00000.bin", 300)
    (out / "shard-00004.bin").write_bytes(b"")
    assert cli.main(["verify", "tokens", str(out), "--json"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    wrong = {c["id"]: c["value"] for c in told["checks"] if not c["ok"]}
    assert wrong["shard-00001.bin"] == "missing" and "sha256" in wrong["shard-00000.bin"] and len(wrong) == 3


def test_a_token_file_is_verified_by_what_it_says_of_itself(tokenizer, stories, tmp_path, capsys):
    run([stories], tokenizer, tmp_path / "t.bin")
    verify = ["verify", "tokens", str(tmp_path / "t.bin")]
    assert cli.main(verify) == 0 and "ids, all of the vocabulary" in capsys.readouterr().out
    flip(tmp_path / "t.bin", 257)  # the high byte of the first id
    assert cli.main(verify) == 1 and "position 0 is past the vocabulary" in capsys.readouterr().out
    flip(tmp_path / "t.bin", 257)
    size = (tmp_path / "t.bin").stat().st_size
    flip(tmp_path / "t.bin", size - 5)  # of the last document's first token
    assert cli.main(verify) == 1 and "do not begin in order" in capsys.readouterr().out
    (tmp_path / "raw.bin").write_bytes(bytes(range(1, 200)) + b"\0")
    assert cli.main(["verify", "tokens", str(tmp_path / "raw.bin")]) == 2
    assert cli.main(["verify", "tokens", str(tmp_path)]) == 2 and "without manifest.json" in capsys.readouterr().err
    assert cli.main(["verify", "tokens", str(tmp_path / "none")]) == 2


def test_inspect_knows_shards(tokenizer, stories, tmp_path, capsys):
    report, _ = run([stories], tokenizer, tmp_path / "s", Options(val=0.1), shard_bytes=600_000)
    for path in (tmp_path / "s", tmp_path / "s" / "manifest.json"):
        assert cli.main(["inspect", str(path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["kind"], told["format"], told["shards"]) == ("tokens", "anert token shards", 3)
        assert (told["tokens"], told["val_tokens"]) == (report.tokens, report.val_tokens)
        assert (told["tokenizer_hash"], told["documents"]) == (tokenizer.hash, report.documents)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.write_text("{"), "damaged"),
        (lambda m: m.write_text("[]"), "damaged"),
        (lambda m: m.write_text(m.read_text().replace('"version": 1', '"version": 9')), "update anert"),
        (lambda m: m.with_name("shard-00000.bin").unlink(), "missing: delete shard-00000.json"),
        (lambda m: m.write_text(m.read_text().replace('"shard-00000.bin"', '"../shard-00000.bin"')), "damaged"),
        (lambda m: m.write_text(m.read_text().replace('"uint16"', '"O"')), "damaged"),
        (lambda m: m.write_text(re.sub(r'"tokens": [0-9]+,', '"tokens": 7,', m.read_text())), "header is not what"),
        (lambda m: flip(m.with_name("shard-00000.bin"), 56), "header is not what manifest.json says"),  # tokenizer
        (lambda m: flip(m.with_name("shard-00000.bin"), 16), "its header says"),  # number of ids
        (lambda m: m.unlink(), "no manifest.json, 3 shards finished"),
        (lambda m: [p.unlink() for p in m.parent.iterdir()], "a directory without manifest.json"),
    ],
)
def test_shards_that_are_damaged(tokenizer, stories, tmp_path, change, says):
    run([stories], tokenizer, tmp_path / "s", shard_bytes=600_000)
    change(tmp_path / "s" / "manifest.json")
    with pytest.raises(InputError, match=says):
        data.open_tokens(tmp_path / "s")
