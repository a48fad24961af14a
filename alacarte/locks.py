"""Locks between the processes of one machine, and the name of the account."""

import getpass
import hashlib
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from alacarte.errors import UserError


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


def user_name() -> str:
    """The name of the account, or its number: a container may run under a number without a name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return str(os.getuid())
