"""Any scikit-learn estimator as a learner: the features and the estimator in one Pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import VotingClassifier
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import has_fit_parameter

from alacarte import formats
from alacarte.errors import UserError
from alacarte.features import (
    Features,
    describe,
    labels,
    requirements,
    rows_fit,
    set_seed,
    signature,
    transform,
    widen,
)
from alacarte.learners import Learner, OnEpoch, Rows, TrainingData, register
from alacarte.learners.further import BOOSTED, add_trees, descend, reason_for_scratch

if TYPE_CHECKING:
    from mlflow.models import Model


@register("sklearn")
class SklearnLearner(Learner):
    """`estimator` for any task that it can do, or `classifier` and `regressor`, of which fit takes the one for its task.

    `settings` are numbers that a config file names once and both estimators read. They are not used here.
    """

    def __init__(
        self,
        estimator: BaseEstimator | None = None,
        classifier: BaseEstimator | None = None,
        regressor: BaseEstimator | None = None,
        **settings: Any,
    ) -> None:
        # `or` would ask an ensemble that is not fitted for its length
        self.estimators = {
            "classification": classifier if estimator is None else estimator,
            "regression": regressor if estimator is None else estimator,
        }
        self.model: Any = None

    @classmethod
    def of(cls, model: Any) -> SklearnLearner:
        """The learner of a fitted estimator or Pipeline."""
        learner = cls()
        learner.model = model
        return learner

    @property
    def task(self) -> str:
        return "classification" if is_classifier(self.model) else "regression"

    @property
    def classes(self) -> list | None:
        return self.model.classes_.tolist() if is_classifier(self.model) else None

    @property
    def epochs(self) -> int:
        return _epochs(self._stepped())

    def transformer(self) -> Any:
        return self.model[0] if self._has_features() else None

    def fit_from_scratch(self, data: TrainingData, task: str, features: Features) -> None:
        """The validation part is not used: an estimator that stops early splits its own part off X."""
        estimator = clone(_for_task(self.estimators[task], task))
        set_seed(estimator, data.seed, unseeded_only=True)
        transformer, inputs = features.fit_transform(data.X, data.y, data.seed)
        with rows_fit(data.X, subject=f"model: {describe(estimator)}"):
            estimator.fit(inputs, labels(data.y), **_weights(estimator, data.weight))
        self.model = estimator
        if transformer is not None:
            self.model = Pipeline([("preprocess", transformer), ("model", estimator)])
        _keep_epochs(self._stepped())

    def start_over(self, seed: int) -> None:
        estimator = clone(self.model[1] if self._has_features() else self.model)
        set_seed(estimator, seed)
        self.estimators[self.task] = estimator

    def fit_further(self, data: TrainingData, epochs: int) -> int:
        """The validation part is not used, as in a training from scratch."""
        transformer, estimator = self._split()
        stepped = self._stepped()
        _keep_epochs(stepped)
        with rows_fit(data.X):
            if hasattr(stepped, "partial_fit"):  # the scale of the training data is in every threshold of a tree
                widen(self.transformer(), data.X)
            inputs, targets = transform(transformer, data.X), labels(data.y)
            if isinstance(estimator, VotingClassifier):
                targets = estimator.le_.transform(targets)
            if isinstance(estimator, TransformedTargetRegressor):
                targets = estimator.transformer_.transform(targets.reshape(-1, 1)).ravel()
            _weights(stepped, data.weight)  # UserError if the estimator takes none
            rows = Rows(inputs, targets, data.weight)
            return self.train_further(stepped, rows, epochs, data.seed, data.on_epoch)

    def reason_for_scratch(self, y: pd.Series) -> str | None:
        return reason_for_scratch(self._stepped(), self.classes, y)

    def train_further(self, stepped: Any, rows: Rows, epochs: int, seed: int, on_epoch: OnEpoch | None) -> int:
        """Gradient descent continues with partial_fit, boosting adds trees. Return the number of epochs."""
        if isinstance(stepped, BOOSTED):
            return add_trees(stepped, rows, epochs)
        descend(stepped, rows, epochs, seed, on_epoch)
        return epochs

    def _has_features(self) -> bool:
        return isinstance(self.model, Pipeline) and list(self.model.named_steps) == ["preprocess", "model"]

    def _split(self) -> tuple[Any, Any]:
        """The fitted transformer in front of the estimator, None for none, and the estimator."""
        steps = [("model", self.model)]
        while isinstance(steps[-1][1], Pipeline):
            steps[-1:] = [(f"{len(steps)}_{name}", step) for name, step in steps[-1][1].steps]
        before, estimator = steps[:-1], steps[-1][1]
        return (before[0][1] if len(before) == 1 else Pipeline(before) if before else None), estimator

    def _stepped(self) -> Any:
        """The estimator that is trained further: the one inside a TransformedTargetRegressor or a VotingClassifier of one."""
        estimator = self._split()[1]
        if isinstance(estimator, VotingClassifier) and len(estimator.estimators) == 1:
            return estimator.estimators_[0]
        return estimator.regressor_ if isinstance(estimator, TransformedTargetRegressor) else estimator

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        return self._answer("predict", X)

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray | None:
        if self.task == "regression" or not hasattr(self.model, "predict_proba"):
            return None
        return self._answer("predict_proba", X)

    def _answer(self, method: str, X: pd.DataFrame) -> np.ndarray:
        estimator, inputs = self.model, X
        if self._has_features():
            estimator, inputs = self.model[-1], transform(self.model[0], X)
        with rows_fit(X):
            answers = getattr(estimator, method)(inputs)
        if len(answers) != len(X):
            raise UserError(f"model: {describe(estimator)} gives {len(answers)} answers for {len(X)} rows")
        return answers

    def save(
        self, path: Path, *, example: pd.DataFrame, metadata: dict[str, Any], mlflow_model: Model | None = None
    ) -> None:
        """MLflow's own sklearn flavor. mlflow.sklearn.save_model would write and load a model of many trees twice."""
        import mlflow.pyfunc
        import sklearn
        from mlflow.models import Model

        model = mlflow_model or Model()
        mlflow.pyfunc.save_model(
            str(path),
            mlflow_model=model,
            loader_module="mlflow.sklearn",
            signature=signature(self.transformer(), example, self.classes),
            input_example=example,
            pip_requirements=requirements(*self.packages),
            metadata=metadata | self.describe_answers(example),
        )
        types = formats.save_skops(self.model, path / "model.skops")
        code = formats.copy_project(path, types)
        model.flavors["python_function"] |= {"model_path": "model.skops", "predict_fn": "predict", **code}
        model.add_flavor(
            "sklearn",
            pickled_model="model.skops",
            serialization_format="skops",
            skops_trusted_types=types,
            sklearn_version=sklearn.__version__,
            **{"code": None, **code},
        )
        model.model_size_bytes = sum(file.stat().st_size for file in path.rglob("*"))
        model.save(str(path / "MLmodel"))


