"""What one worker process is made of; app.py and routes.py put requests through it."""

from dataclasses import dataclass

from mlops.feedback import Store
from mlops.serving.follow.holder import Holder
from mlops.serving.http.access import Access
from mlops.serving.http.metrics import Metrics
from mlops.serving.model.batching import Batcher
from mlops.serving.model.served import ServedModel
from mlops.serving.reading.parsing import RequestError
from mlops.serving.recorder import Recorder
from mlops.serving.settings import Settings


@dataclass
class Parts:
    """Store and recorder are None where nothing is stored (feedback.url=null)."""

    settings: Settings
    store: Store | None
    recorder: Recorder | None
    holder: Holder
    batcher: Batcher
    access: Access
    metrics: Metrics

    @classmethod
    def make(cls, settings: Settings) -> "Parts":
        """UserError where the store's URL is none."""
        store = Store(settings.feedback.url) if settings.feedback.url else None
        return cls(
            settings,
            store,
            Recorder(store, settings) if store else None,
            Holder(settings, lambda folder: ServedModel.load(folder, settings.trust_code)),
            Batcher(settings.timeout, settings.max_rows),
            Access(settings),
            Metrics(settings.registered_model_name),
        )

    def refusal(self, error: RequestError) -> dict[str, str]:
        """What a client is told: the reason on loopback, little elsewhere, where the schema is nobody's business."""
        message = error.message
        if not self.settings.on_loopback and error.status in (400, 422, 503):
            message = "not ready" if error.status == 503 else "the request does not fit what this server takes"
        return {"error_code": "BAD_REQUEST" if error.status < 500 else "UNAVAILABLE", "message": message}

    def too_long(self) -> RequestError:
        return RequestError(413, f"a body may have {self.settings.max_body} bytes; send fewer rows at a time")
