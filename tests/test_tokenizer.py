"""Tokenizers against SentencePiece, Hugging Face tokenizers and tiktoken, and against plain definitions."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anert.errors import InputError
from anert.tokenizer import PATTERNS, ByteBPETokenizer, base, load_tokenizer
from anert.tokenizer.base import StreamDecoder, utf8_prefix
from anert.tokenizer.byte_files import byte_letters
from anert.tokenizer.merge import SHORT, Merges

TEXTS = ["tinystories_10k", "tinyshakespeare", "grimm_pg2591", "andersen_en", "andersen_da_200k", "andersen_es_200k"]
TIKTOKEN_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TIKTOKEN_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

LETTERS = "Once|upon| a|time|don't|WE'LL|  |   |\n|\r\n|\t|123|é|日本|\u2581|🙂|e\u0301|<s>|<0x41>|...|²|\x1c|\xa0|\0"
words = st.sampled_from([*LETTERS.split("|"), "<|endoftext|>"])
texts = st.one_of(st.text(max_size=60), st.lists(st.one_of(words, st.text(max_size=4)), max_size=25).map("".join))


def read(shared_data: Path, name: str) -> str:
    return (shared_data / "text" / f"{name}.txt").read_text(encoding="utf-8-sig")[:400_000]


@pytest.fixture(scope="module")
def llama(shared_data):
    return load_tokenizer(shared_data / "llama2c" / "tokenizer.bin")


@pytest.fixture(scope="module")
def tok512(shared_data):
    return load_tokenizer(shared_data / "llama2c" / "tok512.bin")


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return load_tokenizer(shared_data / "gpt2" / "gpt2_vocab.json")


@pytest.fixture(scope="module")
def sentencepiece_llama(shared_data):
    sp = pytest.importorskip("sentencepiece")
    return sp.SentencePieceProcessor(model_file=str(shared_data / "llama2c" / "tokenizer.model"))


@pytest.fixture(scope="module")
def tiktoken_gpt2(gpt2):
    return tiktoken_of(gpt2, TIKTOKEN_GPT2)


def tiktoken_of(tokenizer, pattern):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {t: i for i, t in enumerate(tokenizer.vocabulary.tokens) if t}
    return tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens=tokenizer.specials)


@pytest.fixture(scope="module")
def small_corpus():
    rng = random.Random(1)
    stock = [rng.choice("aeiou bcdrst") + rng.choice(["an", "er", "to", "ing", "é", "ß", "日"]) for _ in range(300)]
    return " ".join(rng.choice(stock) + rng.choice(["", "", ",", ".\n", " 12", "'s", "!  "]) for _ in range(6000))


@pytest.fixture(scope="module")
def trained(small_corpus):
    return {p: ByteBPETokenizer.train([small_corpus], 400, p) for p in PATTERNS}


# ---- Llama


@pytest.mark.parametrize("name", TEXTS)
def test_llama_is_sentencepiece_on_real_text(shared_data, llama, sentencepiece_llama, name):
    text = read(shared_data, name)
    ids = llama.encode(text)
    assert ids == sentencepiece_llama.encode(text)
    assert llama.decode(ids) == text


@given(texts)
def test_llama_is_sentencepiece_on_any_text(llama, sentencepiece_llama, text):
    ids = llama.encode(text)
    assert ids == sentencepiece_llama.encode(text)
    assert llama.decode(ids) == sentencepiece_llama.decode(ids)


@example([197, 1, 131])  # a control token between the bytes of a character
@given(st.lists(st.integers(0, 31999) | st.integers(0, 300), max_size=30))
def test_llama_decodes_any_ids_as_sentencepiece(llama, sentencepiece_llama, ids):
    stream = llama.decode_stream()
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    assert llama.decode(ids) == sentencepiece_llama.decode(ids) == streamed


def test_llama_follows_sentencepiece_where_run_c_differs(llama):
    assert llama.encode("\u2581x") == [29871, 921]


def test_llama_long_words_take_the_heap(llama, sentencepiece_llama):
    text = "abcdefghij" * 500 + " " * 300 + "日本語" * 200
    assert llama.encode(text) == sentencepiece_llama.encode(text)


def test_bin_and_model_are_one_tokenizer(shared_data, llama, tmp_path):
    model = load_tokenizer(shared_data / "llama2c" / "tokenizer.model")
    assert (model.hash, model.vocab_size, model.bos_id, model.eos_id) == (llama.hash, 32000, 1, 2)
    model.save(tmp_path / "t.bin")
    model.save(tmp_path / "t.model")
    for name in ("t.bin", "t.model"):
        original = shared_data / "llama2c" / f"tokenizer{Path(name).suffix}"
        assert (tmp_path / name).read_bytes() == original.read_bytes()


def run_c_encode(tokenizer, text):
    """llama2.c's run.c: the best pair of all, again and again."""
    pieces, scores = list(tokenizer.model.pieces), tokenizer.model.scores
    index = {p: i for i, p in reversed(list(enumerate(pieces)))}
    ids = []
    for c in (" " + text) if text else "":
        ids += [index[c]] if c in index else [b + 3 for b in c.encode()]
    while True:
        best = max(
            ((scores[index[pieces[a] + pieces[b]]], -i) for i, (a, b) in enumerate(pairwise(ids))
             if pieces[a] + pieces[b] in index), default=None,
        )  # fmt: skip
        if best is None:
            return ids
        i = -best[1]
        ids[i : i + 2] = [index[pieces[ids[i]] + pieces[ids[i + 1]]]]


