"""Command line -> Hydra configuration -> MLflow run. Beside arguments.py the only module that knows Hydra.

`step` composes the configuration, checks it, opens the MLflow run, gives the configuration to the step's function, and
closes the run with the status that fits, whatever ended it.
"""

import contextlib
import functools
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alacarte import signals, stores, tracking
from alacarte.arguments import TEXT, parse, to_overrides
from alacarte.errors import UserError, nearest
from alacarte.folders import ROOT, TEMPLATE
from alacarte.help import help_text

__all__ = ["CONF", "compose", "instantiate", "keys_of", "part_of", "plain", "save_for", "step"]

CONF = next(folder / "conf" for folder in (ROOT, TEMPLATE) if (folder / "conf").is_dir())


def step(
    config_name: str, run: bool = True, offline: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., NoReturn]]:
    """Make a function of the configuration into the command of an entry point. Other arguments are passed on to it.

    run=False opens no MLflow run. offline=True does not check the tracking store.

    Exit codes: 0; 2 after a UserError (one line); 1 after another exception, with a traceback only if the program is at
    fault; 130 and 143 after Ctrl-C and SIGTERM. The MLflow run ends FINISHED, FAILED or KILLED.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., NoReturn]:
        @functools.wraps(function)
        def main(*more: object) -> NoReturn:
            if not sys.stderr.isatty():  # in a log file, a bar is a long line of noise
                os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            code, line = 0, None
            try:
                with signals.raised():
                    _launch(lambda cfg: function(cfg, *more), config_name, run, offline, sys.argv[1:])
            except KeyboardInterrupt:
                code = 130
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except Exception as error:
                if signals.arrived:  # a library may replace the exception of a signal
                    code = 128 + signals.arrived
                elif isinstance(error, UserError):
                    code, line = 2, str(error)
                else:
                    code, line = 1, stores.explain_failure(error)
                    if line is None:
                        traceback.print_exc()
            if line:
                print(f"{config_name}: {line}", file=sys.stderr)
            gc.freeze()  # otherwise the interpreter searches all objects of the libraries for cycles at its end: seconds
            sys.exit(code)

        return main

    return decorate


def _launch(
    function: Callable[[DictConfig], Any], config_name: str, tracked: bool, offline: bool, tokens: Sequence[str]
) -> None:
    failures: list[Exception] = []

    def run(cfg: DictConfig) -> None:
        try:
            check(cfg, config_name)
            stores.find_relative_store() if offline else stores.open_stores()
            with tracking.start_run(config_name, cfg) if tracked else contextlib.nullcontext():
                function(cfg)
        except Exception as error:  # kept from Hydra, which adds lines of its own; a sweep goes on with its next job
            failures.append(error)

    opened_by_mlflow_run = os.environ.get("MLFLOW_RUN_ID")
    try:
        if not (CONF / f"{config_name}.yaml").is_file():
            raise UserError(f"{CONF} has no {config_name}.yaml: copy that file from the template, or rename the folder")
        arguments = to_overrides(tokens)
        check_flags(arguments)
        if {"--help", "-h"} & set(arguments):
            choices = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
            print(help_text(CONF, config_name, choices))
            return
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are; the one line below replaces Hydra's report
        sys.argv[1:] = take_null(arguments, config_name)
        main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(run)
        sweep: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if {"--multirun", "-m"} & set(arguments):  # one parent run, one child run for each job
            stores.open_stores()
            sweep = tracking.start_run(f"{config_name}-sweep", None)
        with sweep:
            main()
            if failures:
                raise failures[0]
    except BaseException as error:
        tracking.fail(opened_by_mlflow_run)
        if isinstance(error, HydraException | OmegaConfBaseException):
            raise UserError(explain(error, config_name)) from error
        raise


def compose(config_name: str, tokens: Sequence[str]) -> DictConfig | None:
    """The configuration that a step would run with elsewhere, checked as the step checks it; None for a sweep.

    Raises UserError for values that the step would refuse, and for flags other than --multirun.
    """
    arguments = to_overrides(tokens)
    flags = [argument for argument in arguments if argument.startswith("-")]
    if other := [flag for flag in flags if flag not in ("--multirun", "-m")]:
        raise UserError(f"{other[0]} does nothing in a job: try it here, python -m steps.{config_name} {other[0]}")
    if flags:
        return None
    before, sys.argv[1:] = sys.argv[1:], arguments
    try:
        arguments = take_null(arguments, config_name)
        with _config_folder():
            cfg = hydra.compose(config_name, overrides=arguments, return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        check(cfg, config_name)
        return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, config_name)) from error
    finally:
        sys.argv[1:] = before


def _config_folder() -> initialize_config_dir:
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(CONF), version_base="1.3")


def take_null(arguments: Sequence[str], config_name: str) -> list[str]:
    """Leave out GROUP=null if the group has no option without it: Hydra takes only names. UserError for another value."""
    kept = []
    for argument in arguments:
        override = parse(argument)
        group = override.key_or_group if override and not override.is_delete() else ""
        value = override.value() if override and _options(group) else ""
        if not any(isinstance(option, int | float | None) for option in getattr(value, "list", [value])):
            kept.append(argument)
        elif value is not None or OmegaConf.select(_defaults(config_name), group) is not None:
            raise UserError(f"{argument} is unknown: {nearest(argument.partition('=')[2], _options(group))}")
    return kept


# --- checks and error texts ------------------------------------------------------------------------------------------


def check_flags(arguments: Sequence[str]) -> None:
    """UserError for one of Hydra's flags with a wrong value or without its value."""

    def refuse(message: str) -> NoReturn:
        raise UserError(message)

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)


