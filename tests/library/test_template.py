"""A clone gets its own name, and takes newer versions of the template without conflicts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, commit
from conftest import command_output as run

import alacarte


@pytest.fixture
def template(repository: Path, tmp_path: Path) -> Path:
    run(tmp_path, "git", "clone", "-q", str(repository), "template")
    return tmp_path / "template"


def clone(template: Path) -> Path:
    root = template.parent / "clone"
    run(template.parent, "git", "clone", "-q", "-o", "template", str(template), "clone")
    (root / ".venv").symlink_to(sys.prefix)
    for file in ("requirements.txt", "requirements-dev.txt"):  # so that `make` finds the environment in order
        subprocess.run(["touch", "-d", "2001-01-01", str(root / file)], check=True)
    return root


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path} does not contain {old}"
    path.write_text(text.replace(old, new, 1))


def test_init_renames_the_project_and_nothing_else(template: Path):
    root = clone(template)
    assert "init: the project is credit-risk" in run(root, "make", "init", "NAME=credit-risk")
    assert yaml.safe_load((root / "MLproject").read_text())["name"] == "credit-risk"
    assert yaml.safe_load((root / "conf" / "base.yaml").read_text())["registered_model_name"] == "credit-risk"
    assert yaml.safe_load((root / "conda.yaml").read_text())["name"] == "credit-risk"
    bundle = yaml.safe_load((root / "databricks" / "databricks.yml").read_text())
    assert bundle["bundle"]["name"] == "credit-risk"
    assert bundle["variables"]["registered_model_name"]["default"] == "main.default.credit_risk"
    assert bundle["resources"]["jobs"]["train"]["name"] == "credit-risk-train"
    assert (root / "README.md").read_text().startswith("# credit-risk\n")
    assert f"version {alacarte.__version__} of the template" in (root / "CHANGELOG.md").read_text()
    assert not run(root, "git", "status", "--short", "alacarte", "docs", "tests", "project", "pyproject.toml")
    pattern = "(name[:=] ?|models:/|Shared/)alacarte\\b"
    assert not run(root, "git", "grep", "-nE", pattern, "--", ":!tests", ":!docs", ":!alacarte", code=1)
    commit(root, "renamed")
    assert "the project is credit-risk already" in run(root, "make", "init", "NAME=credit-risk")
    assert not run(root, "git", "status", "--short")
    run(root, "make", "init", "NAME=house-prices")
    assert (
        "credit" not in run(root, "git", "grep", "-c", "house.prices")
        and "credit" not in (root / "MLproject").read_text()
    )
    run(root, "python", "-m", "pytest", "tests/test_config.py", "-k", "entry_point or pipeline")
    assert "init: NAME is missing: make init NAME=credit-risk" in run(root, "make", "init", code=2)
    assert "init: NAME=Credit Risk is not allowed" in run(root, "make", "init", "NAME=Credit Risk", code=2)


def test_a_month_of_edits_on_both_sides_merges_without_conflict(template: Path):
    root = clone(template)
    run(root, "make", "init", "NAME=credit-risk")
    commit(root, "start")
    # The team: its own data and configuration, other conditions, a package, its own words.
    (root / "project" / "credit.py").write_text("def load_credit():\n    raise NotImplementedError\n")
    (root / "conf" / "data" / "credit.yaml").write_text("_target_: project.credit.load_credit\ntarget: paid\n")
    replace(root / "conf" / "train.yaml", "- data: digits", "- data: credit")
    gate = root / "conf" / "gate" / "default.yaml"
    gate.write_text(re.sub(r"(?m)^(min_test_rows: )\d+", r"\g<1>500", gate.read_text()))
    requirements = root / "requirements.txt"
    requirements.write_text(requirements.read_text() + "phonenumbers==9.0.0\n")
    replace(root / "README.md", "## Two commands", "Our team predicts who pays a credit back.\n\n## Two commands")
    replace(root / "CHANGELOG.md", "## Unreleased\n", "## Unreleased\n\n- Credits of 2026.\n")
    replace(
        root / "steps" / "train.py", "@launch.step", "# Ask the risk team before you change this step.\n@launch.step"
    )
    commit(root, "a month of the team")
    # The template: library, docs, a pin, a new key, a new entry in its own changelog, other words in README.
    replace(template / "alacarte" / "registry.py", '"""', '"""Improved. ')
    replace(template / "docs" / "models.md", "\n", "\n\nA new sentence.\n")
    pins = template / "requirements.txt"
    pins.write_text(re.sub(r"(?m)^requests==\S+", "requests==99.0", pins.read_text()))
    base = template / "conf" / "base.yaml"
    base.write_text(base.read_text() + "new_key: null  # a new feature\n")
    replace(template / "README.md", "## Two commands", "## Two commands, or three")
    replace(template / "alacarte" / "CHANGELOG.md", "\n", "\n\n## 0.2.0\n\n- New.\n")
    (template / "TEMPLATE_VERSION").write_text("0.2.0\n")
    commit(template, "a month of the template")
    run(root, "make", "update", GIT_AUTHOR_NAME="t", GIT_AUTHOR_EMAIL="t@example.com", GIT_COMMITTER_NAME="t",
        GIT_COMMITTER_EMAIL="t@example.com")  # fmt: skip
    assert not run(root, "git", "status", "--short")
    assert (root / "TEMPLATE_VERSION").read_text() == "0.2.0\n"
    pins_of_team = requirements.read_text()
    assert "requests==99.0" in pins_of_team and "phonenumbers==9.0.0" in pins_of_team
    settings = yaml.safe_load((root / "conf" / "base.yaml").read_text())
    assert settings["registered_model_name"] == "credit-risk" and "new_key" in settings
    assert (
        "Our team predicts" in (root / "README.md").read_text() and "or three" not in (root / "README.md").read_text()
    )
    assert "Credits of 2026" in (root / "CHANGELOG.md").read_text()
    assert "min_test_rows: 500" in gate.read_text() and "data: credit" in (root / "conf" / "train.yaml").read_text()


def test_the_library_as_a_package(template: Path, installed: Path):
    root = clone(template)
    refused = run(root, "make", "init", "NAME=credit-risk", "LIBRARY=package", code=2)
    assert f"init: URL={template} is not an address for pip" in refused and not run(root, "git", "status", "--short")
    output = run(root, "make", "init", "NAME=credit-risk", "LIBRARY=package", "URL=git@example.com:team/alacarte.git")
    assert "alacarte/ (deleted)" in output
    assert not (root / "alacarte").exists() and not (root / "tests" / "library").exists()
    pin = (root / "requirements.txt").read_text().splitlines()[-1].split("  #")[0]
    address = f"git+ssh://git@example.com/team/alacarte.git@v{alacarte.__version__}"
    assert pin == f"alacarte[train,serve,torch,postgres] @ {address}"
    python, store = str(installed / "bin" / "python"), f"sqlite:///{root.parent}/mlflow.db"
    run(root, python, "-m", "pytest", "tests/test_config.py", "-k", "not model", MLFLOW_TRACKING_URI=store)
    run(root, python, "-m", "ruff", "check", ".")
    before = run(root, "git", "status", "--short")
    output = run(root, python, "-m", "alacarte.template", "init", "credit-risk", "--library", "package")
    assert "already" in output and run(root, "git", "status", "--short") == before


def test_the_versions_are_one():
    assert (ROOT / "TEMPLATE_VERSION").read_text().strip() == alacarte.__version__
