"""The gate says what it promises."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from answers import OWN, compared, decisions, zero_one

from alacarte.errors import UserError
from alacarte.evaluation import comparison as comparisons
from alacarte.evaluation.comparison import Comparison, measure_signal, paired_test
from alacarte.evaluation.gate import check_gate, check_metric, decide, rows_needed
from alacarte.evaluation.metrics import make_answers

# What a test before left to the garbage collector is no warning of this code.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::ResourceWarning")]

GOOD = {"accuracy": 0.95, "f1_macro": 0.94, "log_loss": 0.2}
COMPARISON = Comparison("mcnemar", 0.95, 360, 0.012, -0.004, 0.027, 0.1, 9, 5, 0.2)


def judge(metrics=GOOD, comparison=None, **settings):
    return decide(metrics, task="classification", comparison=comparison, **settings)


@pytest.mark.parametrize(
    ("gain", "low", "high", "decision"),
    [
        (0.03, 0.001, 0.06, "PROMOTE"), (0.03, 0.0, 0.06, "HOLD"), (0.0, -0.01, 0.01, "HOLD"), (-0.02, -0.05, 0.01, "HOLD"),
        (-0.021, -0.05, 0.01, "REJECT"), (-0.005, -0.009, -0.001, "REJECT"),
    ],
)  # fmt: skip
def test_the_rules(gain, low, high, decision):
    comparison = dataclasses.replace(COMPARISON, gain=gain, low=low, high=high)
    assert judge(comparison=comparison).decision == decision


def test_hold_says_by_how_much_and_how_many_rows_would_decide():
    reason = judge(comparison=COMPARISON).reason
    assert reason == (
        "accuracy gain 0.012 [-0.004, 0.027] on 360 rows (9 won, 5 lost) is not proved; about 2,200 rows would decide it"
    )
    loss = dataclasses.replace(COMPARISON, gain=-0.012, low=-0.027, high=0.004)
    assert "accuracy loss 0.012 [-0.004, 0.027]" in judge(comparison=loss).reason
    equal = dataclasses.replace(COMPARISON, gain=0.0)
    assert rows_needed(equal) is None and "would decide" not in judge(comparison=equal).reason


def test_the_rows_that_would_decide_do_so_four_times_in_five():
    comparison = paired_test(*zero_one(360, 12, 8))
    rows = rows_needed(comparison)
    assert 0.7 < decisions("mcnemar", rows, 12 / 360, 8 / 360, 150)["PROMOTE"] < 0.9


def on_two_sets(old: tuple[int, int], new: tuple[int, int], n: int, **settings):
    """The verdict where so many of 360 test rows and of n audit rows are won and lost."""
    pair = [compared(rows, *counts) for rows, counts in ((360, old), (n, new))]
    return judge(comparison=pair[0], audit=pair[1], **settings)


@pytest.mark.parametrize(
    ("old", "new", "decision", "words"),
    [
        ((5, 5), (14, 3), "PROMOTE", "audit rows (14 won, 3 lost) is proved"),
        ((3, 10), (14, 3), "PROMOTE", "is within the margin 0.02"),
        ((2, 10), (14, 3), "REJECT", "audit rows (14 won, 3 lost): the champion stays; train otherwise, or judge"),
        ((5, 5), (7, 10), "HOLD", "is not proved; about"),  # of equal models one in three loses so much
        ((5, 5), (2, 8), "HOLD", "is not proved; about"),
        ((5, 5), (2, 9), "REJECT", "beyond the margin 0.02, which equal models rarely are (p = 0.065)"),
        ((5, 5), (1, 9), "REJECT", "is proved"),
        ((5, 5), (6, 6), "HOLD", "is not proved"),
    ],
)
def test_the_audit_rows_prove_the_gain_and_the_test_rows_must_not_lose(old, new, decision, words):
    verdict = on_two_sets(old, new, 100)
    assert verdict.decision == decision and words in verdict.reason


def test_a_promotion_must_hold_without_each_single_annotator():
    def judged(without: dict[str, tuple[int, int, int]]):
        others = {name: paired_test(*zero_one(n, won, lost)) for name, (n, won, lost) in without.items()}
        return on_two_sets((5, 5), (24, 3), 120, audit_without=others)

    robust = {"token:alice": (80, 16, 2), "token:bob": (80, 16, 2), "token:carol": (80, 16, 2)}
    assert judged(robust).decision == "PROMOTE"
    verdict = judged(robust | {"token:eve": (60, 2, 2)})
    assert verdict.decision == "HOLD" and "rests on one annotator, token:eve, who labelled 60 of 120" in verdict.reason
    assert "on 60 audit rows (2 won, 2 lost) is not proved" in verdict.reason and "other annotators" in verdict.reason
    alone = judge(comparison=COMPARISON, audit=paired_test(*zero_one(171, 60, 0)), audit_without={"token:eve": 0})
    assert alone.decision == "HOLD" and "who labelled all 171 audit rows" in alone.reason
    # A verdict that is no promotion says what it says, and one on the test rows alone belongs to no annotator.
    assert on_two_sets((2, 10), (24, 3), 120, audit_without={"token:eve": 0}).decision == "REJECT"
    won = dataclasses.replace(COMPARISON, gain=0.03, low=0.001, high=0.06)
    assert judge(comparison=won, audit_without={"token:eve": 0}).decision == "PROMOTE"


def test_strict_asks_for_proof_on_the_test_rows():
    assert on_two_sets((3, 10), (14, 3), 100, strict=True).decision == "HOLD"
    assert on_two_sets((12, 3), (14, 3), 100, strict=True).decision == "PROMOTE"
    too_few = judge(comparison=COMPARISON, audit=12)
    assert too_few.decision == "HOLD" and "12 audit rows can judge, 30 must: label about 36 more" in too_few.reason


@pytest.mark.parametrize(("n", "differing"), [(30, 0.2), (100, 0.06), (400, 0.2)])
def test_few_audit_rows_reject_few_equal_models(n, differing):
    draw, counts = np.random.default_rng(n), {"PROMOTE": 0, "HOLD": 0, "REJECT": 0}
    for _ in range(200):
        wins, flips, _ = draw.multinomial(n, [differing / 2, differing / 2, 1 - differing])
        counts[on_two_sets((5, 5), (int(wins), int(flips)), n).decision] += 1
    assert counts["REJECT"] <= 20  # 10 where the exact test is as loose as it may be; 21 come once in a thousand
    assert counts["PROMOTE"] <= 13


def first(n: int, signal: float, task: str = "classification", proba: bool = True, rare: float = 0.3, seed: int = 0):
    """The signal of one model of n rows: its scores are `signal` times the truth, and noise."""
    rng = np.random.default_rng(seed)
    if task == "regression":
        truth = rng.normal(size=n)
        return measure_signal(make_answers(truth, signal * truth, None, None, task), pd.Series([0.0]))
    truth, noise = (rng.random(n) < rare).astype(int), rng.normal(size=n)
    scores = 1 / (1 + np.exp(-signal * truth - noise))
    columns = np.column_stack([1 - scores, scores]) if proba else None
    answers = (scores > np.quantile(scores, 1 - rare)).astype(int)
    return measure_signal(make_answers(truth, answers, columns, [0, 1], task), pd.Series(truth))


@pytest.mark.parametrize("settings", [{}, {"proba": False}, {"rare": 0.03}, {"task": "regression"}])
def test_the_first_champion_is_proved_to_be_better_than_chance(settings):
    good, noise = first(600, 3.0 if "task" not in settings else 0.5, **settings), first(600, 0.0, **settings)
    verdict = judge(signal=good)
    assert verdict.decision == "PROMOTE" and verdict.reason.startswith("no champion yet, and ")
    verdict = judge(signal=noise)
    assert verdict.decision == "REJECT" and "is not proved to be better than chance" in verdict.reason
    assert "train with more rows, other columns or another model=" in verdict.reason


def test_a_first_champion_on_noise_is_rare(monkeypatch):
    monkeypatch.setattr(comparisons, "DRAWS", 200)
    accepted = sum(judge(signal=first(200, 0.0, seed=seed)).decision == "PROMOTE" for seed in range(40))
    assert accepted <= 5  # 1 expected; 6 come less than once in a thousand


def test_the_same_target_in_all_rows_tells_nothing_and_a_lost_champion_is_named():
    same = measure_signal(make_answers([1, 1], [1, 1], None, [0, 1], "classification"), pd.Series([0, 1]))
    verdict = judge(signal=same)
    assert verdict.decision == "REJECT" and "all test rows have the same target" in verdict.reason
    verdict = judge(signal=first(600, 3.0), no_champion="the champion, version 1, cannot be loaded (it is gone)")
    assert verdict.reason.startswith("the champion, version 1, cannot be loaded (it is gone), and roc_auc 0.9")


def test_a_missed_floor_or_ceiling_rejects_and_all_are_recorded():
    better = dataclasses.replace(COMPARISON, gain=0.1, low=0.05, high=0.2)
    limits = {"floors": {"accuracy": 0.96, "f1_macro": 0.5, "r2": None}, "ceilings": {"log_loss": 0.1}}
    verdict = judge(comparison=better, **limits)
    assert verdict.decision == "REJECT"
    assert verdict.reason == (
        "accuracy 0.95 misses the floor 0.96; log_loss 0.2 misses the ceiling 0.1: "
        "train a better model, or change gate.floors.accuracy and gate.ceilings.log_loss"
    )
    assert [(check["metric"], check["passed"]) for check in verdict.checks] == [
        ("accuracy", False), ("f1_macro", True), ("log_loss", False),
    ]  # fmt: skip
    assert judge(comparison=better, floors={"accuracy": 0.95}, ceilings={"log_loss": 0.2}).decision == "PROMOTE"
    assert judge({"accuracy": float("nan")}, comparison=better, floors={"accuracy": 0.5}).decision == "REJECT"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"floors": {"f1_marco": 0.9}}, r"gate.floors.f1_marco=0.9: there is no such metric: did you mean 'f1_macro'"),
        ({"floors": {"ece": 0.3}, "ceilings": {"ece": None}}, r"ece is better lower; set gate.ceilings.ece=0.3 instead"),
        ({"floors": {"brier": 0.3}}, r"brier is better lower; set \+gate.ceilings.brier=0.3 instead"),
        ({"ceilings": {"r2": 0.3}, "floors": {"r2": None}}, r"r2 is better higher; set gate.floors.r2=0.3 instead"),
        ({"floors": {"accuracy": "high"}}, "gate.floors.accuracy=high: expected a number"),
        ({"metric": "rocauc"}, "gate.metric=rocauc: there is no such metric: did you mean 'roc_auc'"),
        ({"margin": -0.1}, "gate.margin=-0.1"),
        ({"margin": None}, "gate.margin=None"),
        ({"min_audit_rows": 0}, "gate.min_audit_rows=0"),
        ({"confidence_level": 95}, "gate.confidence_level=95"),
        ({"confidence_level": True}, "gate.confidence_level=True"),
        ({"confidence_level": "0.95"}, "gate.confidence_level=0.95"),
        ({"min_test_rows": 0}, "gate.min_test_rows=0"),
        ({"max_share_per_annotator": 0}, "gate.max_share_per_annotator=0"),
    ],
)  # fmt: skip
def test_mistaken_settings_are_named_before_any_model_is_judged(settings, message):
    with pytest.raises(UserError, match=message):
        check_gate(**settings, metrics=OWN)


def test_settings_that_fit_are_taken_and_a_metric_of_another_task_is_named():
    check_gate(
        margin=0, metric="brier", ceilings={"brier": 0.2}, floors={"r2": 0.5}, slices=[], dry_run=False, metrics=OWN
    )
    with pytest.raises(UserError, match=r"gate.floors.r2=0.9: this model has no such metric: there is accuracy, "):
        judge(floors={"r2": 0.9})


def test_a_champion_that_another_metric_chose_is_not_judged_by_the_default():
    for metric, tags in ((None, {}), (None, {"gate.metric": "default"}), ("roc_auc", {"gate.metric": "cost"})):
        check_metric(metric, tags)
    with pytest.raises(UserError, match=r"gate.metric=null: the champion was judged by cost: add gate.metric=cost"):
        check_metric(None, {"gate.metric": "cost"})
    with pytest.raises(UserError, match=r"add 'gate.metric=my cost', and"):
        check_metric(None, {"gate.metric": "my cost"})
