"""Errors that a user can correct, and arguments that a message suggests."""

import re
import shlex


class UserError(ValueError):
    """A mistake in a command, a configuration or a data file: shown as one line, without a traceback, exit code 2.

    The message names the key, the value that came, what is allowed and the mend. A mistake of the program itself is an
    `assert` instead and keeps its traceback.
    """


class StoreError(Exception):
    """The feedback store cannot take or give anything now (locked, full, gone); nothing was changed."""


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
