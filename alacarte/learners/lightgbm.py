"""LightGBM as a learner: its estimators for scikit-learn, behind the features in one Pipeline."""

from __future__ import annotations

from typing import Any

import pandas as pd

from alacarte.errors import UserError
from alacarte.formats.frameworks import import_extra
from alacarte.learners import OnEpoch, Rows, register
from alacarte.learners.further import add_boosters, reason_against_more_trees
from alacarte.learners.sklearn import SklearnLearner

lightgbm = import_extra("lightgbm")


@register("lightgbm")
class LightGBMLearner(SklearnLearner):
    """`lr` is the learning rate. The other settings are arguments of LGBMClassifier and LGBMRegressor."""

    packages = ("lightgbm",)

    def __init__(self, lr: float = 0.1, **settings: Any) -> None:
        settings = {"verbosity": -1, **settings, "learning_rate": lr}
        super().__init__(classifier=lightgbm.LGBMClassifier(**settings), regressor=lightgbm.LGBMRegressor(**settings))

    def fit_from_scratch(self, *arguments: Any) -> None:
        try:
            super().fit_from_scratch(*arguments)
        except lightgbm.basic.LightGBMError as error:  # a setting out of its range
            raise UserError(f"model: LightGBM: {' '.join(str(error).split())}") from error

    def reason_for_scratch(self, y: pd.Series) -> str | None:
        return reason_against_more_trees(self._stepped(), "reg_lambda", self.classes, y)

    def train_further(self, stepped: Any, rows: Rows, epochs: int, seed: int, on_epoch: OnEpoch | None) -> int:
        """Add `epochs` iterations of trees to the ensemble."""
        stepped._Booster = add_boosters(stepped, rows, epochs, seed, init_model=stepped).booster_
        # The earlier trees are in the ensemble. skops would save this copy of them, too.
        stepped._Booster._Booster__init_predictor = None
        return epochs
