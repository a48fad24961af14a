"""CSV files as people write them: spaces, words for missing values, numbers in text, and the types that a model knows."""

import shlex
import subprocess

import numpy as np
import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from people import SPLIT, refusal, table

from alacarte.arguments import to_overrides
from alacarte.data.csv_reader import CellRules
from alacarte.data.tables import open_table, read_table
from alacarte.errors import as_argument


def write(path, separator=",", **columns) -> str:
    """A CSV file of these columns, without any quotes; the address of the file."""
    rows = [columns, *zip(*columns.values(), strict=True)]
    path = path / "t.csv"
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
    return str(path)


def pasted(argument: str):
    """The value that a step gets when a user pastes this argument into bash."""
    command = f"printf '%s\\0' {argument}"
    words = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    value = OverridesParser.create().parse_override(to_overrides(words)[0]).value()
    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]


NAMES = ["Notes (free)", "a,b", "it's", '5" x', "a:b", "x\\", "x\\'y", "${x}", "\\${x}", "$HOME", "`ls`", "wow!", "[a]", "{b}",
         "#", "=x", "true", "3", "null", " first", "last ", "\t", ";", "a\\\\b", "Größe in m²"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_suggested_argument_survives_bash_and_hydra(name):
    assert pasted(as_argument("data.drop", [name, "b"])) == [name, "b"]
    assert pasted(as_argument("data.target", name)) == name


def test_every_key_takes_column_names_with_any_characters(tmp_path):
    rows = {name: np.arange(300) for name in NAMES if name == name.strip()} | {"y": ["a", "b", "c"] * 100}
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    for name in NAMES:
        if name == name.strip():
            dataset = table(tmp_path / "t.csv", drop=[name], target="y")
            assert name not in dataset.X and len(dataset.X.columns) == len(rows) - 2
            assert name not in table(tmp_path / "t.csv", key=name, weight="=x" if name != "=x" else "#").X
    message = refusal(table, tmp_path / "t.csv", drop="[Notes (free), a:b]")  # Hydra takes such a list for a text
    assert pasted(message.rpartition("quote each name: ")[2]) == ["Notes (free)", "a:b"]


@pytest.mark.parametrize("separator", ["\t", ";", "|"])
def test_the_suggested_separator_works(tmp_path, separator):
    path = write(tmp_path, separator, a=range(9), b=range(9))
    message = refusal(read_table, path)
    assert list(read_table(path, pasted(message.rpartition(" use ")[2]))) == ["a", "b"]
    assert separator != "\t" or list(read_table(path, pasted("data.separator=tab"))) == ["a", "b"]


def test_spaces_after_separators(tmp_path):
    (tmp_path / "t.csv").write_text('a, "b, c", d\n1, "x, y", 2\n,, \n3,  z z , 4\n')
    frame = read_table(str(tmp_path / "t.csv"))
    assert list(frame) == ["a", "b, c", "d"] and frame["d"].tolist()[::2] == [2.0, 4.0] and frame["d"].isna()[1]
    assert frame["b, c"].tolist()[::2] == ["x, y", "z z "]


# --- missing values --------------------------------------------------------------------------------------------------


def test_words_are_missing_among_numbers_and_values_in_text(tmp_path, caplog):
    path = write(
        tmp_path, n=["1.5", "NA", "", "None"], ok=["true", "null", "false", ""], country=["NA", "DE", "", "None"]
    )
    frame = read_table(path)
    assert frame["n"].isna().tolist() == [False, True, True, True] and frame["n"].dtype == "float64"
    assert frame["ok"].tolist()[::2] == [True, False] and frame["ok"].isna().sum() == 2
    assert frame["country"].fillna("-").tolist() == ["NA", "DE", "-", "None"]
    assert "read as missing: 'NA' (1 in 'n'), 'None' (1 in 'n'), 'null' (1 in 'ok')" in caplog.text
    assert "kept as text: 'NA' (1 in 'country'), 'None' (1 in 'country')" in caplog.text
    fix = next(word for word in shlex.split(caplog.text) if word.startswith("data.missing=['NA'"))
    missing = pasted(shlex.quote(fix))
    assert read_table(path, missing=missing)["country"].fillna("-").tolist() == ["-", "DE", "-", "-"]
    assert read_table(path, missing=["DE"])["country"].fillna("-").tolist() == ["NA", "-", "-", "None"]
    assert read_table(path, missing=[])["n"].tolist()[:2] == ["1.5", "NA"]


def test_a_class_named_none_is_a_class(tmp_path):
    path = write(tmp_path, a=range(300), y=["None", "Attached", "Detached"] * 100)
    assert set(table(path).y) == {"None", "Attached", "Detached"}
    assert set(table(path, missing=["None"]).y) == {"Attached", "Detached"}


# --- numbers in text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "settings", "expected"),
    [
        (["1,5", "2", "-0,25", ""], {}, [1.5, 2.0, -0.25, None]),
        (["1.234,5", "2,5", "7", "12.000"], {}, [1234.5, 2.5, 7.0, 12000.0]),
        (["1,234.5", "2.5", "7", "1,234,567"], {}, [1234.5, 2.5, 7.0, 1234567.0]),
        (["1,234", "2,500", "7", "3,125"], {"decimal": ","}, [1.234, 2.5, 7.0, 3.125]),
        (["1,234", "2,500", "7", "3,125"], {"decimal": "."}, [1234.0, 2500.0, 7.0, 3125.0]),
        (["1.5", "\t", "2.5", "\u00a0"], {}, [1.5, None, 2.5, None]),
        (["1.5", "?", "2.5", "NA"], {"missing": ["?", "NA"]}, [1.5, None, 2.5, None]),
    ],
)
def test_text_that_can_only_be_numbers_is_numbers(tmp_path, cells, settings, expected):
    column = read_table(write(tmp_path, ";", a=cells, b=range(4)), ";", **settings)["a"]
    assert column.dtype == "float64" and [None if pd.isna(value) else value for value in column] == expected


