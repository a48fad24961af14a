"""Pictures of an evaluation, each a matplotlib Figure of its own (no pyplot: nothing global, nothing to close)."""

from __future__ import annotations  # matplotlib is imported by the functions that draw, its types are only named

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from alacarte.evaluation.metrics import encode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD, BAD, PALE = "#0072B2", "#D55E00", "#BBBBBB"  # told apart by colour-blind readers too (Okabe & Ito, 2008)
MOST_ROWS = 20_000  # behind curves and clouds of points; a random sample of that many looks the same
MOST_CLASSES = 25  # that a picture names


def plots(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    proba: np.ndarray | None,
    classes: ArrayLike | None,
    task: str,
    champion_pred: ArrayLike | None = None,
) -> dict[str, Figure]:
    """Figures by file name, from the arguments of `evaluation.score`; `champion_pred` (n,) adds the comparison."""
    if task == "regression":
        truth, answer = np.asarray(y_true, dtype=float), np.asarray(y_pred, dtype=float)
        figures = {"residuals.png": residuals(truth, answer)}
        if champion_pred is not None:
            nearer = np.abs(truth - np.asarray(champion_pred, dtype=float)) - np.abs(truth - answer)
            figures["champion_vs_challenger.png"] = nearness(nearer)
        return figures
    vectors, names = encode([y_true, y_pred, [] if champion_pred is None else champion_pred], classes)
    truth, answer, champion = vectors
    labels = [_short(str(name)) for name in names]
    figures = {"confusion_matrix.png": confusion_matrix(truth, answer, labels)}
    if proba is not None:
        rows = _sample(truth.size)
        figures["roc_pr.png"] = roc_pr(truth[rows], proba[rows], labels)
        figures["calibration.png"] = calibration(truth, proba, labels)
    if champion_pred is not None:
        figures["champion_vs_challenger.png"] = flips(truth, champion, answer, labels)
    return figures


