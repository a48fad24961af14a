"""A table of people, and shorthands to load it, for the tests of data."""

import numpy as np
import pandas as pd
import pytest

from alacarte.data.dataset import Dataset, load_data
from alacarte.errors import UserError

SPLIT = {"val": 0.15, "test": 0.2, "seed": 0}


def table(path, target="y", **settings) -> Dataset:
    """A CSV or Parquet file as train loads it."""
    defaults = {"_target_": "alacarte.data.tables.read_table", "split": SPLIT}
    return load_data(**{**defaults, "path": str(path), "target": target, **settings})


def refusal(call, *arguments, **settings) -> str:
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def people(n=300, seed=0) -> pd.DataFrame:
    """n rows of numbers, booleans, text, dates, and two classes."""
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": random.integers(18, 90, n),
            "income": random.normal(50.0, 9.0, n).round(3),
            "member": random.random(n) < 0.5,
            "city": random.choice(["Bern", "Genève", "Zürich"], n),
            "since": pd.date_range("2020-01-01", periods=n, unit="ns"),
            "y": random.choice(["no", "yes"], n),
        }
    )
