"""The paired tests keep their error rates, and the gate says what it promises."""

import dataclasses
import math

import numpy as np
import pytest
from answers import decisions, zero_one

from alacarte.errors import UserError
from alacarte.evaluation.gate import check_gate, decide, rows_needed
from alacarte.evaluation.metrics import Comparison, paired_test

# What a test before left to the garbage collector is no warning of this code.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::ResourceWarning")]

# --- the paired tests ---


@pytest.mark.parametrize("test", ["bootstrap", "mcnemar"])
def test_equal_models_are_rarely_promoted_and_clear_differences_are_seen(test):
    # Nominal 0.025, measured 0.010 to 0.028; 300 repeats of 0.025 exceed 0.05 in 4 of a thousand seeds.
    for n, differing in ((360, 0.1), (1000, 0.04)):
        assert decisions(test, n, differing / 2, differing / 2, 300)["PROMOTE"] <= 0.05
    assert decisions(test, 1000, 0.08, 0.03, 100)["PROMOTE"] >= 0.95
    assert decisions(test, 1000, 0.03, 0.08, 100)["REJECT"] >= 0.95


def test_the_better_number_promotes_half_of_the_equal_models():
    assert 0.35 < decisions("mcnemar", 360, 0.05, 0.05, 400, rule="point")["PROMOTE"] < 0.6


def test_bootstrap_of_numbers_keeps_its_level():
    rng, proved = np.random.default_rng(3), 0
    for seed in range(200):
        a, b = rng.normal(size=(2, 150)) ** 2
        comparison = paired_test(a, b, n_resamples=500, seed=seed)
        assert comparison.test == "bootstrap"
        proved += comparison.low > 0 or comparison.high < 0
    assert 2 <= proved <= 22  # 10 expected; beyond this with probability below 0.001


def test_bootstrap_and_mcnemar_agree():
    for won, lost in ((30, 10), (18, 22), (5, 40)):
        champion, challenger = zero_one(500, won, lost)
        exact, drawn = (paired_test(champion, challenger, test=test) for test in ("mcnemar", "bootstrap"))
        assert exact.gain == drawn.gain == pytest.approx((won - lost) / 500)
        assert (exact.wins, exact.negative_flips) == (drawn.wins, drawn.negative_flips) == (won, lost)
        assert exact.low <= drawn.low + 0.002 and drawn.high - 0.002 <= exact.high  # exact is the wider one
        assert [exact.low, exact.high] == pytest.approx([drawn.low, drawn.high], abs=0.02)
        assert (exact.low > 0, exact.high < 0) == (drawn.low > 0, drawn.high < 0)
        assert exact.p_value == pytest.approx(drawn.p_value, abs=0.08)
        # Drawing rows one by one gives what drawing counts gives.
        rows = paired_test(champion * 0.5, challenger * 0.5, test="bootstrap")
        assert [2 * rows.low, 2 * rows.high] == pytest.approx([drawn.low, drawn.high], abs=0.005)


@pytest.mark.parametrize(("won", "lost"), [(5, 0), (6, 0), (9, 2), (10, 2), (0, 6), (30, 14), (30, 15), (30, 16)])
def test_the_interval_of_mcnemar_excludes_zero_exactly_when_p_is_small(won, lost):
    exact = paired_test(*zero_one(100, won, lost), test="mcnemar")
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1)) / 2 ** (won + lost)
    assert exact.p_value == pytest.approx(min(1, 2 * tail))
    assert (exact.low > 0 or exact.high < 0) == (exact.p_value < 0.05)
    assert exact.low <= exact.gain <= exact.high


@pytest.mark.parametrize(("won", "lost"), [(0.02, 0.0), (0.08, 0.01), (0.05, 0.05)])
def test_the_interval_of_mcnemar_holds_the_true_difference(won, lost):
    rng, held = np.random.default_rng(5), 0
    for _ in range(200):
        wins, flips, _ = rng.multinomial(360, [won, lost, 1 - won - lost])
        comparison = paired_test(*zero_one(360, wins, flips), test="mcnemar")
        held += comparison.low <= won - lost <= comparison.high
    assert held >= 180  # 190 or more expected


