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
        expected = {str: "expected text", bool: "expected true or false"}.get(type(predicted))
        return label, f"the label has the wrong type: {expected or 'such predictions take no label'}"
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


def decide(labels: Sequence, chosen: Sequence, accept: bool) -> tuple[dict[int, dict[str, Any]], str | None]:
    """The changes of a review, id -> values, and None; or no changes, and the obstacle.

    `labels`: all rows of `feedback` for one prediction; `chosen`: the labels that the review is about.
    """
    unused = [known for known in chosen if known.state != "used"]
    if not unused:
        return {}, f"the label is used by version {chosen[-1].used_version}: it stays used; give another label"
    checked = [known for known in unused if known.state != "rejected" or known.reviewed]
    waiting = [known for known in checked if known.state == "new"]
    if not accept:
        return {known.id: {"state": "rejected"} for known in waiting or checked}, None
    new_classes = {known.id: value for known in unused if (value := _new_class(known)) is not None}
    candidates = waiting or checked or [known for known in unused if known.id in new_classes]
    if not candidates:
        return {}, f"the label cannot be accepted: {unused[-1].reason}"
    if len({known.label for known in candidates}) > 1:  # one may have come after the administrator looked
        return {}, f"{len(candidates)} different labels can be accepted: name the right one by `label`"
    changes = {known.id: {"state": "rejected"} for known in labels if known.state in ("new", "accepted")}
    best = candidates[-1]
    changes[best.id] = {"state": "accepted"}
    if best.id in new_classes:
        changes[best.id]["label"] = dumps(new_classes[best.id])  # "12" is 12 where classes are numbers
    return changes, None


def _new_class(known: Any) -> Any:
    """The value of a label that was rejected because it is none of the classes, if it has their type; else None."""
    if known.state != "rejected" or known.reviewed or not (known.reason or "").startswith(NO_CLASS):
        return None
    predicted = json.loads(known.prediction)
    value, _ = convert(json.loads(known.label), predicted)
    is_class = type(value) is type(predicted) and not isinstance(value, bool) and str(value).strip()
    return value if is_class else None


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
