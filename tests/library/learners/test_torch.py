"""Networks in torch with a loss and an augmentation of their own; batches go to the device one after the other."""

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from learning import learner

from alacarte import learners
from alacarte.errors import UserError
from project.data import load_digits
from project.networks import DigitsCNN


def digits(rows: int) -> tuple[pd.DataFrame, pd.Series]:
    frame = load_digits(stop=rows)
    return frame.drop(columns="digit"), frame["digit"]


def fit(made, X: pd.DataFrame, y: pd.Series, **arguments: object) -> None:
    half = len(y) // 2
    task = "regression" if y.dtype == "float64" else "classification"
    made.fit(X[:half], y[:half], X[half:], y[half:], task=task, seed=0, **arguments)


def test_the_network_for_digits_uses_its_own_loss_and_augmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batches: dict[str, list] = {"augment": [], "loss": []}
    augment, loss = DigitsCNN.augment, DigitsCNN.loss

    def watch_augment(self, inputs):
        batches["augment"].append(len(inputs))
        moved = augment(self, inputs)
        assert self.training and moved.shape == inputs.shape
        return moved

    def watch_loss(self, outputs, targets):
        batches["loss"].append(len(targets))
        return loss(self, outputs, targets)

    monkeypatch.setattr(DigitsCNN, "augment", watch_augment)
    monkeypatch.setattr(DigitsCNN, "loss", watch_loss)
    X, y = digits(600)
    made = learner("torch_cnn")
    fit(made, X, y)
    assert max(batches["augment"]) == 64 and len(batches["augment"]) == 5 * made.epochs
    assert set(batches["loss"]) == {64, 44, 300}  # training batches, the last one, and the validation part
    assert (made.predict(X[300:]) == y[300:]).mean() > 0.5
    made.save(tmp_path / "model", example=X.head(3), metadata={})
    again = learners.load(tmp_path / "model")
    assert (again.predict(X) == made.predict(X)).all()
    assert (mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(X) == made.predict(X)).all()
    assert again.update(X, y, X, y, init="warm", share=0.5, shrink=0.8, seed=0).init == "warm"


def test_a_table_goes_through_the_network_in_parts(monkeypatch: pytest.MonkeyPatch):
    X, y = digits(200)
    made = learner("torch_cnn", "classification", "model.max_epochs=1")
    fit(made, X, y)
    sizes, forward = [], DigitsCNN.forward
    monkeypatch.setattr(DigitsCNN, "forward", lambda self, x: (sizes.append(len(x)), forward(self, x))[1])
    assert len(made.predict(pd.concat([X] * 50))) == 10_000
    assert sizes == [4096, 4096, 10_000 - 8192]


def test_what_is_wrong_with_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch):
    X, y = digits(100)
    with pytest.raises(UserError, match=r"DigitsCNN: it needs a square image .* give 60 numbers"):
        fit(learner("torch_cnn"), X.iloc[:, :60], y)
    with monkeypatch.context() as patch:
        patch.setattr(DigitsCNN, "loss", lambda self, outputs, targets: outputs.mean())
        with pytest.raises(UserError, match=r"DigitsCNN\.loss returns shape \(\): return one loss per row"):
            fit(learner("torch_cnn"), X, y)
    monkeypatch.setattr(DigitsCNN, "forward", lambda self, x: x)
    with pytest.raises(UserError, match=r"DigitsCNN returns \(2, 64\) for 2 rows, wanted is \(2, 10\)"):
        fit(learner("torch_cnn"), X, y)