def test_many_rows_are_averaged_in_blocks_with_the_same_spread():
    gains = np.random.default_rng(0).standard_exponential(60_001)
    wide = paired_test(gains, np.zeros_like(gains))
    assert (wide.high - wide.low) / 2 == pytest.approx(1.96 * wide.spread / np.sqrt(gains.size), rel=0.05)
    assert wide.low < gains.mean() < wide.high


def test_two_models_that_never_differ_prove_nothing():
    for test in ("mcnemar", "bootstrap"):
        same = paired_test(*zero_one(50, 0, 0), test=test)
        assert (same.gain, same.low, same.high, same.p_value) == (0, 0, 0, 1)
        verdict = decide({}, task="classification", baseline={}, comparison=same)
        assert verdict.decision == "HOLD" and "equally well on each of 50 rows" in verdict.reason


def test_a_comparison_repeats_and_mcnemar_refuses_numbers():
    a, b = np.random.default_rng(0).normal(size=(2, 100))
    assert paired_test(a, b) == paired_test(a, b)
    with pytest.raises(UserError, match=r"gate\.test=mcnemar"):
        paired_test(a, b, test="mcnemar")


# --- the gate ---

GOOD = {"accuracy": 0.95, "f1_macro": 0.94, "log_loss": 0.2}
COMPARISON = Comparison("mcnemar", 0.95, 360, 0.012, -0.004, 0.027, 0.1, 9, 5, 0.2)


def judge(metrics=GOOD, task="classification", base=0.1, comparison=None, **settings):
    return decide(metrics, task=task, baseline={"accuracy": base, "r2": base}, comparison=comparison, **settings)


@pytest.mark.parametrize(
    ("gain", "low", "high", "rule", "decision"),
    [
        (0.03, 0.001, 0.06, "paired", "PROMOTE"),
        (0.03, 0.0, 0.06, "paired", "HOLD"),
        (0.0, -0.01, 0.01, "paired", "HOLD"),
        (-0.02, -0.05, 0.01, "paired", "HOLD"),
        (-0.021, -0.05, 0.01, "paired", "REJECT"),
        (-0.005, -0.009, -0.001, "paired", "REJECT"),
        (0.001, -0.1, 0.1, "point", "PROMOTE"),
        (0.0, -0.1, 0.1, "point", "HOLD"),
        (-0.001, -0.1, 0.1, "point", "REJECT"),
    ],
)
def test_the_rules(gain, low, high, rule, decision):
    comparison = dataclasses.replace(COMPARISON, gain=gain, low=low, high=high)
    assert judge(comparison=comparison, rule=rule).decision == decision


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
    assert 0.7 < decisions("mcnemar", rows, 12 / 360, 8 / 360, 300)["PROMOTE"] < 0.88


def on_two_sets(old: tuple[int, int], new: tuple[int, int], n: int, **settings):
    """The verdict where so many of 360 test rows and of n audit rows are won and lost."""
    pair = [paired_test(*zero_one(rows, *counts)) for rows, counts in ((360, old), (n, new))]
    return judge(comparison=pair[0], audit=pair[1], **settings)