@given(texts.filter(lambda t: "\u2581" not in t and "<" not in t))
def test_tok512_is_run_c(tok512, text):
    assert tok512.encode(text) == run_c_encode(tok512, text)


def test_tok512_decodes_the_golden_story(shared_data, tok512):
    ids = np.load(shared_data / "golden" / "stories260K_hf_logits_greedy.npz")["ids"].ravel().tolist()
    golden = (shared_data / "golden" / "stories260K_greedy_runc.txt").read_text(encoding="utf-8")
    assert len(ids) > 200 and golden.startswith(tok512.decode(ids))
    story = tok512.decode(ids)
    assert tok512.encode(story, bos=True)[:50] == ids[:50]


@pytest.mark.parametrize("name", TEXTS[:2])
def test_tok512_round_trip(shared_data, tok512, name):
    text = read(shared_data, name)
    assert tok512.vocab_size == 512 and tok512.decode(tok512.encode(text)) == text


OPTIONS = {
    "plain": {"byte_fallback": True},
    "no bytes": {"byte_fallback": False, "character_coverage": 0.98},
    "no prefix": {"byte_fallback": True, "add_dummy_prefix": False},
    "extra spaces": {"byte_fallback": True, "remove_extra_whitespaces": True},
    "symbols": {"byte_fallback": True, "user_defined_symbols": ["<sep>", "to", "an to"]},
    "over words": {"byte_fallback": True, "split_by_whitespace": False, "remove_extra_whitespaces": False},
}


@pytest.fixture(scope="module", params=OPTIONS)
def custom(request, small_corpus, tmp_path_factory):
    """A SentencePiece model with other rules than Llama's: (ours, SentencePiece's)."""
    sp = pytest.importorskip("sentencepiece")
    where = tmp_path_factory.mktemp("sp")
    (where / "corpus.txt").write_text(small_corpus, encoding="utf-8")
    rules = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"} | OPTIONS[request.param]
    sp.SentencePieceTrainer.train(
        input=str(where / "corpus.txt"), model_prefix=str(where / "m"), vocab_size=400, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2, **rules,
    )  # fmt: skip
    return load_tokenizer(where / "m.model"), sp.SentencePieceProcessor(model_file=str(where / "m.model"))


@settings(deadline=None)
@given(text=texts | st.text("aeirt no to<sep>\u2581 ", max_size=40))
def test_custom_models_are_sentencepiece(custom, text):
    ours, theirs = custom
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"model_type": "unigram"}, "unigram"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
    ],
)
def test_other_sentencepiece_models_are_refused(small_corpus, tmp_path, rules, says):
    sp = pytest.importorskip("sentencepiece")
    (tmp_path / "c.txt").write_text(small_corpus, encoding="utf-8")
    sp.SentencePieceTrainer.train(input=str(tmp_path / "c.txt"), model_prefix=str(tmp_path / "m"), vocab_size=200,
                                  hard_vocab_limit=False, minloglevel=2, **rules)  # fmt: skip
    with pytest.raises(InputError, match=says):
        load_tokenizer(tmp_path / "m.model")


