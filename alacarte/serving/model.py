"""A model folder that answers requests as `mlflow models serve` does, and faster where a fast path gives the same answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PyFuncModel, scoring_server
from sklearn.base import is_classifier, is_regressor

from alacarte.errors import UserError
from alacarte.formats import load as loading
from alacarte.serving import probe
from alacarte.serving.requests import explain, parse_as_mlflow
from alacarte.serving.rows import Answer, InputSchema, RequestError, Rows

if TYPE_CHECKING:
    from alacarte.serving.fastpath import FastPath

__all__ = ["Answer", "RequestError", "Rows", "ServedModel", "check_answers"]

# Seconds per call and seconds per row of MLflow's own way, roughly.
REFERENCE_COST = (0.005, 2e-5)

log = logging.getLogger(__name__)


class ServedModel:
    """A model and all that a server tells of it. Safe to use from several threads.

    `columns` name the inputs in the order of the signature. `classes` and `task` are None where the model does not say.
    `example` is the input example or None. `path_in_use`: "pyfunc" (MLflow's own way), "frame" (a DataFrame or array
    straight into the estimator) or "numpy" (the pipeline as numpy calls).
    """

    columns: list[str]
    signature: ModelSignature
    classes: list | None
    task: str | None
    run_id: str | None
    metadata: dict[str, Any]
    folder: Path
    path_in_use: str
    example: pd.DataFrame | np.ndarray | None

    def __init__(self, folder: Path, kind: str, implementation: Any, pyfunc: PyFuncModel) -> None:
        meta = pyfunc.metadata
        self.folder, self.signature, self.run_id = folder, meta.signature, meta.run_id
        self.metadata = meta.metadata or {}
        self.input_schema = InputSchema.of(meta.signature.inputs)
        self.columns, self.path_in_use = self.input_schema.names, "pyfunc"
        example = pyfunc.input_example
        self.example = example if isinstance(example, pd.DataFrame | np.ndarray) and len(example) else None
        self._kind, self._implementation, self._pyfunc, self._meta = kind, implementation, pyfunc, meta
        self._fast: FastPath | None = None
        self._tried = False  # whether a child process tries first what this process does
        self.task, self.classes, with_probabilities = _task(kind, implementation, meta)
        self._has_probabilities = with_probabilities is not None
        if with_probabilities:
            self._pyfunc = PyFuncModel(meta, with_probabilities, model_id=meta.model_id)

    @classmethod
    def load(cls, folder: Path, trust_code: bool) -> ServedModel:
        """From a local MLflow model folder. UserError, before anything in it is made or run, for what is not admitted."""
        folder = Path(folder).resolve()
        return cls(folder, *loading.load(folder, trust_code))

    @classmethod
    def load_tried(cls, folder: Path, trust_code: bool) -> ServedModel:
        """Like `load`, after a child process has tried the model. UserError too where this process would not survive it."""
        probe.check_start(folder, trust_code, rehearse_start)
        model = cls.load(folder, trust_code)
        model._tried = True
        return model

    def parse(self, body: bytes, content_type: str, max_rows: int) -> Rows:
        """RequestError: 415 for another content type, 413 for more than max_rows, 400 where MLflow refuses the body."""
        fast = self._fast
        if fast and content_type in ("application/json", "application/json; charset=utf-8"):
            rows = fast.parser.parse(body, max_rows)
            if rows is not None:
                return rows
        return parse_as_mlflow(body, content_type, self._meta, self.input_schema, max_rows)

    def predict(self, requests: list[Rows]) -> list[Answer | RequestError]:
        """One entry per request; a request that cannot be answered never changes the answers to others. Blocks."""
        fast = self.predict_fast(requests)
        return [answer or self._as_mlflow(rows) for rows, answer in zip(requests, fast, strict=True)]

    def predict_fast(self, requests: Sequence[Rows]) -> list[Answer | None]:
        """The same without MLflow's way: None for a request that MLflow has to answer, or to refuse."""
        fast = self._fast
        if fast and all(rows.fast for rows in requests):
            return fast.answer(requests)
        return [fast.answer([rows])[0] if fast and rows.fast else None for rows in requests]

    def joins(self, rows: Rows) -> bool:
        """Whether one call for these rows and those of other requests is faster than a call for each."""
        return rows.fast and self._fast is not None and self._fast.joint

    def probabilities(self, rows: Rows) -> list[dict[str, float]] | None:
        """Class -> probability, per row; None where the model has none. A class that is no text is named as in JSON.

        Slow: through MLflow. RequestError for rows that the model does not take.
        """
        if not self._has_probabilities or self.classes is None:
            return None
        names = [label if isinstance(label, str) else json.dumps(label) for label in self.classes]
        rows = self._reread(rows)
        try:
            _, proba = self._predict(rows)
        except Exception as error:
            raise explain(error, self.input_schema) from None
        assert proba is not None
        return [dict(zip(names, row, strict=True)) for row in proba.tolist()]

    def predict_example(self) -> list | None:
        """The labels of the input example, MLflow's way; None without one. RequestError where it is not answered."""
        if self.example is None:
            return None
        answer = self._as_mlflow(Rows(len(self.example), self.input_schema, data=self.example))
        if isinstance(answer, RequestError):
            raise answer
        return answer.labels

    def check_example(self) -> None:
        """UserError where the answers on the input example are not those logged with the model. Also warms the model up."""
        check_answers(self.predict_example(), self.metadata.get("example_predictions"))

    def cost(self, n_rows: int) -> float:
        """Seconds expected for n rows: measured for a fast path, a guess for MLflow's own."""
        call, row = self._fast.cost if self._fast else REFERENCE_COST
        return call + row * n_rows

    def compile(self) -> None:
        """Look for a fast path that gives MLflow's answers on the input example and on rows made from it.

        Takes seconds. May run while the model answers. UserError where a child process does not survive it, which does it
        first for a model of `load_tried`. The model stays on MLflow's own path without an input example, with
        columns that only MLflow reads, and without the folder fastpath.
        """
        predict_fn = self._meta.flavors["python_function"].get("predict_fn", "predict")
        known = self._kind in ("sklearn", "torch") and predict_fn == "predict"
        if not known or self.example is None or not self.input_schema.readable:
            return
        if self._tried:
            probe.check_search(self.folder, rehearse_compilation)
        try:
            from alacarte.serving.fastpath import find_fast_path

            exact = self.task == "classification"
            self._fast = find_fast_path(
                self._kind, self._implementation, self.input_schema, self.example, exact, self._as_mlflow
            )
        except Exception as error:  # for example an input example that is no request: MLflow's own path needs none
            log.warning("%s: no fast path: %s: %s", self.folder, type(error).__name__, " ".join(str(error).split()))
        if self._fast:
            self.path_in_use = self._fast.name

    # --- MLflow's way ---

    def _reread(self, rows: Rows) -> Rows:
        if not rows.fast:
            return rows
        return parse_as_mlflow(rows.body, "application/json", self._meta, self.input_schema, rows.n)

    def _predict(self, rows: Rows) -> tuple[Any, np.ndarray | None]:
        output: Any = self._pyfunc.predict(rows.data, params=rows.params)
        return output if self._has_probabilities else (output, None)

    def _as_mlflow(self, rows: Rows) -> Answer | RequestError:
        try:
            rows = self._reread(rows)
            output, proba = self._predict(rows)
            out = StringIO()
            scoring_server.predictions_to_json(output, out)
            labels = json.loads(out.getvalue())["predictions"]
        except RequestError as error:
            return error
        except Exception as error:
            return explain(error, self.input_schema)
        if not isinstance(labels, list) or len(labels) != rows.n:
            return RequestError(501, "this model does not give one answer a row, which this server needs")
        return Answer(labels, proba.max(axis=1).tolist() if proba is not None and np.isfinite(proba).all() else None)


