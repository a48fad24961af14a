"""The split: shares, seeds, rows that keep their part, and classes in every part."""

import decimal
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from people import SPLIT, people, refusal, table

from alacarte.data.splits import SplitRule, balanced_split, hash_rows, hash_split
from alacarte.data.tables import plain_column, read_table


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"val": 0}, "data.split.val=0"),
        ({"test": 1.0}, "data.split.test=1.0"),
        ({"test": "20%"}, "data.split.test=20%"),
        ({"test": True}, "data.split.test=True"),
        ({"test": math.nan}, "data.split.test=nan"),
        ({"val": 0.5, "test": 0.5}, "no train part"),
        ({"seed": 1.5}, "data.split.seed=1.5"),
        ({"seed": None}, "data.split.seed=None"),
        ({"by": "date"}, "data.split.by=date: use hash, time or column"),
        ({"by": "time"}, "data.split.by=time needs data.split.column=COLUMN"),
        ({"column": "since"}, "data.split.by=hash needs no data.split.column"),
    ],
)
def test_bad_splits(changes, expected):
    assert expected in refusal(SplitRule.of, {**SPLIT, **changes})


def test_the_split_of_a_known_table_never_changes():
    frame = pd.DataFrame(
        {"a": range(12), "b": ["x", "y", "3"] * 4, "c": pd.date_range("2020", periods=12).as_unit("ns")}
    )
    letters = "".join(part[1] for part in hash_split(hash_rows(frame), val=0.2, test=0.3, seed=7))
    assert letters == "rrarrerarrre"  # r: train, a: val, e: test


def test_parts_have_their_shares_and_seeds_are_independent():
    hashes = hash_rows(pd.DataFrame({"a": range(100_000)}))
    rules = [SplitRule.of({"val": 0.2, "test": 0.2, "seed": seed}) for seed in (0, 1, 2, 10**9, -1, 10**400)]
    splits = [hash_split(hashes, **rule.fractions) for rule in rules]
    for split in splits:
        assert abs(np.mean(split == "test") - 0.2) < 0.006 and abs(np.mean(split == "val") - 0.2) < 0.006
    for other in splits[1:]:
        assert abs(np.mean(other[splits[0] == "test"] == "test") - 0.2) < 0.012


def test_a_fraction_that_changes_moves_rows_only_to_or_from_train():
    hashes = hash_rows(pd.DataFrame({"a": range(10_000)}))
    small, large = (hash_split(hashes, val=0.15, test=test, seed=0) for test in (0.2, 0.3))
    assert Counter(zip(small, large, strict=True)).keys() == {
        ("train", "train"), ("train", "test"), ("test", "test"), ("val", "val")
    }  # fmt: skip
    assert (hash_split(hashes, val=0.4, test=0.2, seed=0) == "test").tolist() == (small == "test").tolist()


CELL = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.sampled_from(
        ["1", "1.0", "true", "007", "-0", "x", 'Ünïcode, "quoted"', "2020-01-01", "NA", " 1", "1e5", "inf"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=5),
)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_row_keeps_its_part_when_others_are_appended(tmp_path_factory, data):
    """Through CSV and back, with columns of any one kind, to which a row of any other kind is appended."""
    kind = st.sampled_from(
        [st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(), st.text("ab1", min_size=1), CELL]
    )
    columns = [data.draw(st.lists(data.draw(kind), min_size=6, max_size=6)) for _ in range(2)]
    before = pd.DataFrame({f"c{i}": pd.Series(column, dtype=object) for i, column in enumerate(columns)})
    extra = pd.DataFrame(
        [[data.draw(CELL), data.draw(CELL)] for _ in range(data.draw(st.integers(1, 3)))], columns=["c0", "c1"]
    )
    after = pd.concat([before, extra.astype(object)], ignore_index=True)
    folder = tmp_path_factory.mktemp("grow")
    hashes = []
    for frame in (before, after, after.iloc[::-1, ::-1]):
        frame.assign(row=range(len(frame))).to_csv(folder / "t.csv", index=False)
        read = read_table(str(folder / "t.csv"))[list(frame)]
        hashes.append(hash_rows(pd.DataFrame({name: plain_column(read[name]) for name in read})))
    assert hashes[0].tolist() == hashes[1][:6].tolist()
    assert hashes[2][::-1].tolist() == hashes[1].tolist()


NUMBERS = st.lists(st.one_of(st.integers(-(2**53), 2**53), st.sampled_from([0, 1, -1])), min_size=1, max_size=8)


