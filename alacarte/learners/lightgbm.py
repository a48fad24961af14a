"""LightGBM as a learner: its estimators for scikit-learn, behind the features in one Pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone

from alacarte.errors import UserError
from alacarte.formats.frameworks import import_extra
from alacarte.learners import OnEpoch, register
from alacarte.learners.further import reason_against_more_trees
from alacarte.learners.sklearn import SklearnLearner

lightgbm = import_extra("lightgbm")


@register("lightgbm")
class LightGBMLearner(SklearnLearner):
    """`lr` is the learning rate. The other settings are arguments of LGBMClassifier and LGBMRegressor."""

    packages = ("lightgbm",)

    has_trees = True

    def __init__(self, lr: float = 0.1, **settings: Any) -> None:
        settings = {"verbosity": -1, **settings, "learning_rate": lr}
        super().__init__(classifier=lightgbm.LGBMClassifier(**settings), regressor=lightgbm.LGBMRegressor(**settings))

    def fit(self, *rows: Any, **arguments: Any) -> None:
        try:
            super().fit(*rows, **arguments)
        except lightgbm.basic.LightGBMError as error:  # a setting out of its range
            raise UserError(f"model: LightGBM: {' '.join(str(error).split())}") from error

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
        stepped._Booster = more.fit(inputs, targets, sample_weight=sample_weight, init_model=stepped).booster_
        stepped._Booster._Booster__init_predictor = (
            None  # the earlier trees are in the ensemble; this copy is not saved
        )
        return epochs
