"""The commands in docs/ run as printed, page by page, in a fresh copy of the project."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, Project, copy_project
from workspace import checkout_at, stand_in

PAGES = sorted((ROOT / "docs").glob("*.md"))
FOLLOWED_ELSEWHERE = {  # page -> the file that runs its commands and looks at the results
    "kubernetes": "test_stack.py",
    "make-it-yours": "test_make_it_yours.py",
    "stack": "test_stack.py",
    "updating": "test_template.py",
}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in FOLLOWED_ELSEWHERE], ids=lambda page: page.stem
)
def test_page(page: Path, tmp_path: Path):
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    assert blocks, f"{page.name} shows no command"
    # Each block is a shell of its own, so that a server started in one ends with it.
    with surroundings(page, tmp_path) as (root, env):
        for block in blocks:
            Project(root, f"sqlite:///{root}/mlflow.db").run("bash", "-euo", "pipefail", "-c", block, **env)


@contextmanager
def surroundings(page: Path, folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A copy of the project, and what a page takes for granted: the one on Databricks, a workspace to be logged in to."""
    if page.stem != "databricks":
        yield copy_project(folder / "project"), {}
        return
    with stand_in(folder) as workspace:
        yield checkout_at(folder / "project"), workspace.env()


def test_the_other_pages_have_a_test():
    for page, file in FOLLOWED_ELSEWHERE.items():
        assert (ROOT / "docs" / f"{page}.md").exists() and Path(__file__).with_name(file).exists()


def test_every_local_link_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
