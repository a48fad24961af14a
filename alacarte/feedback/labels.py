"""Checks of a label: it must have the type of the classes, or of the prediction if there are no classes. Pure functions."""

import json
import math
from collections.abc import Sequence
from typing import Any

SHOWN = 20  # classes that a message names
NO_CLASS = "the label is not one of the classes"


def check_label(given: Any, classes: Sequence | None, predicted: Any) -> tuple[Any, str | None]:
    """The label in the type of the classes, and None; or `given` and what is wrong with it.

    Text that spells exactly one class is that class ("3", 3 and 3.0 where 3 is one, and 3 where "3" is one); true and
    false are never 1 and 0. Without classes a label is of the prediction's type, and a number may be spelled as text.
    """
    if isinstance(given, float) and not math.isfinite(given):
        return given, "the label is not a finite number"
    if classes is not None:
        spelled = spellings(given)
        found = [one for one in classes if spelled & spellings(one)]
        if len(found) == 1:
            return found[0], None
        return given, f"{NO_CLASS}: {_shown(classes)}"
    if _is_number(predicted):
        return _number(given)
    if type(given) is type(predicted) and isinstance(given, str | bool):
        return given, None
    kind = {str: "text", bool: "true or false"}.get(type(predicted))
    return given, f"the label has the wrong type: {kind} is due" if kind else "such predictions take no label"


def new_class(given: Any, predicted: Any) -> tuple[Any, str | None]:
    """A label of a class that the model does not know, in the type of its predictions, and None; or what is wrong with it."""
    if isinstance(predicted, bool):
        return given, "the label has the wrong type: true or false is due"
    if not _is_number(predicted):
        fits = isinstance(given, str) and isinstance(predicted, str) and given.strip()
        return given, None if fits else "the label has the wrong type: text is due"
    number, wrong = _number(given)
    if wrong or isinstance(predicted, float):
        return number, wrong
    return (
        (int(number), None) if number.is_integer() else (given, "the label has the wrong type: a whole number is due")
    )


def decide(
    labels: Sequence, chosen: Sequence, accept: bool, predicted: Any
) -> tuple[dict[int, dict[str, Any]], str | None]:
    """What a review changes, id -> values, and None; or nothing, and the reason why it cannot.

    `labels`: all rows of `feedback` for one prediction; `chosen`: those that are meant.
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
            value, wrong = new_class(json.loads(label.label), predicted)
            if not wrong:
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
    """Whether a checked label says what the model said."""
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


def _number(given: Any) -> tuple[Any, str | None]:
    number = given
    if isinstance(given, str):
        try:
            number = json.loads(given, parse_constant=str)
        except ValueError:
            number = None
    if not _is_number(number):
        return given, "the label has the wrong type: a number is due"
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    return (number, None) if math.isfinite(number) else (given, "the label is not a finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(classes: Sequence) -> str:
    names = [json.dumps(one, default=str, ensure_ascii=False) for one in classes[:SHOWN]]
    return ", ".join(names) + (f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else "")
