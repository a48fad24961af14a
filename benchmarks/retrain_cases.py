"""What benchmarks/retrain.py retrains on: old rows, requests that differ from them, and what people say of the answers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data.dataset import Dataset, load_data
from alacarte.feedback.queries import Labelled
from project.data import load_digits

REQUESTS = 400
OLD_DIGITS = 1000  # of 1,797
TARGETS = {  # of each regime
    "rotation": "digit",  # turned by 25 degrees
    "file order": "digit",  # by later writers
    "table": "answer",  # of customers
}


@dataclass(frozen=True, eq=False)
class Case:
    """Old rows with their parts; requests in their order; rows like the requests that nobody is asked about."""

    dataset: Dataset
    fractions: dict[str, Any]
    requests: tuple[pd.DataFrame, pd.Series]
    held: tuple[pd.DataFrame, pd.Series]


def make_case(regime: str, seed: int) -> Case:
    fractions = {"val": 0.15, "test": 0.2, "seed": seed}
    target = TARGETS[regime]
    loader = {"_target_": f"{__name__}.rows", "regime": regime, "part": "old", "seed": seed}
    dataset = load_data(**loader, target=target, split=fractions)
    new = [rows(regime, part, seed) for part in ("requests", "held")]
    pairs = [(frame.drop(columns=target), frame[target]) for frame in new]
    return Case(dataset, fractions, pairs[0], pairs[1])


def rows(regime: str, part: str, seed: int) -> pd.DataFrame:
    """The rows of "old", "requests" or "held". No image is in two of them, whichever way it is turned."""
    if regime == "table":
        sizes = {"old": 2000, "requests": REQUESTS, "held": 2000}
        draw = np.random.default_rng([seed, list(sizes).index(part)])
        return customers(sizes[part], draw, moved=part != "old")
    draw = np.random.default_rng(seed)
    order = draw.permutation(1797) if regime == "rotation" else np.arange(1797)
    order[OLD_DIGITS:] = draw.permutation(order[OLD_DIGITS:])
    ends = {
        "old": (0, OLD_DIGITS),
        "requests": (OLD_DIGITS, OLD_DIGITS + REQUESTS),
        "held": (OLD_DIGITS + REQUESTS, None),
    }
    frame = load_digits(rotate=25 if regime == "rotation" and part != "old" else 0)
    return frame.iloc[order[slice(*ends[part])]].reset_index(drop=True)


def customers(n: int, draw: np.random.Generator, moved: bool) -> pd.DataFrame:
    """Numbers, text and missing values, with one of three answers.

    `moved`: a town that was rare and where people want other things is now common, and they are older. What someone wants
    is the same before and after, so that one model can serve both.
    """
    towns, plans = np.array(["Bonn", "Lyon", "Turin", "Ghent", "Porto"]), np.array(["small", "large", "team"])
    age = draw.normal(54 if moved else 42, 12, n).clip(18, 90)
    income = draw.lognormal(3.5, 0.4, n)
    visits = draw.poisson(4, n)
    town = draw.choice(5, n, p=[0.1, 0.1, 0.1, 0.1, 0.6] if moved else [0.3, 0.28, 0.2, 0.2, 0.02])
    plan = draw.choice(3, n, p=[0.5, 0.3, 0.2])
    pull = np.array([0.8, 0.3, 0.0, -0.4, 0.4])[town]
    stay = 0.08 * (age - 45) * np.where((plan == 2) | (town == 4), -1, 1) + pull
    more = 0.35 * (visits - 4) * np.where(town == 4, -1, 1) + 0.04 * (income - 33) - 0.5 * (plan == 1)
    scores = np.column_stack([stay, more, np.full(n, 0.3)]) + draw.gumbel(0, 0.25, (n, 3))
    frame = pd.DataFrame({"age": age, "income": income, "visits": visits, "town": towns[town], "plan": plans[plan]})
    for column, share in (("age", 0.05), ("income", 0.15), ("town", 0.05)):
        frame.loc[draw.random(n) < share, column] = None
    return frame.assign(answer=np.array(["stays", "buys more", "leaves"])[scores.argmax(axis=1)])


def give_labels(
    X: pd.DataFrame, y: pd.Series, answers: np.ndarray, draw: np.random.Generator, first: int, wrong: float = 0.0
) -> Labelled:
    """Labels of a random audit share (30 %) of the requests, and of half of the other mistakes, by twenty people.

    `first` is the id of the first request; of the labels, a share `wrong` is another class.
    """
    audit = draw.random(len(y)) < 0.3
    mistake = answers != y.to_numpy()
    is_labelled = audit | (mistake & (draw.random(len(y)) < 0.5))
    labels, classes = y.to_numpy().copy(), np.unique(y)
    for row in np.flatnonzero(draw.random(len(y)) < wrong):
        labels[row] = draw.choice(classes[classes != labels[row]])
    ids = first + np.flatnonzero(is_labelled)
    about = pd.DataFrame(
        {
            "feedback_id": ids,
            "source": [f"person {number % 20}" for number in ids],
            "annotator": "local:benchmark",
            "state": "accepted",
            "used_version": None,
            "audit": audit[is_labelled],
        }
    )
    return Labelled(X[is_labelled].reset_index(drop=True), pd.Series(labels[is_labelled].tolist(), name="label"), about)


def join(labels: list[Labelled]) -> Labelled:
    inputs, values, abouts = ([getattr(part, key) for part in labels] for key in ("inputs", "labels", "about"))
    return Labelled(*(pd.concat(parts, ignore_index=True) for parts in (inputs, values, abouts)))