@pytest.mark.parametrize(
    ("cells", "warning", "key"),
    [
        (["1,234", "2,500"] * 50, "such as '1,234'", "data.decimal=','"),
        ([*map(str, range(97)), "?", "-", "?"], "such as '?'", "data.missing=['?','-']"),
        (["$5", "$6.50"] * 50, "such as '$5'", "data.text=['a (x)']"),
    ],
)
def test_text_that_may_be_numbers_is_one_warning_with_column_and_key(tmp_path, caplog, cells, warning, key):
    path = write(tmp_path, ";", **{"a (x)": cells, "code": ["A1", "007"] * 50, "size": range(100)})
    assert read_table(path, ";")["a (x)"].dtype == "str"
    assert len(caplog.records) == 1 and "'a (x)'" in caplog.text and warning in caplog.text and key in caplog.text
    caplog.clear()
    assert read_table(path, ";", text=["a (x)"])["a (x)"].tolist() == cells and not caplog.records


def test_text_columns_and_number_columns_by_name(tmp_path, caplog):
    path = write(tmp_path, zip=["007", "012", ""], price=["1.5", "much", "2"])
    assert read_table(path)["zip"].tolist()[:2] == [7.0, 12.0]
    assert read_table(path, text=["zip"])["zip"].fillna("-").tolist() == ["007", "012", "-"]
    message = refusal(read_table, path, numbers=["price"])
    assert "column 'price' holds 'much', but the model needs numbers" in message
    assert (
        read_table(path, numbers=["price"], missing=pasted(message.rpartition("or use ")[2]))["price"].isna().sum() == 1
    )
    for setting in ("text", "numbers"):
        assert f"data.{setting}=zipp" in refusal(table, path, target="zip", **{setting: ["zipp"]})
    pd.DataFrame({"zip": ["07", "12"], "price": ["1.5", "2"]}).to_parquet(tmp_path / "t.parquet")
    caplog.clear()
    assert (read_table(str(tmp_path / "t.parquet")).dtypes == "str").all() and "data.numbers=" in caplog.text
    frame = read_table(str(tmp_path / "t.parquet"), text=["zip"], numbers=["price"])
    assert frame["zip"].tolist() == ["07", "12"] and frame["price"].tolist() == [1.5, 2.0]


