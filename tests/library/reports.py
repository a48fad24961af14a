"""What a server and its users leave in a feedback store, made directly: requests, mistakes reported, audit rows labelled."""

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd

from alacarte.feedback import Feedback, Prediction, Store, request_id


def report(
    store: Store,
    name: str,
    X: pd.DataFrame,
    y: Sequence,
    predicted: Sequence,
    *,
    classes: Sequence | None,
    audit: np.ndarray | None = None,
    mistakes: np.ndarray | None = None,
    source: str | None = None,
    annotator: str | None = None,
    version: str = "1",
    age: float = 60.0,
) -> list[str]:
    """Store n requests of one row with their predictions, and give the true label y of those that `audit` or `mistakes`
    (n,) bool name. Returns the ids of the predictions."""
    nobody = np.zeros(len(X), bool)
    audit, mistakes = nobody if audit is None else audit, nobody if mistakes is None else mistakes
    start = time.time_ns() - int(age * 1e9)
    ids = [request_id(start + i * 1000, i) for i in range(len(X))]
    rows = X.to_numpy("<f8")
    store.write_predictions(
        [
            Prediction(
                each, start / 1e9 + i * 1e-6, name, version, 1, tuple(X.columns), "f8", rows[i].tobytes(),
                [np.asarray(predicted[i]).item()], [0.9], 1.0, [0] if audit[i] else None, 0.1, 1.0,
            )
            for i, each in enumerate(ids)
        ]
    )  # fmt: skip
    values = [
        Feedback(ids[i], np.asarray(y[i]).item(), source=source, annotator=annotator)
        for i in np.flatnonzero(audit | mistakes)
    ]
    for at in range(0, len(values), 500):
        store.add_feedback(name, values[at : at + 500], classes=classes)
    return ids
