"""Versions of one model on disk, for a restart while the registry is down, shared by the worker processes.

    <serve.cache>/<model and registry>/<version>-<what it was made from>/model/        the MLflow model folder
    <serve.cache>/<model and registry>/<version>-<what it was made from>/version.json  whose it is, and its digest
    <serve.cache>/<model and registry>/last_good.json                                  the version.json that served last
    <serve.cache>/<model and registry>/hurry                                           touched: every worker looks now

A version is written beside its place and renamed into it, so it is whole or absent. What is read from here is compared
with its digest first, which finds damage; whoever may write here may also write a digest.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import mlflow
from filelock import FileLock
from mlflow.entities.model_registry import ModelVersion

from alacarte import registry
from alacarte.errors import UserError

KEEP = 3  # versions on disk, beside those in use
ABANDONED = 3600  # seconds after which locks, and downloads that a killed process left, are removed
WAIT = 600  # seconds for another worker's download of the same version


@dataclass(frozen=True)
class Found:
    """A version that an alias, or the cache, names."""

    name: str
    number: str
    run_id: str | None
    source: str
    created: int  # ms since 1970; a model deleted and made again has the same numbers

    @classmethod
    def of(cls, version: ModelVersion) -> "Found":
        number, created = registry.number_of(version), int(version.creation_timestamp or 0)
        return cls(version.name, number, version.run_id or None, version.source or "", created)

    @cached_property
    def key(self) -> str:
        return f"{re.sub('[^0-9A-Za-z]', '_', self.number)}-{_short(f'{self.source} {self.created}')}"


class Cache:
    """Raises UserError where the folder cannot be written."""

    def __init__(self, root: str | Path, name: str) -> None:
        self.registry = without_password(mlflow.get_registry_uri())
        readable = re.sub(r"[^\w.-]", "_", name)[:50]
        self.folder = Path(root).resolve() / f"{readable}-{_short(f'{name} {self.registry}')}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"serve.cache={root}: {error.strerror}: choose a folder that can be written") from None
        self._last_good, self._hurry = self.folder / "last_good.json", self.folder / "hurry"

    def fetch(self, found: Found) -> Path:
        """The model folder of a version, downloaded where it is not here or damaged. Of several workers one downloads."""
        place = self.folder / found.key
        with FileLock(self.folder / f".{found.key}.lock", timeout=WAIT):
            origin = _read(place / "version.json")
            if origin and origin.get("digest", "none") == digest(place / "model"):
                os.utime(place)
                return place / "model"
            self._remove(place)
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            try:
                download(found, temporary / "model")
                made = {**asdict(found), "registry": self.registry, "digest": digest(temporary / "model")}
                (temporary / "version.json").write_text(json.dumps(made, indent=1))
                temporary.rename(place)
            except OSError:
                if not (place / "version.json").is_file():
                    raise  # else another worker was first: a lock that was removed as abandoned locks nothing
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return place / "model"

    def keep(self, found: Found) -> None:
        """Remember that a version serves."""
        origin = _read(self.folder / found.key / "version.json")
        if origin is None or _read(self._last_good) == origin:
            return
        with tempfile.NamedTemporaryFile("w", prefix=".new-", dir=self.folder, delete=False) as file:
            json.dump(origin, file, indent=1)
        Path(file.name).replace(self._last_good)

    def last_good(self) -> tuple[Found, Path] | None:
        """The version that served last and its model folder; None where none did. UserError where it is damaged."""
        if not self._last_good.exists():
            return None
        origin = _read(self._last_good) or {}
        found = _found(origin)
        model = self.folder / found.key / "model"
        if origin.get("registry") != self.registry or origin.get("digest", "none") != digest(model):
            raise UserError(f"the copy of the last model in {self.folder} is damaged, so it is not loaded")
        return found, model

    def evict(self, in_use: Iterable[str]) -> None:
        """Remove what is neither among the last KEEP versions, nor in use (keys), nor the last good one."""
        kept = {*in_use, _found(_read(self._last_good) or {}).key}
        places = (place for place in self.folder.iterdir() if place.is_dir() and not place.name.startswith("."))
        for place in sorted(places, key=_age)[KEEP:]:
            if place.name not in kept:
                self._remove(place)
        for place in self.folder.iterdir():
            if place.name.startswith(".") and _age(place) > ABANDONED:
                shutil.rmtree(place, ignore_errors=True)
                with contextlib.suppress(OSError):
                    place.unlink(missing_ok=True)

    def touch(self) -> int:
        """Tell every worker to look; the time, as `touched` gives it."""
        with contextlib.suppress(OSError):
            self._hurry.touch()
        return self.touched()

    def touched(self) -> int:
        """When `touch` was last called, by whichever worker, in ns; 0 for never."""
        try:
            return self._hurry.stat().st_mtime_ns
        except OSError:
            return 0

    def _remove(self, place: Path) -> None:
        """Renamed first, so that nobody finds half of it."""
        away = self.folder / f".old-{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            place.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def download(found: Found, to: Path) -> None:
    """Bring a version's model folder here."""
    to.mkdir()
    uri = f"models:/{found.name}/{found.number}"
    if found.source.startswith("models:/m-") and mlflow.get_registry_uri() == mlflow.get_tracking_uri():
        uri = found.source  # the same files, two calls fewer
    mlflow.artifacts.download_artifacts(uri, dst_path=str(to))
    if not (to / "MLmodel").is_file():
        raise UserError(f"{uri} holds no file MLmodel")


def digest(folder: Path) -> str | None:
    """Over the names and contents of the files in a folder, but for what Python writes there; None where there is none."""
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"):
        with path.open("rb") as file:
            total.update(
                f"{path.relative_to(folder).as_posix()}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return total.hexdigest()


def without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def _found(origin: dict[str, Any]) -> Found:
    """What a version.json names; of one that is damaged a version that does not exist."""
    text = {key: str(origin.get(key)) for key in ("name", "number", "source", "created")}
    created = int(text["created"]) if text["created"].isdecimal() else 0
    return Found(text["name"], text["number"], origin.get("run_id"), text["source"], created)


def _age(path: Path) -> float:
    """Seconds since a path was written or used; 0 where it has just gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