def check(cfg: DictConfig, config_name: str) -> None:
    """Refuse values that Hydra accepts: a missing required value, text for a number, true for a text."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{missing[0]} is required: add -P {missing[0]}=VALUE")
    model = cfg.get("model")
    if OmegaConf.is_dict(model) and OmegaConf.is_dict(model.get("estimator")) and "_target_" not in model.estimator:
        key = f"model.estimator.{next(iter(model.estimator))}"
        raise UserError(f"{key} is not a key of this model: add model=sklearn and model.estimator._target_=CLASS")
    for key in TEXT:
        value = OmegaConf.select(cfg, key, default=None)
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise UserError(f"{key}={str(value).lower()} is not a text: give a text, such as {key}=NAME, or null")
    OmegaConf.to_container(cfg, resolve=True)  # an interpolation that leads nowhere fails here, with its key
    _check_types(cfg, config_name)


def _check_types(cfg: DictConfig, config_name: str) -> None:
    """UserError for an override that is no number, or not true or false, where the default is one."""
    overrides = [override for override in map(parse, HydraConfig.get().overrides.task) if override and override.type]
    values = {
        override.key_or_group: override.value()
        for override in overrides
        if override.type.name == "CHANGE" and isinstance(override.value(), str | bool | list | dict | None)
    }
    defaults = _defaults(config_name) if values else OmegaConf.create()
    for key, value in values.items():
        if "/" in key or "@" in key or (value is None and key.startswith("model.")):  # null may be a library's choice
            continue
        default = OmegaConf.select(defaults, key, throw_on_missing=False)
        if isinstance(default, bool):
            kind, is_wrong = "true or false", not isinstance(value, bool)
        else:  # a text such as ${seed} may lead to a number
            kind, is_wrong = "a number", isinstance(default, int | float) and OmegaConf.select(cfg, key) == value
        if is_wrong:
            shown = "null" if value is None else value
            raise UserError(f"{key}={shown} is not {kind}: the default is {key}={str(default).lower()}")


def _defaults(config_name: str) -> DictConfig:
    """The configuration with the chosen group options and no other override: the valid keys and the default values."""
    groups = [o for o in to_overrides(sys.argv[1:]) if (CONF / re.split("[=@]", o.lstrip("+"))[0]).is_dir()]
    for overrides in (groups, []):  # the groups themselves can be what is wrong
        with contextlib.suppress(HydraException, OmegaConfBaseException, ValueError), _config_folder():
            return hydra.compose(config_name, overrides=[o for o in overrides if "," not in o and "=null" not in o])
    raise AssertionError(f"conf/{config_name}.yaml does not compose without overrides")


def explain(error: Exception, config_name: str) -> str:
    """One line for a refusal by Hydra or OmegaConf, with the nearest valid names."""
    message = f"{error}\n{error.__cause__ or ''}"
    if (match := re.search(r"full_key: (\S+)", str(error))) and error.__cause__:  # from making an object
        reason = error.__cause__.__cause__
        while reason and not isinstance(reason, UserError):  # such as a package that is not installed
            reason = reason.__cause__
        if reason:
            return f"{match[1]}: {reason}"
        cause = " ".join(str(error.__cause__).split())
        # a package that a module imports can be missing too: then the cause names the package
        if missing := re.search(r"Error loading '(([\w.]+)\.(\w+))': .*No module named '([\w.]+)'", cause):
            target, module, name, unknown = missing.groups()
            if f"{target}.".startswith(f"{unknown}."):
                return f"{match[1]}._target_={target} does not exist: {module} has no {name}"
        called = re.search(r"in call to target '([^']+)'", str(error))
        return f"{match[1]}: {f'{called[1]}: ' if called else ''}{cause}"
    if match := re.search(r"Could not find '([^'/]+(?:/[^'/]+)*)/([^'/]*)'", message):
        group, option = match.groups()
        if options := _options(group):
            return f"{group}={option} is unknown: {nearest(option, options)}"
    if match := re.search(r"Could not (?:override|delete)[^']*'([^']*)'", message):
        key = match[1].split("@")[0]
        valid = _key_names(_defaults(config_name))
        return f"{key} is not a key of {config_name}: {nearest(key, valid)} (+{key}=... adds a new key)"
    return " ".join(message.split())


def _options(group: str) -> list[str]:
    """The options of a group; none for a key that is no group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml")) if group else []


