"""Train a fitted estimator of scikit-learn further: gradient descent by partial_fit, boosting by more trees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from alacarte.learners import OnEpoch, Rows, onward_rate

BOOSTED = HistGradientBoostingClassifier, HistGradientBoostingRegressor
MIN_L2 = 10  # with less, boosting on confident mistakes breaks what the earlier trees had learned


def reason_for_scratch(stepped: Any, classes: list | None, y: pd.Series) -> str | None:
    name = type(stepped).__name__
    if isinstance(stepped, BOOSTED):
        return reason_against_more_trees(stepped, "l2_regularization", classes, y)
    if not hasattr(stepped, "partial_fit") or not hasattr(stepped, "n_iter_"):
        return f"{name} starts from scratch: it cannot be trained further"
    if getattr(stepped, "early_stopping", False) or getattr(stepped, "class_weight", None) == "balanced":
        return f"{name} starts from scratch: with early_stopping or class_weight=balanced it cannot be trained further"
    return None


def reason_against_more_trees(stepped: Any, l2: str, classes: list | None, y: pd.Series) -> str | None:
    """Why trees cannot be added to an ensemble of `classes`. None: they can. `l2` is the name of its weight penalty."""
    name = type(stepped).__name__
    if (getattr(stepped, l2) or 0) < MIN_L2:
        return f"{name} starts from scratch: it can be trained further from model.{l2}={MIN_L2} up"
    # fit assumes that the rows have all classes, and would otherwise give the trees to other classes
    lacking = set(classes or ()) - set(y.tolist())
    return f"{name} starts from scratch: the rows lack its class {min(lacking)!r}" if lacking else None


def add_trees(stepped: Any, rows: Rows, iterations: int) -> int:
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
        stepped.set_params(warm_start=True, max_iter=before + iterations).fit(rows.inputs, rows.targets, rows.weight)
    finally:
        del stepped._bin_data
        stepped.set_params(**settings)  # the settings of a training from scratch
    return stepped.n_iter_ - before


def add_boosters(stepped: Any, rows: Rows, iterations: int, seed: int, **earlier: Any) -> Any:
    """An estimator of LightGBM or XGBoost with the trees of `stepped` and `iterations` more.

    `earlier` is the argument of its fit that takes the earlier trees.
    """
    more = clone(stepped).set_params(n_estimators=iterations, random_state=seed)
    return more.fit(rows.inputs, rows.targets, sample_weight=rows.weight, **earlier)


def descend(stepped: Any, rows: Rows, epochs: int, seed: int, on_epoch: OnEpoch | None) -> None:
    """Train further by partial_fit, one pass over the rows in random order for each epoch."""
    inputs, targets, weight = rows.inputs, rows.targets, rows.weight
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
            shuffled = inputs.iloc[order] if isinstance(inputs, pd.DataFrame) else inputs[order]
            stepped.partial_fit(
                shuffled, targets[order], **({} if weight is None else {"sample_weight": weight[order]})
            )
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