# --- in a child process first: these rows are not those of the trial, and a forged model may be made for them ---


def rehearse_start(folder: Path, kind: str, implementation: Any, pyfunc: PyFuncModel) -> None:
    """What the server does with a version before it serves."""
    ServedModel(folder, kind, implementation, pyfunc).check_example()


def rehearse_compilation(folder: Path, kind: str, implementation: Any, pyfunc: PyFuncModel) -> None:
    """The search for a fast path: it asks the model for rows of its own, and parts of it are compiled code."""
    ServedModel(folder, kind, implementation, pyfunc).compile()


def check_answers(answers: Sequence | None, expected: Sequence | None) -> None:
    """Compare a model's answers on its input example with those logged with it, where there are both.

    UserError where they differ.
    """
    if answers is None or expected is None:
        return
    if len(answers) != len(expected) or not all(_same(a, b) for a, b in zip(answers, expected, strict=True)):
        raise UserError("its answers on its input example are not those logged with it")


def _same(answer: Any, expected: Any) -> bool:
    """Numbers nearly, since another processor rounds otherwise; labels exactly."""
    if np.asarray(expected).dtype.kind != "f":
        return bool(answer == expected)
    try:
        return bool(np.allclose(answer, expected, rtol=1e-4, atol=1e-6, equal_nan=True))
    except (TypeError, ValueError):
        return False


class _WithProbabilities:
    """A model whose predict gives labels and probabilities (n, n_classes), so that MLflow checks the input once for both."""

    def __init__(self, predict: Callable[[Any], Any], predict_proba: Callable[[Any], Any]) -> None:
        self._predict, self._predict_proba = predict, predict_proba

    def predict(self, data: Any) -> tuple[Any, np.ndarray]:
        return self._predict(data), np.asarray(self._predict_proba(data))


def _task(kind: str, model: Any, meta: Model) -> tuple[str | None, list | None, _WithProbabilities | None]:
    """The task, the classes, and the model with its probabilities; None for each that the model does not have."""
    if kind in ("torch", "keras", "own"):
        task, classes = model.net["task"], model.net["classes"]
        return task, classes, _WithProbabilities(model.predict, model.predict_proba) if classes else None
    if kind != "sklearn" or meta.flavors["python_function"].get("predict_fn", "predict") != "predict":
        return None, None, None
    if not is_classifier(model):
        return "regression" if is_regressor(model) else None, None, None
    classes = getattr(model, "classes_", None)
    if not isinstance(classes, np.ndarray) or classes.ndim != 1:  # several labels a row
        return "classification", None, None
    with_probabilities = hasattr(model, "predict_proba")
    both = _WithProbabilities(model.predict, model.predict_proba) if with_probabilities else None
    return "classification", classes.tolist(), both
