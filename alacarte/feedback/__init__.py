"""One SQL store of predictions and of what people said about them: SQLite or PostgreSQL."""

from alacarte.errors import StoreError
from alacarte.feedback.queries import Labelled, Window
from alacarte.feedback.records import Feedback, Outcome, Prediction, request_id
from alacarte.feedback.store import Store

__all__ = ["Feedback", "Labelled", "Outcome", "Prediction", "Store", "StoreError", "Window", "request_id"]
