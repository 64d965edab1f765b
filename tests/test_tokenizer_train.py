"""Splitting, training, tokenizer.json of Llama, batches: against `regex`, SentencePiece and Hugging Face tokenizers."""

import itertools
import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from anert.errors import InputError
from anert.tokenizer import PATTERNS, ByteBPETokenizer, LlamaTokenizer, base, load_tokenizer
from anert.tokenizer.hf_files import write_directory
from anert.tokenizer.split import findall

ALPHABET = (
    "aZ sStTlLdDreEvVmM'09(-\n\r\t\v\f\0\x1c\x7f\x85\xa0é日²\u017f\u2003\u3000\u0660🙂\U0001d7d8\U00020000e\u0301_"
)
texts = st.text(max_size=60) | st.text(ALPHABET, max_size=40) | st.text(" 'sS(\r\n\té日1²\u3000-", max_size=30)


@pytest.fixture(scope="module")
def stories(shared_data):
    return (shared_data / "text" / "tinystories_10k.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(stories):
    return LlamaTokenizer.train(stories.split("\n"), 1000)


# ---- splitting


@pytest.mark.parametrize("name", PATTERNS)
@given(text=texts)
def test_the_fast_split_is_the_pattern(name, text):
    assert findall(PATTERNS[name])(text) == regex.findall(PATTERNS[name], text)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_fast_split_is_the_pattern_beside_every_character(name):
    every = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x30000))]
    for before, after in (("a", "a"), ("'", "s"), (" ", " 'l"), ("(", "1"), ("\n", "\n")):
        text = "".join(f"{before}{c}{after} " for c in every)
        assert findall(PATTERNS[name])(text) == regex.findall(PATTERNS[name], text)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_fast_split_is_the_pattern_on_short_texts_of_every_kind(name):
    kinds = "aS'1(é²  \n\u3000"
    for length in range(1, 6):
        for text in map("".join, itertools.product(kinds, repeat=length)):
            assert findall(PATTERNS[name])(text) == regex.findall(PATTERNS[name], text)


# ---- training Llama's kind


def test_trained_pieces_are_a_sentencepiece_model(trained, stories, tmp_path):
    spm = pytest.importorskip("sentencepiece")
    trained.save(tmp_path / "t.model")
    oracle = spm.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert oracle.vocab_size() == trained.vocab_size == 1000 and (oracle.bos_id(), oracle.eos_id()) == (1, 2)
    for line in stories.split("\n")[:3000]:
        assert trained.encode(line) == oracle.encode(line)
    for text in (" two  spaces ", "é日🙂", "tab\tand\nline", "\u2581", "12,345"):
        assert trained.encode(text) == oracle.encode(text) and trained.decode(trained.encode(text)) == oracle.decode(
            oracle.encode(text)
        )


def test_training_is_as_good_as_sentencepiece(trained, stories, tmp_path):
    spm = pytest.importorskip("sentencepiece")
    lines = [line for line in stories.split("\n") if "<|" not in line]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "s"), vocab_size=1000, model_type="bpe",
        byte_fallback=True, split_digits=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "s.model"))
    ours_n, theirs_n = (sum(len(t.encode(line)) for line in lines) for t in (trained, theirs))
    assert ours_n < 1.01 * theirs_n
    pieces = {theirs.id_to_piece(i).replace("\u2581", " ") for i in range(1000)}
    assert len(pieces & set(trained.model.pieces)) > 950


def test_every_form_of_a_trained_tokenizer_is_one(trained, tmp_path):
    for name in ("t.model", "t.bin"):
        trained.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert again.hash == trained.hash and again.encode("Once upon") == trained.encode("Once upon")
    assert trained.model.pieces[:4] == ("<unk>", "<s>", "</s>", "<0x00>") and trained.model.pieces[258] == "<0xFF>"


@given(texts)
def test_trained_llama_round_trip(trained, text):
    assert trained.decode(trained.encode(text)) == text.replace("\u2581", " ")


def test_too_little_text_and_too_small_a_vocabulary():
    small = LlamaTokenizer.train(["ab ab<|endoftext|>ab"], 500)
    assert small.model.pieces[259:] == (" a", " ab", " ", "a", "b")
    with pytest.raises(InputError, match="needs at least 260"):
        LlamaTokenizer.train(["a"], 259)
    rare = LlamaTokenizer.train(["abcabcabcz"], 262)
    assert len(rare.model.pieces) == 262 and rare.decode(rare.encode("abcz")) == "abcz"


# ---- tokenizer.json