def _for_task(estimator: BaseEstimator | None, task: str) -> BaseEstimator:
    fits = {"classification": is_classifier, "regression": is_regressor}
    if estimator is None or not fits[task](estimator):
        name = "none" if estimator is None else type(estimator).__name__
        other = "regression" if task == "classification" else "classification"
        raise UserError(
            f"model.estimator={name} does not do data.task={task}; choose an estimator for {task}, or set data.task={other}"
        )
    return estimator


def _weights(estimator: Any, weight: np.ndarray | None) -> dict[str, np.ndarray]:
    """The arguments with which `fit` or `partial_fit` of an estimator takes a weight per row."""
    if weight is None:
        return {}
    prefix = ""
    while isinstance(estimator, Pipeline):
        prefix, estimator = f"{prefix}{estimator.steps[-1][0]}__", estimator[-1]
    inner = estimator.regressor if isinstance(estimator, TransformedTargetRegressor) else estimator
    # VotingClassifier takes it as one of its **fit_params
    if not has_fit_parameter(inner, "sample_weight") and not isinstance(inner, VotingClassifier):
        raise UserError(
            f"data.weight: {type(inner).__name__} takes no sample_weight: choose another model, or add data.weight=null"
        )
    return {f"{prefix}sample_weight": weight}


def _epochs(stepped: Any) -> int:
    epochs = getattr(stepped, "scratch_epochs_", None) or getattr(stepped, "n_iter_", None)
    if epochs is None and hasattr(stepped, "get_num_boosting_rounds"):  # XGBoost
        epochs = stepped.get_num_boosting_rounds()
    return int(np.max(epochs)) if epochs is not None else 1


def _keep_epochs(stepped: Any) -> None:
    """Store how long a training from scratch is, because further training changes n_iter_."""
    stepped.scratch_epochs_ = _epochs(stepped)
