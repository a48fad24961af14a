"""Make a clone of the template a project of its own: `make init NAME=credit-risk`, or with `LIBRARY=package`.

    python -m alacarte.template init credit-risk
    python -m alacarte.template init credit-risk --library package --url https://git.example.com/alacarte.git

The name of the project is replaced, and CHANGELOG.md starts anew. The library keeps its name. With `--library package`, the
folders of the library and its tests are deleted, and requirements.txt names the library as a package. A second call with the
same arguments changes nothing.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from alacarte import __version__
from alacarte.errors import UserError

ALLOWED = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
TITLE = re.compile(r"\A# .*")
# Files of the team, and the places in them that have the project's name: <name>.
PLACES = {
    "MLproject": (r"(?m)^name: <name>$",),
    "conda.yaml": (r"(?m)^name: <name>$", r"activate <name>\b"),
    "conf/**/*.yaml": (r"registered_model_name[:=] ?<name>\b", r"models:/<name>\b"),
    "steps/*.py": (r"registered_model_name=<name>\b", r"models:/<name>\b"),
    "notebooks/*.ipynb": (r'\\"REGISTERED_MODEL_NAME\\", \\"<name>\\"',),
    "databricks/databricks.yml": (r"name: <name>\b", r"/<name>\b(?!\.)", r"\w+\.default\.<name>\b"),
    "compose.yaml": (r"(?m)^name: <name>$", r"REGISTERED_MODEL_NAME:-<name>\b"),
    "deploy/env.example": (r"(?m)^REGISTERED_MODEL_NAME=<name>$",),
    "deploy/kubernetes.yaml": (r"registered_model_name=<name>\b", r"REGISTRY/<name>-serve"),
}
LIBRARY_FOLDERS = ("alacarte", "tests/library", "benchmarks")
CHANGELOG = (
    "# Changelog\n\n## Unreleased\n\n- The project starts from version {version} of the template MLOps à la carte.\n"
)


def init(root: Path, name: str, library: str = "folder", url: str | None = None) -> list[str]:
    """Rename the project in `root`. Return the files that changed. UserError for a name that a registry may refuse."""
    if not ALLOWED.fullmatch(name):
        raise UserError(
            f"NAME={name} is not allowed: use small letters, digits and single hyphens, such as credit-risk"
        )
    old = yaml.safe_load((root / "MLproject").read_text())["name"]
    changed = use_package(root, url or remote(root)) if library == "package" and (root / "alacarte").is_dir() else []
    changed += rename(root, old, name) if name != old else []
    return sorted(set(changed))


def rename(root: Path, old: str, new: str) -> list[str]:
    """Replace the name in the files of the team, the title of README.md and the content of CHANGELOG.md."""
    changed = []
    for pattern, places in PLACES.items():
        for path in root.glob(pattern):
            text = path.read_text()
            for place in places:
                names = "|".join(re.escape(each) for each in {old, old.replace("-", "_")})
                expression = place.replace("<name>", f"(?P<name>{names})")
                text = re.sub(expression, lambda match: replaced(match, new), text)
            if text != path.read_text():
                path.write_text(text)
                changed.append(str(path.relative_to(root)))
    readme = root / "README.md"
    readme.write_text(TITLE.sub(f"# {new}", readme.read_text()))
    (root / "CHANGELOG.md").write_text(CHANGELOG.format(version=__version__))
    return [*changed, "README.md", "CHANGELOG.md"]


def replaced(match: re.Match[str], new: str) -> str:
    """The text of a match with another name. Names in Unity Catalog have underscores, because hyphens need quotes there."""
    text = match[0]
    start, end = match.start("name") - match.start(), match.end("name") - match.start()
    name = new.replace("-", "_") if text[:start].endswith("default.") else new
    return text[:start] + name + text[end:]


def use_package(root: Path, url: str) -> list[str]:
    """Delete the library, and require it as a package in its current version."""
    address = re.sub(r"^(\w+@[\w.-]+):", r"ssh://\1/", url)  # git@host:team/x.git
    if not re.match(r"(https?|ssh|git)://", address):
        raise UserError(f"URL={url} is not an address for pip: give one such as URL=https://HOST/TEAM/alacarte.git")
    pin = f"alacarte[train,serve,torch,postgres] @ git+{address}@v{__version__}"
    requirements = root / "requirements.txt"
    requirements.write_text(f"{requirements.read_text().rstrip()}\n{pin}  # the library: one line to update\n")
    pyproject = root / "pyproject.toml"
    pyproject.write_text(without_package(pyproject.read_text()))
    for folder in LIBRARY_FOLDERS:
        shutil.rmtree(root / folder, ignore_errors=True)
    return ["requirements.txt", "pyproject.toml", *(f"{folder}/ (deleted)" for folder in LIBRARY_FOLDERS)]


def without_package(text: str) -> str:
    """pyproject.toml without the sections that build the library, and without its folders in the settings of the tools."""
    sections = re.split(r"(?m)^(?=\[)", text)
    kept = [part for part in sections if not re.match(r"\[(project|build-system|tool\.hatch)", part)]
    settings = "".join(part for part in kept if part.startswith("["))
    settings = (
        re.sub(r'"tests/library[^"]*"(, )?', "", settings)
        .replace('files = ["alacarte", ', "files = [")
        .replace('", ]', '"]')
    )
    return "# Settings of the tools for tests and checks.\n" + settings


def remote(root: Path) -> str:
    """The address of the template: the remote `template` of git, else `origin`."""
    for name in ("template", "origin"):
        command = ["git", "remote", "get-url", name]
        asked = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if asked.returncode == 0:
            return asked.stdout.strip()
    raise UserError("URL is missing: this folder has no git remote; add URL=https://... of the template's repository")


def main() -> None:
    parser = argparse.ArgumentParser(prog="alacarte.template", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["init"])
    parser.add_argument("name", help="name of the project: small letters, digits, hyphens")
    parser.add_argument("--library", choices=["folder", "package"], default="folder", dest="form", help="where it is")
    parser.add_argument("--url", help="git address of the template; default: the remote `template`, else `origin`")
    arguments = parser.parse_args()
    try:
        changed = init(Path.cwd(), arguments.name, arguments.form, arguments.url or None)
    except UserError as error:
        sys.exit(f"init: {error}")
    print(*(f"init: changed {file}" for file in changed), sep="\n", end="\n" if changed else "")
    print(f"init: the project is {arguments.name}" if changed else f"init: the project is {arguments.name} already")


if __name__ == "__main__":
    main()
