"""Versions of one model on disk, for a restart while the registry is down. Several servers may share one cache.

    <serve.cache>/<model and registry>/<version>-<digest of its source>/model/        the MLflow model folder
    <serve.cache>/<model and registry>/<version>-<digest of its source>/version.json  its VersionRef, and the folder's digest
    <serve.cache>/<model and registry>/<version>-<digest of its source>/served        its time: when it began to serve

A version is written beside its place and renamed into it, so it is whole or absent. A copy is compared with its digest
before it is used. This finds damage, but no forgery: a process that may write here may also write a digest.
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

KEEP = 3  # versions on disk, beside the versions in use
KEEP_SERVED = 2  # of the versions that served, so that one is left when the last one is refused at a restart
ABANDONED = 3600  # seconds after which locks, and downloads that a killed process left, are removed
WAIT = 600  # seconds for the download of the same version by another process


@dataclass(frozen=True)
class VersionRef:
    """A version that an alias, or the cache, names."""

    name: str
    number: str
    run_id: str | None
    source: str
    created: int  # ms since 1970; a model deleted and made again has the same numbers

    @classmethod
    def of(cls, version: ModelVersion) -> "VersionRef":
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

    def fetch(self, version: VersionRef) -> Path:
        """The model folder of a version, downloaded where it is not here or damaged. Of several processes one downloads."""
        place = self.folder / version.key
        with FileLock(self.folder / f".{version.key}.lock", timeout=WAIT):
            origin = _read(place / "version.json")
            if origin and origin.get("digest", "none") == digest(place / "model"):
                os.utime(place)
                return place / "model"
            self._remove(place)
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            try:
                download(version, temporary / "model")
                origin = {**asdict(version), "registry": self.registry, "digest": digest(temporary / "model")}
                (temporary / "version.json").write_text(json.dumps(origin, indent=1))
                temporary.rename(place)
            except OSError:
                if not (place / "version.json").is_file():
                    raise  # else another process was first: a lock that was removed as abandoned locks nothing
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return place / "model"

    def mark_served(self, version: VersionRef) -> None:
        """Remember that a version serves now."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / version.key / "served").touch()

    def served(self) -> list[str]:
        """The keys of the versions that served, the last one first."""
        return [mark.parent.name for mark in sorted(self.folder.glob("[!.]*/served"), key=_age)]

    def read(self, key: str) -> tuple[VersionRef, Path]:
        """A version and its model folder. Raises UserError where the copy is damaged."""
        place = self.folder / key
        origin = _read(place / "version.json") or {}
        version = _version(origin)
        if version is None or version.key != key or origin.get("registry") != self.registry:
            raise UserError(f"{place}/version.json is damaged, so this copy is not loaded")
        if origin.get("digest", "none") != digest(place / "model"):
            raise UserError(f"the copy of version {version.number} in {place} is damaged, so it is not loaded")
        return version, place / "model"

    def evict(self, in_use: Iterable[str]) -> None:
        """Remove the versions beyond KEEP and KEEP_SERVED that are not in use (keys)."""
        kept = {*in_use, *self.served()[:KEEP_SERVED]}
        places = (place for place in self.folder.iterdir() if place.is_dir() and not place.name.startswith("."))
        for place in sorted(places, key=_age)[KEEP:]:
            if place.name not in kept:
                self._remove(place)
        for place in self.folder.iterdir():
            if place.name.startswith(".") and _age(place) > ABANDONED:
                shutil.rmtree(place, ignore_errors=True)
                with contextlib.suppress(OSError):
                    place.unlink(missing_ok=True)

    def _remove(self, place: Path) -> None:
        """Rename the folder before it is deleted, so that no process reads half of it."""
        away = self.folder / f".old-{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            place.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def download(version: VersionRef, to: Path) -> None:
    """Bring a version's model folder here."""
    to.mkdir()
    uri = f"models:/{version.name}/{version.number}"
    if version.source.startswith("models:/m-") and mlflow.get_registry_uri() == mlflow.get_tracking_uri():
        uri = version.source  # the same files, two calls fewer
    mlflow.artifacts.download_artifacts(uri, dst_path=str(to))
    if not (to / "MLmodel").is_file():
        raise UserError(f"{uri} holds no file MLmodel")


def digest(folder: Path) -> str | None:
    """Of the names and contents of the files in a folder, without `__pycache__`; None where there is no folder."""
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
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _version(origin: dict[str, Any]) -> VersionRef | None:
    """The version that a version.json describes; None where it is damaged."""
    try:
        name, number, source = (str(origin[key]) for key in ("name", "number", "source"))
        return VersionRef(name, number, origin["run_id"], source, int(origin["created"]))
    except (KeyError, TypeError, ValueError):
        return None


def _age(path: Path) -> float:
    """Seconds since a path was written or used; 0 where it has just been removed."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
