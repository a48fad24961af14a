"""Keeps the served model up to date: follows the registry's alias, and swaps when the next version is ready in memory.

One thread reads the alias (at each poll, and after `refresh`) and swaps. Each version is downloaded, tried and loaded in a
thread of its own, so that a slow or broken version delays neither the reads nor a way back. The version under `challenger`
is made ready before its promotion, which is then only a swap. Where there is no challenger, the version before the current
one stays ready for a rollback.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alacarte import registry
from alacarte.errors import UserError
from alacarte.serving.cache import Cache, VersionRef
from alacarte.serving.model import ServedModel
from alacarte.serving.settings import Settings
from alacarte.serving.signatures import objection

RETRY = 60  # seconds until a version that failed is tried again, if the alias still names it; doubled each time
DOUBLED = 6  # times, at most
SILENCE = 3  # seconds without an answer of the registry, after which a version from the cache serves until it answers
YIELD = 0.2  # seconds that a compilation waits, so that the swap comes first

# MLflow's own limits (120 s, 7 tries) would hide for minutes that the registry is gone.
MLFLOW_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """The version that serves. A request reads `ModelFollower.current` once and so answers with one version throughout."""

    model: ServedModel
    version: str
    run_id: str | None
    since: datetime


@dataclass
class _Candidate:
    """A version that is being made ready. `ready` is set last: from then on it has a model or an error."""

    version: VersionRef
    failures: int = 0  # before this attempt
    model: ServedModel | None = None
    error: str | None = None
    counted: bool = False
    ended: float = 0.0
    ready: bool = False


class ModelFollower:
    """`load` makes a model of a folder, and refuses the version by any exception.

    Sets MLflow's timeouts in the environment where the user has not. UserError where `serve.cache` cannot be written.
    """

    def __init__(self, settings: Settings, load: Callable[[Path], ServedModel]) -> None:
        shorten_mlflow_timeouts()
        self.current: LoadedModel | None = None
        self._name, self._poll, self._load = settings.registered_model_name, settings.poll_seconds, load
        self._cache = Cache(settings.cache, self._name)
        self._candidates: dict[str, _Candidate] = {}
        self._champion: VersionRef | None = None
        self._challenger: VersionRef | None = None
        self._key = self._previous = ""
        self._swaps = self._failures = 0
        self._registry_answered = self._cache_tried = False
        self._registry_error: str | None = None
        self._version_error: str | None = None
        self._cache_error: str | None = None
        self._refresh, self._wake, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._compiling, self._swapping = threading.Lock(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def start(self) -> None:
        """Follow the registry from now on."""
        self._thread.start()
        self._in_thread(self._wait_for_registry)

    def stop(self, seconds: float = 10) -> None:
        """Stop following; the current version stays. Waits for versions on their way, but not longer than `seconds`."""
        self._stopping.set()
        self._wake.set()
        end = time.monotonic() + seconds
        if self._thread.ident is not None:
            self._thread.join(seconds)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def refresh(self) -> None:
        """Read the alias now. From any thread; does not wait."""
        self._refresh.set()
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """For people: the version that serves, since when (ISO 8601), through which path, and the last failure, in one line."""
        current = self.current
        return {
            "registered_model_name": self._name,
            "model_version": current.version if current else None,
            "run_id": current.run_id if current else None,
            "since": current.since.isoformat(timespec="milliseconds") if current else None,
            "path": current.model.path_in_use if current else None,
            "swaps": self._swaps,
            "failures": self._failures,
            "last_error": self._error() or self._challenger_error(),
        }

    def reason(self) -> str:
        """Why nothing serves, in one line."""
        if error := self._error():
            return f"no champion of {self._name} is loaded: {error}"
        if not self._registry_answered:
            return f"no champion of {self._name} is loaded yet: the registry has not answered yet"
        if self._champion is None:
            return f"{self._name} has no champion: set the alias on a version in the registry"
        return f"no champion of {self._name} is loaded yet: version {self._champion.number} is on its way"

    def _error(self) -> str | None:
        errors = [text for text in (self._version_error, self._registry_error) if text]
        if errors and self.current is None and self._cache_error:
            errors.append(self._cache_error)
        return "; ".join(errors) or None

    def _challenger_error(self) -> str | None:
        challenger = self._challenger
        candidate = self._candidates.get(challenger.key) if challenger else None
        if candidate is None or candidate.error is None or challenger == self._champion:
            return None
        return f"version {candidate.version.number} is refused: {candidate.error} (it is the challenger)"

    # --- the thread ---

    def _follow(self) -> None:
        next_poll = 0.0
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if self._refresh.is_set() or time.monotonic() >= next_poll:
                    self._refresh.clear()
                    next_poll = time.monotonic() + self._poll
                    self._read_champion()
                    self._swap_if_ready()
                    self._read_challenger()
                self._swap_if_ready()
            except BaseException as error:  # the thread goes on, whatever the error is
                self._registry_error = f"the server failed to follow the registry: {one_line(error)}"
                self._failures += 1
                logger.exception("following the registry failed")
            self._wake.wait(max(0.0, next_poll - time.monotonic()))

    def _read_champion(self) -> None:
        try:
            entity = registry.champion_of(self._name)
        except Exception as error:
            self._registry_error = f"the registry does not answer: {one_line(error)}"
            self._failures += 1
            return
        with self._swapping:
            self._registry_error, self._registry_answered = None, True
        version = VersionRef.of(entity) if entity else None
        if version and version != self._champion:
            candidate = self._candidates.get(version.key)
            if (
                candidate and candidate.error
            ):  # a version that failed as challenger, or as champion before, is tried again
                del self._candidates[version.key]
        self._champion = version

    def _read_challenger(self) -> None:
        """The next champion, which is made ready. Its failure is counted when it is promoted."""
        if self._registry_error:
            return
        with contextlib.suppress(Exception):
            entity = registry.by_alias(self._name, registry.CHALLENGER)
            self._challenger = VersionRef.of(entity) if entity else None

    def _swap_if_ready(self) -> None:
        """Swap to the version that the alias names when it is ready; where nothing serves, to a version from the cache."""
        with self._swapping:
            self._forget()
            wanted = self._champion
            if wanted is None or wanted.key == self._key:
                self._version_error = None
            else:
                candidate = self._candidate(wanted)
                if candidate.ready:
                    self._take(candidate)
            if self._registry_error or self._version_error:
                self._fall_back()
            waiting = wanted is not None and wanted.key != self._key and not self._candidates[wanted.key].ready
            if self._challenger and self._challenger.key != self._key and not waiting:
                self._candidate(self._challenger)  # after the champion, for which requests may wait

    def _wait_for_registry(self) -> None:
        """A registry that neither answers nor refuses must not delay a version that can serve without it."""
        self._stopping.wait(SILENCE)
        if self._registry_error or self._stopping.is_set():
            return
        with self._swapping:
            if self._registry_answered:
                return
            self._registry_error = f"the registry has not answered for {SILENCE} s"
            self._fall_back()

    def _take(self, candidate: _Candidate) -> None:
        model, number = candidate.model, candidate.version.number
        if model and not candidate.error and self.current:
            candidate.error = objection(self.current.model.signature, model.signature)
            if candidate.error:
                candidate.error += "; restart the server to take it all the same"
                candidate.ended = time.monotonic()
        if candidate.error:
            self._version_error = f"version {number} is refused: {candidate.error}"
            if not candidate.counted:
                candidate.counted = True
                self._failures += 1
                logger.warning("%s %s", self._name, self._version_error)
        if model and not candidate.error:
            self._version_error = None
            self._swap(candidate.version, model)

    def _swap(self, version: VersionRef, model: ServedModel) -> None:
        self._previous, self._key = self._key, version.key
        self._swaps += self.current is not None
        self.current = LoadedModel(model, version.number, version.run_id or model.run_id, datetime.now(UTC))
        logger.info("%s: version %s serves", self._name, version.number)
        try:
            self._cache.mark_served(version)
            self._cache.evict({self._key, self._previous, self._challenger.key if self._challenger else ""})
        except OSError as error:
            logger.warning("serve.cache: %s", one_line(error))

    def _fall_back(self) -> None:
        """Serve a version from the cache where nothing serves. Tried once: the copies on the disk do not change."""
        if self.current is None and not self._cache_tried:
            self._cache_tried = True
            self._in_thread(self._load_from_cache)

    def _load_from_cache(self) -> None:
        """Serve the last version that served from here before and is not refused."""
        errors = []
        for key in self._cache.served():
            refused = self._candidates.get(key)
            if refused and refused.error:
                continue
            try:
                version, folder = self._cache.read(key)
            except UserError as error:
                errors.append(str(error))
                continue
            candidate = _Candidate(version)
            self._try(candidate, folder)
            if candidate.model is None:
                errors.append(f"the copy of version {version.number} is refused: {candidate.error}")
                continue
            with self._swapping:
                if self.current is not None:
                    return
                self._candidates[key] = candidate
                self._swap(version, candidate.model)
            self._compile(candidate)
            return
        self._cache_error = "; ".join(errors) or "no other version has served from here before"

    # --- versions on their way ---

    def _candidate(self, version: VersionRef) -> _Candidate:
        """The version's candidate; a new one is sent on its way."""
        last = self._candidates.get(version.key)
        if last and not (last.error and time.monotonic() - last.ended > RETRY * 2 ** min(last.failures, DOUBLED)):
            return last
        candidate = self._candidates[version.key] = _Candidate(version, last.failures + 1 if last else 0)
        self._in_thread(self._prepare, candidate)
        return candidate

    def _forget(self) -> None:
        """Keep, beside the current and the next version, one version in memory: the challenger, or the version before."""
        wanted = {self._key, self._champion.key if self._champion else ""}
        challenger = self._challenger.key if self._challenger else ""
        wanted.add(challenger if challenger not in ("", *wanted) else self._previous)
        self._candidates = {key: candidate for key, candidate in self._candidates.items() if key in wanted}

    def _in_thread(self, function: Callable[..., None], *arguments: _Candidate) -> None:
        thread = threading.Thread(target=function, args=arguments, name="candidate", daemon=True)
        thread.start()
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]

    def _prepare(self, candidate: _Candidate) -> None:
        self._try(candidate)
        self._wake.set()
        self._compile(candidate)

    def _try(self, candidate: _Candidate, folder: Path | None = None) -> None:
        """Load a version, downloaded where it is not in the cache, and let it answer its example."""
        try:
            folder = folder or self._cache.fetch(candidate.version)
            if self._stopping.is_set():
                return
            model = self._load(folder)
            model.check_example()
            candidate.model = model
        except BaseException as error:  # a model's own code may raise anything
            candidate.error = one_line(error, str(folder))
        candidate.ended = time.monotonic()
        candidate.ready = True

    def _compile(self, candidate: _Candidate) -> None:
        """Look for a faster path, one version at a time."""
        self._stopping.wait(YIELD)
        if candidate.model is None or self._stopping.is_set():
            return
        try:
            with self._compiling:
                candidate.model.compile()
        except BaseException as error:
            logger.warning("version %s stays on MLflow's own path: %s", candidate.version.number, one_line(error))


def shorten_mlflow_timeouts() -> None:
    """Let MLflow's calls of this process fail after seconds, where the user has not set otherwise."""
    for name, value in MLFLOW_LIMITS.items():
        os.environ.setdefault(name, value)


def one_line(error: BaseException, folder: str = "") -> str:
    """What an error says: no traceback, no password, 300 characters at most, and not the folder it happened in."""
    text = " ".join(re.sub(r"//[^/@\s]+@", "//", str(error)).split())
    if folder and text.startswith(folder):
        text = text.removeprefix(folder).lstrip("/: ")
    named = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    return named[:300]
