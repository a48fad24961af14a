"""May a challenger become the champion? A pure function of numbers. It returns the verdict and its reason in one sentence."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from alacarte.errors import UserError, check_number, nearest
from alacarte.evaluation.comparison import Comparison, Signal
from alacarte.evaluation.metrics import BUILT_IN, PRIMARY, Metrics, is_lower_better

Limits = Mapping[str, float | None]  # of metrics, by name; None is no limit
RARE = 0.05  # share of equal models that may be rejected for what they lose on the audit rows
STAYS = "the champion stays; train with other settings, more rows or another model="
JUDGE_AGAIN = "the champion stays; train otherwise, or judge again with a larger gate.margin"


@dataclass(frozen=True)
class Verdict:
    decision: str  # PROMOTE, HOLD or REJECT
    reason: str  # one sentence with the numbers; after a REJECT also what to do next
    checks: list[dict[str, Any]]  # metric, value, kind (floor or ceiling), limit, passed


def check_gate(
    *,
    metric: str | None = None,
    margin: float = 0.02,
    confidence_level: float = 0.95,
    min_audit_rows: int = 30,
    min_test_rows: int = 30,
    max_share_per_annotator: float = 0.5,
    floors: Limits | None = None,
    ceilings: Limits | None = None,
    metrics: Metrics | None = None,
    **_: Any,
) -> None:
    """Raise UserError for settings by which no model can be judged, before an hour of training. `metrics` are the own ones."""
    for key, value, is_valid, expected in (
        ("min_audit_rows", min_audit_rows, lambda n: n >= 1, "a number of rows, at least 1"),
        ("min_test_rows", min_test_rows, lambda n: n >= 1, "a number of rows, at least 1"),
        ("max_share_per_annotator", max_share_per_annotator, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
        ("margin", margin, lambda x: x >= 0, "a number of at least 0, in units of gate.metric"),
        ("confidence_level", confidence_level, lambda x: 0.5 <= x < 1, "a number from 0.5 to below 1, such as 0.95"),
    ):
        check_number(f"gate.{key}", value, is_valid, expected)
    known = {*BUILT_IN, *(metrics or {})}
    if metric is not None and metric not in known:
        raise UserError(f"gate.metric={metric}: there is no such metric: {nearest(metric, known)}")
    limits = {"floors": floors or {}, "ceilings": ceilings or {}}
    for key, other in (("floors", "ceilings"), ("ceilings", "floors")):
        for name, limit in _set(limits[key]):
            check_number(f"gate.{key}.{name}", limit, lambda _: True, "a number, or null for no limit")
            if name not in known:
                raise UserError(f"gate.{key}.{name}={limit}: there is no such metric: {nearest(name, known)}")
            if is_lower_better(name, metrics) != (key == "ceilings"):
                better = "lower" if key == "floors" else "higher"
                setting = f"{'' if name in limits[other] else '+'}gate.{other}.{name}={limit}"  # + adds a key to those of conf/
                raise UserError(f"gate.{key}.{name}: {name} is better {better}; set {setting} instead")


def decide(
    scores: Mapping[str, float],
    *,
    task: str,
    signal: Signal | None = None,
    comparison: Comparison | None = None,
    audit: Comparison | int | None = None,
    audit_without: Mapping[str, Comparison | int] | None = None,
    no_champion: str = "no champion yet",
    margin: float = 0.02,
    strict: bool = False,
    min_audit_rows: int = 30,
    floors: Limits | None = None,
    ceilings: Limits | None = None,
) -> Verdict:
    """Judge the challenger by the metrics of its test rows (`scores`, without prefix).

    1. A floor or a ceiling missed: REJECT.
    2. No champion (`comparison` is None): PROMOTE if `signal` is proved to be above chance, else REJECT.
    3. A proved gain is PROMOTE; a loss that is proved, or larger than `margin`, is REJECT; all else HOLD.
    4. With `audit`, the comparison on audit rows (or their number, where they are too few to compare), the audit rows
       must prove the gain, and the test rows must not lose: see `_on_two_sets`. PROMOTE must hold again for each value
       of `audit_without`, the comparison without the rows of one annotator, else it is HOLD.
    """
    checks = [_check("floor", metric, limit, scores) for metric, limit in _set(floors)]
    checks += [_check("ceiling", metric, limit, scores) for metric, limit in _set(ceilings)]
    if missed := [check for check in checks if not check["passed"]]:
        texts = ["{metric} {value:.4g} misses the {kind} {limit:.4g}".format(**check) for check in missed]
        limits = " and ".join("gate.{kind}s.{metric}".format(**check) for check in missed)
        return Verdict("REJECT", f"{'; '.join(texts)}: train a better model, or change {limits}", checks)
    if comparison is None:
        return Verdict(*_first(signal, no_champion), checks)
    if audit is None:
        return Verdict(*_against_champion(comparison, PRIMARY[task], margin), checks)
    rules = PRIMARY[task], margin, strict, min_audit_rows
    decision, reason = _on_two_sets(comparison, audit, *rules)
    for annotator, others in (audit_without or {}).items() if decision == "PROMOTE" else ():
        again, why = _on_two_sets(comparison, others, *rules)
        if again != "PROMOTE":
            return Verdict("HOLD", _rests_on(annotator, _n(audit), _n(others), why), checks)
    return Verdict(decision, reason, checks)


def check_metric(metric: str | None, champion: Mapping[str, str]) -> None:
    """UserError if the champion, with these tags, was judged by a metric that somebody chose, and now none is chosen."""
    before = champion.get("gate.metric", "default")
    if metric is None and before != "default":
        setting = shlex.quote(f"gate.metric={before}")
        raise UserError(
            f"gate.metric=null: the champion was judged by {before}: add {setting}, and metrics=NAME if it is a "
            "metric of your own; or choose another gate.metric"
        )


def _check(kind: str, metric: str, limit: float, scores: Mapping[str, float]) -> dict[str, Any]:
    if metric not in scores:
        raise UserError(f"gate.{kind}s.{metric}={limit}: this model has no such metric: {nearest(metric, scores)}")
    value = scores[metric]
    passed = value >= limit if kind == "floor" else value <= limit  # false for NaN
    return {"metric": metric, "value": value, "kind": kind, "limit": limit, "passed": bool(passed)}


def _first(signal: Signal | None, no_champion: str) -> tuple[str, str]:
    if signal is None:
        return (
            "REJECT",
            f"{no_champion}, and all test rows have the same target: use more rows or another data.split.seed",
        )
    s = signal
    name = "the gain in r2 over the mean" if s.metric == "r2" else s.metric  # it can be above 1
    value = f"{no_champion}, and {name} {s.value:.4g} [{s.low:.4g}, {s.high:.4g}] on {s.n:,} rows"
    if s.low > s.chance:
        return "PROMOTE", f"{value} is better than chance ({s.chance:g})"
    advice = "train with more rows, other columns or another model="
    return "REJECT", f"{value} is not proved to be better than chance ({s.chance:g}): {advice}"


def _against_champion(c: Comparison, metric: str, margin: float) -> tuple[str, str]:
    numbers = _numbers(c, metric)
    if c.gain == c.spread == 0:
        return "HOLD", f"both models do equally well on each of {c.n:,} rows"
    if c.low > 0:
        return "PROMOTE", f"{numbers} is proved at {c.confidence_level:.4g}"
    if c.high < 0:
        return "REJECT", f"{numbers} is proved at {c.confidence_level:.4g}: {STAYS}"
    if c.gain < -margin:
        return "REJECT", f"{numbers} is beyond the margin {margin:.4g}: {STAYS}"
    rows = rows_needed(c)
    return "HOLD", f"{numbers} is not proved" + (f"; about {rows:,} rows would decide it" if rows else "")


def _on_two_sets(
    old: Comparison, new: Comparison | int, metric: str, margin: float, strict: bool, min_audit_rows: int
) -> tuple[str, str]:
    """The test rows show the original task, the audit rows show today's requests.

    REJECT: a loss on the test rows beyond the margin; or one on the audit rows that is proved, or that is beyond the margin
    and that at most RARE of all equal models have: of a hundred rows, two or three are lost by chance.
    PROMOTE: a proved gain on the audit rows, and with `strict` proof that the test rows lose less than the margin.
    HOLD: all between, and fewer than `min_audit_rows` audit rows.
    """
    lost = _numbers(old, metric, "test rows")
    if old.gain < -margin:
        audit = "" if isinstance(new, int) else f"; {_numbers(new, metric, 'audit rows')}"
        return "REJECT", f"{lost} is beyond the margin {margin:.4g}{audit}: {JUDGE_AGAIN}"
    if isinstance(new, int) or new.n < min_audit_rows:
        more = 2 * (min_audit_rows - _n(new))
        advice = f"label about {more} more of the rows that the server names in audit_ids (half of them train), or serve with"
        return "HOLD", f"{_n(new)} audit rows can judge, {min_audit_rows} must: {advice} a larger feedback.audit_share"
    won = _numbers(new, metric, "audit rows")
    kept = f"{lost} is within the margin {margin:.4g}" if old.gain < 0 else lost
    if new.high < 0:
        return "REJECT", f"{won} is proved: {STAYS}"
    if new.gain < -margin and new.p_value <= 2 * RARE:  # p counts gains of that size too
        rare = f"beyond the margin {margin:.4g}, which equal models rarely are (p = {new.p_value:.2g})"
        return "REJECT", f"{won} is {rare}: {STAYS}"
    if new.low <= 0:
        needed = rows_needed(new) if new.gain else None
        decides = f"; about {2 * max(needed - new.n, 1):,} more audit labels would decide it" if needed else ""
        return "HOLD", f"{won} is not proved{decides}; {kept}"
    if strict and old.low <= -margin:
        proof = f"{lost} is not proved to be within the margin {margin:.4g}, which gate.strict=true requires"
        return "HOLD", f"{won} is proved; {proof}"
    return "PROMOTE", f"{won} is proved at {new.confidence_level:.4g}; {kept}"


def _rests_on(annotator: str, n: int, n_others: int, why: str) -> str:
    all_of = "all" if n_others == 0 else f"{n - n_others:,} of"
    return (
        f"the gain rests on one annotator, {annotator}, who labelled {all_of} {n:,} audit rows; without these rows, {why}: "
        "let other annotators label audit rows too"
    )


def _n(comparison: Comparison | int) -> int:
    return comparison if isinstance(comparison, int) else comparison.n


def _numbers(c: Comparison, metric: str, rows: str = "rows") -> str:
    size, low, high = (c.gain, c.low, c.high) if c.gain >= 0 else (-c.gain, -c.high, -c.low)
    return (
        f"{c.metric or metric} {'gain' if c.gain >= 0 else 'loss'} {size:.4g} [{low:.4g}, {high:.4g}] "
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
