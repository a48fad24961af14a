"""The model that serves: follows the registry's alias, and swaps when the next version is ready beside the current one.

One thread reads the alias (at each poll, and when hurried) and swaps. Each version is downloaded, loaded and tried in a
thread of its own, so that a slow or broken one holds up neither the reads nor a way back. The version under `challenger`
is made ready ahead of its promotion, which is then only a swap; when there is none, the version before the current one
stays ready for a rollback.
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

from alacarte import formats, registry
from alacarte.errors import UserError
from alacarte.serving.cache import Cache, Found
from alacarte.serving.model import ServedModel, check_answers
from alacarte.serving.settings import Settings
from alacarte.serving.signatures import objection

TICK = 0.05  # seconds between looks at whether another worker was hurried
RETRY = 60  # seconds until a version that failed is tried again, if the alias still names it
SILENCE = 3  # seconds without an answer of the registry, after which the last known good version serves until it comes
YIELD = 0.2  # seconds that a compilation waits, for the swap to be over

# MLflow's own patience (120 s, 7 tries) would hide for minutes that the registry is gone.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Current:
    """What serves. A request reads `Holder.current` once and so answers with one version throughout."""

    model: ServedModel
    version: str
    run_id: str | None
    since: datetime


@dataclass
class _Candidate:
    """A version on its way to being ready. `done` is set last."""

    found: Found
    model: ServedModel | None = None
    error: str | None = None
    counted: bool = False
    ended: float = 0.0
    done: bool = False


class Holder:
    """`load` makes a model of a folder; whatever it raises refuses that version.

    Sets MLflow's timeouts in the environment where the user has not. UserError where `serve.cache` cannot be written.
    """

    def __init__(self, settings: Settings, load: Callable[[Path], ServedModel]) -> None:
        lose_patience()
        self.current: Current | None = None
        self._name, self._poll, self._load = settings.registered_model_name, settings.poll_seconds, load
        self._cache = Cache(settings.cache, self._name)
        self._candidates: dict[str, _Candidate] = {}
        self._champion: Found | None = None
        self._challenger: Found | None = None
        self._key = self._previous = ""
        self._swaps = self._failures = 0
        self._asked = self._fell_back = False
        self._registry_error: str | None = None
        self._version_error: str | None = None
        self._cache_error: str | None = None
        self._touched = self._cache.touched()
        self._hurried = False
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._compiling, self._swapping = threading.Lock(), threading.Lock()
        self._workers: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._follow, name="holder", daemon=True)

    def start(self) -> None:
        """Follow the registry from now on."""
        self._thread.start()
        self._work(self._wait_for_registry)

    def stop(self, seconds: float = 10) -> None:
        """Stop following; what serves stays. Waits for what is on its way, but not longer than `seconds`."""
        self._stopping.set()
        self._wake.set()
        end = time.monotonic() + seconds
        if self._thread.ident is not None:
            self._thread.join(seconds)
        for worker in self._workers:
            worker.join(max(0.0, end - time.monotonic()))

    @property
    def settled(self) -> bool:
        """Whether a model serves, or none does for a reason that waiting does not mend at once."""
        nothing = self._fell_back if self._error() else self._asked and self._champion is None
        return self.current is not None or nothing

    def hurry(self) -> None:
        """Read the alias now, here and in every other worker with this cache. From any thread; does not wait."""
        self._touched = self._cache.touch()
        self._hurried = True
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """For people: what serves, since when (ISO 8601), through which path, and the last thing that failed, in one line."""
        current = self.current
        return {
            "registered_model_name": self._name,
            "model_version": current.version if current else None,
            "run_id": current.run_id if current else None,
            "since": current.since.isoformat(timespec="milliseconds") if current else None,
            "path": current.model.path_in_use if current else None,
            "swaps": self._swaps,
            "failures": self._failures,
            "last_error": self._error(),
        }

    def reason(self) -> str:
        """Why nothing serves, in one line."""
        if error := self._error():
            return f"no champion of {self._name} is loaded: {error}"
        if not self._asked:
            return f"no champion of {self._name} is loaded yet: the registry has not answered yet"
        if self._champion is None:
            return f"{self._name} has no champion: set the alias on a version in the registry"
        return f"no champion of {self._name} is loaded yet: version {self._champion.number} is on its way"

    def _error(self) -> str | None:
        errors = [text for text in (self._version_error, self._registry_error) if text]
        if errors and self.current is None and self._cache_error:
            errors.append(self._cache_error)
        return "; ".join(errors) or None

    # --- the thread ---

    def _follow(self) -> None:
        due = 0.0
        with contextlib.suppress(Exception):  # what every model needs: not to be waited for when the first one comes
            formats.skops_io()
        while not self._stopping.is_set():
            try:
                if self._take_hurry() or time.monotonic() >= due:
                    due = time.monotonic() + self._poll
                    self._read_champion()
                    self._settle()
                    self._read_challenger()
                self._settle()
            except BaseException as error:  # whatever it is, the thread goes on
                self._registry_error = f"the server failed to follow the registry: {one_line(error)}"
                self._failures += 1
                logger.exception("following the registry failed")
            self._wake.wait(TICK)
            self._wake.clear()

    def _take_hurry(self) -> bool:
        hurried, self._hurried = self._hurried, False
        touched = self._cache.touched()
        if touched != self._touched:
            self._touched, hurried = touched, True
        return hurried

    def _read_champion(self) -> None:
        try:
            version = registry.champion_of(self._name)
        except Exception as error:
            self._registry_error = f"the registry does not answer: {one_line(error)}"
            self._failures += 1
            return
        with self._swapping:
            self._registry_error, self._asked = None, True
        found = Found.of(version) if version else None
        if found and found != self._champion and (candidate := self._candidates.get(found.key)) and candidate.error:
            del self._candidates[found.key]  # what failed as challenger, or as champion before, is tried anew
        self._champion = found

    def _read_challenger(self) -> None:
        """The next champion, which is made ready. What fails here is tried and counted when it is promoted."""
        if self._registry_error:
            return
        with contextlib.suppress(Exception):
            version = registry.by_alias(self._name, registry.CHALLENGER)
            self._challenger = Found.of(version) if version else None

    def _settle(self) -> None:
        """Swap to what the alias names when it is ready; with nothing to serve at all, to the last known good version."""
        with self._swapping:
            self._forget()
            wanted = self._champion
            if wanted is None or wanted.key == self._key:
                self._version_error = None
            else:
                candidate = self._candidate(wanted)
                if candidate.done:
                    self._take(candidate)
            if self._registry_error or self._version_error:
                self._fall_back()
            if self._challenger and self._challenger.key != self._key and (wanted is None or self._is_done(wanted)):
                self._candidate(self._challenger)  # after the champion, which somebody waits for

    def _wait_for_registry(self) -> None:
        """One that neither answers nor refuses must not hold up what can serve without it."""
        self._stopping.wait(SILENCE)
        if self._registry_error or self._stopping.is_set():
            return
        with self._swapping:
            if self._asked:
                return
            self._registry_error = f"the registry has not answered for {SILENCE} s"
            self._fall_back()

    def _take(self, candidate: _Candidate) -> None:
        model, number = candidate.model, candidate.found.number
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
            self._swap(candidate.found, model)

    def _swap(self, found: Found, model: ServedModel) -> None:
        self._previous, self._key = self._key, found.key
        self._swaps += self.current is not None
        self.current = Current(model, found.number, found.run_id or model.run_id, datetime.now(UTC))
        logger.info("%s: version %s serves", self._name, found.number)
        try:
            self._cache.keep(found)
            self._cache.evict({self._key, self._previous, self._challenger.key if self._challenger else ""})
        except OSError as error:
            logger.warning("serve.cache: %s", one_line(error))

    def _fall_back(self) -> None:
        """Serve the last known good version where nothing serves. Tried once: what is on the disk does not mend itself."""
        if self.current is None and not self._fell_back:
            self._load_last_good()
            self._fell_back = True

    def _load_last_good(self) -> None:
        try:
            last = self._cache.last_good()
        except UserError as error:
            self._cache_error = str(error)
            return
        if last is None:
            self._cache_error = "no version has served from here before"
            return
        candidate = _Candidate(last[0])
        self._try(candidate, last[1])
        if candidate.model is None:
            self._cache_error = f"the copy of version {candidate.found.number} is refused: {candidate.error}"
            return
        self._candidates[candidate.found.key] = candidate
        self._swap(candidate.found, candidate.model)
        self._work(self._compile, candidate)

    # --- versions on their way ---

    def _candidate(self, found: Found) -> _Candidate:
        """The version's candidate; what is not yet on its way is sent on it."""
        candidate = self._candidates.get(found.key)
        if candidate is None or (candidate.error and time.monotonic() - candidate.ended > RETRY):
            candidate = self._candidates[found.key] = _Candidate(found)
            self._work(self._prepare, candidate)
        return candidate

    def _is_done(self, found: Found) -> bool:
        return found.key == self._key or self._candidates[found.key].done

    def _forget(self) -> None:
        """Keep, beside what serves and what is to serve, one version in memory: the challenger, or the one before."""
        wanted = {self._key, self._champion.key if self._champion else ""}
        challenger = self._challenger.key if self._challenger else ""
        wanted.add(challenger if challenger not in ("", *wanted) else self._previous)
        self._candidates = {key: candidate for key, candidate in self._candidates.items() if key in wanted}

    def _work(self, job: Callable[..., None], *arguments: _Candidate) -> None:
        worker = threading.Thread(target=job, args=arguments, name="candidate", daemon=True)
        worker.start()
        self._workers = [one for one in self._workers if one.is_alive()] + [worker]

    def _prepare(self, candidate: _Candidate) -> None:
        self._try(candidate)
        self._wake.set()
        self._compile(candidate)

    def _try(self, candidate: _Candidate, folder: Path | None = None) -> None:
        """Load a version, downloaded if need be, and let it answer its example."""
        try:
            folder = folder or self._cache.fetch(candidate.found)
            if self._stopping.is_set():
                return
            model = self._load(folder)
            # Which also warms it up.
            check_answers(model.predict_example(), model.metadata.get("example_predictions"))
            candidate.model = model
        except BaseException as error:  # a model's own code may raise anything
            candidate.error = one_line(error, str(folder))
        candidate.ended = time.monotonic()
        candidate.done = True

    def _compile(self, candidate: _Candidate) -> None:
        """Look for a faster path, one version at a time."""
        self._stopping.wait(YIELD)
        if candidate.model is None or self._stopping.is_set():
            return
        try:
            with self._compiling:
                candidate.model.compile()
        except BaseException as error:
            logger.warning("version %s stays on MLflow's own path: %s", candidate.found.number, one_line(error))


def lose_patience() -> None:
    """Let MLflow's calls of this process fail after seconds, where the user has not set otherwise."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)


def one_line(error: BaseException, folder: str = "") -> str:
    """What an error says: no traceback, no password, 300 characters at most, and not the folder it happened in."""
    text = " ".join(re.sub(r"//[^/@\s]+@", "//", str(error)).split())
    if folder and text.startswith(folder):
        text = text.removeprefix(folder).lstrip("/: ")
    named = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    return named[:300]
