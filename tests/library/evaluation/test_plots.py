"""Each picture draws, whatever the classes, and nothing in it is cut off at the edge."""

import subprocess
import sys

import numpy as np
import pytest
from answers import LABELS, example
from conftest import ROOT

from alacarte.evaluation.plots import plots

# What a test before left to the garbage collector is no warning of this code.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.mark.parametrize("kind", LABELS)
def test_plots_of_a_classifier(kind, tmp_path):
    truth, answer, proba, classes = example(kind)
    figures = plots(truth, answer, proba, classes, "classification", example(kind, seed=1)[1])
    names = {"confusion_matrix.png", "roc_pr.png", "calibration.png", "champion_vs_challenger.png"}
    assert set(figures) == names
    for name, figure in figures.items():
        figure.savefig(tmp_path / name)
        assert inside(figure), f"{name} has text beyond its edge"
    assert set(plots(truth, answer, None, classes, "classification")) == {"confusion_matrix.png"}


def test_plots_of_a_regression(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=300) * 1e6
    for champion in (truth * 0.3, truth):
        for name, figure in plots(truth, truth, None, None, "regression", champion).items():
            figure.savefig(tmp_path / name)
            assert inside(figure)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["champion_vs_challenger.png", "residuals.png"]


@pytest.mark.parametrize("k", [1, 2, 20, 60])
def test_long_names_of_many_classes_stay_inside_the_picture(k):
    rng = np.random.default_rng(0)
    names = np.array([f"a class with a $long$ name, number {i}" for i in range(k)])
    truth = rng.integers(0, k, 400)
    answer = np.where(rng.random(400) < 0.7, truth, rng.integers(0, k, 400))
    proba = rng.dirichlet(np.ones(k), 400)
    for name, figure in plots(names[truth], names[answer], proba, names, "classification", names[truth]).items():
        figure.canvas.draw()
        assert inside(figure), f"{name} has text beyond its edge"


def inside(figure) -> bool:
    """Whether all that is drawn, every text included, lies within the picture."""
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


def test_metrics_and_gate_load_neither_mlflow_nor_matplotlib_nor_torch_and_plots_no_pyplot():
    code = (
        "import sys, alacarte.evaluation.gate, alacarte.evaluation.plots as p;"
        "print([m for m in ('mlflow', 'matplotlib', 'torch', 'hydra') if m in sys.modules]);"
        "p.plots([1., 2.], [1., 2.], None, None, 'regression');"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split("\n")[:2] == ["[]", "True False"]


def test_a_label_never_seen_in_training_is_drawn(tmp_path):
    truth, answer, proba, classes = example("str")
    truth[:10] = "yak"
    for name, figure in plots(truth, answer, proba, classes, "classification", answer).items():
        figure.savefig(tmp_path / name)
