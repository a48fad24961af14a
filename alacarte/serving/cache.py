"""Versions of one model on disk, for a restart while the registry does not answer.

    <serve.cache>/<model and registry>/<version>-<digest of its source>/model/        the MLflow model folder
    <serve.cache>/<model and registry>/<version>-<digest of its source>/version.json  its VersionRef, and the folder's digest
    <serve.cache>/<model and registry>/<version>-<digest of its source>/served        its time: when it began to serve

A version is written beside its place and renamed into it, so it is complete or absent. A copy is compared with its digest
before it is used. This finds damage, but no forgery: a process that may write here may also write a digest.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import msgspec
from mlflow.entities.model_registry import ModelVersion

from alacarte import registry
from alacarte.errors import UserError

KEEP = 3  # versions on disk, beside the versions in use
KEEP_SERVED = 2  # of the versions that served, so that one is left when the last one is refused at a restart
ABANDONED = 3600  # seconds after which a download that a killed process left is removed


@dataclass(frozen=True)
class VersionRef:
    """A version that an alias, or the cache, names."""

    name: str
    number: str
    run_id: str | None
    source: str
    created: int  # ms since 1970; a model that is deleted and registered again has the same numbers

    @classmethod
    def of(cls, version: ModelVersion) -> "VersionRef":
        number, created = registry.number_of(version), int(version.creation_timestamp or 0)
        return cls(version.name, number, version.run_id or None, version.source or "", created)

    @cached_property
    def key(self) -> str:
        return f"{re.sub('[^0-9A-Za-z]', '_', self.number)}-{_short_digest(f'{self.source} {self.created}')}"


class _Record(msgspec.Struct, frozen=True):
    """The content of version.json."""

    version: VersionRef
    registry: str
    digest: str


class Cache:
    """Raises UserError if the folder cannot be written."""

    def __init__(self, root: str | Path, name: str) -> None:
        uri = urlsplit(mlflow.get_registry_uri())
        self.registry = uri._replace(netloc=uri.netloc.rpartition("@")[2], query="", fragment="").geturl()
        readable = re.sub(r"[^\w.-]", "_", name)[:50]
        self.folder = Path(root).resolve() / f"{readable}-{_short_digest(f'{name} {self.registry}')}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"serve.cache={root}: {error.strerror}: choose a folder that can be written") from None

    def fetch(self, version: VersionRef) -> Path:
        """The model folder of a version. It is downloaded if it is absent or damaged."""
        place = self.folder / version.key
        if not _is_complete(place):
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            try:
                (temporary / "model").mkdir()
                download(version, temporary / "model")
                record = _Record(version, self.registry, digest(temporary / "model"))
                (temporary / "version.json").write_bytes(msgspec.json.encode(record))
                if not _is_complete(place):  # another server may have been faster
                    self._remove(place)
                    temporary.rename(place)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        os.utime(place)
        return place / "model"

    def mark_served(self, version: VersionRef) -> None:
        """Remember that a version serves now."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / version.key / "served").touch()

    def served(self) -> list[str]:
        """The keys of the versions that served, the last one first."""
        return [mark.parent.name for mark in sorted(self.folder.glob("[!.]*/served"), key=_age)]

    def read(self, key: str) -> tuple[VersionRef, Path]:
        """A version and its model folder. Raises UserError if the copy is damaged."""
        place = self.folder / key
        record = _read(place)
        if record is None or record.version.key != key or record.registry != self.registry:
            raise UserError(f"{place}/version.json is damaged, so this copy is not loaded")
        if not _is_complete(place):
            raise UserError(f"the copy of version {record.version.number} in {place} is damaged, so it is not loaded")
        return record.version, place / "model"

    def evict(self, in_use: Iterable[str]) -> None:
        """Remove the versions beyond KEEP and KEEP_SERVED that are not in use (keys), and abandoned downloads."""
        kept = {*in_use, *self.served()[:KEEP_SERVED]}
        places = sorted(self.folder.iterdir(), key=_age)
        versions = [place for place in places if not place.name.startswith(".")]
        abandoned = [place for place in places if place.name.startswith(".") and _age(place) > ABANDONED]
        for place in [*(place for place in versions[KEEP:] if place.name not in kept), *abandoned]:
            self._remove(place)

    def _remove(self, place: Path) -> None:
        """Rename the folder before it is deleted, so that it is never incomplete at its place."""
        removed = Path(tempfile.mkdtemp(prefix=".old-", dir=self.folder))
        with contextlib.suppress(FileNotFoundError):
            place.rename(removed / "version")
        shutil.rmtree(removed, ignore_errors=True)


def download(version: VersionRef, folder: Path) -> None:
    """Download the model folder of a version."""
    uri = f"models:/{version.name}/{version.number}"
    if version.source.startswith("models:/m-") and mlflow.get_registry_uri() == mlflow.get_tracking_uri():
        uri = version.source  # the same files, two calls fewer
    mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))
    if not (folder / "MLmodel").is_file():
        raise UserError(f"{uri} holds no file MLmodel")


def digest(folder: Path) -> str:
    """Of the names and contents of the files in a folder, without `__pycache__`."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def _read(place: Path) -> _Record | None:
    """None if version.json is absent or damaged."""
    try:
        return msgspec.json.decode((place / "version.json").read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError):
        return None


def _is_complete(place: Path) -> bool:
    record = _read(place)
    return record is not None and record.digest == digest(place / "model")


def _age(path: Path) -> float:
    """Seconds since a path was written or used; 0 if it was just removed."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
