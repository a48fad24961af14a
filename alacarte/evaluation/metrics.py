"""Metrics of a model, metrics of slices, and the comparison of two models on the same rows. Pure functions, no MLflow.

The names of metrics have no prefix; the caller adds `train_`, `val_` or `test_`. A metric that is not defined on the given rows
(R2 of a constant target, ROC AUC of a single class) is left out, and is never NaN.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from alacarte.errors import UserError

PRIMARY = {"classification": "accuracy", "regression": "r2"}  # what the gate compares
LOWER_IS_BETTER = {"log_loss", "ece", "rmse", "mae", "median_ae"}
MOST_ROWS = 5_000  # that a bootstrap of real-valued losses draws from; more are averaged in blocks


# --- metrics ---------------------------------------------------------------------------------------------------------


def score(
    y_true: ArrayLike, y_pred: ArrayLike, proba: np.ndarray | None, classes: ArrayLike | None, task: str
) -> dict[str, float]:
    """Metrics of the predictions `y_pred` (n,) for the labels or numbers `y_true` (n,).

    `proba` (n, n_classes) has its columns in the order of `classes`; None leaves log_loss, roc_auc and ece out. A label
    that `classes` lacks, because training never saw it, counts as a mistake and has probability 0. Names and
    definitions are scikit-learn's: precision, recall and F1 are means over the classes that occur in either vector,
    log_loss clips at the machine epsilon, roc_auc of more than two classes is the one-vs-rest mean over those that
    occur. ece is the expected calibration error of the top label in 15 bins (Guo et al., On calibration of modern
    neural networks, 2017). Raises UserError for predictions that are NaN or infinite.
    """
    if task == "regression":
        return _score_numbers(_finite(y_true, "target"), _finite(y_pred, "predictions"))
    (truth, answer), _ = encode([y_true, y_pred], classes)
    if not truth.size:
        return {}
    size = max(truth.max(), answer.max()) + 1
    support, answers = np.bincount(truth, minlength=size), np.bincount(answer, minlength=size)
    hits = np.bincount(truth[truth == answer], minlength=size)
    occurs = support + answers > 0
    recall = hits / np.maximum(support, 1)
    values = {
        "accuracy": np.mean(truth == answer),
        "balanced_accuracy": recall[support > 0].mean(),
        "f1_macro": (2 * hits[occurs] / (support + answers)[occurs]).mean(),
        "precision_macro": (hits / np.maximum(answers, 1))[occurs].mean(),
        "recall_macro": recall[occurs].mean(),
    }
    if proba is not None:
        values |= _score_probabilities(truth, _finite(proba, "predicted probabilities"))
    return {name: float(value) for name, value in values.items()}


def _score_probabilities(truth: np.ndarray, proba: np.ndarray) -> dict[str, float]:
    n, k = proba.shape
    padded = np.column_stack([proba, np.zeros(n)])  # one more class, of probability 0, for the labels never seen
    own = padded[np.arange(n), np.minimum(truth, k)]
    top = proba.max(axis=1)
    gaps = np.bincount(np.minimum(top * 15, 14).astype(int), weights=top - (proba.argmax(axis=1) == truth))
    epsilon = np.finfo(float).eps
    values = {"log_loss": -np.log(np.clip(own, epsilon, 1 - epsilon)).mean(), "ece": np.abs(gaps).sum() / n}
    # The area under the ROC curve is the Mann-Whitney statistic, here of each class against the rest.
    columns = np.array([1]) if k == 2 else np.arange(k)
    positive = truth[:, None] == columns
    count = positive.sum(axis=0)
    pairs = count * (n - count)
    if pairs.any():
        from scipy.stats import rankdata  # late, here and below: half a second that a reused pipeline does not need

        above = (rankdata(proba[:, columns], axis=0) * positive).sum(axis=0) - count * (count + 1) / 2
        values["roc_auc"] = (above[pairs > 0] / pairs[pairs > 0]).mean()
    return values


def _score_numbers(truth: np.ndarray, answer: np.ndarray) -> dict[str, float]:
    if not truth.size:
        return {}
    error = truth - answer
    mse = np.mean(error**2)
    values = {"rmse": math.sqrt(mse), "mae": np.abs(error).mean(), "median_ae": np.median(np.abs(error))}
    if truth.var() > 0:
        values["r2"] = 1 - mse / truth.var()
    return {name: float(value) for name, value in values.items()}


def score_parts(learner: Any, parts: Mapping[str, tuple[pd.DataFrame, pd.Series]]) -> dict[str, float]:
    """`score` of a learner on each part, its name before each metric: {"train": (X, y)} gives train_accuracy and more."""
    found: dict[str, float] = {}
    for part, (X, y) in parts.items():
        scores = score(y, learner.predict(X), learner.predict_proba(X), learner.classes, learner.task)
        found |= {f"{part}_{name}": value for name, value in scores.items()}
    return found


def baseline(y_train: ArrayLike, y_test: ArrayLike, task: str) -> dict[str, float]:
    """Metrics on `y_test` of always answering the majority class, or the mean, of `y_train`."""
    train = pd.Series(np.asarray(y_train))
    constant = train.mean() if task == "regression" else train.mode()[0]
    return score(y_test, np.full(np.asarray(y_test).size, constant), None, None, task)


def by_slice(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    proba: np.ndarray | None,
    classes: ArrayLike | None,
    task: str,
    groups: pd.DataFrame | pd.Series,
) -> pd.DataFrame:
    """A row for each value of each column of `groups` (n rows): column, value, n, and the metrics of `score`.

    Numbers and dates with more than ten values are cut at their quartiles; of other columns with more than twenty, the
    19 most frequent stand alone. Missing values are a slice of their own. The worst slice comes first: the lowest
    accuracy or the highest rmse.
    """
    truth, answer, table = np.asarray(y_true), np.asarray(y_pred), []
    for column, values in pd.DataFrame(groups).items():
        for name, rows in _slices(values).items():
            part = None if proba is None else proba[rows]
            metrics = score(truth[rows], answer[rows], part, classes, task)
            table.append({"column": column, "value": name, "n": len(rows), **metrics})
    by, ascending = ("rmse", False) if task == "regression" else ("accuracy", True)
    return pd.DataFrame(table).sort_values(by, ascending=ascending, ignore_index=True)


def worse_slices(
    champion: np.ndarray, challenger: np.ndarray, groups: pd.DataFrame, *, confidence_level: float = 0.95
) -> list[dict[str, Any]]:
    """The slices of `by_slice` on which the challenger's `losses` (n,) are proved to be the larger ones, worst first.

    One level for all slices together (Bonferroni), so that looking at many raises no more false alarms than at one.
    """
    slices = [(column, name, rows) for column, values in groups.items() for name, rows in _slices(values).items()]
    found = []
    for column, name, rows in slices:
        compared = paired_test(
            champion[rows], challenger[rows], confidence_level=1 - (1 - confidence_level) / len(slices)
        )
        if compared.high < 0:
            found.append({"column": column, "value": name, "n": compared.n, "gain": compared.gain})
    return sorted(found, key=lambda one: one["gain"])


def _slices(values: pd.Series) -> dict[str, np.ndarray]:
    """Row numbers of each slice of a column, by name."""
    values = values.reset_index(drop=True)
    present = values.dropna()
    is_number = pd.api.types.is_numeric_dtype(values)
    if (is_number or pd.api.types.is_datetime64_any_dtype(values)) and present.nunique() > 10:
        quarter = np.ceil(present.rank(method="max", pct=True) * 4)  # equal values stay in one slice
        ends = present.groupby(quarter).agg(["min", "max"])
        text = {at: [f"{end:.4g}" if is_number else str(end) for end in pair] for at, *pair in ends.itertuples()}
        names = quarter.map({at: f"{low} to {high}" for at, (low, high) in text.items()})
    else:
        names = present.astype(str)
        frequent = names.value_counts().index
        if len(frequent) > 20:
            names = names.where(names.isin(frequent[:19]), "(other)")
    names = names.astype(object).reindex(values.index).fillna("(missing)")
    return names.groupby(names).indices


def encode(vectors: Sequence[ArrayLike], classes: ArrayLike | None = None) -> tuple[list[np.ndarray], list]:
    """Labels of any type as indices into a list of names: `classes` in their order, then whatever else occurs."""
    code: dict = {name: index for index, name in enumerate([] if classes is None else np.asarray(classes).tolist())}
    codes = [[code.setdefault(label, len(code)) for label in np.asarray(vector).tolist()] for vector in vectors]
    return [np.array(vector, dtype=int) for vector in codes], list(code)


def _finite(values: ArrayLike, what: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    bad = numbers.size - np.count_nonzero(np.isfinite(numbers))
    if bad:
        mend = "scale the inputs or lower the learning rate"
        raise UserError(f"{what}: {bad} of {numbers.size} values are NaN or infinite; {mend}")
    return numbers


# --- two models on the same rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A challenger against a champion on the same `n` rows: its `gain` in PRIMARY, with an interval at `confidence_level`."""

    test: str
    confidence_level: float
    n: int
    gain: float
    low: float
    high: float
    p_value: float  # two-sided: how often models of equal quality differ as much
    wins: int  # rows where the challenger does better (classification: is right where the champion is wrong)
    negative_flips: int  # rows where it does worse, which users notice (Yan et al., Positive-congruent training, 2021)
    spread: float  # standard deviation of the differences per row