# ---- byte level


@pytest.mark.parametrize("name", TEXTS)
def test_gpt2_is_tiktoken_and_hugging_face_on_real_text(shared_data, gpt2, tiktoken_gpt2, name):
    tokenizers = pytest.importorskip("tokenizers")
    text = read(shared_data, name)
    ids = gpt2.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text)
    where = shared_data / "gpt2"
    theirs = tokenizers.ByteLevelBPETokenizer(str(where / "gpt2_vocab.json"), str(where / "gpt2_merges.txt"))
    assert ids[:20_000] == theirs.encode(text[:120_000]).ids[:20_000]
    assert gpt2.decode(ids) == text


@given(texts)
def test_gpt2_is_tiktoken_on_any_text(gpt2, tiktoken_gpt2, text):
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


@given(st.lists(st.integers(0, 50256), max_size=20))
def test_gpt2_decodes_any_ids_as_tiktoken(gpt2, tiktoken_gpt2, ids):
    assert gpt2.decode(ids) == tiktoken_gpt2.decode(ids)


@given(texts)
def test_specials_count_only_where_asked(gpt2, tiktoken_gpt2, text):
    assert gpt2.encode_with_specials(text) == tiktoken_gpt2.encode(text, allowed_special="all")


@pytest.mark.parametrize(("name", "theirs"), [("gpt2", TIKTOKEN_GPT2), ("cl100k", TIKTOKEN_CL100K)])
def test_trained_ranks_are_tiktoken(shared_data, trained, name, theirs):
    oracle = tiktoken_of(trained[name], theirs)
    ranks = ByteBPETokenizer.from_ranks(oracle._mergeable_ranks, name, trained[name].specials)

    @settings(deadline=None)
    @given(texts)
    def check(text):
        assert ranks.encode(text) == oracle.encode_ordinary(text)

    check()
    for text in TEXTS:
        sample = read(shared_data, text)[:50_000]
        assert ranks.encode(sample) == oracle.encode_ordinary(sample)


def test_tiktoken_file(trained, tmp_path, small_corpus):
    import base64

    tokens = [t for t in trained["cl100k"].vocabulary.tokens if t]
    lines = [base64.b64encode(t).decode() + f" {i}" for i, t in enumerate(tokens)]
    (tmp_path / "x.tiktoken").write_text("\n".join(lines) + "\n")
    found = load_tokenizer(tmp_path / "x.tiktoken")
    assert found.encode(small_corpus) == trained["cl100k"].encode(small_corpus)
    assert (found.bos_id, found.eos_id, found.vocab_size) == (-1, -1, len(tokens))


def plain_bpe_merges(text, n, pattern):
    """Training by definition: count every pair anew before each merge."""
    counts = Counter(regex.findall(pattern, text))
    symbols = {w: list(w.encode()) for w in counts}
    merges = []
    while len(merges) < n:
        pairs = Counter()
        for w, s in symbols.items():
            for pair in pairwise(s):
                pairs[pair] += counts[w]
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        for w, s in symbols.items():
            out, i = [], 0
            while i < len(s):
                both = tuple(s[i : i + 2]) == best
                out.append(256 + len(merges) if both else s[i])
                i += 2 if both else 1
            symbols[w] = out
        merges.append(best)
    return merges


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["ab", "abab", "aaa", " ba", "b", "\n", "é", "caab"]), max_size=40).map("".join),
    st.integers(0, 30),
)
def test_training_is_the_definition(text, n):
    tokenizer = ByteBPETokenizer.train([text], 257 + n)
    assert list(tokenizer.vocabulary.merges) == plain_bpe_merges(text, n, PATTERNS["gpt2"])


