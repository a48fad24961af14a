"""One list of exact pins, read by every environment, and it is what runs here."""

import re
import tomllib
from importlib.metadata import version

import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from alacarte.formats.frameworks import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(file: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    matches = [
        re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][\w.]*)(?:; sys_platform .*)?", line)
        for line in lines
        if line and not line.startswith("-r")
    ]
    assert all(matches), f"{file} has a line that is not NAME==VERSION"
    return {match[1]: match[2] for match in matches if match}


def test_every_pin_is_exact_and_installed():
    wanted = pins("requirements.txt") | pins("requirements-extra.txt") | pins("requirements-dev.txt")
    assert {name: version(name).split("+")[0] for name in wanted} == wanted
    assert set(PROJECT["build-system"]["requires"]) <= set(wanted)


def test_every_pin_is_inside_its_range_and_every_range_has_a_pin():
    extras = [line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines]
    ranges = [Requirement(line) for line in [*PROJECT["project"]["dependencies"], *extras]]
    pinned = pins("requirements.txt") | pins("requirements-extra.txt")
    exact = {canonicalize_name(name): number for name, number in pinned.items()}
    allowed = {canonicalize_name(requirement.name): requirement.specifier for requirement in ranges}
    assert len(allowed) == len(ranges), "a package has two ranges"
    assert set(allowed) == set(exact)
    for name, number in exact.items():
        assert allowed[name].contains(number), f"{name}: {number} is outside {allowed[name]}"
        assert not allowed[name].contains("0.0.1"), f"{name} has no lower bound"
    # An installation command in a message names the range.
    assert {str(Requirement(package)) for package in EXTRAS.values()} <= set(map(str, ranges))


def test_python_env_and_conda_read_the_same_list():
    assert yaml.safe_load((ROOT / "python_env.yaml").read_text()) == {"dependencies": ["-r requirements.txt"]}
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    assert {"pip": ["-r requirements.txt"]} in conda["dependencies"]
    assert yaml.safe_load((ROOT / "MLproject").read_text())["python_env"] == "python_env.yaml"
