"""The paired tests keep their error rates, for accuracy, R2 and every other metric."""

import math

import numpy as np
import pytest
from answers import OWN, compared, decisions, zero_one

from alacarte.errors import UserError
from alacarte.evaluation import comparison as comparisons
from alacarte.evaluation.comparison import compare, paired_test
from alacarte.evaluation.gate import decide
from alacarte.evaluation.metrics import make_answers

# What a test before left to the garbage collector is no warning of this code.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::ResourceWarning")]

# --- the paired tests ---


@pytest.mark.parametrize(("test", "repeats", "most"), [("mcnemar", 200, 0.06), ("bootstrap", 60, 0.09)])
def test_equal_models_are_rarely_promoted_and_clear_differences_are_seen(test, repeats, most):
    # Nominal 0.025, measured 0.010 to 0.028. A few in a thousand seeds exceed `most`.
    for n, differing in ((360, 0.1), (1000, 0.04)):
        assert decisions(test, n, differing / 2, differing / 2, repeats)["PROMOTE"] <= most
    assert decisions(test, 1000, 0.08, 0.03, 60)["PROMOTE"] >= 0.95
    assert decisions(test, 1000, 0.03, 0.08, 60)["REJECT"] >= 0.95


def test_bootstrap_of_numbers_keeps_its_level():
    rng, proved = np.random.default_rng(3), 0
    for seed in range(100):
        a, b = rng.normal(size=(2, 150)) ** 2
        comparison = paired_test(a, b, n_resamples=500, seed=seed)
        assert comparison.test == "bootstrap" and comparison == paired_test(a, b, n_resamples=500, seed=seed)
        proved += comparison.low > 0 or comparison.high < 0
    assert proved <= 14  # 5 expected; beyond this with probability below 0.001


def test_bootstrap_and_mcnemar_agree():
    for won, lost in ((30, 10), (18, 22), (5, 40)):
        exact, drawn = (compared(500, won, lost, test) for test in ("mcnemar", "bootstrap"))
        assert exact.gain == drawn.gain == pytest.approx((won - lost) / 500)
        assert (exact.wins, exact.negative_flips) == (drawn.wins, drawn.negative_flips) == (won, lost)
        assert exact.low <= drawn.low + 0.002 and drawn.high - 0.002 <= exact.high  # exact is the wider one
        assert [exact.low, exact.high] == pytest.approx([drawn.low, drawn.high], abs=0.02)
        assert (exact.low > 0, exact.high < 0) == (drawn.low > 0, drawn.high < 0)
        assert exact.p_value == pytest.approx(drawn.p_value, abs=0.12)


@pytest.mark.parametrize(("won", "lost"), [(5, 0), (6, 0), (9, 2), (10, 2), (0, 6), (30, 14), (30, 15), (30, 16)])
def test_the_interval_of_mcnemar_excludes_zero_exactly_when_p_is_small(won, lost):
    exact = compared(100, won, lost)
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1)) / 2 ** (won + lost)
    assert exact.p_value == pytest.approx(min(1, 2 * tail))
    assert (exact.low > 0 or exact.high < 0) == (exact.p_value < 0.05)
    assert exact.low <= exact.gain <= exact.high


@pytest.mark.parametrize(("won", "lost"), [(0.02, 0.0), (0.08, 0.01), (0.05, 0.05)])
def test_the_interval_of_mcnemar_holds_the_true_difference(won, lost):
    rng, held = np.random.default_rng(5), 0
    for _ in range(100):
        wins, flips, _ = rng.multinomial(360, [won, lost, 1 - won - lost])
        comparison = compared(360, int(wins), int(flips))
        held += comparison.low <= won - lost <= comparison.high
    assert held >= 88  # 95 or more expected


def test_of_many_rows_a_sample_is_drawn_and_the_interval_is_that_of_all():
    gains = np.random.default_rng(0).standard_exponential(60_001)
    wide = paired_test(gains, np.zeros_like(gains), n_resamples=2000)
    assert (wide.high - wide.low) / 2 == pytest.approx(1.96 * wide.spread / np.sqrt(gains.size), rel=0.1)
    assert wide.low < gains.mean() < wide.high


def test_two_models_that_never_differ_prove_nothing():
    for test in ("mcnemar", "bootstrap"):
        same = compared(50, 0, 0, test)
        assert (same.gain, same.low, same.high, same.p_value) == (0, 0, 0, 1)
        verdict = decide({}, task="classification", comparison=same)
        assert verdict.decision == "HOLD" and "equally well on each of 50 rows" in verdict.reason


def test_weights_count_rows_more_than_once():
    champion, challenger = zero_one(60, 6, 3)
    weight = np.where(np.arange(60) < 3, 4.0, 1.0)
    weighted = paired_test(champion, challenger, weight=weight)
    assert weighted.test == "bootstrap" and weighted.gain == pytest.approx((3 * 4 + 3 - 3) / weight.sum())
    assert (weighted.wins, weighted.negative_flips) == (6, 3)


# --- other metrics ---


def models(n: int, better: float, seed: int = 0, weight=None):
    """The answers of a champion and of a challenger to n rows of two classes, the second one with a stronger signal."""
    rng = np.random.default_rng(seed)
    truth, noise = (rng.random(n) < 0.3).astype(int), rng.normal(size=n)
    for signal in (1.0, 1.0 + better):
        proba = 1 / (1 + np.exp(-(signal * (truth - 0.5) + noise)))
        answers = (proba > 0.5).astype(int)
        yield make_answers(truth, answers, np.column_stack([1 - proba, proba]), [0, 1], "classification", weight)


@pytest.mark.parametrize("metric", ["roc_auc", "log_loss", "brier"])
def test_another_metric_decides_by_a_paired_bootstrap(metric, monkeypatch):
    monkeypatch.setattr(comparisons, "DRAWS", 200)
    better, worse = (compare(*models(600, by), metric=metric, metrics=OWN) for by in (0.8, -0.8))
    assert (better.metric, better.test, better.n) == (metric, "bootstrap", 600)
    assert better.low > 0 and worse.high < 0 and better.low < better.gain < better.high
    verdict = decide({}, task="classification", comparison=better)
    assert verdict.decision == "PROMOTE" and verdict.reason.startswith(f"{metric} gain ")
    equal = compare(*models(600, 0.0), metric=metric, metrics=OWN)
    assert decide({}, task="classification", comparison=equal).decision == "HOLD"


def test_a_metric_of_regression_and_a_large_sample(monkeypatch):
    monkeypatch.setattr(comparisons, "DRAWS", 200)
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=(2, 12_000))
    pair = [make_answers(truth, truth + size * noise, None, None, "regression") for size in (1.05, 1.0)]
    result = compare(*pair, metric="mae")
    gains = 0.05 * np.abs(noise)  # of each row
    assert result.gain == pytest.approx(gains.mean())
    assert (result.high - result.low) / 2 == pytest.approx(1.96 * gains.std() / np.sqrt(len(truth)), rel=0.25)


def test_a_metric_that_two_models_do_not_have_is_named():
    pair = [make_answers([0, 1], [0, 1], None, [0, 1], "classification") for _ in range(2)]
    with pytest.raises(UserError, match=r"gate\.metric=roc_auc is not defined"):
        compare(*pair, metric="roc_auc")
