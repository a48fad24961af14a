"""The parts of a running server. app.py and routes.py use them to answer requests."""

from dataclasses import dataclass

from alacarte.feedback import Store
from alacarte.serving.auth import Access, Rate
from alacarte.serving.batching import Batcher
from alacarte.serving.follower import ModelFollower
from alacarte.serving.metrics import Metrics
from alacarte.serving.model import ServedModel
from alacarte.serving.prediction_log import PredictionLog
from alacarte.serving.rows import RequestError
from alacarte.serving.settings import Settings


@dataclass
class AppState:
    """`store` and `prediction_log` are None where nothing is stored (feedback.url=null)."""

    settings: Settings
    store: Store | None
    prediction_log: PredictionLog | None
    follower: ModelFollower
    batcher: Batcher
    access: Access
    label_rate: Rate
    metrics: Metrics

    @classmethod
    def make(cls, settings: Settings) -> "AppState":
        """UserError where the store's URL is none."""
        store = Store(settings.feedback.url) if settings.feedback.url else None
        return cls(
            settings,
            store,
            PredictionLog(store, settings) if store else None,
            ModelFollower(settings, lambda folder: ServedModel.load_tried(folder, settings.trust_code)),
            Batcher(settings.timeout, settings.max_rows),
            Access(settings),
            Rate(settings.feedback_per_minute),
            Metrics(settings.registered_model_name),
        )

    def refusal(self, error: RequestError) -> dict[str, str]:
        """What a client is told: the reason on loopback, little elsewhere, where the schema is nobody's business."""
        message = error.message
        if not self.settings.on_loopback and error.status in (400, 422, 503):
            message = "not ready" if error.status == 503 else "the request does not fit what this server takes"
        return {"error_code": "BAD_REQUEST" if error.status < 500 else "UNAVAILABLE", "message": message}
