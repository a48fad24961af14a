"""Any scikit-learn estimator as a learner: the features and the estimator in one Pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import has_fit_parameter

from alacarte import formats
from alacarte.errors import UserError
from alacarte.features import (
    TABULAR,
    Features,
    describe,
    is_tabular,
    labels,
    requirements,
    rows_fit,
    set_seed,
    signature,
    threads_for,
    transform,
    unfitted,
    widen,
)
from alacarte.learners import OnEpoch, Update, check_changed, log_model, onward_rate, outputs, with_answers

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

BOOSTED = HistGradientBoostingClassifier, HistGradientBoostingRegressor
MIN_L2 = 10  # with less, boosting on confident mistakes breaks what the earlier trees had learned


class SklearnLearner:
    """`estimator` for any task that it can do, or `classifier` and `regressor`, of which fit takes the one for its task.

    `settings` are numbers that a config file names once and both estimators read. They are not used here.
    """

    packages: tuple[str, ...] = ()  # that a model needs beside scikit-learn, pinned in its requirements

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
        self.task = ""
        self.classes: list | None = None
        self.model: Any = None

    def fit(
        self,
        X: pd.DataFrame,
        y: pd.Series,
        X_val: pd.DataFrame,
        y_val: pd.Series,
        *,
        task: str,
        seed: int,
        features: Features = TABULAR,
        weight: np.ndarray | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """The validation part is not used: an estimator that stops early splits its own part off X."""
        estimator = clone(_for_task(self.estimators[task], task))
        set_seed(estimator, seed, unseeded_only=True)
        transformer, inputs = features.fit_transform(X, y, seed)
        with rows_fit(X, subject=f"model: {describe(estimator)}"), threads_for(X):
            estimator.fit(inputs, labels(y), **_weights(estimator, weight))
        self._set(estimator if transformer is None else Pipeline([("preprocess", transformer), ("model", estimator)]))
        _keep_epochs(_stepped(self._split()[1]))

    @property
    def epochs(self) -> int:
        return _epochs(_stepped(self._split()[1]))

    def update(
        self,
        X: pd.DataFrame,
        y: pd.Series,
        X_val: pd.DataFrame,
        y_val: pd.Series,
        *,
        init: str,
        share: float,
        shrink: float,
        seed: int,
        weight: np.ndarray | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Update:
        """Gradient descent continues with partial_fit, boosting adds trees. Every other estimator starts from scratch.

        shrink_perturb is for networks in torch: here it is warm. The validation part is not used, as in fit.
        """
        transformer, estimator = self._split()
        stepped = _stepped(estimator)
        note = None if init == "scratch" else self.reason_for_scratch(stepped, y)
        if note or init == "scratch":
            self._start_over(X, y, seed, weight)
            return Update("scratch", self.epochs, self.epochs * len(X), note)
        if init == "shrink_perturb":
            note = f"shrink_perturb is for networks in torch: {type(stepped).__name__} starts warm"
        assert self.classes is None or set(y.tolist()) <= set(self.classes), "labels of unknown classes are kept out"
        _keep_epochs(stepped)
        epochs, before = max(1, int(share * self.epochs)), outputs(self, X)
        with rows_fit(X), threads_for(X):
            # The scale of the training data is in every threshold of a tree, so it cannot change for trees.
            if is_tabular(transformer) and not isinstance(stepped, BOOSTED):
                widen(transformer, X)
            inputs, targets = transform(transformer, X), labels(y)
            if isinstance(estimator, TransformedTargetRegressor):
                targets = estimator.transformer_.transform(targets.reshape(-1, 1)).ravel()
            weights = _weights(stepped, weight)
            epochs = self.train_further(stepped, inputs, targets, epochs, seed, on_epoch, **weights)
        assert self.classes == (self.model.classes_.tolist() if self.classes is not None else None)
        check_changed(before, self, X)
        return Update("warm", epochs, epochs * len(X), note)

    def reason_for_scratch(self, stepped: Any, y: pd.Series) -> str | None:
        """Why an estimator cannot be trained further with the labels y, as a sentence. None: it can."""
        return _reason_for_scratch(stepped, y)

    def train_further(
        self,
        stepped: Any,
        inputs: Any,
        targets: np.ndarray,
        epochs: int,
        seed: int,
        on_epoch: OnEpoch | None,
        sample_weight: np.ndarray | None = None,
    ) -> int:
        """Train a fitted estimator further for at most `epochs` epochs. Return the number of epochs."""
        if isinstance(stepped, BOOSTED):
            return _boost(stepped, inputs, targets, epochs, sample_weight)
        _descend(stepped, inputs, targets, epochs, seed, on_epoch, sample_weight)
        return epochs

    def _start_over(self, X: pd.DataFrame, y: pd.Series, seed: int, weight: np.ndarray | None) -> None:
        """Train again with the same settings, and with the same features fitted again."""
        transformer, estimator = (self.model[0], self.model[1]) if self._has_features() else (None, self.model)
        estimator = clone(estimator)
        set_seed(estimator, seed)
        self.estimators[self.task] = estimator
        self.fit(X, y, X, y, task=self.task, seed=seed, features=unfitted(transformer), weight=weight)

    def _has_features(self) -> bool:
        return isinstance(self.model, Pipeline) and list(self.model.named_steps) == ["preprocess", "model"]

    def _split(self) -> tuple[Any, Any]:
        """The fitted transformer in front of the estimator, None for none, and the estimator."""
        steps = [("model", self.model)]
        while isinstance(steps[-1][1], Pipeline):
            steps[-1:] = [(f"{len(steps)}_{name}", step) for name, step in steps[-1][1].steps]
        before, estimator = steps[:-1], steps[-1][1]
        return (before[0][1] if len(before) == 1 else Pipeline(before) if before else None), estimator

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
            signature=signature(self.model[0] if self._has_features() else None, example, self.classes),
            input_example=example,
            pip_requirements=requirements("scipy", *self.packages),
            metadata=with_answers(self, example, metadata),
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

    def log(self, name: str, *, example: pd.DataFrame, metadata: dict[str, Any]) -> ModelInfo:
        return log_model(self, name, example=example, metadata=metadata)

    @classmethod
    def of(cls, model: Any) -> SklearnLearner:
        """The learner of a fitted estimator or Pipeline."""
        learner = cls()
        learner._set(model)
        return learner

    def _set(self, model: Any) -> None:
        self.model = model
        self.task = "classification" if is_classifier(model) else "regression"
        self.classes = model.classes_.tolist() if is_classifier(model) else None


def _for_task(estimator: BaseEstimator | None, task: str) -> BaseEstimator:
    fits = {"classification": is_classifier, "regression": is_regressor}
    if estimator is None or not fits[task](estimator):
        name = "none" if estimator is None else type(estimator).__name__
        other = "regression" if task == "classification" else "classification"
        raise UserError(
            f"model.estimator={name} does not do data.task={task}; choose an estimator for {task}, or set data.task={other}"
        )
    return estimator


def _stepped(estimator: Any) -> Any:
    """The estimator that is trained further: inside a TransformedTargetRegressor, its regressor."""
    return estimator.regressor_ if isinstance(estimator, TransformedTargetRegressor) else estimator


def _weights(estimator: Any, weight: np.ndarray | None) -> dict[str, np.ndarray]:
    """The arguments with which `fit` or `partial_fit` of an estimator takes a weight per row."""
    if weight is None:
        return {}
    prefix = ""
    while isinstance(estimator, Pipeline):
        prefix, estimator = f"{prefix}{estimator.steps[-1][0]}__", estimator[-1]
    inner = estimator.regressor if isinstance(estimator, TransformedTargetRegressor) else estimator
    if not has_fit_parameter(inner, "sample_weight"):
        raise UserError(
            f"data.weight: {type(inner).__name__} takes no sample_weight: choose another model, or add data.weight=null"
        )
    return {f"{prefix}sample_weight": weight}


def _epochs(stepped: Any) -> int:
    epochs = getattr(stepped, "scratch_epochs_", None) or getattr(stepped, "n_iter_", None)
    return int(np.max(epochs)) if epochs is not None else 1


def _keep_epochs(stepped: Any) -> None:
    """Store how long a training from scratch is, because further training changes n_iter_."""
    stepped.scratch_epochs_ = _epochs(stepped)


def _reason_for_scratch(stepped: Any, y: pd.Series) -> str | None:
    name = type(stepped).__name__
    if isinstance(stepped, BOOSTED):
        if stepped.l2_regularization < MIN_L2:
            return f"{name} starts from scratch: it can be trained further from model.l2_regularization={MIN_L2} up"
        return lacking_class(stepped, y)
    if not hasattr(stepped, "partial_fit") or not hasattr(stepped, "n_iter_"):
        return f"{name} starts from scratch: it cannot be trained further"
    if getattr(stepped, "early_stopping", False) or getattr(stepped, "class_weight", None) == "balanced":
        return f"{name} starts from scratch: with early_stopping or class_weight=balanced it cannot be trained further"
    return None


def lacking_class(stepped: Any, y: pd.Series) -> str | None:
    """Why boosting starts from scratch: fit assumes that the rows have all classes, otherwise it mixes up their trees."""
    lacking = set(stepped.classes_.tolist()) - set(y.tolist()) if is_classifier(stepped) else None
    name = type(stepped).__name__
    return f"{name} starts from scratch: the rows lack its class {min(lacking)!r}" if lacking else None


def _boost(stepped: Any, inputs: Any, targets: np.ndarray, iterations: int, weight: np.ndarray | None) -> int:
    """Add at most `iterations` iterations of trees to the ensemble. Return the number of iterations added."""
    bins, before = stepped._bin_mapper, stepped.n_iter_
    settings = {"warm_start": stepped.warm_start, "max_iter": stepped.max_iter}

    def bin_as_before(X: np.ndarray, sample_weight: object, is_training_data: bool) -> np.ndarray:
        stepped._bin_mapper = bins
        binned = bins.transform(X)
        return binned if is_training_data else np.ascontiguousarray(binned)

    # scikit-learn (1.9) makes new bins from the new rows and reads the earlier trees with these bins. The new trees would
    # then correct answers that the model does not give.
    stepped._bin_data = bin_as_before
    try:
        stepped.set_params(warm_start=True, max_iter=before + iterations).fit(inputs, targets, weight)
    finally:
        del stepped._bin_data
        stepped.set_params(**settings)  # the settings of a training from scratch
    return stepped.n_iter_ - before


def _descend(
    stepped: Any,
    inputs: Any,
    targets: np.ndarray,
    epochs: int,
    seed: int,
    on_epoch: OnEpoch | None,
    weight: np.ndarray | None,
) -> None:
    rng, average = np.random.default_rng(seed), getattr(stepped, "average", False)
    if average:  # average the new steps only: an average with the old steps would hardly move
        stepped.average = int(stepped.t_)
        stepped._average_coef[:], stepped._average_intercept[:] = 0, 0
    setting = _constant_rate(stepped)
    rate = getattr(stepped, setting) if setting else 0.0
    stepped.__dict__.pop("_optimizer", None)  # of a network: it holds the rate and the momentum of the last training
    try:
        for epoch in range(epochs):
            if setting:
                _set_rate(stepped, setting, rate * onward_rate(epoch, epochs))
            order = rng.permutation(len(targets))  # partial_fit itself shuffles in the same way each time
            rows = inputs.iloc[order] if isinstance(inputs, pd.DataFrame) else inputs[order]
            stepped.partial_fit(rows, targets[order], **({} if weight is None else {"sample_weight": weight[order]}))
            if on_epoch and hasattr(stepped, "loss_"):
                on_epoch(epoch, {"train_loss": float(stepped.loss_)})
    finally:
        if setting:
            _set_rate(stepped, setting, rate)
        if average:
            stepped.average = average


def _constant_rate(stepped: Any) -> str | None:
    """The setting that is the learning rate of each step. None: the steps follow a schedule of their own."""
    if hasattr(stepped, "learning_rate_init"):
        return "learning_rate_init" if stepped.solver == "adam" or stepped.learning_rate == "constant" else None
    return "eta0" if getattr(stepped, "learning_rate", None) == "constant" else None


def _set_rate(stepped: Any, setting: str, rate: float) -> None:
    setattr(stepped, setting, rate)
    if (optimizer := getattr(stepped, "_optimizer", None)) is not None:  # it has read the setting when it was made
        optimizer.learning_rate_init = optimizer.learning_rate = rate
