"""A loaded version. It answers as `mlflow models serve` does, and faster where a fast path gives the same answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel, scoring_server
from sklearn.base import is_classifier, is_regressor
from sklearn.pipeline import Pipeline

from alacarte.errors import UserError
from alacarte.formats import load as loading
from alacarte.formats.probe import ROWS, is_memory_error, limits, peak_memory, set_limits
from alacarte.serving import probe
from alacarte.serving.requests import explain, parse_as_mlflow
from alacarte.serving.rows import Answer, InputSchema, RequestError, Rows

if TYPE_CHECKING:
    from alacarte.serving.fastpath import FastPath

# Seconds per call and per row of MLflow's own path, roughly.
REFERENCE_COST = (0.005, 2e-5)

MEASURED_ROWS = 512  # of the table that shows how much memory a row needs

# From a table to labels (n,) and probabilities (n, n_classes).
PredictBoth = Callable[[Any], tuple[Any, np.ndarray]]

logger = logging.getLogger(__name__)


class ServedModel:
    """Safe to use from several threads.

    `columns` are the inputs in the order of the signature. `classes` and `task` are None if the model does not tell them.
    `example` is the input example or None. `path_in_use` is "pyfunc" (MLflow's own path), "frame" (a DataFrame or array
    passed to the model without MLflow's checks) or "numpy" (the pipeline as numpy calls).
    """

    def __init__(self, folder: Path, kind: str, implementation: Any, pyfunc: PyFuncModel) -> None:
        meta = pyfunc.metadata
        self.folder, self.signature, self.run_id = folder, meta.signature, meta.run_id
        self.metadata: dict[str, Any] = meta.metadata or {}
        self.input_schema = InputSchema.of(meta.signature.inputs)
        self.columns, self.path_in_use = self.input_schema.names, "pyfunc"
        example = pyfunc.input_example
        self.example = example if isinstance(example, pd.DataFrame | np.ndarray) and len(example) else None
        self._implementation, self._meta, self._pyfunc = implementation, meta, pyfunc
        self._fast: FastPath | None = None
        self._try_first = False  # whether a child process tries the search for a fast path before this process
        self.task, self.classes, self._predict_both = _inspect(kind, implementation, meta)
        if self._predict_both:  # MLflow checks the input once for labels and probabilities
            self._pyfunc = PyFuncModel(meta, SimpleNamespace(predict=self._predict_both), model_id=meta.model_id)

    @classmethod
    def load(cls, folder: Path, trust_code: bool) -> ServedModel:
        """Load an MLflow model folder. Raises UserError before anything in the folder runs, if it may not be loaded."""
        folder = Path(folder).resolve()
        return cls(folder, *loading.load(folder, trust_code))

    @classmethod
    def load_tried(cls, folder: Path, trust_code: bool, max_rows: int = 0) -> ServedModel:
        """Like `load`, after a child process has tried the model. Raises UserError also for a model that ends its process.

        The child also refuses a model that needs too much memory for a request of `max_rows` rows.
        """
        probe.check(folder, trust_code, partial(rehearse_start, max_rows=max_rows))
        model = cls.load(folder, trust_code)
        model._try_first = True
        return model

    def parse(self, body: bytes, content_type: str, max_rows: int) -> Rows:
        """Raises RequestError: 415 for another content type, 413 for too many rows, 400 if MLflow refuses the body."""
        if self._fast and content_type in ("application/json", "application/json; charset=utf-8"):
            rows = self._fast.parser.parse(body, max_rows)
            if rows is not None:
                return rows
        return parse_as_mlflow(body, content_type, self._meta, self.input_schema, max_rows)

    def predict(self, requests: Sequence[Rows]) -> list[Answer | RequestError]:
        """One answer per request. A request that cannot be answered does not change the answers to others. Blocks."""
        answers = self.predict_fast(requests)
        return [answer or self._predict_as_mlflow(rows) for rows, answer in zip(requests, answers, strict=True)]

    def predict_fast(self, requests: Sequence[Rows]) -> list[Answer | None]:
        """Like `predict`, but None for a request that needs MLflow's own path."""
        fast = self._fast
        if fast and all(rows.fast for rows in requests):
            return fast.answer(requests)
        return [fast.answer([rows])[0] if fast and rows.fast else None for rows in requests]

    def can_join(self, rows: Rows) -> bool:
        """Whether one call for these rows and the rows of other requests is faster than a call for each request."""
        return rows.fast and self._fast is not None and self._fast.joint

    def cost(self, n_rows: int) -> float:
        """Expected seconds for n rows: measured for a fast path, an estimate for MLflow's own path."""
        call, row = self._fast.cost if self._fast else REFERENCE_COST
        return call + row * n_rows

    def probabilities(self, rows: Rows) -> list[dict[str, float]] | None:
        """Class -> probability for each row; None if the model has none. A class that is not text is named as in JSON.

        Uses MLflow's own path. Raises RequestError for rows that the model does not accept.
        """
        if not self._predict_both or self.classes is None:
            return None
        names = [label if isinstance(label, str) else json.dumps(label) for label in self.classes]
        rows = self._for_mlflow(rows)
        try:
            output: Any = self._pyfunc.predict(rows.data, params=rows.params)
        except Exception as error:
            raise explain(error, self.input_schema) from None
        return [dict(zip(names, row, strict=True)) for row in output[1].tolist()]

    def predict_example(self) -> list | None:
        """The labels of the input example by MLflow's own path, None without an example. Raises RequestError."""
        if self.example is None:
            return None
        answer = self._predict_as_mlflow(Rows(len(self.example), self.input_schema, data=self.example))
        if isinstance(answer, RequestError):
            raise answer
        return answer.labels

    def check_example(self) -> None:
        """Raise UserError if the answers to the input example differ from the answers logged with the model."""
        labels = self.predict_example()
        if labels is not None:
            loading.check_example(labels, self.metadata)

    def find_fast_path(self) -> None:
        """Use a fast path if it gives MLflow's answers on the input example and on rows made from it.

        Takes seconds. The model can answer meanwhile. Raises UserError if a child process does not survive the search. The
        model stays on MLflow's own path without an input example, with columns of other types, and without the folder
        fastpath.
        """
        predict_fn = self._meta.flavors["python_function"].get("predict_fn", "predict")
        if self._implementation is None or predict_fn != "predict" or self.example is None:
            return
        if not self.input_schema.readable:
            return
        if self._try_first:
            probe.check(self.folder, False, rehearse_search)
        try:
            from alacarte.serving.fastpath import find_fast_path

            self._fast = find_fast_path(
                self._implementation, self._predict_frame, self.input_schema, self.example, self._predict_as_mlflow
            )
        except Exception as error:  # for example an input example that MLflow refuses
            logger.warning("%s: no fast path: %s: %s", self.folder, type(error).__name__, " ".join(str(error).split()))
        if self._fast:
            self.path_in_use = self._fast.name

    def _predict_frame(self, data: Any) -> tuple[Any, np.ndarray | None]:
        return self._predict_both(data) if self._predict_both else (self._implementation.predict(data), None)

    # --- MLflow's own path ---

    def _for_mlflow(self, rows: Rows) -> Rows:
        if not rows.fast:
            return rows
        return parse_as_mlflow(rows.body, "application/json", self._meta, self.input_schema, rows.n)

    def _predict_as_mlflow(self, rows: Rows) -> Answer | RequestError:
        probabilities, text = None, StringIO()
        try:
            rows = self._for_mlflow(rows)
            output: Any = self._pyfunc.predict(rows.data, params=rows.params)
            if self._predict_both:
                output, probabilities = output
            scoring_server.predictions_to_json(output, text)
            labels = json.loads(text.getvalue())["predictions"]
        except RequestError as error:
            return error
        except Exception as error:
            return explain(error, self.input_schema)
        if not isinstance(labels, list) or len(labels) != rows.n:
            return RequestError(501, "this model does not give one answer a row, which this server needs")
        if probabilities is None or not np.isfinite(probabilities).all():
            return Answer(labels, None)
        return Answer(labels, probabilities.max(axis=1).tolist())


# --- what a child process does first: a forged model may end the process at rows that the trial did not have ---


def rehearse_start(folder: Path, kind: str, implementation: Any, pyfunc: PyFuncModel, max_rows: int = 0) -> None:
    """Do what the server does with a version before it serves."""
    model = ServedModel(folder, kind, implementation, pyfunc)
    model.check_example()
    _check_memory(model, max_rows)


def _check_memory(model: ServedModel, max_rows: int) -> None:
    """UserError if a request of `max_rows` rows needs more memory than a trial may. Judged from fewer rows if that is enough.

    A model without an input example is not judged.
    """
    example, few, many = model.example, ROWS, min(MEASURED_ROWS, max_rows)
    if example is None or many <= few:
        return
    seconds, megabytes = limits(model.folder)
    set_limits(seconds, megabytes)  # above the memory of the loaded model

    def measure(n: int) -> int:
        rows = np.arange(n) % len(example)
        table = example[rows] if isinstance(example, np.ndarray) else example.iloc[rows]
        return peak_memory(lambda: model._pyfunc.predict(table))

    per_row, fits = megabytes * 1e6 / few, True
    try:
        needed = measure(few)
        per_row = max(needed, 1) / few
        per_row = (measure(many) - needed) / (many - few)
        if needed + per_row * (max_rows - few) > megabytes * 1e6:
            measure(max_rows)  # some models work through their rows in parts
    except Exception as error:  # the server answers such a request with an error
        fits = not is_memory_error(error)
    if not fits:
        raise UserError(
            f"a request of serve.max_rows={max_rows} rows needs more than {megabytes} MB, about {per_row / 1e6:.1f} MB a row;"
            f" start the server with serve.max_rows={int(0.8e6 * megabytes / per_row)}"
        )


def rehearse_search(folder: Path, kind: str, implementation: Any, pyfunc: PyFuncModel) -> None:
    """Search for a fast path. The search predicts rows of its own, and parts of it are compiled code."""
    ServedModel(folder, kind, implementation, pyfunc).find_fast_path()


def _inspect(kind: str, model: Any, meta: Model) -> tuple[str | None, list | None, PredictBoth | None]:
    """The task, the classes, and a function for labels and probabilities; None for each that the model does not have."""
    if kind == "network":
        task, classes = model.net["task"], model.net["classes"]
        return task, classes, _predict_twice(model) if classes else None
    if model is None or meta.flavors["python_function"].get("predict_fn", "predict") != "predict":
        return None, None, None
    if not is_classifier(model):
        return "regression" if is_regressor(model) else None, None, None
    classes = getattr(model, "classes_", None)
    if not isinstance(classes, np.ndarray) or classes.ndim != 1:  # several labels per row
        return "classification", None, None
    has_probabilities = hasattr(model, "predict_proba")
    return "classification", classes.tolist(), _predict_sklearn(model) if has_probabilities else None


def _predict_twice(model: Any) -> PredictBoth:
    return lambda data: (model.predict(data), np.asarray(model.predict_proba(data)))


def _predict_sklearn(model: Any) -> PredictBoth:
    if type(model) is not Pipeline or len(model.steps) == 1:
        return _predict_twice(model)
    features, estimator = model[:-1], model.steps[-1][1]

    def predict(data: Any) -> tuple[Any, np.ndarray]:
        matrix = features.transform(data)  # once for both
        return estimator.predict(matrix), np.asarray(estimator.predict_proba(matrix))

    return predict
