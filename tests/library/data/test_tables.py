"""Tables: files read from disk and URLs, what cannot be read, and plain column types."""

import datetime
import decimal
import gzip
import hashlib
import http.server
import threading

import fsspec
import mlflow
import numpy as np
import pandas as pd
import pytest
from people import people, refusal, table

from alacarte.data.dataset import source_digest
from alacarte.data.tables import plain_column, read_table


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "people.csv"
    people().to_csv(path, index=False)
    return path


def test_csv_and_parquet_hold_the_same_data(tmp_path, csv):
    people().to_parquet(tmp_path / "people.parquet")
    from_csv, from_parquet = table(csv), table(tmp_path / "people.parquet")
    pd.testing.assert_frame_equal(from_csv.X, from_parquet.X)
    assert from_csv.digest == from_parquet.digest
    assert (from_csv.task, from_csv.name, from_csv.target) == ("classification", "people", "y")
    assert from_csv.source == str(csv)
    assert [str(dtype) for dtype in from_csv.X.dtypes] == ["int64", "float64", "bool", "str", "datetime64[ns]"]
    X, y = from_csv.part("val")
    assert len(X) == len(y) == (from_csv.split == "val").sum() and list(X.index) == list(y.index)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".parquet"])
@pytest.mark.parametrize("scheme", ["memory", "file", "simplecache::memory"])
def test_urls(tmp_path, scheme, suffix):
    url = f"file://{tmp_path}/a b" if scheme == "file" else f"{scheme}://{tmp_path.name}"
    url += f"/people{suffix}"
    separator = "\t" if suffix == ".tsv" else ","
    with fsspec.open(url.removeprefix("simplecache::"), "wb", compression="infer", auto_mkdir=True) as file:
        people().to_parquet(file) if suffix == ".parquet" else people().to_csv(file, index=False, sep=separator)
    with fsspec.open(url, "rb") as file:
        content = file.read()
    dataset = table(url)
    pd.testing.assert_frame_equal(dataset.X, people().drop(columns="y"))
    assert dataset.name == "people"
    assert dataset.source == (f"{tmp_path}/a b/people{suffix}" if scheme == "file" else url)
    assert source_digest(_target_="alacarte.data.tables.read_table", path=url) == hashlib.sha256(content).hexdigest()
    assert "no such file" in refusal(table, url.replace("people", "nobody"))


def test_http(tmp_path, csv):
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/people.csv?token=1"
        dataset = table(url)
        assert dataset.digest == table(csv).digest and dataset.name == "people" and dataset.source == url
        expected = hashlib.sha256(csv.read_bytes()).hexdigest()
        assert source_digest(_target_="alacarte.data.tables.read_table", path=url) == expected
        assert "data.path" in refusal(table, url.replace("people", "nobody"))
        server.shutdown()
    assert "data.path" in refusal(table, url)


def test_parquet_folder(tmp_path):
    folder = tmp_path / "people"
    people().assign(part=["a", "b", "c"] * 100).to_parquet(folder, partition_cols=["part"])
    dataset = table(folder)
    assert dataset.name == "people" and len(dataset.X) == 300 and dataset.X["part"].dtype == "str"
    before = source_digest(_target_="x", path=str(folder))
    next(folder.rglob("*.parquet")).rename(folder / "part=a" / "other.parquet")
    assert source_digest(_target_="x", path=str(folder)) != before


