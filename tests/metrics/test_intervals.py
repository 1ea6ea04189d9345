"""Intervals and tests: they cover what they promise, and find differences that are there only."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from sfumato.metrics.intervals import bootstrap, holm, jackknife, mean_interval, paired_test


def test_the_bootstrap_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        mean, low, high = mean_interval(rng.normal(3, 2, 60), seed=i)
        assert low < mean < high
        hits += low <= 3 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_rows_of_all_columns_are_drawn_together() -> None:
    x = np.random.default_rng(0).normal(size=50)
    low, high = bootstrap(lambda a, b: (a - b).mean(-1), x, x)
    assert (low, high) == (0, 0)
    with pytest.raises(ValueError, match="as many rows"):
        bootstrap(lambda a, b: a.mean(-1), x, x[:3])
    assert np.isnan(bootstrap(lambda a: a.mean(-1), x[:0])).all()


def test_the_jackknife_of_a_mean_is_the_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=40)
    low, high = jackknife(x.mean(), (x.sum() - x) / 39)
    assert (high - low) / 2 == pytest.approx(1.959964 * x.std(ddof=1) / 40**0.5, rel=1e-9)
    assert np.isnan(jackknife(1.0, np.array([1.0]))).all()


def test_the_paired_test_is_exact_for_few_pairs() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 4.5, 5.0]), np.array([0.5, 1.0, 2.5, 3.0, 4.0])
    found = paired_test(a, b)
    theirs = scipy.stats.permutation_test((a - b,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True)
    assert found["p"] == pytest.approx(theirs.pvalue)
    assert found["p"] == pytest.approx(2 / 32)
    assert found["difference"] == pytest.approx(0.9)


def test_the_paired_test_finds_what_is_there_only() -> None:
    rng = np.random.default_rng(1)
    false = 0
    for i in range(100):
        base = rng.normal(size=80)
        false += paired_test(base + rng.normal(size=80) * 0.1, base + rng.normal(size=80) * 0.1, seed=i, draws=1000)["real"]
        if i < 10:
            assert paired_test(base + 0.05 + rng.normal(size=80) * 0.1, base, seed=i, draws=1000)["real"]
    assert false <= 12
    with pytest.raises(ValueError, match="same length"):
        paired_test(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="1 of 3 pairs are not"):
        paired_test(np.array([1.0, np.nan, 2.0]), np.zeros(3))


def test_holm_is_what_it_is() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
