"""Plots of an evaluation: scikit-learn's display classes, and how often the champion and the challenger win."""

from __future__ import annotations  # matplotlib is imported by the functions that draw, its types are only named

from typing import TYPE_CHECKING

import numpy as np

from alacarte.evaluation.metrics import Answers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD, BAD, PALE = "#0072B2", "#D55E00", "#BBBBBB"  # distinct for colour-blind readers too (Okabe & Ito, 2008)
MOST_ROWS = 20_000  # in curves and scatter plots; a random sample of that many looks the same
MOST_CLASSES = 12  # with a number in each cell, or a curve of its own


def plots(answers: Answers, champion: Answers | None = None) -> dict[str, Figure]:
    """Figures by file name; the answers of the champion on the same rows add the comparison."""
    if answers.task == "regression":
        figures = {"residuals.png": plot_residuals(answers)}
    else:
        figures = {"confusion_matrix.png": plot_confusion(answers)}
        if answers.proba is not None:
            figures["roc_pr.png"] = plot_ranking(answers)
            figures["calibration.png"] = plot_calibration(answers)
    if champion is not None:
        figures["champion_vs_challenger.png"] = plot_comparison(champion, answers)
    return figures


def plot_confusion(answers: Answers) -> Figure:
    """Shares of the predictions by true class; with few classes the number of rows in each cell."""
    from sklearn.metrics import ConfusionMatrixDisplay

    labels = label_texts(answers)
    figure, (axes,) = new_figure("Confusion matrix: good is a dark diagonal", 1, 6.5, 6)
    ConfusionMatrixDisplay.from_predictions(
        answers.truth, answers.predicted, labels=range(len(labels)), display_labels=labels, ax=axes, colorbar=False,
        cmap="Blues", include_values=len(labels) <= MOST_CLASSES, im_kw={"norm": "symlog"}, xticks_rotation=45,
    )  # fmt: skip
    step = -(-len(labels) // 30)
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    axes.set_yticks(range(0, len(labels), step), labels[::step])
    return figure


def plot_ranking(answers: Answers) -> Figure:
    """ROC and precision-recall curves: of the second of two classes, or of the most frequent classes against the rest."""
    from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

    sample, labels = answers.at(sample_rows(len(answers.truth))), label_texts(answers)
    assert sample.proba is not None
    figure, both = new_figure("Ranking: good is the upper left (ROC) and the upper right (precision-recall) corner", 2)
    k = sample.proba.shape[1]
    counts = np.bincount(sample.truth, minlength=k)[:k]
    frequent = np.sort(np.argsort(-counts, kind="stable")[:MOST_CLASSES])
    for column in [1] if k == 2 else frequent:
        if not 0 < counts[column] < len(sample.truth):
            continue
        for display, axes in zip((RocCurveDisplay, PrecisionRecallDisplay), both, strict=True):
            display.from_predictions(
                sample.truth == column, sample.proba[:, column], sample_weight=sample.weight, name=labels[column], ax=axes,
                curve_kwargs={"lw": 1},
            )  # fmt: skip
    for axes in both:
        axes.set(xlabel=axes.get_xlabel().split(" (")[0], ylabel=axes.get_ylabel().split(" (")[0])
        if axes.get_legend():
            axes.legend(fontsize=7)
    return figure


def plot_calibration(answers: Answers) -> Figure:
    """How often a class occurs that has the probability p: the second of two classes, or the predicted one."""
    from sklearn.calibration import CalibrationDisplay

    assert answers.proba is not None
    if answers.proba.shape[1] == 2:
        stated, true, name = answers.proba[:, 1], answers.truth == 1, label_texts(answers)[1]
    else:
        stated, true, name = answers.proba.max(axis=1), answers.truth == answers.proba.argmax(axis=1), "predicted class"
    figure, (axes, below) = new_figure("Calibration: good is near the diagonal", 2)
    CalibrationDisplay.from_predictions(
        true, np.clip(stated, 0, 1), n_bins=10, name=name, ax=axes, color=GOOD, pos_label=True
    )
    axes.set(xlabel="probability that the model states", ylabel="share that is correct")
    below.hist(stated, bins=20, range=(0, 1), color=PALE)
    below.set(xlabel="probability that the model states", ylabel="rows")
    return figure


def plot_residuals(answers: Answers) -> Figure:
    """Prediction against truth, and the distribution of the errors."""
    from sklearn.metrics import PredictionErrorDisplay

    figure, (axes, histogram) = new_figure("Errors: good is near the diagonal, and narrow around 0", 2)
    PredictionErrorDisplay.from_predictions(
        answers.truth, answers.predicted, kind="actual_vs_predicted", subsample=min(MOST_ROWS, len(answers.truth)),
        random_state=0, ax=axes, scatter_kwargs={"color": GOOD, "s": 8, "alpha": 0.5},
    )  # fmt: skip
    plot_histogram(histogram, answers.predicted - answers.truth, "prediction minus truth")
    return figure


def plot_comparison(champion: Answers, challenger: Answers) -> Figure:
    """Rows that only one of two models predicts correctly, by true class; for numbers, how much nearer the challenger is."""
    if challenger.task == "regression":
        nearer = np.abs(champion.truth - champion.predicted) - np.abs(challenger.truth - challenger.predicted)
        figure, (axes,) = new_figure("Challenger against champion: good is right of 0", 1, 7)
        plot_histogram(axes, nearer, "absolute error of the champion minus that of the challenger")
        return figure
    right, right_before = challenger.truth == challenger.predicted, champion.truth == champion.predicted
    k = len(challenger.names)
    won, lost = (
        np.bincount(challenger.truth[rows], minlength=k) for rows in (right & ~right_before, right_before & ~right)
    )
    shown = np.sort(np.argsort(-(won + lost), kind="stable")[:25])
    title = f"Challenger against champion: {won.sum():,} rows won, {lost.sum():,} lost of {len(right):,}"
    figure, (axes,) = new_figure(title, 1, 7, 2 + 0.27 * len(shown))
    labels = [label_texts(challenger)[column] for column in shown]
    for side, color, name in (
        (won[shown], GOOD, "only the challenger is right"),
        (-lost[shown], BAD, "only the champion is right"),
    ):
        axes.bar_label(
            axes.barh(labels, side, color=color, label=name), [f"{abs(n)}" if n else "" for n in side], size=8
        )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="rows", ylabel="true class")
    axes.legend(fontsize=8)
    return figure


