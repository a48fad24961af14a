"""The text of `--help`: the keys of an entry point with their defaults and comments, as they are in conf/."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

NOT_KEYS = ("defaults:", "hydra:")  # blocks of a file that set no key of a step


def help_text(folder: Path, config_name: str, choices: Mapping[str, str]) -> str:
    """All keys of `folder`/`config_name`.yaml, with the options in `choices` (`{"model": "torch_mlp"}`) for its groups."""
    first, *_ = (folder / f"{config_name}.yaml").read_text().splitlines()
    lines = [
        f"{config_name} takes KEY=VALUE, --KEY VALUE or, with mlflow run, -P KEY=VALUE. For example:",
        first.lstrip("# "),
    ]
    lines += ["", *_describe(folder, config_name, choices)]
    return "\n".join(
        [*lines, "", "--cfg job prints the resolved configuration; --multirun seed=1,2 runs one job for each value."]
    )


def _describe(folder: Path, name: str, choices: Mapping[str, str]) -> Iterator[str]:
    """The lines of a file with the lines of the files that it includes."""
    path = folder / f"{name}.yaml"
    defaults: list[Any] = (yaml.safe_load(path.read_text()) or {}).get("defaults", [])
    for entry in defaults:
        if isinstance(entry, str) and entry != "_self_":
            yield from _describe(folder, str(Path(name).parent / entry), choices)
    yield from _keys(path)
    for entry in defaults:
        group, option = next(iter(entry.items())) if isinstance(entry, dict) else ("override", None)
        if group.startswith("override"):
            continue
        option = choices.get(group, option)
        options = ", ".join(sorted(other.stem for other in (folder / group).glob("*.yaml")))
        about = f"keys are {group}.KEY; options: {options}" if option else f"options: {options}"
        yield f"\n{group}={option or 'null'}    # {about}"
        if option and (folder / group / f"{option}.yaml").is_file():
            yield from (f"  {line}" for line in _describe(folder, f"{group}/{option}", choices))


def _keys(path: Path) -> Iterator[str]:
    """The lines of a file without its heading comments and the blocks that are no keys."""
    is_heading, is_key = True, True
    for line in path.read_text().splitlines():
        is_heading = is_heading and line.startswith("#")
        if line and line[0] not in " -":
            is_key = not line.startswith(NOT_KEYS)
        if line and is_key and not is_heading:
            yield line
