"""A model folder that answers requests: as `mlflow models serve` does, and faster where a fast path gives the same."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.pyfunc import PyFuncModel, scoring_server
from mlflow.types import DataType
from sklearn.base import is_classifier, is_regressor

from alacarte.formats import load as loading
from alacarte.serving import probe
from alacarte.serving.fastpath import parity
from alacarte.serving.reference import explain, read_as_mlflow
from alacarte.serving.requests import Answer, Form, Reader, RequestError, Rows

__all__ = ["Answer", "RequestError", "Rows", "ServedModel"]

# From (n, d) float64, or d object arrays (n,), to labels (n,) and probabilities (n, n_classes) or None.
Function = Callable[[Any], tuple[np.ndarray, np.ndarray | None]]

# Rows that the time of a fast path is measured with, beside one; and the cost of MLflow's own way, roughly.
MANY = 500
REFERENCE_COST = (0.005, 2e-5)

# Rows of the input example that a fast path is tried on.
EXAMPLES = 100

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastPath:
    """A way to answer that agreed with MLflow's."""

    name: str
    reader: Reader
    function: Function
    joint: bool  # many requests may be one call
    cost: tuple[float, float]  # seconds a call, seconds a row


class ServedModel:
    """A model and all that a server tells of it. Safe to use from several threads.

    `columns` name the inputs in the order of the signature. `classes` and `task` are None where the model does not say.
    `example` is the input example or None. `path_in_use`: "pyfunc" (MLflow's own way), "frame" (a DataFrame or array
    straight into the estimator) or "numpy" (compiled).
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
        self.form = Form.of(meta.signature.inputs)
        self.columns, self.path_in_use = self.form.names, "pyfunc"
        example = pyfunc.input_example
        self.example = example if isinstance(example, pd.DataFrame | np.ndarray) and len(example) else None
        self._kind, self._implementation, self._pyfunc, self._meta = kind, implementation, pyfunc, meta
        self._fast: FastPath | None = None
        self.task, self.classes, self._proba = _task(kind, implementation, pyfunc)

    @classmethod
    def load(cls, folder: Path, trust_code: bool) -> "ServedModel":
        """From a local MLflow model folder. UserError, before anything in it is made or run, for what is not admitted."""
        folder = Path(folder).resolve()
        return cls(folder, *loading.load(folder, trust_code))

    @classmethod
    def load_tried(cls, folder: Path, trust_code: bool) -> "ServedModel":
        """Like `load`, after a child process has tried the model. UserError too where this process would not survive it."""
        probe.check(folder, trust_code)
        return cls.load(folder, trust_code)

    def parse(self, body: bytes, content_type: str, max_rows: int) -> Rows:
        """RequestError: 415 for another content type, 413 for more than max_rows, 400 for what MLflow refuses too."""
        fast = self._fast
        if fast and content_type in ("application/json", "application/json; charset=utf-8"):
            rows = fast.reader.read(body, max_rows)
            if rows is not None:
                return rows
        return read_as_mlflow(body, content_type, self._meta, self.form, max_rows)

    def predict(self, requests: list[Rows]) -> list[Answer | RequestError]:
        """One entry a request; one that cannot be answered never spoils the others. Blocks."""
        fast = self.predict_fast(requests)
        return [answer or self._as_mlflow(rows) for rows, answer in zip(requests, fast, strict=True)]

    def predict_fast(self, requests: Sequence[Rows]) -> list[Answer | None]:
        """The same without MLflow's way: None for a request that has to go there, for an answer or a refusal."""
        fast = self._fast
        if fast and all(rows.fast for rows in requests):
            return self._run(fast, requests)
        return [self._run(fast, [rows])[0] if fast and rows.fast else None for rows in requests]

    def joins(self, rows: Rows) -> bool:
        """Whether these rows gain from one call together with those of other requests."""
        return rows.fast and self._fast is not None and self._fast.joint

    def probabilities(self, rows: Rows) -> list[dict[str, float]] | None:
        """Class -> probability, per row; None where the model gives none. A class that is no text is named as in JSON.

        Slow: through MLflow. RequestError for rows that the model does not take.
        """
        if self._proba is None or self.classes is None:
            return None
        names = [label if isinstance(label, str) else json.dumps(label) for label in self.classes]
        rows = self._reread(rows)
        try:
            found: np.ndarray = np.asarray(self._proba.predict(rows.data))
        except Exception as error:
            raise explain(error, self.form) from None
        return [dict(zip(names, row, strict=True)) for row in found.tolist()]

    def predict_example(self) -> list | None:
        """The labels of the input example, MLflow's way; None without one. RequestError where it is not answered."""
        if self.example is None:
            return None
        answer = self._as_mlflow(Rows(len(self.example), self.form, data=self.example))
        if isinstance(answer, RequestError):
            raise answer
        return answer.labels

    def cost(self, n_rows: int) -> float:
        """Seconds expected for n rows: measured for a fast path, a guess for MLflow's own."""
        call, row = self._fast.cost if self._fast else REFERENCE_COST
        return call + row * n_rows

    def compile(self) -> None:
        """Look for a fast path, and take the first that agrees with MLflow on the input example and on rows made of it.

        Takes seconds. May run while the model answers. Without an input example, or with columns that only MLflow
        reads, the model stays as it is.
        """
        if self._kind not in ("sklearn", "torch") or self.example is None or not self.form.readable:
            return
        if self._kind == "sklearn" and self._meta.flavors["python_function"].get("predict_fn", "predict") != "predict":
            return
        try:
            self._fast = self._agreed()
        except Exception as error:  # an example that is no request, say: MLflow's way needs none
            log.warning("%s: no fast path: %s: %s", self.folder, type(error).__name__, " ".join(str(error).split()))
        if self._fast:
            self.path_in_use = self._fast.name

    def _agreed(self) -> FastPath | None:
        assert self.example is not None
        base = parity.table_of(self.example[:EXAMPLES], self.form)
        cases = list(self._cases(base))
        for name, function, joint in self._candidates():
            for missing in (True, False):
                reader = Reader(self.form, parity.kinds_in(base), missing)
                fast = FastPath(name, reader, function, joint, (0.0, 0.0))
                if parity.holds(reader, partial(self._run, fast), cases, self.task == "classification"):
                    return replace(fast, cost=self._measure(fast, base))
        return None

    # --- MLflow's way ---

    def _reread(self, rows: Rows) -> Rows:
        if not rows.fast:
            return rows
        return read_as_mlflow(rows.body, "application/json", self._meta, self.form, rows.n)

    def _as_mlflow(self, rows: Rows) -> Answer | RequestError:
        try:
            rows = self._reread(rows)
            out = StringIO()
            scoring_server.predictions_to_json(self._pyfunc.predict(rows.data, params=rows.params), out)
            labels = json.loads(out.getvalue())["predictions"]
        except RequestError as error:
            return error
        except Exception as error:
            return explain(error, self.form)
        if not isinstance(labels, list) or len(labels) != rows.n:
            return RequestError(501, "this model does not give one answer a row, which this server needs")
        return Answer(labels, None)

    # --- the fast way ---

    def _run(self, fast: FastPath, requests: Sequence[Rows]) -> list[Answer | None]:
        """None for a request that MLflow has to answer, or to refuse."""
        if not requests:
            return []
        if len(requests) == 1 or fast.joint:
            try:
                return _answers(requests, *fast.function(_joined(requests)))
            except Exception:  # whatever it is, MLflow's way decides what becomes of the request
                if len(requests) == 1:
                    return [None]
        return [answer for rows in requests for answer in self._run(fast, [rows])]

    def _candidates(self) -> Iterator[tuple[str, Function, bool]]:
        from alacarte.serving.fastpath import transformers

        build = transformers.build if self._kind == "sklearn" else transformers.build_torch
        if function := build(self._implementation, self.columns, self.form.numeric):
            yield "numpy", function, True
        # pandas types a column by all its values, so rows of several requests may not share a frame
        yield "frame", self._through_frame, self.form.numeric

    def _through_frame(self, data: Any) -> tuple[np.ndarray, None]:
        """The rows as MLflow's schema enforcement leaves them, straight into the estimator."""
        whole = {"long": "int64", "integer": "int32"}
        if self.form.tensor:
            frame = data
        elif self.form.numeric:
            frame = pd.DataFrame(data, columns=self.columns)
            types = dict(zip(self.columns, self.form.types, strict=True))
            if dtypes := {name: whole[kind] for name, kind in types.items() if kind in whole}:
                frame = frame.astype(dtypes)
        else:
            columns = {}
            for name, kind, values in zip(self.columns, self.form.types, data, strict=True):
                dtype = DataType[kind].to_pandas() if kind not in ("string", "any") else None
                columns[name] = pd.Series(values.tolist(), dtype=dtype)
            frame = pd.DataFrame(columns)
        return np.asarray(self._implementation.predict(frame)), None

    def _cases(self, base: parity.Table) -> Iterator[parity.Case]:
        for table in parity.tables(base):
            body = parity.body_of(table, self.form)
            rows = Rows(len(table), self.form, values=[], body=body)
            expected, best = self._as_mlflow(rows), None
            if self._proba is not None and isinstance(expected, Answer):
                best = [max(row.values()) for row in self.probabilities(rows) or []]
            yield parity.Case(body, expected, best)

    def _measure(self, fast: FastPath, base: parity.Table) -> tuple[float, float]:
        def seconds(n: int) -> float:
            rows = fast.reader.read(parity.body_of((base * n)[:n], self.form), n)
            if rows is None:
                return REFERENCE_COST[0]
            times = []
            for _ in range(5):
                start = time.perf_counter()
                self._run(fast, [rows])
                times.append(time.perf_counter() - start)
            return min(times)

        one, many = seconds(1), seconds(MANY)
        return one, max(0.0, (many - one) / MANY)


