"""Checks of a label: it must have the type of the classes, or of the prediction if there are no classes. Pure functions."""

import json
import math
from collections.abc import Sequence
from typing import Any

LISTED_CLASSES = 20  # in a message
NO_CLASS = "the label is not one of the classes"


def check_label(label: Any, classes: Sequence | None, predicted: Any) -> tuple[Any, str | None]:
    """The label in the type of the classes, and None; or the label as it is, and the problem.

    Text that spells exactly one class is that class ("3", 3 and 3.0 if 3 is a class, and 3 if "3" is a class); true and
    false are never 1 and 0. Without classes a label has the type of the prediction, and a number may be spelled as text.
    """
    if isinstance(label, float) and not math.isfinite(label):
        return label, "the label is not a finite number"
    if classes is None:
        return convert(label, predicted)
    spelled = spellings(label)
    matches = [name for name in classes if spelled & spellings(name)]
    return (matches[0], None) if len(matches) == 1 else (label, f"{NO_CLASS}: {_list(classes)}")


def convert(label: Any, predicted: Any) -> tuple[Any, str | None]:
    """The label in the type of the prediction, and None; or the label as it is, and the problem."""
    if not _is_number(predicted):
        if type(label) is type(predicted) and isinstance(label, str | bool) and label != "":
            return label, None
        expected = {str: "text", bool: "true or false"}.get(type(predicted))
        return (
            label,
            f"the label has the wrong type: expected {expected}" if expected else "such predictions take no label",
        )
    number = label
    if isinstance(label, str):
        try:
            number = json.loads(label, parse_constant=str)
        except ValueError:
            number = None
    if not _is_number(number):
        return label, "the label has the wrong type: expected a number"
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return label, "the label is not a finite number"
    return (int(number) if isinstance(predicted, int) and number.is_integer() else number), None


def decide(
    labels: Sequence, chosen: Sequence, accept: bool, predicted: Any
) -> tuple[dict[int, dict[str, Any]], str | None]:
    """The changes of a review, id -> values, and None; or no changes, and the obstacle.

    `labels`: all rows of `feedback` for one prediction; `chosen`: the labels that the review is about.
    """
    waiting = [label for label in chosen if label.state == "new"]
    unused = [label for label in chosen if label.state != "used"]
    checked = [label for label in unused if label.state != "rejected" or label.reviewed]
    if not unused:
        return {}, f"the label is used by version {chosen[-1].used_version}: it stays used; give another label"
    if not accept:
        return {label.id: {"state": "rejected"} for label in waiting or checked}, None
    new_classes = {}
    for label in unused:
        if label not in checked and (label.reason or "").startswith(NO_CLASS):
            value, _ = convert(json.loads(label.label), predicted)
            if type(value) is type(predicted) and not isinstance(value, bool) and str(value).strip():
                new_classes[label.id] = value
    candidates = waiting or checked or [label for label in unused if label.id in new_classes]
    if not candidates:
        return {}, f"the label cannot be accepted: {unused[-1].reason}"
    if len({label.label for label in candidates}) > 1:  # one may have come after the administrator looked
        return {}, f"{len(candidates)} different labels can be accepted: name the right one by `label`"
    best = candidates[-1]
    changes: dict[int, dict[str, Any]] = {
        label.id: {"state": "rejected"} for label in labels if label.state in ("new", "accepted")
    }
    changes[best.id] = {"state": "accepted"}
    if best.id in new_classes and dumps(new_classes[best.id]) != best.label:  # "12" where classes are numbers
        changes[best.id] |= {"label": dumps(new_classes[best.id]), "given": best.label}
    return changes, None


def same(label: Any, predicted: Any) -> bool:
    """Whether a checked label is equal to the prediction."""
    if _is_number(label) and _is_number(predicted):
        return label == predicted
    return type(label) is type(predicted) and label == predicted


def spellings(value: Any) -> set[str]:
    """The texts that mean a value: 3 and 3.0 share "3"."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, float) and value.is_integer():
        return {repr(value), str(int(value))}
    return {str(value), json.dumps(value)}


def dumps(value: Any) -> str:
    """JSON; NaN and infinity, which JSON lacks, as text."""
    return json.dumps(str(value) if isinstance(value, float) and not math.isfinite(value) else value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(classes: Sequence) -> str:
    names = [json.dumps(name, default=str, ensure_ascii=False) for name in classes[:LISTED_CLASSES]]
    more = len(classes) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