def hugging_face(llama, form):
    """The JSON that Hugging Face's converter makes of a Llama model, from the vocabulary and its scores."""
    tokenizers = pytest.importorskip("tokenizers")
    model, space = llama.model, "\u2581"
    vocab = {
        (p.replace(" ", space) if t == 1 else p): i
        for i, (p, t) in enumerate(zip(model.pieces, model.types, strict=True))
    }
    found = []
    for piece, i in vocab.items():
        parts = [
            (vocab[piece[:k]], vocab[piece[k:]], k)
            for k in range(1, len(piece))
            if {piece[:k], piece[k:]} <= vocab.keys()
        ]
        if model.types[i] == 1:
            found += [(-model.scores[i], a, b, (piece[:k], piece[k:])) for a, b, k in sorted(parts)]
    found.sort(key=lambda f: f[:3])
    bpe = tokenizers.models.BPE(vocab, [f[3] for f in found], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(bpe)
    if form == "normalizer":
        steps = [tokenizers.normalizers.Prepend(space), tokenizers.normalizers.Replace(" ", space)]
        made.normalizer = tokenizers.normalizers.Sequence(steps)
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(space, prepend_scheme="first", split=False)
    d = tokenizers.decoders
    made.decoder = d.Sequence([d.Replace(space, " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>"])
    return made


@pytest.fixture(scope="module", params=["normalizer", "metaspace"])
def pair(request, trained, tmp_path_factory):
    made = hugging_face(trained, request.param)
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    made.save(str(path))
    return made, load_tokenizer(path)


@given(text=texts.filter(lambda t: "<" not in t))
def test_llama_json_is_hugging_face(pair, text):
    theirs, ours = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_llama_json_is_hugging_face_on_stories(pair, stories):
    theirs, ours = pair
    for line in stories.split("\n")[:1500]:
        ids = ours.encode(line)
        assert ids == theirs.encode(line, add_special_tokens=False).ids and ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 1000)


def test_llama_json_keeps_its_ends_when_saved(pair, tmp_path):
    pair[1].save(tmp_path / "tokenizer.json")
    tokenizers = pytest.importorskip("tokenizers")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 1000
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": {"content": "<s>"}}')
    read = load_tokenizer(tmp_path)
    assert (read.bos_id, read.eos_id) == (-1, 1)
    read.save(tmp_path / "elsewhere.json")
    again = load_tokenizer(tmp_path / "elsewhere.json")
    (tmp_path / "tokenizer_config.json").unlink()
    assert (again.hash, again.eos_id) == (read.hash, 1) and again.hash != load_tokenizer(tmp_path).hash


def test_metaspace_is_for_json_alone(pair, tmp_path):
    if not pair[1].model.prefix_once:
        pair[1].save(tmp_path / "t.model")
        assert load_tokenizer(tmp_path / "t.model").hash == pair[1].hash
    else:
        with pytest.raises(InputError, match=r"save it as \.json"):
            pair[1].save(tmp_path / "t.bin")
    write_directory(pair[1], tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").hash == pair[1].hash


def change_merge(c):
    c["model"]["merges"][3] = ["a", "nothing"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_merge, "is not of this vocabulary"),
        (lambda c: c["model"].pop("merges"), "not a tokenizer.json"),
        (lambda c: c.update(normalizer={"type": "NFKC"}, pre_tokenizer=None), "NFKC before byte-fallback BPE"),
        (lambda c: c.update(normalizer=None, pre_tokenizer=None), "another kind of tokenizer"),
        (lambda c: c["model"]["vocab"].update({"zz": 5000}), "doubled or sparse"),
        (lambda c: c["model"]["vocab"].update({"<0x00>": c["model"]["vocab"].pop("<0x01>")}), "sparse"),
        (lambda c: c["model"]["vocab"].update({"<0x0>": c["model"]["vocab"].pop("<0x01>")}), "all 256 byte pieces"),
        (lambda c: c.update(added_tokens=[3]), "not a tokenizer.json"),
    ],
)
def test_llama_json_that_is_damaged(pair, tmp_path, change, says):
    content = json.loads(pair[1]._source)
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        load_tokenizer(tmp_path / "tokenizer.json")


# ---- batches


def test_a_batch_is_every_text(trained, stories, monkeypatch):
    monkeypatch.setattr(base, "BATCH_CHARS", 5000)
    docs = [*stories.split("\n")[:400], "", "é"]
    byte_level = ByteBPETokenizer.train(docs, 400)
    for tokenizer in (trained, byte_level):
        expected = [tokenizer.encode(d, True, True) for d in docs]
        assert tokenizer.encode_batch(docs, True, True) == expected
        with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2) as processes:
            for executor in (threads, processes):
                assert tokenizer.encode_batch(docs, True, True, executor) == expected
    assert trained.encode_batch([]) == []


def test_long_text_is_encoded_in_parts(trained, stories, monkeypatch):
    whole = trained.encode(stories[:300_000], True, True)
    monkeypatch.setattr(base, "SEGMENT", 1 << 30)
    assert trained.encode(stories[:300_000], True, True) == whole