def losses(y_true: ArrayLike, y_pred: ArrayLike, task: str) -> np.ndarray:
    """Loss of each row (n,): 0 or 1 for a label; the squared error over the variance of `y_true` for a number.

    So the difference of two models' mean losses is their difference in accuracy or in R2.
    """
    if task == "regression":
        truth = _finite(y_true, "target")
        return (truth - _finite(y_pred, "predictions")) ** 2 / (truth.var() or 1.0)
    (truth, answer), _ = encode([y_true, y_pred])
    return (truth != answer).astype(float)


def paired_test(
    champion: ArrayLike,
    challenger: ArrayLike,
    *,
    test: str = "auto",
    confidence_level: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare the `losses` (n,) of two models on the same rows.

    "bootstrap" is the percentile interval over resampled rows (Efron & Tibshirani, An introduction to the bootstrap,
    1993, ch. 13). "mcnemar", for losses of 0 and 1, is the exact test of the rows on which one model is right and the
    other wrong (Dietterich, Approximate statistical tests, 1998). Its interval joins Clopper-Pearson's for the share of
    those rows and for the share of wins among them: it excludes 0 exactly when p < 1 - confidence_level, and is on the wide side.
    "auto" takes mcnemar where it can.
    """
    before, after = np.asarray(champion, dtype=float), np.asarray(challenger, dtype=float)
    assert before.shape == after.shape == (before.size,) and before.size, "losses of the same rows, at least one"
    gains = before - after
    n, wins, flips = gains.size, int((gains > 0).sum()), int((gains < 0).sum())
    zero_one = bool(np.isin([before, after], (0, 1)).all())
    if test == "auto":
        test = "mcnemar" if zero_one else "bootstrap"
    if test == "mcnemar" and not zero_one:
        raise UserError("gate.test=mcnemar compares right and wrong answers; for regression take bootstrap or auto")
    low, high, p_value = 0.0, 0.0, 1.0  # when no row differs, nothing is proved either way
    if wins + flips and test == "mcnemar":
        from scipy.stats import binomtest

        result = binomtest(wins, wins + flips)
        share = result.proportion_ci(confidence_level)  # of wins among the rows that differ, and of these among all
        differ = binomtest(wins + flips, n).proportion_ci(confidence_level)
        low, high = 2 * share.low - 1, 2 * share.high - 1
        low *= differ.high if low < 0 else differ.low
        high *= differ.high if high > 0 else differ.low
        p_value = result.pvalue
    elif wins + flips:
        rng = np.random.default_rng(seed)
        if zero_one:  # resampling rows is drawing how many of each kind come
            drawn = rng.multinomial(n, [flips / n, 1 - (wins + flips) / n, wins / n], size=n_resamples)
            means = (drawn[:, 2] - drawn[:, 0]) / n
        else:
            means = _resampled_means(gains, n_resamples, rng)
        low, high = np.quantile(means, [(1 - confidence_level) / 2, (1 + confidence_level) / 2]).tolist()
        p_value = min(1.0, 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + n_resamples))
    gain, spread = float(gains.mean()), float(gains.std())
    return Comparison(test, confidence_level, n, gain, low, high, float(p_value), wins, flips, spread)


def _resampled_means(gains: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    rows = gains
    if rows.size > MOST_ROWS:  # the mean of a random block stands for its rows: the mean keeps its standard error
        block = -(-rows.size // MOST_ROWS)
        rows = rng.permutation(rows)[: rows.size // block * block].reshape(-1, block).mean(axis=1)
        rows += gains.mean() - rows.mean()  # the few rows of an incomplete block are missing in the spread only
    chunk = max(1, 1_000_000 // rows.size)  # resamples at a time, to bound the memory
    sizes = [min(chunk, n_resamples - start) for start in range(0, n_resamples, chunk)]
    return np.concatenate([rows[rng.integers(0, rows.size, (size, rows.size))].mean(axis=1) for size in sizes])
