"""XGBoost as a learner: its estimators for scikit-learn, behind the features in one Pipeline."""

from __future__ import annotations

from importlib.metadata import packages_distributions
from typing import Any

import pandas as pd
from sklearn.ensemble import VotingClassifier

from alacarte.formats.frameworks import import_extra
from alacarte.learners import OnEpoch, Rows, register
from alacarte.learners.further import add_boosters, reason_against_more_trees
from alacarte.learners.sklearn import SklearnLearner

xgboost = import_extra("xgboost")


@register("xgboost")
class XGBoostLearner(SklearnLearner):
    """`lr` is the learning rate. The other settings are arguments of XGBClassifier and XGBRegressor.

    XGBoost takes only the labels 0, 1, 2, ... A VotingClassifier of one member translates all other labels.
    """

    packages = tuple(packages_distributions()["xgboost"][:1])  # xgboost or xgboost-cpu

    def __init__(self, lr: float = 0.1, **settings: Any) -> None:
        settings["learning_rate"] = lr
        classifier = VotingClassifier([("xgboost", xgboost.XGBClassifier(**settings))], voting="soft")
        super().__init__(classifier=classifier, regressor=xgboost.XGBRegressor(**settings))

    def reason_for_scratch(self, y: pd.Series) -> str | None:
        return reason_against_more_trees(self._stepped(), "reg_lambda", self.classes, y)

    def train_further(self, stepped: Any, rows: Rows, epochs: int, seed: int, on_epoch: OnEpoch | None) -> int:
        """Add `epochs` iterations of trees to the ensemble."""
        more = add_boosters(stepped, rows, epochs, seed, xgb_model=stepped.get_booster())
        stepped._Booster = more.get_booster()
        return epochs