def test_training_on_text_is_the_definition_and_as_good_as_hugging_face(shared_data):
    tokenizers = pytest.importorskip("tokenizers")
    text = read(shared_data, "tinystories_10k").replace("<|endoftext|>", "")[:200_000]
    seen = []
    ours = ByteBPETokenizer.train(
        [text[:100_000], text[100_000:]], 1024, progress=lambda done, total: seen.append(done / total)
    )
    assert ours.vocab_size == 1024 and ours.bos_id == ours.eos_id == 1023 and seen == sorted(seen) and seen[-1] == 1
    assert list(ours.vocabulary.merges[:40]) == plain_bpe_merges(text, 40, PATTERNS["gpt2"])
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([text], 1023, show_progress=False)
    assert abs(len(ours.encode(text)) / len(theirs.encode(text).ids) - 1) < 0.003


def test_specials_are_no_training_text():
    tokenizer = ByteBPETokenizer.train(["ab<|endoftext|>" * 50], 300)
    assert tokenizer.decode([257]) == "<|endoftext|>" and tokenizer.vocab_size == 258


@given(text=texts)
def test_byte_level_round_trip(trained, text):
    for tokenizer in trained.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_save_and_load(trained, gpt2, tmp_path, small_corpus):
    hashes = set()
    for i, tokenizer in enumerate([*trained.values(), gpt2]):
        path = tmp_path / f"{i}.json"
        tokenizer.save(path)
        again = load_tokenizer(path)
        assert again.vocabulary == tokenizer.vocabulary and again.hash == tokenizer.hash
        assert again.encode(small_corpus[:5000]) == tokenizer.encode(small_corpus[:5000])
        hashes.add(again.hash)
    assert len(hashes) == 3
    assert "Ġ" in (tmp_path / "2.json").read_text(encoding="utf-8")


def hugging_face(trained, pre, **flags):
    tokenizers = pytest.importorskip("tokenizers")
    letters = byte_letters()
    tokens = ["".join(letters[b] for b in t) for t in trained.vocabulary.tokens if t]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [(tokens[a], tokens[b]) for a, b in trained.vocabulary.merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, **flags))
    tokenizer.pre_tokenizer = pre(tokenizers)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


