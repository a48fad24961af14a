"""Your models: a function here returns an unfitted scikit-learn estimator or Pipeline.

    python -m steps.train features=none model=sklearn model.estimator._target_=project.models.make_model model.estimator.C=0.1

The arguments of the function are keys below model.estimator. With features=none the model gets the original columns with
their names, otherwise the array that the features return.
"""

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def make_model(C: float = 1.0) -> Pipeline:
    """A logistic regression on scaled columns; `C` is the inverse of the weight penalty."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500))
