"""Keeps the served model up to date: follows the alias in the registry, and swaps when the next version is ready in memory.

One thread reads the alias (at each poll, and after `refresh`) and swaps. Each version is downloaded, tried and loaded in a
thread of its own, so that a slow or broken version delays neither the reads nor a rollback. The version under `challenger`
is prepared before its promotion, which is then only a swap. Without a challenger, the version before the current one stays
ready for a rollback.
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

import mlflow

from alacarte import registry, verdicts
from alacarte.errors import UserError
from alacarte.serving.cache import Cache, VersionRef
from alacarte.serving.model import ServedModel
from alacarte.serving.settings import Settings
from alacarte.serving.signatures import objection

RETRY = 60  # seconds until a refused version is tried again, if an alias still names it
UNSIGNED = "the gate has not signed a PROMOTE for these files (serve.require_verdict=true): run evaluate, or retrain"
SEARCH_DELAY = 0.2  # seconds that the search for a fast path waits, so that the swap comes first

# MLflow's own limits (120 s, 7 attempts) would hide for minutes that the registry does not answer.
MLFLOW_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """The version that serves. A request reads `ModelFollower.current` once, so that one version answers it."""

    model: ServedModel
    version: str
    run_id: str | None
    since: datetime


@dataclass
class _Candidate:
    """A version that is prepared. `ready` is set last: from then on it has a model or an error."""

    version: VersionRef
    folder: Path | None = None
    model: ServedModel | None = None
    error: str | None = None
    ended: float = 0.0
    ready: bool = False


class ModelFollower:
    """`load` makes a model from a folder. Any exception refuses the version.

    Sets MLflow's timeouts in the environment unless the user has set them. Raises UserError if `serve.cache` cannot be written.
    """

    def __init__(self, settings: Settings, load: Callable[[Path], ServedModel]) -> None:
        for name, limit in MLFLOW_LIMITS.items():
            os.environ.setdefault(name, limit)
        self.current: LoadedModel | None = None
        self._name, self._poll, self._load = settings.registered_model_name, settings.poll_seconds, load
        self._require_verdict = settings.require_verdict
        self._cache = Cache(settings.cache, self._name)
        self._candidates: dict[str, _Candidate] = {}
        self._champion: VersionRef | None = None
        self._challenger: VersionRef | None = None
        self._current_key = self._previous_key = ""
        self._swaps = self._failures = 0
        self._cache_tried = False
        self._registry_error: str | None = "the registry has not answered yet"
        self._version_error: str | None = None
        self._cache_error: str | None = None
        self._refresh, self._wake, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._search_lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start to follow the registry."""
        self._in_thread(self._follow)

    def stop(self, seconds: float = 10) -> None:
        """Stop following. The current version stays. Waits at most `seconds` for versions that are being prepared."""
        self._stopping.set()
        self._wake.set()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def refresh(self) -> None:
        """Read the alias now. Callable from any thread; does not wait."""
        self._refresh.set()
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """The version that serves, since when (ISO 8601), through which path, and the last failure in one line."""
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
        if self._champion is None:
            return f"{self._name} has no champion: set the alias on a version in the registry"
        return f"no champion of {self._name} is loaded yet: version {self._champion.number} is being prepared"

    def _error(self) -> str | None:
        cache_error = None if self.current else self._cache_error
        errors = [error for error in (self._version_error, self._registry_error) if error]
        return "; ".join([*errors, cache_error] if errors and cache_error else errors) or None

    def _challenger_error(self) -> str | None:
        challenger = self._challenger
        candidate = self._candidates.get(challenger.key) if challenger else None
        if candidate is None or candidate.error is None or challenger == self._champion:
            return None
        return f"version {candidate.version.number} is refused: {candidate.error} (it is the challenger)"

    # --- the thread that follows ---

    def _follow(self) -> None:
        next_poll, said_why = 0.0, False
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
                if not (said_why or self.current) and (self._champion is None or self._version_error):
                    said_why = True
                    uri = re.sub("//[^/]*@", "//", mlflow.get_registry_uri())  # without a password
                    print(f"serve: waiting, {self.reason()}; the registry is {uri}", flush=True)
            except BaseException as error:  # the thread goes on, whatever the error is
                self._registry_error = f"the server failed to follow the registry: {_one_line(error)}"
                self._failures += 1
                logger.exception("following the registry failed")
            self._wake.wait(max(0.0, next_poll - time.monotonic()))

    def _read_champion(self) -> None:
        try:
            version = registry.champion_of(self._name)
        except Exception as error:
            self._registry_error = f"the registry does not answer: {_one_line(error)}"
            self._failures += 1
            return
        self._registry_error = None
        champion = VersionRef.of(version) if version else None
        if champion and champion != self._champion:
            candidate = self._candidates.get(champion.key)
            if candidate and candidate.error:  # it failed earlier under an alias; it is tried again now
                del self._candidates[champion.key]
        self._champion = champion

    def _read_challenger(self) -> None:
        """Its failures are counted when it is promoted."""
        if not self._registry_error:
            with contextlib.suppress(Exception):
                version = registry.by_alias(self._name, registry.CHALLENGER)
                self._challenger = VersionRef.of(version) if version else None

    # --- swapping ---

    def _swap_if_ready(self) -> None:
        """Swap to the version that the alias names when it is ready. If nothing serves, use a version from the cache."""
        self._forget_candidates()
        champion, challenger = self._champion, self._challenger
        preparing = False
        if champion is None or champion.key == self._current_key:
            self._version_error = None
        else:
            candidate = self._prepare(champion)
            preparing = not candidate.ready
            if not preparing:
                self._take(candidate)
        if self.current is None and not self._cache_tried and (self._registry_error or self._version_error):
            self._cache_tried = True  # the copies on the disk do not change
            self._load_from_cache()
        if challenger and challenger.key != self._current_key and not preparing:
            self._prepare(challenger)  # after the champion, for which requests may wait

    def _forget_candidates(self) -> None:
        """Keep one version in memory beside the current and the next one: the challenger, or the version before."""
        keys = {self._current_key, self._champion.key if self._champion else ""}
        challenger = self._challenger.key if self._challenger else ""
        keys.add(challenger if challenger not in ("", *keys) else self._previous_key)
        self._candidates = {key: candidate for key, candidate in self._candidates.items() if key in keys}

    def _take(self, candidate: _Candidate) -> None:
        """Swap to a candidate that is ready, or report why it is refused."""
        if candidate.model and not candidate.error:
            signature = self._read_signature(candidate.version)
            candidate.error = self._find_fault(candidate, signature)
            if not candidate.error:
                self._version_error = None
                self._swap(candidate.version, candidate.model, signature)
                return
            candidate.ended = time.monotonic()
        error = f"version {candidate.version.number} is refused: {candidate.error}"
        if error != self._version_error:
            self._version_error = error
            self._failures += 1
            logger.warning("%s %s", self._name, error)

    def _read_signature(self, version: VersionRef) -> str:
        """The signature in the registry, if one is required: "" for none, or for another version of the same number."""
        registered = registry.by_number(self._name, version.number) if self._require_verdict else None
        is_same = registered is not None and VersionRef.of(registered) == version
        return registered.tags.get(verdicts.TAG, "") if registered and is_same else ""

    def _find_fault(self, candidate: _Candidate, signature: str) -> str | None:
        """Why a loaded version must not replace the current one."""
        version, folder = candidate.version, candidate.folder
        assert candidate.model and folder
        if self._require_verdict and not verdicts.is_signed(
            version.name, version.number, version.source, folder, signature
        ):
            return UNSIGNED
        reason = objection(self.current.model.signature, candidate.model.signature) if self.current else None
        return f"{reason}; restart the server to take it all the same" if reason else None

    def _swap(self, version: VersionRef, model: ServedModel, signature: str) -> None:
        self._previous_key, self._current_key = self._current_key, version.key
        self._swaps += self.current is not None
        self.current = LoadedModel(model, version.number, version.run_id or model.run_id, datetime.now(UTC))
        print(f"serve: version {version.number} of {self._name} answers", flush=True)
        try:
            self._cache.mark_served(version, signature)
            self._cache.evict({*self._candidates, self._current_key, self._previous_key})
        except OSError as error:
            logger.warning("serve.cache: %s", _one_line(error))

    # --- preparing versions ---

    def _prepare(self, version: VersionRef) -> _Candidate:
        """The candidate of a version. A new one is prepared in its thread."""
        last = self._candidates.get(version.key)
        if last and not (last.error and time.monotonic() - last.ended > RETRY):
            return last
        candidate = self._candidates[version.key] = _Candidate(version)
        self._in_thread(self._prepare_candidate, candidate)
        return candidate

    def _prepare_candidate(self, candidate: _Candidate) -> None:
        self._load_candidate(candidate)
        self._wake.set()
        self._find_fast_path(candidate)

    def _load_candidate(self, candidate: _Candidate) -> None:
        """Download a version if it has no folder, load it, and compare its answers with the answers logged with it."""
        try:
            folder = candidate.folder = candidate.folder or self._cache.fetch(candidate.version)
            if self._stopping.is_set():
                return
            model = self._load(folder)
            model.check_example()
            candidate.model = model
        except BaseException as error:  # a model's own code may raise anything
            candidate.error = _one_line(error, str(candidate.folder))
        candidate.ended = time.monotonic()
        candidate.ready = True

    def _find_fast_path(self, candidate: _Candidate) -> None:
        """One version at a time."""
        self._stopping.wait(SEARCH_DELAY)
        if candidate.model is None or self._stopping.is_set():
            return
        try:
            with self._search_lock:
                candidate.model.find_fast_path()
        except BaseException as error:
            logger.warning("version %s stays on MLflow's own path: %s", candidate.version.number, _one_line(error))

    def _load_from_cache(self) -> None:
        """Serve the newest version in the cache that served before and is not refused."""
        errors = []
        for key in self._cache.served():
            refused = self._candidates.get(key)
            if refused and refused.error:
                continue
            try:
                version, folder, signature = self._cache.read(key)
            except UserError as error:
                errors.append(str(error))
                continue
            candidate = _Candidate(version, folder)
            self._load_candidate(candidate)
            if candidate.model:
                candidate.error = self._find_fault(candidate, signature)
            if candidate.model and not candidate.error:
                self._candidates[key] = candidate
                self._swap(version, candidate.model, signature)
                self._in_thread(self._find_fast_path, candidate)
                return
            errors.append(f"the copy of version {version.number} is refused: {candidate.error}")
        self._cache_error = "; ".join(errors) or "no other version has served from here before"

    def _in_thread(self, function: Callable[..., None], *arguments: _Candidate) -> None:
        thread = threading.Thread(target=function, args=arguments, name="follower", daemon=True)
        thread.start()
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]


def _one_line(error: BaseException, folder: str = "") -> str:
    """The text of an error: no traceback, no password, at most 300 characters, without the folder at its start."""
    text = " ".join(re.sub(r"//[^/@\s]+@", "//", str(error)).split())
    if folder and text.startswith(folder):
        text = text.removeprefix(folder).lstrip("/: ")
    return (text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")[:300]
