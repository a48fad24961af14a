"""Your own functions in project/: change these tests together with the functions."""

import numpy as np
import pytest

from project.data import load_digits
from project.features import make_features
from project.models import make_model


def test_digits_are_a_table_with_a_target():
    frame = load_digits(stop=20)
    assert frame.shape == (20, 65) and frame["digit"].between(0, 9).all()
    assert frame.drop(columns="digit").to_numpy().max() <= 16


def test_rotation_changes_the_pixels_and_not_the_labels():
    straight, rotated = load_digits(start=5, stop=9), load_digits(start=5, stop=9, rotate=25)
    assert straight["digit"].equals(rotated["digit"])
    assert not np.allclose(straight.drop(columns="digit"), rotated.drop(columns="digit"))


@pytest.mark.parametrize(("axis", "columns"), [("both", 80), ("rows", 72), ("columns", 72)])
def test_features_are_numbers_for_every_row(axis: str, columns: int):
    pixels = load_digits(stop=30).drop(columns="digit")
    values = make_features(axis).fit(pixels.head(20)).transform(pixels)
    assert values.shape == (30, columns) and np.isfinite(values).all()


def test_the_model_learns_digits():
    rows, others = load_digits(stop=300), load_digits(start=300, stop=400)
    model = make_model().fit(rows.drop(columns="digit"), rows["digit"])
    assert model.score(others.drop(columns="digit"), others["digit"]) > 0.7


def test_the_network_has_one_output_for_each_class():
    torch = pytest.importorskip("torch")
    from project.networks import MLP

    network = MLP(n_inputs=64, n_outputs=10, hidden=[8, 4], dropout=0.1).eval()
    assert network(torch.zeros(3, 64)).shape == (3, 10)
