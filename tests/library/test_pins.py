"""One list of exact pins, read by every environment, and it is what runs here."""

import re
import tomllib
from importlib.metadata import version

import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from alacarte.formats.frameworks import EXTRAS


def pins(file: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    found = [
        re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][\w.]*)(?:; sys_platform .*)?", line)
        for line in lines
        if line and not line.startswith("-r")
    ]
    assert all(found), f"{file} has a line that is not NAME==VERSION"
    return {match[1]: match[2] for match in found if match}


def test_every_pin_is_exact_and_installed():
    wanted = pins("requirements.txt") | pins("requirements-extra.txt") | pins("requirements-dev.txt")
    assert wanted["mlflow"] == "3.17.2"
    assert wanted["torch"] == "2.13.0"
    assert {name: version(name).split("+")[0] for name in wanted} == wanted


def ranges() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def test_every_pin_is_inside_its_range_and_every_range_has_a_pin():
    pinned = pins("requirements.txt") | pins("requirements-extra.txt")
    exact = {canonicalize_name(name): number for name, number in pinned.items()}
    allowed = {canonicalize_name(requirement.name): requirement.specifier for requirement in ranges()}
    assert len(allowed) == len(ranges()), "a package has two ranges"
    assert set(allowed) == set(exact)
    for name, number in exact.items():
        assert allowed[name].contains(number), f"{name}: {number} is outside {allowed[name]}"
        assert not allowed[name].contains("0.0.1"), f"{name} has no lower bound"


def test_an_installation_command_in_a_message_names_the_range():
    listed = {str(requirement) for requirement in ranges()}
    assert {str(Requirement(package)) for package in EXTRAS.values()} <= listed


def test_what_builds_the_wheel_is_pinned():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert set(needed) <= set(pins("requirements-dev.txt"))


def test_python_env_and_conda_read_the_same_list():
    assert yaml.safe_load((ROOT / "python_env.yaml").read_text()) == {"dependencies": ["-r requirements.txt"]}
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    assert {"pip": ["-r requirements.txt"]} in conda["dependencies"]
    assert yaml.safe_load((ROOT / "MLproject").read_text())["python_env"] == "python_env.yaml"


def test_mlflow_reads_the_pins_through_python_env():
    from mlflow.utils.environment import _PythonEnv
    from mlflow.utils.requirements_utils import _parse_requirements

    environment = _PythonEnv.from_yaml(str(ROOT / "python_env.yaml"))
    read = {
        line.req_str.split(";")[0]
        for line in _parse_requirements(environment.dependencies, is_constraint=False, base_dir=ROOT)
    }
    assert read == {f"{name}=={number}" for name, number in pins("requirements.txt").items()}
