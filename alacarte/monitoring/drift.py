"""Have requests, answers or labels changed since training? Pure functions of tables; no MLflow and no store.

A change counts if it is large and not by chance: an effect size above a threshold, and a test below a level that all tests of
a window share (Holm, 1979). One condition alone misleads: in a large window every small change is significant, and in a small
window every change looks large.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

BINS = 10
MAX_VALUES = 50  # of a column that is compared value by value; rarer values share a bin
COLUMNS = ["column", "kind", "psi", "statistic", "p_value", "missing", "missing_before", "out_of_range"]


@dataclass(frozen=True)
class Decision:
    retrain: bool
    reason: str  # one sentence with the numbers


def compare_columns(reference: pd.DataFrame, window: Mapping[str, pd.Series] | pd.DataFrame) -> pd.DataFrame:
    """A row for each column of `reference` (m rows) against this column of `window` (n values), the largest PSI first.

    `psi` is the population stability index over ten bins of equal content (or one for each value of a column with few, or
    of text) and one for missing values, less the (bins - 1) (1/n + 1/m) that chance alone gives (Yurdakul and Naranjo,
    Statistical properties of the population stability index, 2020); below 0 it is 0. `statistic` and `p_value` are of the
    two-sample Kolmogorov-Smirnov test for numbers and dates, of the chi-squared test for the rest, where missing values
    are a value. `missing` is the share of missing values, `out_of_range` the share of numbers outside the range of the
    reference, and of values that the reference does not contain. A column without a row in the window was never stored
    and is not compared: `kind` is "not stored".
    """
    rows = [{"column": name, **compare_column(reference[name], window[name])} for name in reference]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("psi", ascending=False, ignore_index=True)


def compare_column(before: pd.Series, after: pd.Series) -> dict[str, Any]:
    """See compare_columns."""
    if after.empty:
        missing = {"missing": 0.0, "missing_before": float(before.isna().mean())}
        return {"kind": "not stored", "psi": 0.0, "statistic": 0.0, "p_value": 1.0, "out_of_range": 0.0, **missing}
    missing = {"missing": float(after.isna().mean()), "missing_before": float(before.isna().mean())}
    is_number = _is_number(before)
    if is_number:
        before, after = _as_float(before), _as_float(after)
    known, values = before.dropna(), after.dropna()
    by_value = not is_number or known.nunique() <= BINS
    if is_number:
        outside = (values < known.min()) | (values > known.max()) if len(known) else values.notna()
    else:
        categories = before.dtype.categories if isinstance(before.dtype, pd.CategoricalDtype) else None
        are_numbers = categories is not None and pd.api.types.is_numeric_dtype(categories)  # 1.0 in a window, 1 before
        known, values = (column.astype("float64" if are_numbers else str) for column in (known, values))
        outside = ~values.isin(known.unique())
    if by_value:
        bins = known.value_counts().index[:MAX_VALUES].to_numpy()
    else:
        bins = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1]))
    n_missing = np.array([len(before) - len(known), len(after) - len(values)])
    counts = [
        np.append(_count(column, bins, by_value), n) for column, n in zip((known, values), n_missing, strict=True)
    ]
    statistic, p_value = chi_squared(*counts)
    if not by_value and len(values):
        from scipy.stats import ks_2samp  # late, as elsewhere: half a second

        test = ks_2samp(known, values, method="asymp")
        _, p_missing = chi_squared(np.array([len(known), n_missing[0]]), np.array([len(values), n_missing[1]]))
        statistic, p_value = float(test.statistic), min(1.0, 2 * min(float(test.pvalue), p_missing))
    return {
        "kind": "values" if by_value else "numbers",
        "psi": psi(*counts),
        "statistic": statistic,
        "p_value": p_value,
        "out_of_range": float(outside.sum()) / len(after),
        **missing,
    }


def psi(before: np.ndarray, after: np.ndarray) -> float:
    """Population stability index of two (bins,) counts, less what chance gives; see compare_columns."""
    used = before + after > 0
    before, after = before[used], after[used]
    m, n = before.sum(), after.sum()
    if not m or not n:
        return 0.0
    # Half a row in each bin, so that an empty one is no infinite change.
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * counts.size) for counts in (before, after))
    return max(0.0, float(((q - p) * np.log(q / p)).sum() - (used.sum() - 1) * (1 / n + 1 / m)))


def chi_squared(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Statistic and p-value of homogeneity for two (bins,) counts; bins too rare for the test are joined."""
    from scipy.stats import chi2_contingency

    n, m = after.sum(), before.sum()
    rare = (before + after) * min(n, m) < 5 * (n + m)  # an expected count below five
    table = np.array([np.append(counts[~rare], counts[rare].sum()) for counts in (before, after)])
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2 or not n or not m:
        return 0.0, 1.0
    result = chi2_contingency(table, correction=False)
    return float(result.statistic), float(result.pvalue)


