"""A tokenizer of 300 tokens, a text, and runs of `tokenize` on it: a pytest plugin of the tests that want them."""

import pytest

from anert.data.corpus import tokenize
from anert.tokenizer import ByteBPETokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return ByteBPETokenizer.train(["once upon a time there was a small fox and a small bear. " * 20], 300)


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.json"
    tokenizer.save(path)
    return str(path)


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "text" / "tinystories_10k.txt"


def run(*args, **kwargs):
    """(report, events)"""
    events, job = [], tokenize(*args, **kwargs)
    while True:
        try:
            events.append(next(job))
        except StopIteration as end:
            return end.value, events