def confusion_matrix(truth: np.ndarray, answer: np.ndarray, labels: Sequence[str]) -> Figure:
    """Counts by true class (row) and answer (column), from class indices (n,); colour is the share of the row."""
    k = len(labels)
    counts = np.bincount(truth * k + answer, minlength=k * k).reshape(k, k)
    share = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))  # the root lets rare mistakes show
    right = np.eye(k, dtype=bool)
    side, size = (4.6, 10) if k <= 12 else (6.6, 8)
    step = -(-k // MOST_CLASSES)
    turned = max(map(len, labels)) * len(labels[::step]) > 40
    title = "Confusion matrix: good is a blue diagonal and no orange"
    height = side + (2.1 if turned else 1.3)
    figure, (axes,) = _figure(side + 1.6, height, title, left=1.4, bottom=height - side - 0.5)
    axes.imshow(np.where(right, share, -share), cmap=_orange_to_blue(), vmin=-1, vmax=1)
    for row, column in np.argwhere(counts) if k <= MOST_CLASSES else ():
        color = "white" if share[row, column] > 0.6 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", size=size, color=color)
    axes.set_xticks(range(0, k, step), labels[::step], rotation=90 if turned else 0, size=min(size, 9))
    axes.set_yticks(range(0, k, step), labels[::step], size=min(size, 9))
    axes.set(xlabel="answer", ylabel="truth")
    wrong = np.where(right, 0, counts).ravel()
    worst = [divmod(cell, k) for cell in np.argsort(-wrong, kind="stable")[:2] if wrong[cell]]
    mistakes = ", ".join(f"{labels[row]} as {labels[column]} ({counts[row, column]})" for row, column in worst)
    figure.text(0.5, 0.1 / height, f"most frequent: {mistakes or 'no mistake'}", ha="center", size=8)
    return figure


def roc_pr(truth: np.ndarray, proba: np.ndarray, labels: Sequence[str]) -> Figure:
    """ROC and precision-recall curves from class indices (n,) and probabilities (n, k).

    Of two classes: those of the second. Of more: each class against the rest (pale), all these decisions pooled
    (micro), and the mean over the classes (macro).
    """
    from matplotlib.collections import LineCollection

    k = proba.shape[1]
    title = "Ranking: good is a curve near the upper left (ROC) and the upper right (precision-recall) corner"
    figure, (roc, pr) = _figure(9.6, 4.5, title, columns=2)
    grid = np.linspace(0, 1, 201)
    hot = truth[:, None] == np.arange(k)
    shown = [c for c in ([1] if k == 2 else range(k)) if 0 < hot[:, c].sum() < truth.size]
    curves = [_curves(hot[:, c], proba[:, c]) for c in shown]
    drawn = [(f"{labels[1]} against {labels[0]}", GOOD, "-", *curve) for curve in curves]
    if k > 2 and curves:
        means = [np.mean([np.interp(grid, c[i], c[i + 1]) for c in curves], axis=0) for i in (0, 2)]
        drawn = [("micro: decisions pooled", GOOD, "-", *_curves(hot.ravel(), proba.ravel()))]
        drawn += [("macro: mean of classes", BAD, "--", grid, means[0], grid, means[1])]
        roc.add_collection(LineCollection([np.column_stack(c[:2]) for c in curves], colors=PALE, linewidths=0.8))
        pr.add_collection(LineCollection([np.column_stack(c[2:]) for c in curves], colors=PALE, linewidths=0.8))
    for name, color, style, fpr, tpr, recall, precision in drawn:
        for axes, x, y in ((roc, fpr, tpr), (pr, recall, precision)):
            axes.plot(x, y, style, color=color, lw=2, label=f"{name}, area {np.trapezoid(y, x):.3f}")
    roc.plot([0, 1], [0, 1], ":", color="k", lw=1)
    roc.set(xlabel="false positive rate", ylabel="true positive rate (recall)")
    pr.set(xlabel="recall", ylabel="precision")
    for axes in (roc, pr):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        if drawn:
            axes.legend(loc="lower center", frameon=False, fontsize=9)
    return figure


def _curves(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """False and true positive rate, then recall and precision, at each distinct threshold from high to low."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.diff(score[order], append=np.inf))  # of each run of equal scores
    hits = np.cumsum(positive[order])[last]
    false = last + 1 - hits
    recall, precision = hits / hits[-1], hits / (last + 1)
    return np.r_[0, false / false[-1]], np.r_[0, recall], np.r_[0, recall], np.r_[precision[0], precision]


def calibration(truth: np.ndarray, proba: np.ndarray, labels: Sequence[str]) -> Figure:
    """How often what has probability p comes true (Wilson intervals): the second of two classes, else the top one."""
    from matplotlib.ticker import MaxNLocator

    if proba.shape[1] == 2:
        stated, true, what = proba[:, 1], truth == 1, f"probability of {labels[1]}"
    else:
        stated, true, what = proba.max(axis=1), truth == proba.argmax(axis=1), "probability of the answer"
    bins = np.minimum((stated * 10).astype(int), 9)
    count, hits = np.bincount(bins, minlength=10), np.bincount(bins, weights=true, minlength=10).astype(int)
    full = np.flatnonzero(count)
    x, y = np.bincount(bins, weights=stated, minlength=10)[full] / count[full], hits[full] / count[full]
    ends = np.array([binomtest(hits[b], count[b]).proportion_ci(method="wilson") for b in full])
    error = np.abs(ends - y[:, None]).T
    figure, (axes, below) = _figure(5.6, 5.6, "Calibration: good is on the diagonal", rows=(3, 1))
    axes.plot([0, 1], [0, 1], ":", color="k", lw=1)
    axes.errorbar(x, y, error, fmt="o-", color=GOOD, ecolor=PALE, capsize=3)
    axes.set(ylabel="share that came true", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_xticklabels([])
    below.bar(np.arange(10) / 10 + 0.05, count, 0.09, color=PALE)
    below.set(xlabel=what, ylabel="rows", xlim=(-0.02, 1.02))
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def residuals(truth: np.ndarray, answer: np.ndarray) -> Figure:
    """Prediction against truth (n,), and the distribution of the errors."""
    figure, (cloud, histogram) = _figure(9.6, 4.5, "Errors: good is near the diagonal, and narrow around 0", columns=2)
    rows = _sample(truth.size)
    cloud.scatter(truth[rows], answer[rows], s=12, alpha=max(0.05, min(0.6, 300 / rows.size)), color=GOOD, lw=0)
    ends = [min(truth.min(), answer.min()), max(truth.max(), answer.max())]
    cloud.plot(ends, ends, ":", color="k", lw=1)
    cloud.set(xlabel="truth", ylabel="prediction")
    _histogram(histogram, answer - truth, "prediction minus truth")
    return figure


def flips(truth: np.ndarray, champion: np.ndarray, challenger: np.ndarray, labels: Sequence[str]) -> Figure:
    """Rows that only one of two models gets right, by true class, from class indices (n,)."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    k = len(labels)
    won = np.bincount(truth[(challenger == truth) & (champion != truth)], minlength=k)
    lost = np.bincount(truth[(challenger != truth) & (champion == truth)], minlength=k)
    shown = np.sort(np.argsort(-(won + lost), kind="stable")[:MOST_CLASSES])
    title = f"Challenger against champion: {won.sum():,} rows won, {lost.sum():,} lost of {truth.size:,}; good is blue"
    figure, (axes,) = _figure(7.2, 1.6 + 0.27 * max(len(shown), 4), title, left=1.4)
    for side, color, align in ((won[shown], GOOD, "left"), (-lost[shown], BAD, "right")):
        axes.barh(range(len(shown)), side, color=color)
        for at, value in enumerate(side):
            if value:
                axes.text(value, at, f" {abs(value)} ", ha=align, va="center", size=8)
    reach = max(won.max(), lost.max(), 1) * 1.15
    axes.axvline(0, color="k", lw=0.8)
    axes.set_yticks(range(len(shown)), [labels[c] for c in shown], size=9)
    axes.set(xlim=(-reach, reach), ylim=(len(shown) - 0.5, -0.5), ylabel="truth")
    axes.set_xlabel("← lost: only the champion is right   |   won: only the challenger is right →")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    return figure


def nearness(nearer: np.ndarray) -> Figure:
    """Distribution of the champion's absolute error minus the challenger's (n,)."""
    title = (
        f"Challenger against champion: nearer on {np.mean(nearer > 0):.0%} of {nearer.size:,} rows; good is right of 0"
    )
    figure, (axes,) = _figure(7.2, 4.0, title)
    _histogram(axes, nearer, "absolute error of the champion minus that of the challenger")
    return figure


def _histogram(axes: Axes, values: np.ndarray, what: str) -> None:
    low, high = np.quantile(values, [0.005, 0.995])  # a few far outliers would squeeze all others into one bar
    axes.hist(np.clip(values, low, high), bins=int(np.clip(np.sqrt(values.size), 10, 40)), color=GOOD)
    axes.axvline(0, color="k", ls=":", lw=1)
    axes.axvline(values.mean(), color=BAD, lw=2)
    axes.set(xlabel=f"{what}\nmean {values.mean():.3g} (line), standard deviation {values.std():.3g}", ylabel="rows")


def _short(name: str) -> str:
    name = name.replace("$", r"\$")  # else matplotlib reads what is between two of them as mathematics
    return name if len(name) <= 14 else f"{name[:6]}…{name[-7:]}"


def _sample(n: int) -> np.ndarray:
    return np.arange(n) if n <= MOST_ROWS else np.random.default_rng(0).choice(n, MOST_ROWS, replace=False)


def _orange_to_blue() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("orange_blue", [BAD, "white", GOOD])


def _figure(
    width: float,
    height: float,
    title: str,
    *,
    columns: int = 1,
    rows: Sequence[int] = (1,),
    left: float = 0.8,
    bottom: float = 0.8,
) -> tuple[Figure, list[Axes]]:
    """A figure in inches with its axes placed by hand, which takes half the time of matplotlib's layout engines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": rows})
    figure.subplots_adjust(
        left=left / width, bottom=bottom / height, right=1 - 0.2 / width, top=1 - 0.5 / height, wspace=0.22, hspace=0.08
    )
    figure.text(0.5, 1 - 0.28 / height, title, ha="center", size=11 if width > 6 else 10)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)
