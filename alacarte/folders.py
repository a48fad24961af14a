"""Where the files of the project and those of the library are, and locks between processes of one machine."""

import getpass
import hashlib
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from alacarte.errors import UserError

ROOT = Path.cwd()  # the project is the folder in which a step is started
PACKAGE = Path(__file__).resolve().parent
# An installed library holds steps, configurations and a default project in `_template`. A checkout holds them beside it.
TEMPLATE = PACKAGE / "_template" if (PACKAGE / "_template").is_dir() else PACKAGE.parent
OURS = ("alacarte", "examples", "project", "steps")  # packages whose source decides the result of a step


def lock(name: str) -> FileLock:
    """A lock with a name, between the processes of one account on one machine.

    The file is in a folder of the account: a file of another account could not be opened, or could be kept locked.
    """
    account = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir(), f"alacarte-{account}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and folder.lstat().st_uid != account:
            raise PermissionError
    except OSError:
        raise UserError(f"{folder} cannot be used for lock files: export TMPDIR=FOLDER of your own") from None
    return FileLock(folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock")
