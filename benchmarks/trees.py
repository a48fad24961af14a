"""How fast and how exact treelite is beside scikit-learn's own predict for ensembles of trees, in one run on one thread.

    python benchmarks/trees.py

A cell is the time of the estimator's own call divided by the time of the fast path, which uses treelite below `MANY` rows.
The last column counts the rows at a threshold of a tree, or just beside one, of which the label or number differs.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from sklearn import ensemble
from sklearn.datasets import make_classification
from threadpoolctl import threadpool_limits

from alacarte.serving.fastpath.estimators import MANY, compile_estimator

MODELS = {
    "RandomForestClassifier": {"n_estimators": 100},
    "ExtraTreesClassifier": {"n_estimators": 100},
    "HistGradientBoostingClassifier": {"max_iter": 100, "early_stopping": False},
    "HistGradientBoostingRegressor": {"max_iter": 100, "early_stopping": False},
}
ROWS = (1, 8, 64, MANY, 1000)


def seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def at_thresholds(model: object, row: np.ndarray) -> np.ndarray:
    """(n, d): `row` with one value each changed to a threshold of a tree, or to the number before or after it."""
    if hasattr(model, "_predictors"):
        nodes = np.concatenate([tree.nodes for trees in model._predictors for tree in trees])
        nodes = nodes[nodes["is_leaf"] == 0]
        places, thresholds = nodes["feature_idx"], nodes["num_threshold"]
    else:
        trees = [each.tree_ for each in np.ravel(model.estimators_)]
        places, thresholds = (
            np.concatenate([getattr(tree, name) for tree in trees]) for name in ("feature", "threshold")
        )
        places, thresholds = places[places >= 0], thresholds[places >= 0]
    chosen = np.random.default_rng(0).choice(len(places), min(2000, len(places)), replace=False)
    places, thresholds = places[chosen], thresholds[chosen]
    rows = np.tile(row, (3 * len(places), 1))
    around = [np.nextafter(thresholds, -np.inf), thresholds, np.nextafter(thresholds, np.inf)]
    rows[np.arange(len(rows)), np.tile(places, 3)] = np.concatenate(around)
    return rows


def main() -> None:
    X, y = make_classification(
        3000, 20, n_informative=12, n_classes=10, n_clusters_per_class=1, flip_y=0.1, random_state=0
    )
    print("| 100 trees or iterations, 10 classes | " + " | ".join(f"{n} rows" for n in ROWS) + " | differ |")
    print("|---|" + "---|" * (len(ROWS) + 1))
    for name, settings in MODELS.items():
        model = getattr(ensemble, name)(random_state=0, **settings).fit(X, y)
        fast = compile_estimator(model)
        ratios = [seconds(partial(model.predict, X[:n])) / seconds(partial(fast, X[:n])) for n in ROWS]
        rows = at_thresholds(model, X[0])
        pieces = np.concatenate([fast(part)[0] for part in np.array_split(rows, len(rows) // (MANY - 1) + 1)])
        differ = (~np.isclose(pieces, model.predict(rows), rtol=1e-9)).sum()
        print(f"| {name} | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + f" | {differ} of {len(rows)} |")


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