def plot_importance(columns: list[str], mean: np.ndarray, deviation: np.ndarray, metric: str) -> Figure:
    """Permutation importance of the most important columns."""
    figure, (axes,) = new_figure(
        f"Permutation importance: loss of {metric} without the column", 1, 7, 2 + 0.27 * len(columns)
    )
    axes.barh([short_text(column) for column in columns], mean, xerr=deviation, color=GOOD, ecolor=PALE)
    axes.invert_yaxis()
    axes.set(xlabel=f"loss of {metric}")
    return figure


def plot_histogram(axes: Axes, values: np.ndarray, name: str) -> None:
    """Without the outermost 0.5 % on each side, which would squeeze the rest into one bar."""
    low, high = np.quantile(values, [0.005, 0.995])
    axes.hist(np.clip(values, low, high), bins=30, color=GOOD)
    axes.axvline(0, color="k", ls=":", lw=1)
    axes.set(xlabel=f"{name}\nmean {values.mean():.3g}, standard deviation {values.std():.3g}", ylabel="rows")


def label_texts(answers: Answers) -> list[str]:
    """The names of the classes, each different from the others."""
    texts = [short_text(name) for name in answers.names]
    return [text if texts.count(text) == 1 else f"{text} ({i})" for i, text in enumerate(texts)]


def short_text(name: object) -> str:
    """Text of a user as matplotlib draws it unchanged: without the sign that begins a formula, and not too long."""
    text = " ".join(str(name).split())
    return plain_text(text if len(text) <= 20 else f"{text[:9]}…{text[-10:]}")


def plain_text(text: object) -> str:
    """The text as matplotlib shall show it: without this, text between two $ is a formula, and can be a wrong one."""
    return str(text).replace("$", r"\$")


def sample_rows(n: int) -> np.ndarray:
    return np.arange(n) if n <= MOST_ROWS else np.random.default_rng(0).choice(n, MOST_ROWS, replace=False)


def new_figure(title: str, columns: int, width: float = 9.6, height: float = 4.6) -> tuple[Figure, list[Axes]]:
    """A figure with a row of axes, which no window shows and nothing has to close."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="tight")
    figure.suptitle(title, size=11)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])
