"""The parts of a running server, which app.py and routes.py use to answer requests, and its metrics for Prometheus."""

import math
from collections.abc import Callable
from functools import cache, partial

from prometheus_client import Counter, Gauge, Histogram
from starlette.requests import Request

from alacarte.feedback import Store
from alacarte.serving.auth import Access
from alacarte.serving.batching import Batcher
from alacarte.serving.follower import LoadedModel, ModelFollower
from alacarte.serving.limits import Bodies, LabelRate
from alacarte.serving.model import ServedModel
from alacarte.serving.prediction_log import PredictionLog
from alacarte.serving.requests import check_type
from alacarte.serving.rows import RequestError
from alacarte.serving.settings import Settings


class AppState:
    """`store` and `prediction_log` are None if nothing is stored (feedback.url=null). UserError for a wrong feedback.url."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.feedback.url) if settings.feedback.url else None
        self.prediction_log = PredictionLog(self.store, settings) if self.store else None
        load = partial(ServedModel.load_tried, trust_code=settings.trust_code, max_rows=settings.max_rows)
        self.follower = ModelFollower(settings, load)
        self.batcher = Batcher(settings.timeout, settings.max_rows)
        self.access = Access(settings)
        self.bodies = Bodies(settings.max_body)
        self.label_rate = LabelRate(settings.feedback_per_minute)
        self.metrics = Metrics(settings.registered_model_name, self.follower, self.prediction_log)

    def current_model(self) -> LoadedModel:
        """The version that serves. RequestError 503 if there is none."""
        current = self.follower.current
        if current is None:
            raise RequestError(503, self.follower.reason())
        return current

    async def read_json(self, request: Request, limit: int) -> bytes:
        """The body of a request with JSON. The caller must release a body that may be large.

        RequestError 415 for another Content-Type: a page of another web site can send some of them without permission.
        """
        if check_type(request.headers.get("content-type", "")) != "application/json":
            raise RequestError(415, "Content-Type must be application/json")
        return await self.bodies.read(request.headers, request.receive, min(limit, self.settings.max_body))

    def check_live(self) -> None:
        """RequestError 503 if only a restart of the process helps."""
        if self.batcher.stuck:
            raise RequestError(503, "a prediction hangs and does not stop")

    def refusal(self, error: RequestError) -> dict[str, str]:
        """The body of an answer: the reason on loopback; little elsewhere, because messages can describe the model."""
        if self.settings.on_loopback or error.status not in (400, 422, 503):
            return error.body()
        return error.body("not ready" if error.status == 503 else "the request does not fit what this server takes")


class Metrics:
    """Counters, which each request raises, and gauges, which are computed when somebody reads them."""

    def __init__(self, name: str, follower: ModelFollower, log: PredictionLog | None) -> None:
        labels = ["registered_model_name"]
        requests = Counter("serve_requests", "Requests answered", [*labels, "path", "status"])
        self._requests = cache(lambda path, status: requests.labels(name, path, str(status)))
        self._latency = Histogram(
            "serve_latency_seconds", "From the request read to the answer sent", labels,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        ).labels(name)  # fmt: skip
        rows = Counter("serve_rows", "Rows predicted", [*labels, "model_version"])
        self.rows = cache(lambda version: rows.labels(name, version))
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "ready": ("1 if a model is loaded, else 0", lambda: follower.current is not None),
            "swaps": ("Times that another version took over", lambda: follower.status()["swaps"]),
            "failures": ("Versions and reads of the registry that failed", lambda: follower.status()["failures"]),
            "dropped": ("Predictions that could not be stored", lambda: log.dropped if log else 0),
            "model_version": ("The version that serves", lambda: _number(follower.status()["model_version"])),
        }
        for key, (text, value) in gauges.items():
            Gauge(f"serve_{key}", text, labels).labels(name).set_function(value)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        self._requests(path, status).inc()
        self._latency.observe(seconds)


def _number(version: str | None) -> float:
    return float(version) if version and version.isdecimal() else math.nan
