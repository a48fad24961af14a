"""Drift is found where it is, not where it is not, and says so of each kind of column."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from alacarte.data.dataset import Dataset
from alacarte.data.tables import align_columns
from alacarte.feedback.queries import Labelled, Window
from alacarte.learners.sklearn import SklearnLearner
from alacarte.monitoring import drift
from alacarte.monitoring.drift import compare_column, compare_columns, decide, holm, mark, measure, psi
from alacarte.monitoring.report import answers_figure, drift_figure
from alacarte.monitoring.window import compare_window
from alacarte.registry import Located
from alacarte.retraining.champion import Champion, count_new
from project.data import load_digits


def moved(before: pd.DataFrame, after: pd.DataFrame) -> bool:
    return bool(mark(compare_columns(before, after), 0.05, 0.1)["drifted"].any())


def test_digits_turned_are_found_within_100_rows_and_unturned_ones_raise_no_alarm():
    rng = np.random.default_rng(0)
    plain, turned = (load_digits(rotate=angle).drop(columns="digit") for angle in (0, 25))
    alarms = detected = 0
    for _ in range(12):
        rows = rng.permutation(len(plain))
        alarms += moved(plain.iloc[rows[:800]], plain.iloc[rows[800:900]])
        detected += moved(plain.iloc[rows[:800]], turned.iloc[rows[800:900]])
    assert alarms <= 3 and detected >= 11  # at a true rate of .05, four or more alarms come twice in 1,000 times


def test_each_kind_of_column():
    rng = np.random.default_rng(1)
    n = 2000
    before = pd.DataFrame(
        {
            "number": rng.normal(size=n),
            "still": rng.normal(size=n),
            "text": rng.choice(["a", "b"], n),
            "flag": rng.random(n) < 0.5,
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 100, n), "D"),
            "count": rng.integers(0, 4, n),
            "gone": rng.normal(size=n),
            "hidden": rng.normal(size=n),
        }
    )
    after = before.assign(
        number=before["number"] + 1,
        text=rng.choice(["a", "c"], n),
        flag=rng.random(n) < 0.9,
        day=before["day"] + pd.Timedelta(days=60),
        count=rng.integers(2, 6, n),
        gone=before["gone"].mask(rng.random(n) < 0.4),
        hidden=np.nan,
    ).sample(frac=1, random_state=0, ignore_index=True)
    stored = {name: column[:0] if name == "hidden" else column for name, column in after.items()}
    columns = mark(compare_columns(before, stored), 0.05, 0.1).set_index("column")
    assert columns["drifted"].to_dict() == {
        "number": True, "still": False, "text": True, "flag": True, "day": True, "count": True, "gone": True,
        "hidden": False,
    }  # fmt: skip
    assert columns.loc["hidden", "kind"] == "not stored"
    assert columns.loc["text", "out_of_range"] == pytest.approx(0.5, abs=0.05)
    assert columns.loc["gone", "missing"] == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("name", ["number", "text", "day"])
def test_a_column_that_is_no_longer_sent_is_missing_values(name: str):
    rng = np.random.default_rng(1)
    day = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 100, 300), "D")
    before = pd.DataFrame({"number": rng.normal(size=300), "text": rng.choice(["a", "b"], 300), "flag": rng.random(300) < 0.5,
                           "day": day, "count": rng.integers(0, 4, 300)})  # fmt: skip
    after = align_columns(before.drop(columns=name).head(100), before)
    columns = mark(compare_columns(before, after), 0.05, 0.1)
    assert columns["column"][columns["drifted"]].tolist() == [name]
    assert columns["missing"].tolist() == [1.0, 0, 0, 0, 0]
    metrics = measure(about(100, 0), "classification") | {"rows": 100.0, "new_labels": 0.0}
    decision = decide(columns, metrics, {"accuracy": 0.5}, margin=0.02, labels=100)
    assert decision.retrain and f"{name} (PSI " in decision.reason and "100% missing" in decision.reason


@settings(deadline=None, max_examples=30)
@given(st.lists(st.one_of(st.floats(allow_nan=True, allow_infinity=False), st.none()), min_size=1, max_size=40),
       st.lists(st.one_of(st.floats(allow_nan=True, allow_infinity=False), st.none()), min_size=1, max_size=40))  # fmt: skip
def test_any_numbers_give_numbers(before: list, after: list):
    row = compare_column(pd.Series(before, dtype="float64"), pd.Series(after, dtype="float64"))
    assert 0 <= row["p_value"] <= 1 and row["psi"] >= 0 and np.isfinite(row["psi"])


def test_psi_of_samples_of_one_distribution_is_about_nothing():
    rng = np.random.default_rng(0)
    drawn = [psi(*(rng.multinomial(n, [0.1] * 10) for n in (1000, 200))) for _ in range(200)]
    assert np.mean(drawn) < 0.03


def test_holm_keeps_one_level_for_all():
    assert holm([0.01, 0.02, 0.03], 0.05).tolist() == [True, True, True]
    assert holm([0.01, 0.04, 0.03], 0.05).tolist() == [True, False, False]
    assert holm([0.2], 0.05).tolist() == [False] and holm([], 0.05).tolist() == []


def about(n: int, wrong: int, audit: bool = True) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prediction": 1, "label": [0] * wrong + [1] * (n - wrong), "is_correction": [True] * wrong + [False] * (n - wrong),
            "audit": audit, "confidence": 0.9, "latency_ms": 2.0,
        }
    )  # fmt: skip


def test_a_decision_needs_a_reason():
    columns = mark(compare_columns(*(pd.DataFrame({"a": np.arange(500.0)}),) * 2), 0.05, 0.1)
    expected, more = {"accuracy": 0.95, "rmse": 1.0}, {"rows": 200.0}

    def decided(new: float, **window: object) -> drift.Decision:
        metrics = measure(about(**window), "classification") | more | {"new_labels": new}
        return decide(columns, metrics, expected, margin=0.02, labels=100)

    assert not decided(0, n=100, wrong=6).retrain
    worse = decided(0, n=100, wrong=20)
    assert worse.retrain and "accuracy 0.800 on 100 audit labels is proved below the 0.950" in worse.reason
    assert not decided(0, n=100, wrong=20, audit=False).retrain  # what people choose to report proves nothing
    assert decided(100, n=100, wrong=5).reason == "100 new labels"


def test_regression_is_measured_by_its_errors():
    metrics = measure(about(50, 25), "regression")
    assert metrics["audit_rmse"] == pytest.approx(np.sqrt(0.5))
    assert metrics["audit_rmse_low"] < metrics["audit_rmse"] < metrics["audit_rmse_high"]


def champion_of(X: pd.DataFrame, y: np.ndarray, weights: np.ndarray | None = None) -> Champion:
    """A champion that was trained on these rows, half of them; the others are its val and test parts."""
    split, labels = np.array(["train", "train", "val", "test"] * len(X))[: len(X)], pd.Series(y, name="y")
    dataset = Dataset(X, labels, split, "classification", "rows", "y", "rows.csv", "0", weights)
    (X_train, y_train), (X_val, y_val) = dataset.part("train"), dataset.part("val")
    learner = SklearnLearner(LogisticRegression())
    learner.fit(X_train, y_train, X_val, y_val, task="classification", seed=0)
    return Champion("m", "1", Located("", Path(), None, None, {}), learner, {}, dataset)


def test_weights_count_on_neither_side_of_the_accuracy():
    """Half of the rows are a guess, and count for a tenth in training. A window like the test part raises no alarm."""
    draw = np.random.default_rng(0)
    X = pd.DataFrame({"a": draw.normal(size=1600), "hard": draw.integers(0, 2, 1600).astype(float)})
    y = np.where(np.where(X["hard"] == 1, draw.normal(size=1600), X["a"]) > 0, "p", "q")
    champion = champion_of(X, y, np.where(X["hard"] == 1, 0.1, 1.0))
    rows, predicted = X[:400], champion.learner.predict(X[:400])
    about = pd.DataFrame({
        "prediction_id": rows.index.astype(str), "model_version": "1", "prediction": predicted, "label": y[:400],
        "is_correction": predicted != y[:400], "audit": True, "confidence": 0.9, "latency_ms": 1.0, "input_schema": "1",
    })  # fmt: skip
    none = Labelled(rows[:0], pd.Series([], dtype=object), pd.DataFrame(columns=[*about, "used_version", "annotator"]))
    settings = {"rows": 400, "min_rows": 1000, "reference_rows": 1000, "confidence_level": 0.95, "psi_threshold": 0.1,
                "margin": 0.02, "labels": 200}  # fmt: skip
    compared = compare_window(champion, Window(rows, about, {"1": list(X)}), none, 0, settings)
    assert not compared.decision.retrain, compared.decision.reason


@pytest.mark.parametrize(("new_classes", "n"), [("scratch", 50), ("error", 0)])
def test_labels_of_a_new_class_are_new_labels_where_a_retraining_takes_them(
    new_classes: str, n: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("alacarte.registry.rejected_versions", None)  # replay_rejected needs none
    X = pd.DataFrame({"a": np.random.default_rng(0).normal(size=400)})
    champion = champion_of(X, np.where(X["a"] > 0, "p", "q"))
    about = pd.DataFrame({"state": ["accepted"] * 50, "audit": False, "used_version": None, "annotator": "local:me"})
    labelled = Labelled(X[:50] + 0.001, pd.Series(["r"] * 50), about)
    settings = {"new_classes": new_classes, "max_share_per_annotator": 1, "max_range_factor": 1, "max_replay_rows": None,
                "label_weight": 1, "replay_rejected": True}  # fmt: skip
    assert count_new(champion, labelled, settings) == n


HOSTILE = ["$$", "$\\frac{$", "_hidden", "a\nb", "<b>", "^_{}", "\\$", "🐟"]


@pytest.mark.filterwarnings("ignore:Glyph")  # the font has no fish
def test_no_text_of_a_table_is_read_as_a_formula():
    columns = pd.DataFrame({"column": HOSTILE, "psi": 0.2, "drifted": True})
    labels = drift_figure(columns), answers_figure(HOSTILE, HOSTILE[:2], HOSTILE[1])
    numbers = answers_figure(np.arange(100) / 3, np.arange(100) / 3, HOSTILE[0])
    for figure in (*labels, numbers):
        figure.savefig(BytesIO(), format="png")
    ticks = [text.get_text() for text in labels[0].axes[0].get_yticklabels()]
    assert ticks[::-1] == [name.replace("$", r"\$") for name in HOSTILE]


def test_categories_of_numbers_are_compared_as_numbers():
    codes = pd.Series(np.random.default_rng(0).integers(1, 6, 900))
    before = pd.DataFrame({"code": codes.astype("category")})
    after = align_columns(pd.DataFrame({"code": codes[:300].astype("float64")}), before)
    assert not moved(before, after) and compare_columns(before, after)["out_of_range"].max() == 0
    assert moved(before, after.replace(1.0, 9.0)) and not moved(before, before[:300])


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_dates_are_compared_whatever_unit_they_are_stored_in(unit: str):
    days = pd.Series(pd.date_range("2024-01-01", periods=300, unit="ns"))
    as_sent = days.dt.strftime("%Y-%m-%d").sample(300, random_state=0).reset_index(drop=True)
    after = align_columns(
        pd.DataFrame({"signup": as_sent}), pd.DataFrame({"signup": days.astype(f"datetime64[{unit}]")})
    )
    before = pd.DataFrame({"signup": days.astype(f"datetime64[{unit}]")})
    assert not moved(before, after) and compare_columns(before, after)["out_of_range"].max() == 0
    assert moved(before, after + pd.Timedelta(days=400))
