"""Any argument form -> Hydra's overrides: the grammar of the command line. Pure functions.

`-P key=value`, `--key value`, `key=value` and `overrides="a=1 b=2"` mean the same, because `to_overrides` rewrites the
command line before Hydra reads it.
"""

import re
import shlex
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException

from alacarte.errors import UserError

FLAGS = {name: action.nargs for action in get_args_parser()._actions for name in action.option_strings}  # 0: no value
FREE_TEXT = {"description"}  # always taken as typed: nobody means a number or a list there
# Texts by nature: digits are taken as typed (a run id may consist of digits alone), null stays null.
TEXT = {"registered_model_name", "experiment_name", "reason", "save_to", "run_id", "model_uri", "input", "output",
        "data.path", "data.target", "data.name", "data.key", "data.weight", "data.split.column", "feedback.url"}  # fmt: skip
OPEN = ("model.estimator.",)  # any key may be added under these: the arguments of an estimator that no config names


def to_overrides(tokens: Sequence[str]) -> list[str]:
    """Rewrite any mix of `-P key=value`, `--key value`, `--key=value`, `key=value`, `overrides=...` and Hydra's flags for Hydra.

    A value that Hydra's grammar reads as something other than plain text (number, list, null, quoted string) keeps that
    meaning; every other value, and a comma outside `--multirun`, is quoted so that it arrives unchanged.
    Raises UserError for a token that is none of these.
    """
    flags, pairs = _split(list(tokens))
    multirun = bool({"--multirun", "-m"} & set(flags))
    return flags + [quote(pair, multirun) for pair in pairs]


def _split(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Flags for Hydra, and pairs KEY=VALUE."""
    flags: list[str] = []
    pairs: list[str] = []
    while tokens:
        token = tokens.pop(0).removeprefix("-P")
        name = token.partition("=")[0]
        if FLAGS.get(token) == 0 and not (token == "--version" and tokens):  # with a value it is promote's key
            flags.append(token)
            if tokens and tokens[0].lower() in ("", "true"):  # -P multirun=true
                tokens.pop(0)
        elif FLAGS.get(name, 0) != 0:
            flags.append(token)
            if token == name and tokens:
                flags.append(tokens.pop(0))
        else:
            if token.startswith("--"):
                token = token[2:]
                if "=" not in token:
                    if not tokens:
                        raise UserError(f"--{token} has no value: write --{token} VALUE or {token}=VALUE")
                    token = f"{token}={tokens.pop(0)}"
            key, equals, value = token.partition("=")
            if key == "overrides" and equals:
                more_flags, more_pairs = _split(_words(value))
                flags, pairs = flags + more_flags, pairs + more_pairs
            elif equals or key.startswith("~"):
                pairs.append(token)
            elif token:  # the empty token is a parameter left empty
                raise UserError(f"'{token}' is not KEY=VALUE: write {token}=VALUE, or --help for the keys")
    return flags, pairs


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"overrides={text!r}: {error}; quote it as a shell would: overrides=\"a=1 b='x y'\"") from None


def quote(pair: str, multirun: bool = False) -> str:
    """One `key=value` in the form in which Hydra gives the value the meaning that `to_overrides` promises."""
    if pair.startswith(OPEN):
        pair = f"++{pair}"
    key, equals, value = pair.partition("=")
    if key.startswith("~") and not value:
        return key  # `-P "~key="`: a deletion takes no value
    if key not in FREE_TEXT:
        parsed = parse(pair)
        if parsed is not None and (multirun or not parsed.is_sweep_override()):
            plain = isinstance(parsed.value(), str) and value.strip()[:1] not in ("'", '"')
            number = isinstance(parsed.value(), int | float) and not isinstance(parsed.value(), bool)
            if (not plain and not (number and key in TEXT)) or parsed.value() == value or "\\" in value:
                return pair
    # `\${` is OmegaConf's spelling of a literal `${`, and backslashes before it count twice.
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    return f"{key}{equals}{QuotedString(text, Quote.single).with_quotes()}"


def parse(pair: str) -> Override | None:
    """As Hydra reads it; None where its grammar does not take it."""
    try:
        return OverridesParser.create().parse_override(pair)
    except (OverrideParseException, HydraException):
        return None