def test_text_that_can_only_be_dates_is_dates(tmp_path, caplog):
    path = write(
        tmp_path,
        sold=["2024-05-31", "", "2024-06-01T01:30:00+02:00"],
        no=["2024-13-01"] * 3,
        word=["2024-05-31", "x", ""],
    )
    frame = read_table(path)
    assert frame["sold"].dt.strftime("%F %R").fillna("-").tolist() == ["2024-05-31 00:00", "-", "2024-05-31 23:30"]
    assert (frame[["no", "word"]].dtypes == "str").all()
    assert len(caplog.records) == 1 and "'sold' is read as dates" in caplog.text and "data.text=['sold']" in caplog.text
    assert read_table(path, text=["sold"])["sold"].dtype == "str"


@pytest.mark.parametrize("encoding", ["latin1", "utf16"])
def test_a_file_in_another_encoding_is_converted_by_the_suggested_command(tmp_path, encoding):
    content = "a,y\nGenève,1\n"
    path = tmp_path / "o'clock.csv"
    path.write_bytes(content.encode(encoding))
    command = refusal(read_table, str(path)).rpartition("such as with ")[2]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "utf8.csv").read_text() == content


# --- the types that a model knows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "file", "expected"),
    [
        (["007", "012", "A1"] * 100, ["007", "012", ""], ["007", "012", None]),
        (["1", "2", "A", ""] * 75, ["1", "2", ""], ["1", "2", None]),
        (["true", "false", "maybe"] * 100, ["true", "false", "TRUE"], ["true", "false", "TRUE"]),
        (["0.5", "1", "2"] * 100, ["1", "2", "x"], None),
    ],
)
def test_the_model_decides_the_types_of_a_file(tmp_path, trained, file, expected):
    y = (["a", "b"] * len(trained))[: len(trained)]
    X = table(write(tmp_path, code=trained, n=range(len(trained)), y=y)).X
    kind = "string" if X["code"].dtype == "str" else "double"
    rules, only = CellRules().for_model({"code": kind, "n": "any"}), ["code", "n"]
    path = write(tmp_path, code=file, n=range(3), other=range(3))
    if expected is None:
        assert "'code' holds 'x'" in refusal(open_table(path).typed, rules, only)
        return
    frame = open_table(path).typed(rules, only)
    assert [None if pd.isna(value) else value for value in frame["code"]] == expected and list(frame) == only
    write(tmp_path, code=["1"] * 100 + ["2"] * 100 + ["3"] * 100, n=range(300), y=["a", "b", "a"] * 100)
    as_known = table(path, types={"code": kind, "n": "any"}, split=SPLIT).X
    assert as_known["code"].dtype == kind.replace("string", "str") and as_known["n"].dtype == "int64"


def test_cells_as_they_are_written(tmp_path):
    text = ',zip,order,country,price, ok,note\n7,00501,9007199254740993,NA,1.10,true,"a ""b"", c"\n8,,1e5,,, x,\n'
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    frame = open_table(str(tmp_path / "t.csv")).as_written()
    assert list(frame) == ["", "zip", "order", "country", "price", "ok", "note"]
    assert frame.iloc[0].tolist() == ["7", "00501", "9007199254740993", "NA", "1.10", "true", 'a "b", c']
    assert frame.iloc[1].tolist() == ["8", "", "1e5", "", "", " x", ""]