PRE_TOKENIZERS = {
    "byte level": lambda t: t.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix space": lambda t: t.pre_tokenizers.ByteLevel(add_prefix_space=True),
    "digits": lambda t: t.pre_tokenizers.Sequence(
        [t.pre_tokenizers.Digits(individual_digits=True), t.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "split": lambda t: t.pre_tokenizers.Sequence(
        [
            t.pre_tokenizers.Split(t.Regex(r"\p{L}+|\s+"), "isolated"),
            t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("whole", [False, True])
def test_tokenizer_json_is_hugging_face(trained, tmp_path, pre, whole):
    theirs = hugging_face(trained["gpt2"], PRE_TOKENIZERS[pre], ignore_merges=whole)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.bos_id == ours.eos_id == ours.vocab_size - 1 == theirs.get_vocab_size() - 1

    @settings(deadline=None, max_examples=60)
    @given(texts)
    def check(text):
        assert ours.encode_with_specials(text) == theirs.encode(text).ids

    check()


def test_tokenizer_json_specials_come_from_its_config(trained, tmp_path):
    hugging_face(trained["gpt2"], PRE_TOKENIZERS["byte level"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<x>"})
    )
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.bos_id, found.eos_id) == (-1, found.vocab_size - 1)
    with pytest.raises(InputError, match="no bos"):
        found.encode("a", bos=True)


# ---- what all have in common


@given(texts)
def test_streaming_gives_the_same_text_and_no_half_character(llama, gpt2, text):
    for tokenizer in (llama, gpt2):
        stream = tokenizer.decode_stream()
        parts = [stream.push(i) for i in tokenizer.encode(text, bos=True)]
        end = stream.flush()
        expected = text.replace("\u2581", " ") if tokenizer is llama else "<|endoftext|>" + text
        assert "".join(parts) == expected and end == ""
        assert "\ufffd" in text or not any("\ufffd" in p for p in parts)


@given(st.lists(st.binary(max_size=4), max_size=12), st.booleans())
def test_streaming_any_bytes_is_decoding_them_at_once(chunks, per_byte):
    stream = StreamDecoder(lambda i: chunks[i], per_byte)
    text = "".join(stream.push(i) for i in range(len(chunks))) + stream.flush()
    if per_byte:  # SentencePiece's: a token without bytes ends a run of them
        runs = [b""]
        for chunk in chunks:
            runs = [*runs[:-1], runs[-1] + chunk] if chunk else [*runs, b""]
        assert text == "".join(utf8_prefix(run, True, True)[0] for run in runs)
    else:
        assert text == b"".join(chunks).decode("utf-8", "replace")


@given(text=texts, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_encoding_in_pieces_is_encoding_at_once(llama, tok512, gpt2, trained, text, cuts):
    limit = base.SEGMENT
    base.SEGMENT = 8
    try:
        at = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
        pieces = [text[a:b] for a, b in pairwise(at)]
        for tokenizer in (llama, tok512, gpt2, trained["cl100k"]):
            parts = list(tokenizer.encode_pieces(pieces, bos=True, eos=True))
            assert [i for p in parts for i in p] == tokenizer.encode(text, bos=True, eos=True)
    finally:
        base.SEGMENT = limit


def test_long_text_is_cut(llama, gpt2, shared_data):
    text = read(shared_data, "tinystories_10k")
    for tokenizer in (llama, gpt2):
        parts = list(tokenizer.encode_pieces([text[i : i + 9999] for i in range(0, len(text), 9999)]))
        assert len(parts) > 3 and [i for p in parts for i in p] == tokenizer.encode(text)


def test_bos_and_eos(llama, gpt2):
    assert llama.encode("Hello", bos=True, eos=True) == [1, 15043, 2]
    assert gpt2.encode("Hello", bos=True, eos=True) == [50256, 15496, 50256]
    assert llama.encode("") == gpt2.encode("") == [] and llama.decode([]) == ""


def test_lone_surrogates_become_the_replacement_character(llama, gpt2):
    for tokenizer in (llama, gpt2):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_the_cache_is_bounded(llama, monkeypatch):
    monkeypatch.setattr(base, "CACHE_WORDS", 50)
    for i in range(300):
        llama.encode(f"word{i} " + "x" * 100)
    assert len(llama._cache) <= 50 and all(len(w) <= base.CACHE_CHARS for w in llama._cache)


@given(st.lists(st.integers(0, 5), max_size=2 * SHORT), st.data())
def test_short_and_long_merging_agree(symbols, data):
    pairs = st.tuples(st.integers(0, 9), st.integers(0, 9))
    table = data.draw(st.dictionaries(pairs, st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=25))
    merges = Merges({p: r for p, (r, _) in table.items()}, {p: s for p, (_, s) in table.items()})
    assert merges.short(symbols[:]) == merges.long(symbols[:])


@settings(deadline=None)
@given(st.data())
def test_symbols_that_are_reached_are_what_merging_makes_of_their_atoms(data):
    """Any table over "abc", in the order of a training or not: what is proven is so; of an ordered table, all that is
    so is proven."""
    texts, ids, merges = ["a", "b", "c"], {"a": 0, "b": 1, "c": 2}, {}
    for _ in range(data.draw(st.integers(0, 14))):
        pair = tuple(data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=2, max_size=2)))
        text = texts[pair[0]] + texts[pair[1]]
        if len(text) > 9 or pair in merges:
            continue
        if text not in ids:
            ids[text] = len(texts)
            texts.append(text)
        merges[pair] = ids[text]
    in_order = data.draw(st.booleans())
    pairs = list(merges) if in_order else data.draw(st.permutations(list(merges)))
    table = Merges({p: r for r, p in enumerate(pairs)}, merges)
    alone = [table.apply([ids[c] for c in text]) == [i] for i, text in enumerate(texts)]
    proven = list(table.reached(range(3), len(texts)))
    assert proven[:3] == [1, 1, 1] and all(a for a, p in zip(alone, proven, strict=True) if p)
    made_before_use = all(not any(i in used for used in pairs[:r]) for r, p in enumerate(pairs) for i in [merges[p]])
    if made_before_use:
        assert proven == alone


def test_words_that_are_tokens_are_what_merging_makes(gpt2, shared_data):
    for tokenizer in (gpt2, ByteBPETokenizer.train([read(shared_data, "andersen_da_200k")], 2000)):
        tokens = {t: i for i, t in enumerate(tokenizer.vocabulary.tokens) if t}
        assert tokenizer._merged_alone() == tokens  # every word that training merged
        for token, i in tokens.items():
            assert tokenizer._merges.apply([tokenizer._byte_id(b) for b in token]) == [i]


# ---- bad input


def test_missing_lfs_pointer_and_empty(shared_data, tmp_path):
    pointer = tmp_path / "tokenizer.bin"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 433869\n")
    with pytest.raises(InputError, match="git lfs pull"):
        load_tokenizer(pointer)
    with pytest.raises(InputError, match="No such file"):
        load_tokenizer(tmp_path / "none.bin")
    with pytest.raises(InputError, match=r"no tokenizer in it; looked for tokenizer\.json"):
        load_tokenizer(shared_data / "text")
    (tmp_path / "e").write_bytes(b" \n")
    with pytest.raises(InputError, match="empty"):
        load_tokenizer(tmp_path / "e")


@pytest.mark.parametrize("name", ["tok512.bin", "tokenizer.model"])
def test_truncated_files(shared_data, tmp_path, name):
    data = (shared_data / "llama2c" / name).read_bytes()
    whole = load_tokenizer(shared_data / "llama2c" / name).vocab_size
    path, refused = tmp_path / name, 0
    for n in [*range(1, 60), *random.Random(2).sample(range(60, len(data)), 12)]:
        path.write_bytes(data[:n])
        try:
            assert load_tokenizer(path).vocab_size < whole  # cut between two tokens: the model's size tells
        except InputError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert refused > 60


@settings(deadline=None)
@given(
    st.binary(min_size=1, max_size=200)
    | st.binary(max_size=60).map(lambda b: b"\x07\0\0\0" + b)
    | st.binary(max_size=60).map(lambda b: b"\n" + b)
)
def test_any_bytes_are_a_tokenizer_or_an_input_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(data)
    with pytest.raises(InputError):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "damaged JSON"),
        ("[1]", "no tokenizer"),
        ('{"model": {"type": "WordPiece"}}', "WordPiece"),
        ('{"model": {"type": "BPE", "byte_fallback": true}}', "not a tokenizer.json"),
        ('{"model": {"vocab": {}, "merges": []}, "pre_tokenizer": null}', "no ByteLevel"),
        ('{"model": {"vocab": {"a": 0}}, "pre_tokenizer": {"type": "ByteLevel"}}', "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}', "byte 0x20"),
        ('{"model": {"vocab": {"a": 0, "b": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}', "doubled"),
        ('{"model": {"vocab": {"a": 99999999}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}', "sparse"),
        ('{"format": "anert byte-bpe tokenizer", "version": 2}', "update anert"),
        ('{"format": "anert byte-bpe tokenizer", "version": 1}', "damaged tokenizer file"),
        ('{"hello": 0, "world": 1}', "no t.txt beside"),
    ],
)  # fmt: skip
def test_json_that_is_no_tokenizer(tmp_path, content, says):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(InputError, match=says.replace(".", r"\.")):
        load_tokenizer(path)


def test_merges_and_vocabulary_must_agree(shared_data, tmp_path):
    vocab = json.loads((shared_data / "gpt2" / "gpt2_vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match=r"no merges\.txt beside"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nĠ qqqqqq\n")
    with pytest.raises(InputError, match="merge 1 is"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"no vocab\.json beside"):
        (tmp_path / "vocab.json").unlink()
        load_tokenizer(tmp_path / "merges.txt")


def test_ids_and_sizes_out_of_range(llama, gpt2):
    for tokenizer, bad in ((llama, 32000), (gpt2, 50257), (llama, -1)):
        with pytest.raises(InputError, match=f"token id {bad} is past the vocabulary"):
            tokenizer.decode([5, bad])
    with pytest.raises(InputError, match="needs at least 257"):
        ByteBPETokenizer.train(["abc"], 200)


@given(st.lists(st.text(" abcdeghlnorst'Tü\n", max_size=20), max_size=30))
def test_the_first_words_merge_as_the_table_says(shared_data: Path, texts: list[str]) -> None:
    path = shared_data / "llama2c" / "tok512.bin"
    fresh, used = load_tokenizer(path), load_tokenizer(path)
    used._plain_words = 0
    assert [fresh.encode(t) for t in texts] == [used.encode(t) for t in texts]
