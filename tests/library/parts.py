"""What some tests need beside Python: looked for here, skipped where it is missing unless ALL_PARTS is set, as CI does."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def need(name: str, package: str) -> str:
    """The path of a program, of PATH or of Debian's PostgreSQL; skips the test, or fails it, where there is none."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, versions)])
    matches = shutil.which(name, path=path)
    if matches is None:
        lacks(f"{name} is not installed: apt-get install {package}")
    return matches


def lacks(message: str) -> NoReturn:
    """Skip the test, or fail it where all parts are due."""
    if os.environ.get("ALL_PARTS"):
        pytest.fail(message)
    pytest.skip(message)