def test_relative_path_and_home(tmp_path, csv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    people().to_parquet(tmp_path / "2024", partition_cols=["city"])
    assert len(read_table(2024)) == 300
    assert table("people.csv").source == table("~/people.csv").source == str(csv)


def test_row_numbers_are_no_input(tmp_path, caplog):
    people().to_csv(tmp_path / "numbered.csv")
    assert "unnamed" not in str(list(table(tmp_path / "numbered.csv").X)).lower()
    assert "first column has no name" in caplog.text
    people().set_index("city").to_parquet(tmp_path / "indexed.parquet")
    assert set(table(tmp_path / "indexed.parquet").X) == set(people()) - {"y"}
    people().sample(frac=1.0).to_parquet(tmp_path / "shuffled.parquet")
    assert set(table(tmp_path / "shuffled.parquet").X) == set(people()) - {"y"}


def test_byte_order_mark_and_windows_lines(tmp_path):
    text = people().to_csv(index=False, lineterminator="\r\n")
    (tmp_path / "excel.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert set(table(tmp_path / "excel.csv").X) == set(people()) - {"y"}


def test_bad_paths(tmp_path, csv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(table, "peple.csv")
    assert "data.path=peple.csv" in message and str(tmp_path / "peple.csv") in message and "'people.csv'" in message
    assert "nowhere" in refusal(table, "nowhere/people.csv")
    assert "data.path=people.xls" in refusal(table, "people.xls")
    (tmp_path / "people.xls").write_text("a")
    assert "must end in .csv" in refusal(table, "people.xls")
    (tmp_path / "folder").mkdir()
    assert "data.path=folder" in refusal(table, "folder")
    assert "data.path=" in refusal(table, "")
    assert "data.path=nope://x.csv" in refusal(table, "nope://x.csv")
    assert "data.path=s3://" in refusal(table, "s3://bucket/x.csv")  # no s3fs, or no such bucket
    for digest_refusal in (refusal(source_digest, _target_="x", path="nope.csv"), refusal(read_table, "nope.csv")):
        assert "no such file" in digest_refusal


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.csv", b"", "empty"),
        ("blank.csv", b"\n\n", "empty"),
        ("header.csv", b"a,y\n", "0 rows"),
        ("twice.csv", b"a,b,a,y\n1,2,3,4\n", "header has a more than once"),
        ("long.csv", b"a,y\n1,2,3\n4,5,6\n", "more fields than the header, 2"),
        ("ragged.csv", b"a,y\n1,2\n4,5,6\n", "cannot be read"),
        ("false.csv.gz", b"a,y\n1,2\n", "cannot be read"),
        ("false.parquet", b"a,y\n1,2\n", "cannot be read"),
        ("cut.csv.gz", gzip.compress(b"a,y\n" + b"1,2\n" * 9, mtime=0)[:-9], "cannot be read"),
        ("null.parquet", b"", "cannot be read"),
        ("only.csv", b"y\n1\n2\n", "no other column"),
    ],
)
def test_unreadable_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    message = refusal(table, tmp_path / name)
    assert expected in message and name in message


# --- plain columns ---------------------------------------------------------------------------------------------------

UTC_NOON, UTC_MIDNIGHT = pd.Timestamp("2020-01-01 12:00"), pd.Timestamp("2020-01-01")
DAY, FAR_DAY = datetime.date(2020, 1, 1), datetime.date(9999, 12, 31)
PLAIN = {
    "nullable int": (pd.Series([1, 2, 3], dtype="Int64"), "int64", [1, 2, 3]),
    "nullable int, missing": (pd.Series([1, None], dtype="Int64"), "float64", [1.0, None]),
    "nullable float": (pd.Series([1.5, None], dtype="Float64"), "float64", [1.5, None]),
    "small int": (pd.Series([1, 2], dtype="int8"), "int64", [1, 2]),
    "unsigned": (pd.Series([1, 2], dtype="uint64"), "int64", [1, 2]),
    "large unsigned": (pd.Series([2**64 - 1, 2], dtype="uint64"), "float64", [2.0**64, 2.0]),
    "half": (pd.Series([0.5], dtype="float16"), "float64", [0.5]),
    "nullable bool": (pd.Series([True, False], dtype="boolean"), "bool", [True, False]),
    "bool, missing": (pd.Series([True, None, False], dtype="boolean"), "object", [True, None, False]),
    "bool, NaN": (pd.Series([True, np.nan], dtype=object), "object", [True, None]),
    "pyarrow text": (pd.Series(["a", None], dtype="string[pyarrow]"), "str", ["a", None]),
    "python text": (pd.Series(["a", None], dtype="string[python]"), "str", ["a", None]),
    "object text": (pd.Series(["a", None], dtype=object), "str", ["a", None]),
    "category": (pd.Series(["a", None], dtype="category"), "str", ["a", None]),
    "bool category": (pd.Series([True, False], dtype="category"), "bool", [True, False]),
    "number category": (pd.Series([1, 2, None], dtype="category"), "category", [1, 2, None]),
    "zone": (pd.Series([UTC_NOON]).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"), "datetime64[ns]", [UTC_NOON]),
    "seconds": (pd.Series([UTC_NOON, None]).astype("datetime64[s]"), "datetime64[ns]", [UTC_NOON, None]),
    "date": (pd.Series([DAY, None], dtype=object), "datetime64[ns]", [UTC_MIDNIGHT, None]),
    "far date": (pd.Series([FAR_DAY, DAY]), "datetime64[ns]", [None, UTC_MIDNIGHT]),
    "duration": (pd.Series(pd.to_timedelta(["1min", None])), "float64", [60.0, None]),
    "decimal": (pd.Series([decimal.Decimal("1.5"), None], dtype=object), "float64", [1.5, None]),
    "large int": (pd.Series([10**30, 1], dtype=object), "float64", [1e30, 1.0]),
    "endless int": (pd.Series([10**400, 1, None], dtype=object), "str", [f"1{'0' * 400}", "1", None]),
    "ints and floats": (pd.Series([1, 2.5, None], dtype=object), "float64", [1.0, 2.5, None]),
    "mixed": (pd.Series([1, "a", True, None, np.bool_(False)], dtype=object), "str", ["1", "a", "True", None, "False"]),
    "arrow": (pd.Series([1, None], dtype="int32[pyarrow]"), "float64", [1.0, None]),
    "sparse": (pd.Series(pd.arrays.SparseArray([0.0, 1.0])), "float64", [0.0, 1.0]),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_columns(case):
    column, dtype, values = PLAIN[case]
    plain = plain_column(column.rename("c"))
    assert str(plain.dtype) == dtype
    assert [None if pd.isna(value) else value for value in plain] == values
    pd.testing.assert_series_equal(plain_column(plain), plain)
    signature = mlflow.models.infer_signature(plain.to_frame()).inputs
    assert signature.is_tensor_spec() is False and len(signature) == 1


@pytest.mark.parametrize(
    "values",
    [[[1], [2]], [b"a", b"b"], [{"a": 1}, None], [1j, 2j], [datetime.time(1), None], [1, [2]], [pd.Period("2020")]],
)
def test_columns_that_no_signature_expresses(values):
    message = refusal(plain_column, pd.Series(values, name="odd"))
    assert "'odd'" in message and "data.drop=['odd']" in message


@pytest.mark.parametrize("missing", ["", "NA", "null"])
def test_missing_values_among_integers_of_any_size(tmp_path, missing):
    (tmp_path / "t.csv").write_text(f"a,b\n{missing},1\n5,2\n{2**64 - 1},3\n")
    assert read_table(str(tmp_path / "t.csv"))["a"].isna().tolist() == [True, False, False]
