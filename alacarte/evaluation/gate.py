"""May a challenger become the champion? A pure function of numbers. It returns the verdict and its reason in one sentence."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from alacarte.errors import UserError
from alacarte.evaluation.metrics import LOWER_IS_BETTER, PRIMARY, Comparison

Limits = Mapping[str, float | None]  # of metrics, by name; None is no limit
RARE = 0.05  # share of equal models that may be rejected for what they lose on the audit rows


@dataclass(frozen=True)
class Verdict:
    decision: str  # PROMOTE, HOLD or REJECT
    reason: str  # one sentence with the numbers
    checks: list[dict[str, Any]]  # metric, value, kind (floor or ceiling), limit, passed


def check_gate(
    *,
    rule: str = "paired",
    test: str = "auto",
    margin: float = 0.02,
    confidence_level: float = 0.95,
    strict: bool = False,
    min_audit_rows: int = 30,
    min_test_rows: int = 30,
    max_share_per_annotator: float = 0.5,
    floors: Limits | None = None,
    ceilings: Limits | None = None,
    **_: Any,
) -> None:
    """Raise UserError for settings that no model could be judged by: worth a call before an hour of training."""
    for key, number in (("min_audit_rows", min_audit_rows), ("min_test_rows", min_test_rows)):
        if not (_is_number(number) and number >= 1):
            raise UserError(f"gate.{key}={number}: expected a number of rows, at least 1")
    if not (_is_number(max_share_per_annotator) and 0 < max_share_per_annotator <= 1):
        raise UserError(f"gate.max_share_per_annotator={max_share_per_annotator}: expected a number above 0, at most 1")
    for key, value, allowed in (("rule", rule, ("paired", "point")), ("test", test, ("auto", "bootstrap", "mcnemar"))):
        if value not in allowed:
            raise UserError(f"gate.{key}={value}: expected {' or '.join(allowed)}")
    if not (_is_number(margin) and margin >= 0):
        raise UserError(f"gate.margin={margin}: expected a number of at least 0, in units of accuracy or R2")
    if not (_is_number(confidence_level) and 0.5 <= confidence_level < 1):
        raise UserError(
            f"gate.confidence_level={confidence_level}: expected a number from 0.5 to below 1, such as 0.95"
        )
    for key, other, limits in (("floors", "ceilings", floors), ("ceilings", "floors", ceilings)):
        for metric, limit in _set(limits):
            if not _is_number(limit):
                raise UserError(f"gate.{key}.{metric}={limit}: expected a number, or null for no limit")
            if (metric in LOWER_IS_BETTER) != (key == "ceilings"):
                better = "lower" if metric in LOWER_IS_BETTER else "higher"
                raise UserError(f"gate.{key}.{metric}: {metric} is better {better}; set gate.{other}.{metric}={limit}")


def decide(
    metrics: Mapping[str, float],
    *,
    task: str,
    baseline: Mapping[str, float],
    comparison: Comparison | None = None,
    audit: Comparison | int | None = None,
    audit_without: Mapping[str, Comparison | int] | None = None,
    rule: str = "paired",
    margin: float = 0.02,
    strict: bool = False,
    min_audit_rows: int = 30,
    floors: Limits | None = None,
    ceilings: Limits | None = None,
) -> Verdict:
    """Judge the challenger by its test `metrics`, without prefix.

    1. A floor or a ceiling missed: REJECT.
    2. No champion (`comparison` is None): PROMOTE if accuracy or R2 beats the `baseline` of a constant answer, else
       REJECT.
    3. rule "paired": a proved gain is PROMOTE; a loss that is proved, or larger than `margin`, is REJECT; all else HOLD.
       rule "point": the better number wins, however small the difference and the sample; HOLD only when equal.
    4. With `audit`, the comparison on audit rows (or their number, where they are too few to compare), the audit rows
       must prove the gain, and the test rows must not lose: see `_on_two_sets`. PROMOTE must hold again for each value
       of `audit_without`, the comparison without the rows of one annotator, else it is HOLD.
    """
    check_gate(rule=rule, margin=margin, min_audit_rows=min_audit_rows, floors=floors, ceilings=ceilings)
    checks = [_check("floor", metric, limit, metrics) for metric, limit in _set(floors)]
    checks += [_check("ceiling", metric, limit, metrics) for metric, limit in _set(ceilings)]
    missed = [check for check in checks if not check["passed"]]
    if missed:
        texts = ("{metric} {value:.4g} misses the {kind} {limit:.4g}".format(**check) for check in missed)
        return Verdict("REJECT", "; ".join(texts), checks)
    if comparison is None:
        return Verdict(*_first(metrics, baseline, task), checks)
    if audit is not None:
        rules = PRIMARY[task], rule, margin, strict, min_audit_rows
        decision, reason = _on_two_sets(comparison, audit, *rules)
        for annotator, others in (audit_without or {}).items() if decision == "PROMOTE" else ():
            again, why = _on_two_sets(comparison, others, *rules)
            if again != "PROMOTE":
                return Verdict("HOLD", _rests_on(annotator, audit, others, why), checks)
        return Verdict(decision, reason, checks)
    return Verdict(*_against_champion(comparison, PRIMARY[task], rule, margin), checks)


def _check(kind: str, metric: str, limit: float, metrics: Mapping[str, float]) -> dict[str, Any]:
    if metric not in metrics:
        near = difflib.get_close_matches(metric, metrics, n=1, cutoff=0)
        raise UserError(
            f"gate.{kind}s.{metric}={limit}: this model has no such metric; the nearest is {''.join(near)}, "
            f"all are {', '.join(sorted(metrics))}"
        )
    value = metrics[metric]
    passed = value >= limit if kind == "floor" else value <= limit  # false for NaN
    return {"metric": metric, "value": value, "kind": kind, "limit": limit, "passed": bool(passed)}


def _first(metrics: Mapping[str, float], baseline: Mapping[str, float], task: str) -> tuple[str, str]:
    metric, constant = PRIMARY[task], "the mean" if task == "regression" else "the majority class"
    if metric not in metrics:
        return "REJECT", f"no champion yet, and {metric} is not defined on test rows with a constant target"
    beats = metrics[metric] > baseline[metric]
    than = f"{'beats' if beats else 'does not beat'} {baseline[metric]:.4g} of {constant}"
    return "PROMOTE" if beats else "REJECT", f"no champion yet, and {metric} {metrics[metric]:.4g} {than}"


def _against_champion(c: Comparison, metric: str, rule: str, margin: float) -> tuple[str, str]:
    numbers = _numbers(c, metric)
    if c.wins + c.negative_flips == 0:
        return "HOLD", f"both models do equally well on each of {c.n:,} rows"
    if rule == "point":
        decision = "PROMOTE" if c.gain > 0 else "REJECT" if c.gain < 0 else "HOLD"
        return decision, f"{numbers}; gate.rule=point takes the better number"
    if c.low > 0 or c.high < 0:
        return "PROMOTE" if c.low > 0 else "REJECT", f"{numbers} is proved at {c.confidence_level:.4g}"
    if c.gain < -margin:
        return "REJECT", f"{numbers} is beyond the margin {margin:.4g}"
    rows = rows_needed(c)
    return "HOLD", f"{numbers} is not proved" + (f"; about {rows:,} rows would decide it" if rows else "")


def _on_two_sets(
    old: Comparison,
    new: Comparison | int,
    metric: str,
    rule: str,
    margin: float,
    strict: bool,
    min_audit_rows: int,
) -> tuple[str, str]:
    """The test rows are what the model did well, the audit rows what is asked of it now.

    REJECT: a loss on the test rows beyond the margin; or one on the audit rows that is proved, or that is beyond the margin
    and that equal models come to in at most RARE of all cases: of a hundred rows, two or three lost by chance are no news.
    PROMOTE: a proved gain on the audit rows, and with `strict` proof that the test rows lose less than the margin.
    HOLD: all between, and fewer than `min_audit_rows` audit rows. rule "point" takes the better number for proof.
    """
    lost = _numbers(old, metric, "test rows")
    if old.gain < -margin:
        return "REJECT", f"{lost} is beyond the margin {margin:.4g}"
    n = new if isinstance(new, int) else new.n
    if isinstance(new, int) or n < min_audit_rows:
        more = 2 * (min_audit_rows - n)
        return "HOLD", f"{n} audit rows can judge, {min_audit_rows} must: label about {more} more, half of them train"
    won = _numbers(new, metric, "audit rows")
    kept = f"{lost} is within the margin {margin:.4g}" if old.gain < 0 else lost
    beyond = new.gain < -margin and new.p_value <= 2 * RARE  # p counts gains of that size too
    if new.high < 0 or beyond:
        rare = f"beyond the margin {margin:.4g}, which equal models rarely are (p = {new.p_value:.2g})"
        return "REJECT", f"{won} is {'proved' if new.high < 0 else rare}"
    if rule == "point":
        decision = "PROMOTE" if new.gain > 0 else "REJECT" if new.gain < 0 else "HOLD"
        return decision, f"{won}; gate.rule=point takes the better number; {kept}"
    if new.low <= 0:
        needed = rows_needed(new) if new.gain else None
        decides = f"; about {2 * max(needed - n, 1):,} more audit labels would decide it" if needed else ""
        return "HOLD", f"{won} is not proved{decides}; {kept}"
    if strict and old.low <= -margin:
        return (
            "HOLD",
            f"{won} is proved; {lost} is not proved to be within the margin {margin:.4g}, which strict asks for",
        )
    return "PROMOTE", f"{won} is proved at {new.confidence_level:.4g}; {kept}"


def _rests_on(annotator: str, audit: Comparison | int, others: Comparison | int, why: str) -> str:
    n, n_others = (one if isinstance(one, int) else one.n for one in (audit, others))
    all_of = "all" if n_others == 0 else f"{n - n_others:,} of"
    return (
        f"the gain rests on one annotator, {annotator}, who labelled {all_of} {n:,} audit rows; without these rows, {why}: "
        "let other annotators label audit rows too"
    )


def _numbers(c: Comparison, metric: str, rows: str = "rows") -> str:
    size, low, high = (c.gain, c.low, c.high) if c.gain >= 0 else (-c.gain, -c.high, -c.low)
    return (
        f"{metric} {'gain' if c.gain >= 0 else 'loss'} {size:.4g} [{low:.4g}, {high:.4g}] "
        f"on {c.n:,} {rows} ({c.wins:,} won, {c.negative_flips:,} lost)"
    )


def rows_needed(comparison: Comparison, power: float = 0.8) -> int | None:
    """Test rows on which a difference of the size observed is proved with probability `power`; None beyond a billion.

    The normal approximation ((z_level + z_power) * spread / gain) ** 2, to two digits.
    """
    z = NormalDist().inv_cdf((1 + comparison.confidence_level) / 2) + NormalDist().inv_cdf(power)
    if z * comparison.spread > 3e4 * abs(comparison.gain):
        return None
    return int(float(f"{(z * comparison.spread / comparison.gain) ** 2:.1e}"))


def _set(limits: Limits | None) -> list[tuple[str, Any]]:
    return [(metric, limit) for metric, limit in (limits or {}).items() if limit is not None]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
