"""How far the answers on n rows prove something: two models on the same rows, and one model against chance."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from alacarte.errors import UserError
from alacarte.evaluation.metrics import (
    PRIMARY,
    Answers,
    Metrics,
    is_lower_better,
    losses,
    make_answers,
    measure_one,
    roc_auc,
    slices,
)  # fmt: skip

MOST_ROWS = 5_000  # that a bootstrap draws from; with more rows the interval of a random sample is made narrower
DRAWS = 1_000  # of a metric of all rows; a mean of rows is fast, and takes MEAN_DRAWS
MEAN_DRAWS = 10_000


@dataclass(frozen=True)
class Comparison:
    """A challenger against a champion on the same `n` rows: its `gain`, with an interval at `confidence_level`."""

    test: str
    confidence_level: float
    n: int
    gain: float  # in `metric`; positive if the challenger is better
    low: float
    high: float
    p_value: float  # two-sided: how often models of equal quality differ as much
    wins: int  # rows where the challenger does better (classification: is right where the champion is wrong)
    negative_flips: int  # rows where it does worse, which users notice (Yan et al., Positive-congruent training, 2021)
    spread: float  # standard deviation of the differences per row
    metric: str = ""  # empty: accuracy or R2


@dataclass(frozen=True)
class Signal:
    """How much better than chance one model is on n rows, without regard to another model."""

    metric: str
    value: float
    low: float
    high: float
    confidence_level: float
    n: int
    chance: float  # value of a model that knows nothing


def paired_test(
    champion: ArrayLike,
    challenger: ArrayLike,
    *,
    weight: np.ndarray | None = None,
    confidence_level: float = 0.95,
    n_resamples: int = MEAN_DRAWS,
    seed: int = 0,
) -> Comparison:
    """Compare the `losses` (n,) of two models on the same rows.

    For losses of 0 and 1 without weights it is McNemar's exact test of the rows on which one model is right and the other
    wrong (Dietterich, Approximate statistical tests, 1998). Its interval joins Clopper-Pearson's for the share of those
    rows and for the share of wins among them: it excludes 0 exactly when p < 1 - confidence_level, and is on the wide side.
    Otherwise it is the percentile interval over resampled rows (Efron & Tibshirani, An introduction to the bootstrap,
    1993, ch. 13).
    """
    before, after = np.asarray(champion, dtype=float), np.asarray(challenger, dtype=float)
    assert before.shape == after.shape == (before.size,) and before.size, "losses of the same rows, at least one"
    gains = before - after
    n, wins, flips = gains.size, int((gains > 0).sum()), int((gains < 0).sum())
    test = "mcnemar" if weight is None and np.isin([before, after], (0, 1)).all() else "bootstrap"
    if weight is not None:
        gains = gains * weight / weight.mean()
    low, high, p_value = 0.0, 0.0, 1.0  # when no row differs, nothing is proved
    if wins + flips and test == "mcnemar":
        from scipy.stats import binomtest  # late: takes half a second, which a reused pipeline does not need

        result = binomtest(wins, wins + flips)
        share = result.proportion_ci(confidence_level)  # of wins among the rows that differ, and of these among all
        differ = binomtest(wins + flips, n).proportion_ci(confidence_level)
        low, high = 2 * share.low - 1, 2 * share.high - 1
        low *= differ.high if low < 0 else differ.low
        high *= differ.high if high > 0 else differ.low
        p_value = float(result.pvalue)
    elif wins + flips:
        draws = bootstrap(lambda rows, axis=-1: gains[rows].mean(axis=axis), n, n_resamples, seed, vectorized=True)
        low, high, p_value = interval(draws, confidence_level)
    gain, spread = float(gains.mean()), float(gains.std())
    return Comparison(test, confidence_level, n, gain, low, high, p_value, wins, flips, spread)


def compare(
    before: Answers,
    after: Answers,
    *,
    metric: str | None = None,
    metrics: Metrics | None = None,
    confidence_level: float = 0.95,
) -> Comparison:
    """Compare the answers of the champion and of the challenger on the same rows, by accuracy or R2, or by another metric.

    Another metric is compared with a paired bootstrap: both models are measured on the same resampled rows.
    """
    counts = paired_test(losses(before), losses(after), weight=before.weight, confidence_level=confidence_level)
    if metric is None or metric == PRIMARY[before.task]:
        return counts
    sign = -1 if is_lower_better(metric, metrics) else 1

    def gain_on(rows: np.ndarray) -> float:
        values = (measure_one(answers.at(rows), metric, metrics) for answers in (after, before))
        return sign * (next(values) - next(values))

    n = len(before.truth)
    gain = gain_on(np.arange(n))
    if math.isnan(gain):
        raise UserError(f"gate.metric={metric} is not defined for both models on these {n} rows: choose another metric")
    draws = bootstrap(gain_on, n, DRAWS, seed=0)
    low, high, p_value = interval(draws, confidence_level)
    spread = float(np.nanstd(draws) * math.sqrt(n))
    return Comparison(
        "bootstrap", confidence_level, n, gain, low, high, p_value, counts.wins, counts.negative_flips, spread, metric
    )


def measure_signal(
    answers: Answers, y_train: pd.Series, confidence_level: float = 0.95, seed: int = 0
) -> Signal | None:
    """How far a model is proved to know something, or None if the rows cannot tell (all labels are equal).

    Classification: ROC AUC (one-vs-rest mean) of the probabilities, or of the predictions where the model has no
    probabilities; chance is 0.5, also for imbalanced classes. Regression: the gain in R2 over the mean of
    the train part as a constant answer; chance is 0.
    """
    n = len(answers.truth)
    if answers.task == "regression":
        constant = make_answers(answers.truth, np.full(n, y_train.mean()), None, None, answers.task, answers.weight)
        c = paired_test(
            losses(constant), losses(answers), weight=answers.weight, confidence_level=confidence_level, seed=seed
        )
        known = answers.truth.var() > 0
        return Signal("r2", c.gain, c.low, c.high, confidence_level, n, 0.0) if known else None
    scores = np.eye(len(answers.names))[answers.predicted] if answers.proba is None else answers.proba
    weight = np.ones(n) if answers.weight is None else answers.weight
    value = roc_auc(answers.truth, scores, weight)
    if math.isnan(value):
        return None
    draws = bootstrap(lambda rows: roc_auc(answers.truth[rows], scores[rows], weight[rows]), n, DRAWS, seed)
    low, high, _ = interval(draws, confidence_level)
    return Signal("roc_auc", value, low, high, confidence_level, n, 0.5)


def bootstrap(
    statistic: Callable[..., Any], n: int, n_resamples: int, seed: int, *, vectorized: bool = False
) -> np.ndarray:
    """(n_resamples,) values of a statistic of row numbers, over resampled rows; NaN where it is not defined.

    With more than MOST_ROWS rows, a random sample of them is resampled, and the deviations shrink with the root of the size.
    """
    import sklearn
    from scipy import stats  # late, as above

    rng = np.random.default_rng(seed)
    rows = np.arange(n) if n <= MOST_ROWS else rng.choice(n, MOST_ROWS, replace=False)
    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True), np.errstate(invalid="ignore"):
        result = stats.bootstrap(
            (rows,), statistic, n_resamples=n_resamples, batch=max(1, 1_000_000 // len(rows)) if vectorized else None,
            vectorized=vectorized, method="percentile", rng=rng,
        )  # fmt: skip
        if len(rows) == n:
            return result.bootstrap_distribution
        deviations = result.bootstrap_distribution - statistic(rows)
        return statistic(np.arange(n)) + deviations * math.sqrt(len(rows) / n)


def interval(draws: np.ndarray, confidence_level: float) -> tuple[float, float, float]:
    """Percentile interval of a bootstrap, and the two-sided p-value of 0. Draws that are not defined do not count."""
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return -math.inf, math.inf, 1.0
    low, high = np.quantile(draws, [(1 - confidence_level) / 2, (1 + confidence_level) / 2]).tolist()
    return low, high, min(1.0, 2 * (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (1 + draws.size))


def worse_slices(
    before: Answers, after: Answers, groups: pd.DataFrame, confidence_level: float = 0.95
) -> list[dict[str, Any]]:
    """The slices on which the challenger's losses are proved to be the larger ones, worst first.

    One level for all slices together (Bonferroni), so that looking at many raises no more false alarms than at one.
    """
    losses_before, losses_after, worse = losses(before), losses(after), []
    all_slices = slices(groups, before.weight)
    for column, value, rows in all_slices:
        level = 1 - (1 - confidence_level) / len(all_slices)
        weight = None if before.weight is None else before.weight[rows]
        c = paired_test(losses_before[rows], losses_after[rows], weight=weight, confidence_level=level)
        if c.high < 0:
            worse.append({"column": column, "value": value, "n": c.n, "gain": c.gain})
    return sorted(worse, key=lambda slice_: slice_["gain"])
