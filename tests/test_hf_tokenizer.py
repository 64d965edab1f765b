"""tokenizer.json: ours against Hugging Face's tokenizers, both kinds, written and read; and ones that are refused."""

import json

import pytest

from anert.errors import InputError
from anert.tokenizer import ByteBPETokenizer, LlamaTokenizer, load_tokenizer
from anert.tokenizer.hf_files import llama_pieces, write_directory

ODD = [" two  spaces", "tab\tand ünïcode \U0001f600", "", "a\n\nb", "x" * 70, "12345", "日本語"]


@pytest.fixture(scope="module")
def lines(shared_data):
    text = (shared_data / "text" / "grimm_pg2591.txt").read_text("utf-8-sig")[:12000]
    return [*text.splitlines(), *ODD]


def both(tokenizer, folder):
    """(the tokenizers package, ours) of the directory that is written."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir()
    write_directory(tokenizer, folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("name", ["tok512.bin", "tokenizer.model"])
def test_llama(shared_data, tmp_path, lines, name):
    ours = load_tokenizer(shared_data / "llama2c" / name)
    theirs, again = both(ours, tmp_path / "t")
    assert isinstance(again, LlamaTokenizer) and (again.bos_id, again.eos_id) == (1, 2)
    for line in lines:
        ids = ours.encode(line)
        assert theirs.encode(line, add_special_tokens=False).ids == ids == again.encode(line)
        assert again.decode(ids) == ours.decode(ids)
    assert theirs.encode("cat").ids[0] == 1  # bos, as Llama's own does
    again.save(tmp_path / "kept.json")
    assert load_tokenizer(tmp_path / "kept.json").hash == again.hash


@pytest.mark.parametrize("kind", ["gpt2", "cl100k"])
def test_byte_level(tmp_path, lines, kind):
    ours = ByteBPETokenizer.train(lines, 400, kind)
    theirs, again = both(ours, tmp_path / "t")
    assert again.eos_id == ours.eos_id == 399
    for line in lines:
        ids = ours.encode(line)
        assert theirs.encode(line).ids == ids == again.encode(line)
        assert theirs.decode(ids) == line
    assert theirs.encode("<|endoftext|>").ids == [399]


def content(shared_data, tmp_path):
    write_directory(load_tokenizer(shared_data / "llama2c" / "tok512.bin"), tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text())


def one_of_two_ways(found):
    """A merge whose piece another merge makes too."""
    merges = found["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    return next(pair for pair, piece in zip(merges, made, strict=True) if made.count(piece) > 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["model"]["merges"].reverse(), "not those of a SentencePiece model"),
        (lambda c: c["model"]["merges"].remove(one_of_two_ways(c)), "not those of a SentencePiece model"),
        (lambda c: c["model"]["merges"].append(["q", "zzz"]), "is not of this vocabulary"),
        (lambda c: c["model"]["merges"].append(["q"]), "not a tokenizer.json"),
        (lambda c: c["model"]["vocab"].pop("<0x41>"), "doubled or sparse|256 byte pieces"),
        (lambda c: c["model"]["vocab"].update({"zz": 7}), "doubled or sparse"),
        (lambda c: c["model"].pop("vocab"), "not a tokenizer.json"),
        (lambda c: c["normalizer"]["normalizers"].append({"type": "NFKC"}), "NFKC before byte-fallback"),
        (lambda c: c.update(normalizer=None), "without SentencePiece's spaces"),
    ],
)
def test_what_is_not_sentencepiece_is_refused(shared_data, tmp_path, change, says):
    found = content(shared_data, tmp_path)
    change(found)
    with pytest.raises(InputError, match=says):
        llama_pieces(found, {}, "t.json")


def test_what_tokenizer_json_cannot_say(tmp_path):
    from dataclasses import replace

    plain = ByteBPETokenizer.train(["ab"], 258, "cl100k")
    odd = ByteBPETokenizer(replace(plain.vocabulary, add_prefix_space=True))
    with pytest.raises(InputError, match="with a prefix space"):
        write_directory(odd, tmp_path)
    assert not list(tmp_path.iterdir())
