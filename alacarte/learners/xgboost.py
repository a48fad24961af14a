"""XGBoost as a learner: its estimators for scikit-learn, behind the features in one Pipeline."""

from __future__ import annotations

from importlib.metadata import packages_distributions
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.ensemble import VotingClassifier

from alacarte.formats.frameworks import import_extra
from alacarte.learners import OnEpoch, register
from alacarte.learners.further import reason_against_more_trees
from alacarte.learners.sklearn import SklearnLearner

xgboost = import_extra("xgboost")


@register("xgboost")
class XGBoostLearner(SklearnLearner):
    """`lr` is the learning rate. The other settings are arguments of XGBClassifier and XGBRegressor.

    XGBoost takes only the labels 0, 1, 2, ... A VotingClassifier of one member translates all other labels.
    """

    has_trees = True

    def __init__(self, lr: float = 0.1, **settings: Any) -> None:
        self.packages = tuple(packages_distributions()["xgboost"][:1])  # xgboost or xgboost-cpu
        settings["learning_rate"] = lr
        classifier = VotingClassifier([("xgboost", xgboost.XGBClassifier(**settings))], voting="soft")
        super().__init__(classifier=classifier, regressor=xgboost.XGBRegressor(**settings))

    def reason_for_scratch(self, stepped: Any, y: pd.Series) -> str | None:
        return reason_against_more_trees(stepped, "reg_lambda", self.classes, y)

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
        """Add `epochs` iterations of trees to the ensemble."""
        more = clone(stepped).set_params(n_estimators=epochs, random_state=seed)
        stepped._Booster = more.fit(
            inputs, targets, sample_weight=sample_weight, xgb_model=stepped.get_booster()
        ).get_booster()
        return epochs
