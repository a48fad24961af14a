"""Any scikit-learn estimator as a learner: the preprocessing of features.py and the estimator in one Pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.pipeline import Pipeline

from alacarte import features, formats
from alacarte.errors import UserError
from alacarte.learners import OnEpoch, Update, check_changed, log_model, onward_rate, outputs, with_answers

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

BOOSTED = HistGradientBoostingClassifier, HistGradientBoostingRegressor
LEAST_L2 = 10  # below it, boosting on confident mistakes breaks what the trees before had learned


class SklearnLearner:
    """`estimator` for any task it can do, or `classifier` and `regressor`, of which fit takes the one for its task.

    `knobs` are the numbers that a config file names once and both estimators read; they are not used here.
    """

    packages: tuple[str, ...] = ()  # what a model needs beside scikit-learn, pinned in its requirements

    def __init__(
        self,
        estimator: BaseEstimator | None = None,
        classifier: BaseEstimator | None = None,
        regressor: BaseEstimator | None = None,
        **knobs: Any,
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
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """The validation part is not used: what stops early here splits its own part off X."""
        estimator = clone(_for_task(self.estimators[task], task))
        _seed(estimator, seed, unseeded_only=True)
        preprocess = features.fit_preprocess(X)
        try:
            with features.threads_for(X):
                estimator.fit(preprocess.transform(X), features.labels(y))
        except ValueError as error:  # a setting out of its range, or data this estimator does not take
            raise UserError(f"model: {type(estimator).__name__}: {' '.join(str(error).split())}") from error
        _keep_epochs(_stepped(estimator))
        self._set(Pipeline([("preprocess", preprocess), ("model", estimator)]))

    @property
    def epochs(self) -> int:
        return _epochs(_stepped(self._parts()[1]))

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
        on_epoch: OnEpoch | None = None,
    ) -> Update:
        """Gradient descent goes on with partial_fit, boosting adds trees; every other estimator starts from scratch.

        shrink_perturb is for networks in torch: here it is warm. The validation part is not used, as in fit.
        """
        preprocess, estimator = self._parts()
        stepped = _stepped(estimator)
        note = None if init == "scratch" else self.reason_for_scratch(stepped, y)
        if note or init == "scratch":
            epochs = self._start_over(X, y, X_val, y_val, seed)
            return Update("scratch", epochs, epochs * len(X), note)
        if init == "shrink_perturb":
            note = f"shrink_perturb is for networks in torch: {type(stepped).__name__} starts warm"
        assert self.classes is None or set(y.tolist()) <= set(self.classes), "labels of unknown classes are kept out"
        _keep_epochs(stepped)
        epochs, before = max(1, int(share * self.epochs)), outputs(self, X)
        with features.rows_fit(X), features.threads_for(X):
            if self._is_ours() and not isinstance(stepped, BOOSTED):  # of trees, the scale is in every threshold
                features.widen(preprocess["preprocess"], X)
            inputs = preprocess.transform(X) if preprocess is not None else X
            targets = features.labels(y)
            if isinstance(estimator, TransformedTargetRegressor):
                targets = estimator.transformer_.transform(targets.reshape(-1, 1)).ravel()
            epochs = self.train_further(stepped, inputs, targets, epochs, seed, on_epoch)
        assert self.classes == (self.model.classes_.tolist() if self.classes is not None else None)
        check_changed(before, self, X)
        return Update("warm", epochs, epochs * len(X), note)

    def reason_for_scratch(self, stepped: Any, y: pd.Series) -> str | None:
        """Why `stepped` cannot be trained further with the labels y, in a sentence; None where it can."""
        return _why_not_on(stepped, y)

    def train_further(
        self, stepped: Any, inputs: Any, targets: np.ndarray, epochs: int, seed: int, on_epoch: OnEpoch | None
    ) -> int:
        """Train a fitted estimator further for up to so many epochs. Return the number of epochs."""
        if isinstance(stepped, BOOSTED):
            return _boost(stepped, inputs, targets, epochs)
        _descend(stepped, inputs, targets, epochs, seed, on_epoch)
        return epochs

    def _start_over(self, X: pd.DataFrame, y: pd.Series, X_val: pd.DataFrame, y_val: pd.Series, seed: int) -> int:
        model = clone(self.model)
        estimator = model[-1] if isinstance(model, Pipeline) else model
        _seed(estimator, seed)
        if self._is_ours():
            self.estimators[self.task] = estimator
            self.fit(X, y, X_val, y_val, task=self.task, seed=seed)
        else:
            with features.rows_fit(X):
                self._set(model.fit(X, features.labels(y)))
        return self.epochs

    def _is_ours(self) -> bool:
        return isinstance(self.model, Pipeline) and list(self.model.named_steps) == ["preprocess", "model"]

    def _parts(self) -> tuple[Any, Any]:
        """What comes before the estimator, None for nothing, and the estimator."""
        return (self.model[:-1], self.model[-1]) if isinstance(self.model, Pipeline) else (None, self.model)

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        with features.rows_fit(X):
            return self.model.predict(X)

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray | None:
        if self.task == "regression" or not hasattr(self.model, "predict_proba"):
            return None
        with features.rows_fit(X):
            return self.model.predict_proba(X)

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
            signature=features.signature(self.model["preprocess"] if self._is_ours() else None, example, self.classes),
            input_example=example,
            pip_requirements=features.requirements("scipy", *self.packages),
            metadata=with_answers(self, example, metadata),
        )
        types = formats.save_skops(self.model, path / "model.skops")
        model.flavors["python_function"] |= {"model_path": "model.skops", "predict_fn": "predict"}
        model.add_flavor(
            "sklearn",
            pickled_model="model.skops",
            serialization_format="skops",
            skops_trusted_types=types,
            sklearn_version=sklearn.__version__,
            code=None,
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
    """The estimator that is trained on: of one that transforms its target, the one inside."""
    return estimator.regressor_ if isinstance(estimator, TransformedTargetRegressor) else estimator


def _seed(estimator: Any, seed: int, *, unseeded_only: bool = False) -> None:
    states = {key: value for key, value in estimator.get_params().items() if key.split("__")[-1] == "random_state"}
    estimator.set_params(**{key: seed for key, value in states.items() if value is None or not unseeded_only})


def _epochs(stepped: Any) -> int:
    found = getattr(stepped, "scratch_epochs_", None) or getattr(stepped, "n_iter_", None)
    return int(np.max(found)) if found is not None else 1


def _keep_epochs(stepped: Any) -> None:
    """Write down how long a training from scratch is: training on changes n_iter_."""
    stepped.scratch_epochs_ = _epochs(stepped)


def _why_not_on(stepped: Any, y: pd.Series) -> str | None:
    """Why an estimator cannot be trained on with the labels y, in a sentence; None where it can."""
    name = type(stepped).__name__
    if isinstance(stepped, BOOSTED):
        if stepped.l2_regularization < LEAST_L2:
            return f"{name} starts from scratch: it can go on from model.l2_regularization={LEAST_L2} up"
        return lacking_class(stepped, y)
    if not hasattr(stepped, "partial_fit") or not hasattr(stepped, "n_iter_"):
        return f"{name} starts from scratch: it cannot be trained on"
    if getattr(stepped, "early_stopping", False) or getattr(stepped, "class_weight", None) == "balanced":
        return f"{name} starts from scratch: with early_stopping or class_weight=balanced it cannot be trained on"
    return None


def lacking_class(stepped: Any, y: pd.Series) -> str | None:
    """Why boosting cannot go on: its fit would take the classes of the rows for all classes, and mix up their trees."""
    lacking = set(stepped.classes_.tolist()) - set(y.tolist()) if is_classifier(stepped) else None
    return (
        f"{type(stepped).__name__} starts from scratch: the rows lack its class {min(lacking)!r}" if lacking else None
    )


def _boost(stepped: Any, inputs: Any, targets: np.ndarray, iterations: int) -> int:
    """Add up to so many iterations of trees to those that are there; how many it were."""
    bins, before = stepped._bin_mapper, stepped.n_iter_
    settings = {"warm_start": stepped.warm_start, "max_iter": stepped.max_iter}

    def bin_as_before(X: np.ndarray, sample_weight: object, is_training_data: bool) -> np.ndarray:
        stepped._bin_mapper = bins
        binned = bins.transform(X)
        return binned if is_training_data else np.ascontiguousarray(binned)

    # scikit-learn (1.9) makes new bins from the new rows, and then reads the trees before by bins that are not theirs:
    # what the new trees would correct is not what the model answers.
    stepped._bin_data = bin_as_before
    try:
        stepped.set_params(warm_start=True, max_iter=before + iterations).fit(inputs, targets)
    finally:
        del stepped._bin_data
        stepped.set_params(**settings)  # those of a training from scratch
    return stepped.n_iter_ - before


def _descend(stepped: Any, inputs: Any, targets: np.ndarray, epochs: int, seed: int, on_epoch: OnEpoch | None) -> None:
    draw, average = np.random.default_rng(seed), getattr(stepped, "average", False)
    if average:  # of the new steps only: with the old ones in it, it would hardly move
        stepped.average = int(stepped.t_)
        stepped._average_coef[:], stepped._average_intercept[:] = 0, 0
    knob = _constant_rate(stepped)
    rate = getattr(stepped, knob) if knob else 0.0
    stepped.__dict__.pop("_optimizer", None)  # a network's, with its rate and the momentum of steps long past
    try:
        for epoch in range(epochs):
            if knob:
                _set_rate(stepped, knob, rate * onward_rate(epoch, epochs))
            order = draw.permutation(len(targets))  # partial_fit itself shuffles alike each time
            rows = inputs.iloc[order] if isinstance(inputs, pd.DataFrame) else inputs[order]
            stepped.partial_fit(rows, targets[order])
            if on_epoch and hasattr(stepped, "loss_"):
                on_epoch(epoch, {"train_loss": float(stepped.loss_)})
    finally:
        if knob:
            _set_rate(stepped, knob, rate)
        if average:
            stepped.average = average


def _constant_rate(stepped: Any) -> str | None:
    """The setting that is the rate of each step; None where the steps follow a schedule of their own."""
    if hasattr(stepped, "learning_rate_init"):
        return "learning_rate_init" if stepped.solver == "adam" or stepped.learning_rate == "constant" else None
    return "eta0" if getattr(stepped, "learning_rate", None) == "constant" else None


def _set_rate(stepped: Any, knob: str, rate: float) -> None:
    setattr(stepped, knob, rate)
    if (optimizer := getattr(stepped, "_optimizer", None)) is not None:  # it has read the setting when it was made
        optimizer.learning_rate_init = optimizer.learning_rate = rate
