"""Small tables and learners made from the real configuration, for the tests of formats and learners."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

CONF = Path(__file__).resolve().parents[2] / "conf"

# Every family, made small.
FAMILIES = {
    "sklearn_sgd": [],
    "sklearn_hgb": ["model.max_iter=10"],
    "sklearn_forest": ["model.n_estimators=10"],
    "sklearn_mlp": ["model.hidden=[16]", "model.max_epochs=50"],
    "sklearn": [],
    "torch_mlp": ["model.network.hidden=[16]", "model.max_epochs=20", "model.device=cpu"],
}
SMALL = ["model.network.hidden=[16]", "model.max_epochs=20"]
# And those of other packages.
ALL = FAMILIES | {
    "lightgbm": ["model.n_estimators=10"],
    "xgboost": ["model.n_estimators=10"],
    "keras_mlp": SMALL,
}
IMAGES = {"torch_cnn": ["model.network.channels=4", "model.max_epochs=6", "model.device=cpu"]}
ANY = {
    "classification": "sklearn.ensemble.ExtraTreesClassifier",
    "regression": "sklearn.ensemble.ExtraTreesRegressor",
}


def learner(family: str, task: str = "classification", *overrides: str) -> Any:
    any_estimator = [f"model.estimator._target_={ANY[task]}", "+model.estimator.n_estimators=10"]
    more = any_estimator if family == "sklearn" else []
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", [f"model={family}", *(ALL | IMAGES)[family], *more, *overrides])
    return instantiate(config.model)


@cache
def table(kind: str, task: str, rows: int = 160, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    """ "numeric": four float columns. "mixed": each type that CSV and Parquet give, with missing values in each."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(rows, 4))
    truth = numbers[:, 0] + 0.5 * numbers[:, 1]
    if task == "regression":
        y = pd.Series(1000 + 200 * truth, name="price")
    else:
        y = pd.Series(np.where(truth > 0.4, "high", np.where(truth < -0.4, "low", "mid")), name="level")
    X = pd.DataFrame(numbers, columns=list("abcd"))
    if kind == "mixed":
        day = pd.Timestamp("2020-01-01")
        X = pd.DataFrame(
            {
                "floors": (10 * numbers[:, 0]).astype("int64"),  # no missing value in training
                "area": numbers[:, 1],
                "garden": (numbers[:, 2] > 0).astype(object),
                "town": np.where(numbers[:, 0] > 0, "Lyon", "Bonn"),
                "sold": [day + pd.Timedelta(days=int(40 * number)) for number in numbers[:, 1]],
                "listed": [str((day + pd.Timedelta(days=int(9 * number))).date()) for number in numbers[:, 3]],
            }
        )
        for place, name in enumerate(X.columns[1:]):
            X.loc[place :: 9 + place, name] = None
    return X, y


@cache
def fitted(family: str, kind: str, task: str) -> Any:
    X, y = table(kind, task)
    made = learner(family, task)
    made.fit(X[:120], y[:120], X[120:], y[120:], task=task, seed=0)
    return made
