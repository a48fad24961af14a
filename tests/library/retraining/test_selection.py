"""Which labels a retraining learns from and which judge it, on labels made directly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from people import SPLIT, people, refusal

from alacarte.data.dataset import Dataset, load_data
from alacarte.data.splits import occurs_in
from alacarte.evaluation.audit import ONE_PARTY, for_gate, largest_count, select_audit_rows, subset
from alacarte.feedback.queries import Labelled
from alacarte.learners import INITS
from alacarte.retraining.selection import check_settings, choose, make_rows, most_labels, select

LIMITS: dict[str, Any] = {"max_labels_per_annotator": 10_000, "max_range_factor": 10}
SHARE = {"max_share_per_annotator": 0.05, "label_weight": 1, "max_replay_rows": None}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("people") / "people.csv"
    frame = people(600)
    frame["y"] = np.where(frame["age"] > 80, "rare", frame["y"])
    frame.to_csv(path, index=False)
    return load_data(_target_="alacarte.data.tables.read_table", path=str(path), target="y", split=SPLIT)


def labelled(n: int, seed: int = 1, frame: pd.DataFrame | None = None, **about: Any) -> Labelled:
    """n labels for people who are not in the data set, none of them for an audit row unless `about` says so."""
    rows = people(n, seed) if frame is None else frame
    defaults = {"feedback_id": np.arange(len(rows)), "source": "page", "annotator": "token:page", "state": "accepted"}
    defaults |= {"used_version": None, "audit": False}
    table = pd.DataFrame({**defaults, **about}, index=range(len(rows)))
    inputs = rows.drop(columns="y").reset_index(drop=True)
    return Labelled(inputs, rows["y"].reset_index(drop=True).rename("label"), table)


def test_each_label_that_is_left_out_has_its_reason(dataset: Dataset) -> None:
    X, y = dataset.part("test")
    frame = pd.concat([people(60, seed=1), X[:2].assign(y=y[:2])], ignore_index=True)
    frame.loc[2, "age"], frame.loc[3, "income"], frame.loc[4, "y"] = 5_000, None, "perhaps"
    about = {"state": np.where(np.arange(62) < 2, "used", "accepted"), "audit": np.arange(62) >= 10}
    labels = labelled(0, frame=frame, used_version=np.where(np.arange(62) == 0, "3", "2"), **about)
    left = select(labels, dataset, classes=["no", "yes", "rare"], rejected=["3"], **LIMITS)
    assert left[:5].tolist() == ["rejected", "", "range", "", "class"]
    judging = for_gate(labels)
    assert (left[judging] == "gate").all() and judging[10:].any()
    assert (left[60:].isin(["test", "gate"])).all()
    others = ~judging & (np.arange(62) >= 5) & (np.arange(62) < 60)
    assert (left[others] == "").all()
    assert (select(labels, dataset, classes=None, **LIMITS)[:5] == ["", "", "range", "", ""]).all()


def test_a_row_that_judges_is_not_learned_from_by_another_label(dataset: Dataset) -> None:
    frame = people(40)
    audit = for_gate(labelled(0, frame=frame, audit=True))
    twice = labelled(0, frame=pd.concat([frame, frame]), audit=np.arange(80) < 40)
    left = select(twice, dataset, classes=None, **LIMITS)
    assert (left[40:] == np.where(audit, "test", "")).all()


def test_one_annotator_adds_so_much_over_all_retrainings_and_the_newest_first(dataset: Dataset) -> None:
    most = most_labels(dataset, SHARE)
    n = 3 * most
    flood = labelled(2 * n, annotator=["token:one"] * n + ["token:two"] * 5 + ["token:one"] * (n - 5))
    limits = {**LIMITS, "max_labels_per_annotator": most}
    left = select(flood, dataset, classes=None, **limits).to_numpy()
    assert (left[:n] == "share").all() and (left[n : n + 5] == "").all()
    assert (left == "").sum() == most + 5 and (left[-most:] == "").all()
    how = {"classes": None, "init": "warm", "new_classes": "error", "rejected": [], **limits}
    choice = choose(flood, dataset, **how)
    assert choice.why_left_out == f"{2 * n - most - 5} (share)"
    (note,) = choice.notes(dataset, SHARE)
    assert f"token:one {2 * n - most - 5}" in note and "retrain.max_share_per_annotator=0.05" in note

    # Labels that an earlier retraining used count again: an annotator does not collect the share each time.
    taken = np.flatnonzero(left == "")
    flood.about.loc[taken, "state"], flood.about.loc[taken, "used_version"] = "used", "2"
    again = choose(flood, dataset, **how)
    assert again.new.size == 0 and again.replayed.tolist() == taken.tolist()
    # A lower limit holds for these labels too.
    lower = choose(flood, dataset, **{**how, "max_labels_per_annotator": most // 2})
    assert lower.new.size == 0 and lower.replayed.size == most // 2 + 5
    # The version that used them was rejected: the champion has not learned from them.
    assert choose(flood, dataset, **{**how, "rejected": ["2"]}).new.size == most


@pytest.mark.parametrize(("label_weight", "max_replay_rows"), [(1, None), (2, None), (10, None), (2, 60)])
def test_the_share_of_one_annotator_counts_the_copies_of_a_label(
    dataset: Dataset, label_weight, max_replay_rows
) -> None:
    amounts = {"label_weight": label_weight, "max_replay_rows": max_replay_rows}
    most = most_labels(dataset, {"max_share_per_annotator": 0.1, **amounts})
    flood = labelled(most, annotator=["token:one"] * most)
    rows = make_rows(dataset, flood, SPLIT, **amounts)
    copies = len(rows.train[0]) - rows.n_replayed
    assert 0 < copies <= 0.1 * len(rows.train[0])


@pytest.mark.parametrize("annotators", [["token:"], ["address:127.0.0.1", "address:127.0.0.2"], ["local:me", "token:"]])
def test_without_a_named_token_everybody_is_one_party(dataset: Dataset, annotators: list[str]) -> None:
    sources = [f"person {i}" for i in range(200)]
    flood = labelled(200, annotator=[annotators[i % len(annotators)] for i in range(200)], source=sources)
    limits = {"max_labels_per_annotator": 2, "max_range_factor": 10}
    choice = choose(flood, dataset, classes=None, init="warm", new_classes="error", rejected=[], **limits)
    assert choice.new.size == 200 and choice.notes(dataset, SHARE) == [ONE_PARTY]
    # One named token, and each other value is a party of its own.
    flood.about.loc[0, "annotator"] = "token:alice"
    choice = choose(flood, dataset, classes=None, init="warm", new_classes="error", rejected=[], **limits)
    most = limits["max_labels_per_annotator"]
    assert choice.new.size == 1 + len(annotators) * most and set(choice.above_share) == set(annotators)


def test_one_annotator_gives_at_most_a_share_of_the_rows_that_judge(dataset: Dataset) -> None:
    names = np.array(["token:alice"] * 300 + ["token:bob"] * 60 + ["token:carol"] * 40)
    flood = labelled(400, audit=True, annotator=names)
    every = select_audit_rows(flood, dataset, max_share=1)
    some = select_audit_rows(flood, dataset, max_share=0.5)
    n = len(some.rows.labels)
    assert max(some.counts.values()) <= 0.5 * n and not every.left_out
    assert every.counts["token:alice"] == some.counts["token:alice"] + some.left_out["token:alice"]
    assert [some.counts[f"token:{name}"] == every.counts[f"token:{name}"] for name in ("bob", "carol")] == [True, True]
    kept = some.rows.about.loc[some.rows.about["annotator"] == "token:alice", "feedback_id"].tolist()
    assert kept == [each for each in every.rows.about["feedback_id"] if each < 300][-len(kept) :]  # the newest
    assert f"token:alice {some.left_out['token:alice']}" in some.notes(0.5)[0]
    nobody = select_audit_rows(labelled(400, audit=True, annotator="token:"), dataset, max_share=0.1)
    assert nobody.counts == {"token:": len(every.rows.labels)} and nobody.notes(0.1) == [ONE_PARTY]


@pytest.mark.parametrize(
    ("counts", "share", "largest"),
    [((171,), 0.5, 171), ((200, 20), 0.5, 20), ((10, 10, 10), 0.1, 10), ((90, 20, 10), 0.5, 30), ((5, 5), 1, 5)],
)
def test_the_largest_count_of_one_annotator(counts: tuple[int, ...], share: float, largest: int) -> None:
    assert largest_count({str(i): count for i, count in enumerate(counts)}, share) == largest


def test_numbers_out_of_range_are_left_out_of_a_regression_too(dataset: Dataset) -> None:
    numbers = Dataset(dataset.X, dataset.X["income"], dataset.split, "regression", "n", "y", "", "")
    frame = people(4, seed=2).assign(y=[50.0, 50.0, 1e6, np.float64(50)])
    frame.loc[1, "age"] = -10_000
    labels = labelled(0, frame=frame)
    for factor, reasons in ((10, ["", "range", "range", ""]), (1e9, [""] * 4)):
        left = select(labels, numbers, classes=None, max_labels_per_annotator=10_000, max_range_factor=factor)
        assert left.tolist() == reasons


def test_the_half_that_judges_stays_for_good() -> None:
    frame = people(1000).drop(columns="y").assign(y=1)
    judging = for_gate(labelled(0, frame=frame, audit=True))
    assert 430 < judging.sum() < 570  # 500, and 4 standard deviations
    order = np.random.default_rng(0).permutation(1000)
    assert (for_gate(labelled(0, frame=frame.iloc[order], audit=True)) == judging[order]).all()
    later = frame.assign(added=None, age=frame["age"].astype(float), member=frame["member"].astype(object))
    assert (for_gate(labelled(0, frame=later[sorted(later)], audit=True, state="used")) == judging).all()
    some = np.arange(1000) % 3 == 0
    assert (for_gate(labelled(0, frame=frame, audit=some)) == (judging & some)).all()


def test_labels_come_twice_in_training_and_once_in_validation(dataset: Dataset) -> None:
    labels = labelled(200)
    once, twice = (make_rows(dataset, labels, SPLIT, label_weight=n) for n in (1, 2))
    (X, y), (X_val, y_val) = once.train, once.val
    assert once.n_replayed == twice.n_replayed == (dataset.split == "train").sum()
    new = len(X) - once.n_replayed
    assert 100 < new < 200 and len(X_val) - (dataset.split == "val").sum() == 200 - new
    assert len(twice.train[0]) == once.n_replayed + 2 * new and len(twice.val[0]) == len(X_val)
    counts = twice.train[0].assign(y=twice.train[1])[once.n_replayed :].value_counts()
    assert (counts == 2).all() and len(counts) == new
    assert y.dtype == y_val.dtype == dataset.y.dtype
    replayed = dataset.part("train")[0].reset_index(drop=True)
    pd.testing.assert_frame_equal(X[: once.n_replayed], replayed, check_dtype=False)
    empty = subset(labels, np.zeros(200, bool))
    assert len(make_rows(dataset, empty, SPLIT, label_weight=2).train[0]) == once.n_replayed


@pytest.mark.parametrize("split", [{"by": "time", "column": "since"}, {"by": "column", "column": "part"}])
def test_a_split_by_time_or_column_keeps_its_test_rows(tmp_path: Path, split: dict[str, str]) -> None:
    frame = people(300).assign(part=lambda table: np.resize(["train", "train", "val", "test"], len(table)), cost=2.0)
    frame.loc[::2, "cost"] = 4.0
    frame.to_csv(tmp_path / "people.csv", index=False)
    drop = ["part"] if split["by"] == "time" else ["since"]
    dataset = load_data(_target_="alacarte.data.tables.read_table", path=str(tmp_path / "people.csv"), target="y",
                        drop=drop, split=split, weight="cost")  # fmt: skip
    X_test, y_test = dataset.part("test")
    inputs = pd.concat([people(50, seed=9)[list(X_test)], X_test[:20]], ignore_index=True)
    labels = labelled(0, frame=inputs.assign(y=["yes"] * 50 + y_test[:20].tolist()))
    choice = choose(labels, dataset, classes=None, init="warm", new_classes="error", rejected=[], **LIMITS)
    assert choice.new.tolist() == list(range(50)) and choice.left_out == {"test": 20}
    without_one = Labelled(inputs.drop(columns="member"), labels.labels, labels.about)  # feedback.redact=[member]
    assert (select(without_one, dataset, classes=None, **LIMITS) == "test").tolist() == [False] * 50 + [True] * 20
    rows = make_rows(dataset, subset(labels, choice.new), split, label_weight=2)
    for X, _ in (rows.train, rows.val):
        assert not occurs_in(X_test, X).any()
    replayed, mean = rows.weight[: rows.n_replayed], dataset.weight("train").mean()
    assert replayed.tolist() == dataset.weight("train").tolist() and set(replayed) == {2.0, 4.0}
    assert set(rows.weight[rows.n_replayed :]) == {mean} and len(rows.weight) == len(rows.train[0])
    assert set(rows.val_weight[len(dataset.part("val")[0]) :]) <= {mean} and len(rows.val_weight) == len(rows.val[0])


def test_a_capped_replay_keeps_every_class_in_its_proportion(dataset: Dataset) -> None:
    y = dataset.part("train")[1]
    rows = make_rows(dataset, labelled(10), SPLIT, max_replay_rows=40, seed=3)
    kept = rows.train[1][: rows.n_replayed].value_counts()
    assert abs(rows.n_replayed - 40) <= 2
    for label, count in y.value_counts().items():
        assert abs(kept[label] - 40 * count / len(y)) <= 1
    tiny = make_rows(dataset, labelled(10), SPLIT, max_replay_rows=1)
    assert set(tiny.train[1][: tiny.n_replayed]) == set(y)
    assert rows.weight is None
    weighted = replace(dataset, weights=dataset.X["age"].to_numpy("float64"))
    with_weight = make_rows(
        weighted, labelled(10), {**SPLIT, "by": "time", "column": "since"}, max_replay_rows=40, seed=3
    )
    X, n, weight = with_weight.train[0], with_weight.n_replayed, with_weight.weight
    assert weight is not None and (weight[:n] == X["age"][:n]).all()
    assert len(weight) == len(X) > n and weight[n:] == pytest.approx(weight[:n].mean())
    again = make_rows(dataset, labelled(10), SPLIT, max_replay_rows=40, seed=3)
    assert again.train[0].equals(rows.train[0])
    assert not make_rows(dataset, labelled(10), SPLIT, max_replay_rows=40, seed=4).train[0].equals(rows.train[0])


def test_the_gate_judges_by_no_row_that_a_training_saw(dataset: Dataset) -> None:
    X, y = dataset.part("train")
    frame = pd.concat([people(60, seed=5), X[:60].assign(y=y[:60])], ignore_index=True)
    labels = labelled(0, frame=frame, audit=True)
    judging = for_gate(labels)
    assert judging[60:].any()
    rows = select_audit_rows(labels, dataset, max_share=1).rows
    assert rows.about["feedback_id"].tolist() == np.flatnonzero(judging[:60]).tolist()
    # A report for such a row, from before somebody drew it for an audit, has trained.
    seen = int(np.flatnonzero(judging)[0])
    reported = pd.concat([frame, frame.iloc[[seen]]], ignore_index=True)
    states = ["accepted"] * len(frame) + ["used"]
    both = labelled(0, frame=reported, audit=[True] * len(frame) + [False], state=states)
    assert seen not in select_audit_rows(both, dataset, max_share=1).rows.about["feedback_id"].tolist()
    assert select_audit_rows(labelled(5), dataset, max_share=1).rows.labels.empty


def test_an_unknown_label_stops_it_or_starts_from_scratch(dataset: Dataset) -> None:
    frame = people(20, seed=6)
    frame.loc[:2, "y"] = "perhaps"
    labels = labelled(0, frame=frame, state=["accepted"] * 15 + ["used"] * 5)
    settings = {"classes": ["no", "rare", "yes"], "init": "warm", "rejected": [], **LIMITS}
    message = refusal(choose, labels, dataset, new_classes="error", **settings)
    assert "retrain.new_classes=error: 3 accepted labels" in message and "'perhaps' (3)" in message
    choice = choose(labels, dataset, new_classes="scratch", **settings)
    assert choice.init == "scratch" and choice.new.tolist() == list(range(15)) and choice.left_out == {}
    assert choice.why_left_out == "none"
    assert choice.replayed.tolist() == list(range(15, 20))
    known = subset(labels, np.arange(3, 20))
    choice = choose(known, dataset, new_classes="error", **settings)
    assert choice.init == "warm" and len(choice.new) == 12 and len(choice.replayed) == 5


def test_settings_that_cannot_be_followed_are_named() -> None:
    good: dict[str, Any] = {"epoch_fraction": 0.2, "init": "warm", "shrink": 0.8, "new_classes": "error"}
    good |= {
        "max_share_per_annotator": 0.1,
        "max_range_factor": 10,
        "max_replay_rows": None,
        "min_labels": 1,
        "label_weight": 2,
    }
    check_settings(**good, inits=INITS)
    for key, value in (
        ("init", "hot"), ("new_classes", "learn"), ("epoch_fraction", 0), ("epoch_fraction", 1.5), ("shrink", "half"),
        ("max_share_per_annotator", None), ("max_range_factor", -1), ("max_replay_rows", 1.5), ("min_labels", 0),
        ("label_weight", 0), ("label_weight", 1.5), ("label_weight", None), ("max_share_per_annotator", np.inf),
        ("max_range_factor", np.nan),
    ):  # fmt: skip
        assert f"retrain.{key}={value}: " in refusal(check_settings, **{**good, key: value}, inits=INITS)
