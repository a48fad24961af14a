"""Simulated users of a served model: they send requests over HTTP at a constant rate, and report labels."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import requests
from matplotlib.figure import Figure

from alacarte.evaluation.plots import BAD, GOOD, PALE

CLIENTS = 4  # requests at the same time
TRIES = 5  # of one request to a busy server
DIM = "#555555"
WINDOW = 100  # the plot shows the accuracy over so many requests

# The text in the plot for a line that a step printed.
MARKS = {"retrain: from": "retraining", "evaluate: verdict   PROMOTE": "promoted",
         "evaluate: verdict   HOLD": "held", "evaluate: verdict   REJECT": "rejected"}  # fmt: skip


@dataclass
class Answer:
    """The answer to one request."""

    phase: str
    version: str
    correct: bool


@dataclass(eq=False)
class Traffic:
    """Requests of one row each to the server at `url`, `per_second` of them, in the order of the rows.

    The user reports the true label of each row for which the server asks. The user reports a wrong answer with the probability
    `reports`. The labels come from `people` different sources.
    """

    target: str
    per_second: float
    reports: float
    people: int
    seed: int = 0
    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # errors of requests and of labels
    labels: int = 0

    def __post_init__(self) -> None:
        self._draw = np.random.default_rng(self.seed)
        self._lock = threading.Lock()
        self._session = requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=CLIENTS))

    @property
    def version(self) -> str:
        """The version of the newest answer."""
        return self.answers[-1].version if self.answers else "none"

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Wait until the server has a model. Raise TimeoutError after so many seconds."""
        end = time.monotonic() + seconds
        while not self._session.get(f"{self.url}/readyz", timeout=30).ok:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.url}/readyz: no model after {seconds} seconds")
            time.sleep(0.1)

    def send(self, phase: str, rows: pd.DataFrame, enough: Callable[[int], bool], each: Callable[[], object]) -> None:
        """Send the rows repeatedly until `enough(sent)` is true. The column `target` has the true labels."""
        X = rows.drop(columns=self.target)
        columns, inputs, labels = list(X), X.to_numpy().tolist(), rows[self.target].tolist()
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            waiting = threading.BoundedSemaphore(2 * CLIENTS)
            for sent in itertools.count():
                if enough(sent):
                    break
                waiting.acquire()
                at = sent % len(rows)
                request = clients.submit(self._ask, phase, {"columns": columns, "data": [inputs[at]]}, labels[at])
                request.add_done_callback(lambda _: waiting.release())
                each()
                time.sleep(max(0.0, began + sent / self.per_second - time.monotonic()))

    def _ask(self, phase: str, row: dict, label: object) -> None:
        try:
            answer = self._post("/invocations", {"dataframe_split": row})
            correct = answer["predictions"][0] == label
            with self._lock:
                self.answers.append(Answer(phase, answer["model_version"], correct))
                reports = bool(answer.get("audit_ids")) or (not correct and self._draw.random() < self.reports)
                source = f"person-{self._draw.integers(self.people)}"
            if reports:
                prediction_id = answer["prediction_ids"][0]
                self._post("/feedback", {"prediction_id": prediction_id, "label": label, "source": source})
                with self._lock:
                    self.labels += 1
        except (requests.RequestException, KeyError, ValueError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")

    def _post(self, path: str, body: dict) -> dict:
        """The answer. A server that is busy answers 503, which asks the client to try again."""
        for _ in range(TRIES):
            answer = self._session.post(self.url + path, json=body, timeout=30)
            if answer.status_code != 503:
                break
            time.sleep(1)
        if not answer.ok:
            raise requests.HTTPError(f"{path} {answer.status_code}: {answer.text.strip()}")
        return answer.json()

    def accuracy(self, phase: str | None = None, version: str | None = None, last: int | None = None) -> float:
        """The share of correct answers in a phase, of a version, or of the `last` answers. NaN if there are none."""
        chosen = [a.correct for a in self.answers if phase in (None, a.phase) and version in (None, a.version)]
        return float(np.mean(chosen[-last:] if last else chosen)) if chosen else float("nan")


def accuracy_figure(answers: list[Answer], marks: list[tuple[int, str]], model: str) -> Figure:
    """Plot the accuracy of the last WINDOW answers: a colour for each version, a shade for each phase, a line for each mark."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    rolling = pd.Series([a.correct for a in answers], dtype=float).rolling(WINDOW, min_periods=WINDOW // 4).mean()
    versions, phases = pd.Series([a.version for a in answers]), pd.Series([a.phase for a in answers])
    for version, rows in versions.groupby(versions, sort=False):
        color = GOOD if version == versions.iloc[-1] else BAD
        axes.plot(rolling.loc[rows.index[0] : rows.index[-1]], color=color, lw=1.8)
        axes.annotate(f"version {version}", (rows.index[0], 1.03), color=color)
    for shade, (phase, rows) in zip(itertools.cycle((0.0, 0.25)), phases.groupby(phases, sort=False), strict=False):
        axes.axvspan(rows.index[0], rows.index[-1] + 1, color=PALE, alpha=shade, lw=0)
        axes.annotate(str(phase), (rows.index[0], 0.02), xytext=(3, 0), textcoords="offset points", color=DIM)
    for at, text in marks:
        axes.axvline(at, color=DIM, ls=":", lw=1)
        axes.annotate(text, (at, 0.5), rotation=90, ha="right", va="bottom", color=DIM)
    axes.set(ylim=(0, 1.12), xlim=(0, len(answers)), xlabel="requests", ylabel=f"accuracy of the last {WINDOW} answers")
    axes.set_title(model, loc="left")
    return figure
