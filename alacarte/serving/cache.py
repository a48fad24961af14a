"""Versions of one model on disk, for a restart while the registry does not answer.

    <serve.cache>/<model and registry>/<version>-<digest of its source>/model/        the MLflow model folder
    <serve.cache>/<model and registry>/<version>-<digest of its source>/version.json  its VersionRef, and the folder's digest
    <serve.cache>/<model and registry>/<version>-<digest of its source>/served        its signature, and when it began to serve

A copy is written beside its place and renamed into it, and compared with its digest before it is used. This finds damage, but no
forgery: a process that may write here may also write a digest.
"""

import contextlib
import hashlib
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
from alacarte.verdicts import digest

KEEP = 3  # versions that served, beside the versions in use: the last one may be refused at a restart

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
    digest: str


class Cache:
    """Raises UserError if the folder cannot be written."""

    def __init__(self, root: str | Path, name: str) -> None:
        uri = urlsplit(mlflow.get_registry_uri())
        address = uri._replace(netloc=uri.netloc.rpartition("@")[2], query="", fragment="").geturl()
        readable = re.sub(r"[^\w.-]", "_", name)[:50]
        self.folder = Path(root).resolve() / f"{readable}-{_short_digest(f'{name} {address}')}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"serve.cache={root}: {error.strerror}: choose a folder that can be written") from None

    def fetch(self, version: VersionRef) -> Path:
        """The model folder of a version. It is downloaded if it is absent or damaged."""
        place = self.folder / version.key
        if not _read(place):
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self.folder) as temporary:
                copy = Path(temporary) / "copy"
                (copy / "model").mkdir(parents=True)
                _download(version, copy / "model")
                record = _Record(version, digest(copy / "model"))
                (copy / "version.json").write_bytes(msgspec.json.encode(record))
                if not _read(place):  # another server may have been faster
                    shutil.rmtree(place, ignore_errors=True)
                    copy.rename(place)
        return place / "model"

    def mark_served(self, version: VersionRef, signature: str) -> None:
        """Remember that a version serves now, and the signature of the gate."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / version.key / "served").write_text(signature)

    def served(self) -> list[str]:
        """The keys of the versions that served, the last one first."""
        marks = sorted(self.folder.glob("*/served"), key=lambda mark: mark.stat().st_mtime, reverse=True)
        return [mark.parent.name for mark in marks]

    def read(self, key: str) -> tuple[VersionRef, Path, str]:
        """A version that served, its model folder and its signature. Raises UserError if the copy is damaged."""
        place = self.folder / key
        version = _read(place)
        if version is None:
            raise UserError(f"the copy in {place} is damaged, so it is not loaded")
        return version, place / "model", (place / "served").read_text()

    def evict(self, in_use: Iterable[str]) -> None:
        """Remove the copies that are not in use (keys) and not among the last versions that served, and abandoned downloads."""
        kept = {*in_use, *self.served()[:KEEP]}
        for place in self.folder.iterdir():
            is_download = place.name.startswith(".") and time.time() - place.stat().st_mtime < ABANDONED
            if place.name not in kept and not is_download:
                shutil.rmtree(place, ignore_errors=True)


def _download(version: VersionRef, folder: Path) -> None:
    uri = f"models:/{version.name}/{version.number}"
    if version.source.startswith("models:/m-") and mlflow.get_registry_uri() == mlflow.get_tracking_uri():
        uri = version.source  # the same files, two calls fewer
    mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))
    if not (folder / "MLmodel").is_file():
        raise UserError(f"{uri} holds no file MLmodel")


def _read(place: Path) -> VersionRef | None:
    """The version of a copy; None if the copy is absent, damaged or incomplete."""
    try:
        record = msgspec.json.decode((place / "version.json").read_bytes(), type=_Record)
        return record.version if record.digest == digest(place / "model") else None
    except (OSError, msgspec.MsgspecError):
        return None


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