@settings(deadline=None, max_examples=30)
@given(NUMBERS)
def test_the_hash_ignores_how_numbers_are_stored(values):
    stored = [
        pd.Series(values, dtype="int64"),
        pd.Series(values, dtype="float64"),
        pd.Series(values, dtype="Int64"),
        pd.Series(values, dtype="category"),
        pd.Series([decimal.Decimal(value) for value in values]),
        pd.Series([str(value) for value in values]),
        pd.Series([-0.0 if value == 0 else float(value) for value in values]),
    ]
    hashes = {tuple(hash_rows(plain_column(column).to_frame("c"))) for column in stored}
    assert len(hashes) == 1
    assert len(set(next(iter(hashes)))) == len(set(values))


def test_the_hash_ignores_how_booleans_dates_and_missing_values_are_stored():
    def hashed(column):
        return hash_rows(plain_column(column).to_frame("c")).tolist()

    assert hashed(pd.Series([True, False])) == hashed(pd.Series([True, False, None]))[:2] == hashed(pd.Series([1, 0]))
    assert hashed(pd.Series([None, "a"]))[0] == hashed(pd.Series([math.nan, 1.5]))[0]
    assert hashed(pd.Series([True, None]))[1] == hashed(pd.Series([np.nan, 1.5]))[0]
    days = pd.Series(pd.date_range("2020", periods=3))
    assert (
        hashed(days)
        == hashed(days.astype("datetime64[s]"))
        == hashed(days.dt.tz_localize("UTC"))
        == hashed(days.dt.date)
    )


def test_rows_with_equal_inputs_or_equal_keys_stay_together(tmp_path):
    frame = pd.concat([people(), people().assign(y=people()["y"].to_numpy()[::-1])], ignore_index=True)
    frame.to_csv(tmp_path / "t.csv", index=False)
    split = table(tmp_path / "t.csv").split
    assert split[:300].tolist() == split[300:].tolist()
    frame.assign(person=[*range(200), None] * 2 + [*range(198)]).to_csv(tmp_path / "t.csv", index=False)
    by_key = table(tmp_path / "t.csv", key="person")
    assert "person" not in by_key.X
    person = pd.read_csv(tmp_path / "t.csv")["person"]
    assert pd.Series(by_key.split).groupby(person, dropna=False).nunique().max() == 1
    first = table(tmp_path / "t.csv", key="person").split
    frame.assign(person=[str(p) for p in person.fillna(-1)]).iloc[:300].to_csv(tmp_path / "t.csv", index=False)
    text_keys = table(tmp_path / "t.csv", key="person").split
    assert (text_keys == first[:300])[person[:300].notna()].all(), "the key's part depends on its type"


