"""One SQL store of predictions and of what people said about them: SQLite, PostgreSQL, or tables of Unity Catalog."""

from mlops.errors import StoreError
from mlops.feedback.reading import Labelled, Window
from mlops.feedback.records import Feedback, Outcome, Prediction, request_id
from mlops.feedback.store import Store

__all__ = ["Feedback", "Labelled", "Outcome", "Prediction", "Store", "StoreError", "Window", "request_id"]
