"""Choosing tokens: against plain definitions, and the distribution of many draws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anert.errors import InputError, NonFiniteError
from anert.sampler import Sampler, choose, distribution

logit_lists = st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=1, max_size=30)
filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.5, 1.0, 1.7]),
        "top_k": st.integers(0, 35),
        "top_p": st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    }
)


def plain(logits, temperature, top_k, top_p, min_p):
    """{id: probability} by definition, one filter after the other."""
    top = max(logits)
    weight = {i: math.exp((x - top) / temperature) for i, x in enumerate(logits)}
    order = sorted(weight, key=lambda i: (-weight[i], i))
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        total, reached = sum(weight[i] for i in order), 0.0
        for n, i in enumerate(order, 1):
            reached += weight[i]
            if reached / total >= top_p - 1e-12:
                order = order[:n]
                break
    order = [i for i in order if weight[i] >= min_p * weight[order[0]]]
    total = sum(weight[i] for i in order)
    return {i: weight[i] / total for i in order}


@given(logit_lists, filters)
def test_filters_are_their_definition(logits, settings):
    ids, p = distribution(np.array(logits, np.float32), **settings)
    expected = plain(logits, **settings)
    if settings["top_p"] < 1 and set(ids.tolist()) != expected.keys():
        # Rounding decides where a sum of equal weights reaches top_p: one token more or less.
        assert abs(len(ids) - len(expected)) == 1
        return
    assert dict(zip(ids.tolist(), p.tolist(), strict=True)) == pytest.approx(expected, rel=1e-12)


def test_the_smallest_set_that_reaches_p():
    logits = np.log(np.array([0.2, 0.4, 0.1, 0.3], np.float32))
    for top_p, expected in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 0]), (0.95, [1, 3, 0, 2])):
        assert distribution(logits, 1.0, top_p=top_p)[0].tolist() == expected
    assert sorted(distribution(logits, 1.0, top_k=2)[0].tolist()) == [1, 3]


def test_of_equals_the_lower_ids_come_first():
    flat = np.zeros(100, np.float32)
    assert distribution(flat, 1.0, top_k=3)[0].tolist() == [0, 1, 2]
    assert distribution(flat, 1.0, top_p=0.0301)[0].tolist() == [0, 1, 2, 3]
    assert choose(flat, np.random.default_rng(0), temperature=0) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_many_draws_follow_the_distribution(settings):
    logits, n = np.random.default_rng(5).standard_normal(20).astype(np.float32) * 1.5, 8000
    expected = plain(
        logits.astype(float).tolist(), **({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings)
    )
    sampler = Sampler(**settings, seed=11)
    rng = sampler.generator()
    counts = np.bincount([sampler.choose(logits, rng) for _ in range(n)], minlength=20)
    assert set(np.flatnonzero(counts).tolist()) <= expected.keys()
    chi2 = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in expected.items())
    assert chi2 < len(expected) + 5 * math.sqrt(2 * len(expected))


def test_a_big_vocabulary_agrees_with_the_definition():
    logits = np.random.default_rng(2).standard_normal(32000).astype(np.float32) * 3
    for settings in ({"top_p": 0.9, "top_k": 0}, {"top_p": 0.9, "top_k": 50}, {"top_p": 1.0, "top_k": 50}):
        ids, p = distribution(logits, 0.8, **settings)
        expected = plain(logits.astype(float).tolist(), 0.8, min_p=0.0, **settings)
        assert dict(zip(ids.tolist(), p.tolist(), strict=True)) == pytest.approx(expected, rel=1e-9)


def test_seeds_repeat_and_differ():
    logits = np.zeros(1000, np.float32)

    def draws(seed):
        sampler = Sampler(seed=seed)
        rng = sampler.generator()
        return [sampler.choose(logits, rng) for _ in range(20)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(-1) == draws((1 << 64) - 1)
    assert draws(0)[:3] == [11, 241, 111]  # Philox: the same on every machine


def test_temperature_zero_and_next_to_zero():
    logits = np.array([1, 5, 5, -math.inf], np.float32)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state["state"]
    assert choose(logits, rng, temperature=0) == 1
    assert rng.bit_generator.state["state"] == before
    assert {choose(logits, rng, temperature=1e-300) for _ in range(20)} == {1, 2}
    assert {choose(logits, rng, temperature=1e30) for _ in range(60)} == {0, 1, 2}


def test_repetition_penalty():
    logits = np.array([2.0, 1.9, -1.0, 0.0], np.float32)
    kept = logits.copy()
    rng = np.random.default_rng(0)
    assert choose(logits, rng, temperature=0, repetition_penalty=1.5, recent=[0, 0, 2]) == 1
    assert choose(logits, rng, temperature=0, repetition_penalty=0.5, recent=[1]) == 1
    assert (logits == kept).all()
    near = Sampler(temperature=0, repetition_penalty=1.5, repetition_window=2)
    assert near.choose(logits, rng, [0, 3, 3]) == 0 and near.choose(logits, rng, [3, 0, 3]) == 1
    assert Sampler(temperature=0, repetition_penalty=9, repetition_window=0).choose(logits, rng, [0]) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers(bad):
    logits = np.array([0, bad, 1], np.float32)
    for temperature in (0, 1):
        with pytest.raises(NonFiniteError, match="token 1 has"):
            choose(logits, np.random.default_rng(0), temperature=temperature)
    with pytest.raises(NonFiniteError, match="none is allowed"):
        choose(np.full(3, -math.inf, np.float32), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -1), ("temperature", math.inf), ("temperature", math.nan), ("top_k", -1), ("top_p", 0),
     ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0), ("repetition_window", -1)],
)  # fmt: skip
def test_settings_that_make_no_sense(setting, value):
    with pytest.raises(InputError, match=f"{setting} {value}: expected"):
        Sampler(**{setting: value})
