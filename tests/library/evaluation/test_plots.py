"""Each picture draws, whatever the classes, and nothing in it is cut off at the edge."""

import subprocess
import sys

import numpy as np
import pytest
from answers import example
from conftest import ROOT

from alacarte.evaluation.metrics import make_answers
from alacarte.evaluation.plots import plot_importance, plots

# What a test before left to the garbage collector is no warning of this code.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.mark.parametrize("kind", ["str", "bool"])
def test_plots_of_a_classifier(kind, tmp_path):
    truth, answer, proba, classes = example(kind)
    before = example(kind, seed=1)[1]
    if kind == "str":
        truth[:10] = "yak"  # never seen in training
    challenger = make_answers(truth, answer, proba, classes, "classification")
    figures = plots(challenger, make_answers(truth, before, None, classes[::-1], "classification"))
    assert set(figures) == {"confusion_matrix.png", "roc_pr.png", "calibration.png", "champion_vs_challenger.png"}
    draw(figures, tmp_path)
    right, right_before = answer == truth, before == truth
    counts = f"{(right & ~right_before).sum()} rows won, {(right_before & ~right).sum()} lost of 200"
    assert counts in figures["champion_vs_challenger.png"].get_suptitle()
    assert set(plots(make_answers(truth, answer, None, classes, "classification"))) == {"confusion_matrix.png"}


def test_plots_of_a_regression(tmp_path):
    truth = np.random.default_rng(0).normal(size=300) * 1e6
    for champion in (truth * 0.3, truth):
        pair = [make_answers(truth, numbers, None, None, "regression") for numbers in (truth, champion)]
        draw(plots(*pair), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["champion_vs_challenger.png", "residuals.png"]


def test_long_names_of_many_classes_stay_inside_the_picture(tmp_path):
    rng, k = np.random.default_rng(0), 40
    names = np.array([f"a class with a $long$ name, number {i} $$" for i in range(k)])
    truth = rng.integers(0, k, 400)
    answer = np.where(rng.random(400) < 0.7, truth, rng.integers(0, k, 400))
    answers = make_answers(names[truth], names[answer], rng.dirichlet(np.ones(k), 400), names, "classification")
    draw(plots(answers, answers), tmp_path)
    draw({"importance.png": plot_importance(names.tolist(), np.ones(k), np.ones(k), "log_loss")}, tmp_path)


def draw(figures, folder) -> None:
    """Save each figure. All that is drawn, every text included, must lie within it."""
    for name, figure in figures.items():
        figure.savefig(folder / name)
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        inside = drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height
        assert inside, f"{name} has text beyond its edge: {drawn}"


def test_the_gate_loads_neither_mlflow_nor_matplotlib_nor_torch_nor_scikit_learn():
    code = "import sys, alacarte.evaluation.gate, alacarte.evaluation.plots;"
    code += "print([m for m in ('mlflow', 'matplotlib', 'torch', 'hydra', 'sklearn', 'scipy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "[]\n"