def _joined(requests: Sequence[Rows]) -> Any:
    if len(requests) == 1:
        return requests[0].numbers if requests[0].values is None else requests[0].values
    if requests[0].values is None:
        return np.concatenate([rows.numbers for rows in requests])
    return [np.concatenate(columns) for columns in zip(*(rows.values or [] for rows in requests), strict=True)]


def _answers(requests: Sequence[Rows], labels: np.ndarray, proba: np.ndarray | None) -> list[Answer | None]:
    """The answers of one call, request by request. Raises where they are none: numbers that are not finite, and so on."""
    total = sum(rows.n for rows in requests)
    finite = labels.dtype.kind != "f" or math.isfinite(labels.sum())
    if labels.shape != (total,) or not finite or not (proba is None or math.isfinite(proba.sum())):
        raise ValueError("no answer per row, or none that is finite")
    plain, best = labels.tolist(), None if proba is None else proba.max(axis=1).tolist()
    if len(requests) == 1:
        return [Answer(plain, best)]
    ends = list(accumulate(rows.n for rows in requests))
    return [
        Answer(plain[end - rows.n : end], None if best is None else best[end - rows.n : end])
        for rows, end in zip(requests, ends, strict=True)
    ]


def _task(kind: str, implementation: Any, pyfunc: PyFuncModel) -> tuple[str | None, list | None, PyFuncModel | None]:
    """The task, the classes, and a model that gives probabilities instead of labels; None for what there is not."""
    meta = pyfunc.metadata
    if kind == "torch":
        net = implementation.net
        proba = PyFuncModel(meta, _TorchProbabilities(implementation)) if net["classes"] else None
        return net["task"], net["classes"], proba
    if kind != "sklearn" or meta.flavors["python_function"].get("predict_fn", "predict") != "predict":
        return None, None, None
    if not is_classifier(implementation):
        return "regression" if is_regressor(implementation) else None, None, None
    classes = getattr(implementation, "classes_", None)
    if not isinstance(classes, np.ndarray) or classes.ndim != 1:  # several labels a row
        return "classification", None, None
    has = hasattr(implementation, "predict_proba")
    return "classification", classes.tolist(), PyFuncModel(meta, implementation, "predict_proba") if has else None


class _TorchProbabilities:
    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor

    def predict(self, data: pd.DataFrame) -> np.ndarray:
        import torch

        numbers = torch.from_numpy(self._predictor.preprocess.transform(data).astype("float32"))
        with torch.inference_mode():
            return self._predictor.network(numbers).double().softmax(dim=1).numpy()