@pytest.mark.parametrize(
    ("old", "new", "decision", "words"),
    [
        ((5, 5), (14, 3), "PROMOTE", "audit rows (14 won, 3 lost) is proved"),
        ((3, 10), (14, 3), "PROMOTE", "is within the margin 0.02"),
        ((2, 10), (14, 3), "REJECT", "on 360 test rows (2 won, 10 lost) is beyond the margin 0.02"),
        (
            (5, 5),
            (7, 10),
            "HOLD",
            "is not proved; about",
        ),  # three points lost, and of equal models one in three does so
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
    def judged(without: dict[str, tuple[int, int, int]], **settings):
        others = {name: paired_test(*zero_one(n, won, lost)) for name, (n, won, lost) in without.items()}
        return on_two_sets((5, 5), (24, 3), 120, audit_without=others, **settings)

    robust = {"token:alice": (80, 16, 2), "token:bob": (80, 16, 2), "token:carol": (80, 16, 2)}
    assert judged(robust).decision == "PROMOTE"
    verdict = judged(robust | {"token:eve": (60, 2, 2)})
    assert verdict.decision == "HOLD" and "rests on one annotator, token:eve, who labelled 60 of 120" in verdict.reason
    assert "on 60 audit rows (2 won, 2 lost) is not proved" in verdict.reason and "other annotators" in verdict.reason
    assert judged(robust | {"token:eve": (60, 2, 2)}, rule="point").decision == "HOLD"
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


@pytest.mark.parametrize("n", [30, 100, 400])
@pytest.mark.parametrize("differing", [0.06, 0.2])
def test_few_audit_rows_reject_few_equal_models(n, differing):
    draw, counts = np.random.default_rng(n), {"PROMOTE": 0, "HOLD": 0, "REJECT": 0}
    for _ in range(400):
        wins, flips, _ = draw.multinomial(n, [differing / 2, differing / 2, 1 - differing])
        counts[on_two_sets((5, 5), (int(wins), int(flips)), n).decision] += 1
    assert counts["REJECT"] <= 34  # 20 where the exact test is as loose as it may be; 34 come once in a thousand
    assert counts["PROMOTE"] <= 20


def test_without_a_champion_the_constant_answer_must_be_beaten():
    assert judge(base=0.94).decision == "PROMOTE"
    assert judge(base=0.95).decision == "REJECT"
    assert judge().reason == "no champion yet, and accuracy 0.95 beats 0.1 of the majority class"
    assert judge({"r2": -0.1}, "regression", base=-0.01).decision == "REJECT"
    undefined = judge({"rmse": 1.0}, "regression")
    assert undefined.decision == "REJECT" and "r2 is not defined" in undefined.reason


def test_a_missed_floor_or_ceiling_rejects_and_all_are_recorded():
    better = dataclasses.replace(COMPARISON, gain=0.1, low=0.05, high=0.2)
    limits = {"floors": {"accuracy": 0.96, "f1_macro": 0.5, "r2": None}, "ceilings": {"log_loss": 0.1}}
    verdict = judge(comparison=better, **limits)
    assert verdict.decision == "REJECT"
    assert verdict.reason == "accuracy 0.95 misses the floor 0.96; log_loss 0.2 misses the ceiling 0.1"
    assert [(check["metric"], check["passed"]) for check in verdict.checks] == [
        ("accuracy", False), ("f1_macro", True), ("log_loss", False),
    ]  # fmt: skip
    assert judge(comparison=better, floors={"accuracy": 0.95}, ceilings={"log_loss": 0.2}).decision == "PROMOTE"
    assert judge({"accuracy": float("nan")}, comparison=better, floors={"accuracy": 0.5}).decision == "REJECT"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"floors": {"f1_marco": 0.9}}, r"gate.floors.f1_marco=0.9: .*nearest is f1_macro, all are accuracy"),
        ({"floors": {"r2": 0.9}}, "gate.floors.r2=0.9: this model has no such metric"),
        ({"floors": {"log_loss": 0.3}}, r"log_loss is better lower; set gate.ceilings.log_loss=0.3"),
        ({"ceilings": {"accuracy": 0.3}}, r"accuracy is better higher; set gate.floors.accuracy=0.3"),
        ({"floors": {"accuracy": "high"}}, "gate.floors.accuracy=high: expected a number"),
        ({"rule": "pared"}, "gate.rule=pared: expected paired or point"),
        ({"margin": -0.1}, "gate.margin=-0.1"),
        ({"margin": None}, "gate.margin=None"),
        ({"min_audit_rows": 0}, "gate.min_audit_rows=0"),
    ],
)
def test_mistaken_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        judge(**settings)


def test_the_whole_gate_is_checked_before_any_model_is():
    check_gate(
        rule="paired", test="auto", margin=0, confidence_level=0.9, floors={"accuracy": None}, slices=[], dry_run=False
    )
    for settings in ({"test": "ttest"}, {"confidence_level": 95}, {"confidence_level": True}, {"confidence_level": "0.95"},
                     {"min_test_rows": 0}, {"max_share_per_annotator": 0}):  # fmt: skip
        with pytest.raises(UserError, match=r"gate\.(test|confidence_level|min_test_rows|max_share_per_annotator)="):
            check_gate(**settings)