def rare(tmp_path, n_rare: int, **settings):
    """300 rows of which a few have a class of their own."""
    path = tmp_path / "t.csv"
    people().assign(y=["rare"] * n_rare + ["a", "b"] * ((300 - n_rare) // 2)).to_csv(path, index=False)
    return table(path, **settings)


def test_a_rare_class_goes_to_train_or_away_or_ends_the_run(tmp_path, caplog):
    dataset = rare(tmp_path, 2)
    assert set(dataset.split[:2]) == {"train"} and (dataset.split != "dropped").all()
    assert "rare (2 rows)" in caplog.text and "data.rare_classes=keep" in caplog.text
    dropped = rare(tmp_path, 2, rare_classes="drop")
    assert set(dropped.split[:2]) == {"dropped"} and dropped.digest != dataset.digest
    assert sum(len(dropped.part(part)[0]) for part in ("train", "val", "test")) == 298
    assert (dropped.split[2:] == dataset.split[2:]).all()
    message = refusal(rare, tmp_path, 2, rare_classes="error")
    assert "of 2 rows with y=rare are in" in message and "more such rows are needed" in message
    assert "use keep, drop or error" in refusal(rare, tmp_path, 2, rare_classes="kep")


def test_too_few_rows(tmp_path):
    people(5).assign(y=[0.1, 0.2, 0.3, 0.4, 0.5]).to_csv(tmp_path / "t.csv", index=False)
    assert "of 5 rows into" in refusal(table, tmp_path / "t.csv")
    people(1).to_csv(tmp_path / "t.csv", index=False)
    assert "all 1 rows" in refusal(table, tmp_path / "t.csv")
    people()[["city", "y"]].to_csv(tmp_path / "t.csv", index=False)
    assert "3 differ" in refusal(table, tmp_path / "t.csv", split={**SPLIT, "val": 0.01})
    people().assign(y=[f"{price} Fr." for price in range(300)]).to_csv(tmp_path / "t.csv", index=False)
    assert "y has 300 classes in 300 rows" in refusal(table, tmp_path / "t.csv")


# --- large groups ----------------------------------------------------------------------------------------------------


def test_large_groups_of_equal_rows_are_balanced_and_small_groups_stay(tmp_path, caplog):
    sizes = [70, 60, 50, 45, 40, 35, 30, 25, 20, 15, 12, 10] + [2] * 150 + [1] * 179
    groups = hash_rows(pd.DataFrame({"a": np.repeat(np.arange(len(sizes)), sizes)}))
    is_large, moved = np.repeat(np.array(sizes) >= 10, sizes), 0
    for seed in range(10):
        fractions = {**SPLIT, "seed": seed}
        plain, balanced = hash_split(groups, **fractions), balanced_split(groups, **fractions)
        assert abs(np.mean(balanced == "test") - 0.2) < 0.05 and abs(np.mean(balanced == "val") - 0.15) < 0.05
        assert (plain == balanced)[~is_large].all() and pd.Series(balanced).groupby(groups).nunique().max() == 1
        order = np.random.default_rng(0).permutation(len(groups))
        assert (balanced_split(groups[order], **fractions) == balanced[order]).all()
        moved += (plain != balanced).any()
    assert 0 < moved < 10
    people(900)[["city", "y"]].assign(city=["a", "b", "c"] * 300).to_csv(tmp_path / "t.csv", index=False)
    refusal(table, tmp_path / "t.csv")
    assert "val=0.15 test=0.2, but the parts are" in caplog.text and "3 of 900 rows differ" in caplog.text


# --- by time and by column -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["date text", "number", "timestamp"])
def test_the_newest_rows_are_the_test_part(tmp_path, kind):
    days = pd.Series(pd.date_range("2020-01-01", periods=150).repeat(2)).sample(
        frac=1, random_state=0, ignore_index=True
    )
    bought = {"date text": days.dt.strftime("%Y-%m-%d"), "number": days.dt.dayofyear, "timestamp": days}[kind]
    path = tmp_path / "t.parquet"
    people().assign(bought=bought).to_parquet(path)
    split = {**SPLIT, "by": "time", "column": "bought"}
    dataset = table(path, split=split)
    assert "bought" not in dataset.X and "bought" in table(path, split={**split, "as_input": True}).X
    parts = {part: days[dataset.split == part] for part in ("train", "val", "test")}
    assert parts["train"].max() < parts["val"].min() and parts["val"].max() < parts["test"].min()
    assert [len(parts[part]) for part in ("val", "test")] == pytest.approx([45, 60], abs=2)


def test_a_column_names_the_parts(tmp_path):
    path = tmp_path / "t.csv"
    parts = ["train", " Train", "val", "TEST", "test"] * 60
    people().assign(part=parts).to_csv(path, index=False)
    dataset = table(path, split={"by": "column", "column": "part"})
    assert dataset.split.tolist() == [part.strip().lower() for part in parts] and "part" not in dataset.X
    people().assign(part=["train", "dev", "test"] * 100).to_csv(path, index=False)
    assert "has 'dev' in 100 rows" in refusal(table, path, split={"by": "column", "column": "part"})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"column": "sinc"}, "data.split.column=sinc"),
        ({"column": "y"}, "data.target=y is also in data.split.column"),
        ({"column": "city"}, "is no time: write dates as 2024-05-31, or numbers"),
        ({"column": "since", "key": "city"}, "data.key=city is for data.split.by=hash"),
    ],
)
def test_columns_that_cannot_split_by_time(tmp_path, settings, expected):
    people().to_csv(tmp_path / "t.csv", index=False)
    split = {**SPLIT, "by": "time", "column": settings["column"]}
    assert expected in refusal(table, tmp_path / "t.csv", split=split, key=settings.get("key"))


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_come_from_a_column_that_is_no_input(tmp_path):
    path = tmp_path / "t.csv"
    people().assign(w=np.arange(300) / 2).to_csv(path, index=False)
    dataset = table(path, weight="w")
    assert "w" not in dataset.X and table(path, drop=["w"]).weight("train") is None
    for part in ("train", "val", "test"):
        assert (dataset.weight(part) == np.flatnonzero(dataset.split == part) / 2).all()
    assert dataset.digest != table(path, drop=["w"]).digest
    for value in (-1, "much", None, np.inf):
        people().assign(w=[value, *[1] * 299]).to_csv(path, index=False)
        assert "data.weight=w" in refusal(table, path, weight="w")
    people().assign(w=np.where(dataset.split == "val", 0, 1)).to_csv(path, index=False)
    assert "rows of val have the weight 0" in refusal(table, path, weight="w")
