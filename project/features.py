"""Your features: a function here returns a scikit-learn transformer for the original columns; a file in conf/features/ names it.

The function's arguments are keys of that file. The transformer is fitted on the training rows only and saved inside the
model, so training, serving and retraining use the same one. It may contain the functions and classes of this package.
They need a name at the top level of a module: a lambda cannot be saved. It returns one row for each row, without NaN.
"""

import numpy as np
import pandas as pd
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler


def make_features(axis: str = "both") -> Pipeline:
    """The 64 pixels of a digit and the sums of its rows and columns, scaled."""
    return make_pipeline(FunctionTransformer(add_sums, kw_args={"axis": axis}), StandardScaler())


def add_sums(X: pd.DataFrame, axis: str) -> np.ndarray:
    """(n, 64) pixels to (n, 72 or 80)."""
    images = X.to_numpy(dtype="float64").reshape(-1, 8, 8)
    sums = {"rows": [images.sum(axis=2)], "columns": [images.sum(axis=1)]}
    sums["both"] = sums["rows"] + sums["columns"]
    return np.concatenate([images.reshape(-1, 64), *sums[axis]], axis=1)