def holm(p_values: Sequence[float], level: float) -> np.ndarray:
    """(k,) bool: which of k tests are significant at one `level` for all of them together."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values)
    is_below = values[order] <= level / np.arange(values.size, 0, -1)
    is_significant = np.zeros(values.size, bool)
    is_significant[order] = np.logical_and.accumulate(is_below)
    return is_significant


def mark(columns: pd.DataFrame, level: float, psi_threshold: float) -> pd.DataFrame:
    """Add `drifted`: the column moved by at least `psi_threshold`, and not by chance."""
    return columns.assign(drifted=holm(columns["p_value"].tolist(), level) & (columns["psi"] >= psi_threshold))


def measure(about: pd.DataFrame, task: str) -> dict[str, float]:
    """Metrics of a window's predictions, from its `about` (n rows, at least one) as the feedback store gives it."""
    from scipy.stats import binomtest  # late, as elsewhere: half a second

    is_labelled = about["label"].notna()
    wrong = about.loc[is_labelled, "is_correction"].astype(bool)
    metrics = {
        "labels": float(is_labelled.sum()),
        "reported_mistake_rate": float(wrong.sum() / len(about)),
        "latency_p50_ms": float(about["latency_ms"].median()),
        "latency_p95_ms": float(about["latency_ms"].quantile(0.95)),
    }
    if about["confidence"].notna().any():
        metrics["confidence_mean"] = float(about["confidence"].mean())
    audit = about[is_labelled & about["audit"]]
    metrics["audit_labels"] = float(len(audit))
    if len(audit) and task == "classification":
        right = int((~audit["is_correction"].astype(bool)).sum())
        low, high = map(float, binomtest(right, len(audit)).proportion_ci())
        metrics |= {"audit_accuracy": right / len(audit), "audit_accuracy_low": low, "audit_accuracy_high": high}
    elif len(audit):
        squares = (audit["label"].astype(float) - audit["prediction"].astype(float)).to_numpy() ** 2
        draws = np.random.default_rng(0).choice(squares, (2000, len(squares))).mean(axis=1)
        low, high = np.sqrt(np.quantile(draws, [0.025, 0.975]))
        rmse = float(np.sqrt(squares.mean()))
        metrics |= {"audit_rmse": rmse, "audit_rmse_low": float(low), "audit_rmse_high": float(high)}
    return metrics


def decide(
    marked: pd.DataFrame, metrics: Mapping[str, float], expected: Mapping[str, float], *, margin: float, labels: int
) -> Decision:
    """Retrain or not, and why. `expected` holds accuracy or rmse of the champion on its test part, and is empty without a row.

    Yes for drift of columns, predictions or confidence; for audit labels that prove an accuracy more than `margin`
    below what is expected (or an rmse that much, in shares of it, above); for `labels` new labels.
    """
    reasons = []
    if "audit_accuracy" in metrics and metrics["audit_accuracy_high"] < expected.get("accuracy", 0) - margin:
        reasons.append(
            f"accuracy {metrics['audit_accuracy']:.3f} on {metrics['audit_labels']:.0f} audit labels is proved below "
            f"the {expected['accuracy']:.3f} of the test part"
        )
    if "audit_rmse" in metrics and metrics["audit_rmse_low"] > expected.get("rmse", math.inf) * (1 + margin):
        reasons.append(f"rmse {metrics['audit_rmse']:.4g} on audit labels is proved above {expected['rmse']:.4g}")
    moved = marked[marked["drifted"]]
    if len(moved):
        names = ", ".join(map(_describe, moved.head(3).itertuples()))
        reasons.append(f"{len(moved)} of {len(marked)} distributions moved: {names}{' ...' if len(moved) > 3 else ''}")
    if metrics["new_labels"] >= labels:
        reasons.append(f"{metrics['new_labels']:.0f} new labels")
    if reasons:
        return Decision(True, "; ".join(reasons))
    return Decision(False, f"nothing moved in {metrics['rows']:.0f} rows, {metrics['new_labels']:.0f} new labels")


def _describe(column: Any) -> str:
    missing = f", {column.missing:.0%} missing" if column.missing > column.missing_before + 0.01 else ""
    return f"{column.column} (PSI {column.psi:.2f}{missing})"


def _is_number(column: pd.Series) -> bool:
    if pd.api.types.is_bool_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype):
        return False
    return pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_datetime64_any_dtype(column.dtype)


def _as_float(column: pd.Series) -> pd.Series:
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        seconds = column.dt.as_unit("us").astype("int64") / 1e6  # a file and a request give dates in different units
        return seconds.where(column.notna())
    return pd.to_numeric(column, errors="coerce").astype("float64")


def _count(column: pd.Series, bins: np.ndarray, by_value: bool) -> np.ndarray:
    """Rows in each bin: one bin for each value of `bins` and one for all others, or the bins between the edges `bins`."""
    if by_value:
        codes = pd.Index(bins).get_indexer(pd.Index(column))
        return np.bincount(np.where(codes < 0, len(bins), codes), minlength=len(bins) + 1)
    return np.bincount(np.searchsorted(bins, column.to_numpy(), side="left"), minlength=len(bins) + 1)
