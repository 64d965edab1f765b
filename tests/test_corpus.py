"""The corpus that the stories plugin writes: stories of a child's length, whole, varied and the same for a seed."""

import importlib.util
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[1] / "plugins" / "stories.py"


@pytest.fixture(scope="module")
def stories():
    spec = importlib.util.spec_from_file_location("stories_under_test", PLUGIN)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def corpus(stories, tmp_path_factory):
    path, start = tmp_path_factory.mktemp("corpus") / "c.txt", time.process_time()
    stories.write_corpus(path, 1.0, 7)
    assert time.process_time() - start < 2
    return path.read_text(encoding="utf-8").removesuffix("\n<|endoftext|>\n").split("\n<|endoftext|>\n")


def test_size_and_lengths(corpus):
    assert 1_000_000 <= sum(len(s) + 15 for s in corpus) < 1_001_500
    lengths = sorted(len(s.split()) for s in corpus)
    assert lengths[0] >= 80 and lengths[-1] <= 200 and lengths[len(lengths) // 20] > 100


def test_nothing_of_the_grammar_is_left(corpus):
    for story in corpus:
        assert not re.search(r"[{}|\[\]/_]|  | [.,!?]|\ba [aeiou]|\ban [^aeiou]|\b(\w+) \1\b", story), story
        assert (
            re.match(r"[A-Z]", story) and story[-1] in '.!?"' and story.count("\n\n") == 1 and story.count('"') % 2 == 0
        )


def test_words_and_variety(corpus):
    words = Counter(re.findall(r"[a-z']+", " ".join(corpus).lower()))
    assert 400 <= len(words) <= 1500 and min(words.values()) >= 3
    assert len(set(corpus)) == len(corpus)
    assert sum(s.startswith("Once upon a time") for s in corpus) > len(corpus) / 4


def test_every_plot_is_told_with_its_own_characters(stories):
    rng = random.Random(1)
    for _ in range(300):
        cast = stories.cast_of(rng)
        assert (
            cast["A"] != cast["B"]
            and cast["akind"] != cast["bkind"]
            and len({cast["spot"], cast["spot2"], cast["spot3"]}) == 3
        )
        assert cast["A"] in stories.NAMES[cast["he"]].split() and cast["B"] in stories.NAMES[cast["bhe"]].split()
    slots = set(
        re.findall(r"\{(\w+)\}", stories.OPENING + stories.WALK + stories.ENDING + "".join(stories.PLOTS.values()))
    )
    assert slots <= cast.keys() | stories.VARIED.keys()
    used = slots | {"hobby"}
    assert stories.FIXED.keys() | stories.VARIED.keys() <= used


def test_a_seed_is_a_corpus(stories, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        stories.write_corpus(tmp_path / name, 0.05, seed)
    a, b, c = ((tmp_path / n).read_bytes() for n in "abc")
    assert a == b != c


def test_progress_and_nothing_to_write(stories, tmp_path):
    seen = []
    stories.write_corpus(tmp_path / "t", 0.02, 1, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and 0.02 <= seen[-1][0] < 0.0215 and seen[-1][1] == 0.02
    stories.write_corpus(tmp_path / "none", 0, 1)
    assert (tmp_path / "none").read_text() == ""
    with pytest.raises(OSError, match="No such file"):
        stories.write_corpus(tmp_path / "no" / "where", 0.1, 1)