def _key_names(node: DictConfig, prefix: str = "") -> list[str]:
    names = []
    for name in map(str, node):
        names.append(f"{prefix}{name}")
        if OmegaConf.is_dict(node._get_node(name)) and not OmegaConf.is_missing(node, name):
            names += _key_names(node[name], f"{prefix}{name}.")
    return names


# --- a step's share of a larger configuration ------------------------------------------------------------------------


def keys_of(config_name: str) -> set[str]:
    """Top-level keys of an entry point's configuration, read from `conf/<config_name>.yaml` and what it includes."""
    root = OmegaConf.load(CONF / f"{config_name}.yaml")
    assert isinstance(root, DictConfig)
    keys = {str(key) for key in root if key not in ("defaults", "hydra")}
    for entry in root.get("defaults", []):
        if isinstance(entry, str):
            keys |= set() if entry == "_self_" else keys_of(entry)
        else:
            keys |= {str(name).split()[-1] for name in entry if not str(name).split()[-1].startswith("hydra/")}
    return keys - {"experiment"}


def plain(node: DictConfig) -> dict[str, Any]:
    """A configuration as plain, resolved Python: what leaves a step for the library."""
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def part_of(cfg: DictConfig, config_name: str, **fixed: Any) -> DictConfig:
    """The resolved share of `cfg` that another entry point takes, with some keys set: what the pipeline hands a step."""
    keys = keys_of(config_name)
    return OmegaConf.create({key: value for key, value in {**plain(cfg), **fixed}.items() if key in keys})


def save_for(cfg: DictConfig, folder: str) -> list[str]:
    """Write a resolved configuration to `folder`; return the arguments with which a step runs with just that."""
    quiet = ["base", "_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    OmegaConf.save({"defaults": quiet, **cfg}, Path(folder, "resolved.yaml"))
    return ["--config-dir", folder, "--config-name", "resolved"]
