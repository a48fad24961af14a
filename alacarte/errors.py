"""Errors that a user can correct, and the parts of their messages that can be pasted."""

import difflib
import math
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Any


class UserError(ValueError):
    """A mistake in a command, a configuration or a data file; exit code 2.

    The message names the key, its value, the allowed values and the fix. A mistake of the program is an `assert` instead.
    """


class StoreError(Exception):
    """The feedback store cannot be used now (locked, full or away). Nothing was changed."""


def check_number(key: str, value: Any, is_valid: Callable[[float], bool], expected: str) -> None:
    """UserError for the value of a key that is no finite number, or one that is not valid."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and -math.inf < value < math.inf and is_valid(value)):
        raise UserError(f"{key}={value}: expected {expected}")


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'label'?` when a choice is near, else what there is."""
    folded = {choice.strip().lower(): choice for choice in choices}
    if near := difflib.get_close_matches(name.strip().lower(), folded, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(repr(folded[match]) for match in near)}?"
    more = f" and {len(folded) - 10} more" if len(folded) > 10 else ""
    return f"there is {', '.join(list(folded.values())[:10]) or 'nothing like it'}{more}"


def first_line(error: object) -> str:
    """The first line of a library's message, or the name of its class if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def as_argument(key: str, value: str | list[str]) -> str:
    """`key=value` as one argument for bash, from which Hydra reads exactly this text or this list of texts.

    as_argument("data.drop", ["Notes (free)"]) is "data.drop=['Notes (free)']" with the double quotes.
    """
    texts = [value] if isinstance(value, str) else value
    quoted = [_quote_for_hydra(str(text)) for text in texts]
    argument = f"{key}={quoted[0]}" if isinstance(value, str) else f"{key}=[{','.join(quoted)}]"
    return shlex.quote(argument) if re.search(r'["$`!]|\\\\', argument) else f'"{argument}"'


def _quote_for_hydra(text: str) -> str:
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)  # no interpolation of OmegaConf
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), text) + "'"
