"""The bodies of requests: every way to send rows, and what nobody should send."""

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd

JSON = "application/json"
SECRET = "zebra4711"  # stands in every bad request, and in no answer


def good(rows: pd.DataFrame) -> Iterator[tuple[str, str, bytes]]:
    """Each way to send the same rows, and rows alone."""
    for part in (rows, rows[:1], rows[-1:], rows[rows.columns[::-1]]):
        split, records = part.to_dict(orient="split"), part.to_dict(orient="records")
        bodies = {
            "split": {"dataframe_split": {"columns": split["columns"], "data": split["data"]}},
            "index": {"dataframe_split": split},
            "records": {"dataframe_records": records},
            "instances": {"instances": records},
            "inputs": {"inputs": records},
            "columns": {"inputs": part.to_dict(orient="list")},
            "params": {"dataframe_records": records, "params": {"a": 1}},
        }
        for name, body in bodies.items():
            yield name, JSON, json.dumps(body).encode()
        yield "csv", "text/csv", part.to_csv(index=False).encode()
        yield "charset", f"{JSON}; charset=utf-8", json.dumps(bodies["split"]).encode()


def bad(rows: pd.DataFrame) -> Iterator[tuple[str, str, bytes]]:
    """What is no request, or a strange one; some of it MLflow takes."""
    columns, data = list(rows.columns), rows.to_numpy(dtype=object).tolist()
    records, d = rows.to_dict(orient="records"), len(columns)

    def split(data: Any, columns: Any = columns, **more: Any) -> bytes:
        return json.dumps({"dataframe_split": {"columns": columns, "data": data}, **more}).encode()

    whole = split(data)
    for name, body in {
        "nothing": b"", "open": b"{", "list": b"[]", "null": b"null", "number": b"1", "text": f'"{SECRET}"'.encode(),
        "deep": b"[" * 100_000, "deep inside": b'{"inputs":' + b"[" * 5000 + b"]" * 5000 + b"}",
        "deep objects": b'{"a":' * 50_000, "latin": whole[:-2] + b"\xff" + whole[-2:], "half": whole[: len(whole) // 2],
        "utf-16": whole.decode().encode("utf-16"), "bom": b"\xef\xbb\xbf" + whole, "more": whole + b" 1",
        "twice": whole[:-1] + b',"dataframe_split":{"columns":[],"data":[]}}', "spaces": b" \n" + whole + b"\n",
        "twice the same": b'{"dataframe_split":{"data":[]},' + whole[1:], "comma": whole[:-1] + b",}",
        "twice, then a number": whole[:-1] + b',"dataframe_split":1}',
        "digits": whole.replace(b"[[", b"[[" + b"9" * 5000 + b",", 1), "control": whole.replace(b"]]", b',"a\nb"]]'),
    }.items():  # fmt: skip
        yield name, JSON, body
    for text in ("NaN", "Infinity", "-Infinity", "1e999", "-0", "1E3", "9" * 400, str(2**63), str(2**70), "0x1", "01",
                 "1.0000000000000000000000000000001", "1e308", "-1e17", "true", "null", f'"{SECRET}"', '"1.5"', '""', '"\\ud800"',
                 '"\\u0000"', f'["{SECRET}"]', "{}", "[]", "[1]", '"2020-01-01"', '"a\\u0000b"'):  # fmt: skip
        for i in (0, 1, 3, 4):
            cells = [json.dumps(value) for value in data[0]]
            cells[i] = text
            body = f'{{"dataframe_split":{{"columns":{json.dumps(columns)},"data":[[{",".join(cells)}]]}}}}'
            yield f"{text[:20]} in column {i}", JSON, body.encode()
            if i in (0, 4):
                both = f"[{json.dumps(data[0])},[{','.join(cells)}]]"
                two = f'{{"dataframe_split":{{"columns":{json.dumps(columns)},"data":{both}}}}}'
                yield f"{text[:20]} in column {i}, second row", JSON, two.encode()
                named = ",".join(f"{json.dumps(name)}:{cell}" for name, cell in zip(columns, cells, strict=True))
                for key in ("dataframe_records", "instances", "inputs"):
                    yield f"{text[:20]} in column {i} of {key}", JSON, f'{{"{key}":[{{{named}}}]}}'.encode()
    for name, content in {
        "no columns": {"dataframe_split": {"data": data}}, "no data": {"dataframe_split": {"columns": columns}},
        "no rows": {"dataframe_split": {"columns": columns, "data": []}},
        "data is one": {"dataframe_split": {"columns": columns, "data": 1}},
        "other key": {"dataframe_split": {"columns": columns, "data": data, SECRET: 1}},
        "missing column": {"dataframe_split": {"columns": columns[1:], "data": [row[1:] for row in data]}},
        "more columns": {"dataframe_split": {"columns": [*columns, SECRET], "data": [[*row, SECRET] for row in data]}},
        "column twice": {"dataframe_split": {"columns": [*columns, columns[0]], "data": [[*row, row[0]] for row in data]}},
        "column instead": {"dataframe_split": {"columns": [*columns[:-1], columns[0]], "data": data}},
        "names are numbers": {"dataframe_split": {"columns": list(range(d)), "data": data}},
        "ragged": {"dataframe_split": {"columns": columns, "data": [data[0], data[1][:-1]]}},
        "ragged, as many cells": {"dataframe_split": {"columns": columns, "data": [data[0][:-1], [*data[1], data[0][-1]]]}},
        "cells in a cell": {"dataframe_split": {"columns": columns, "data": [[*data[0][:-2], data[0][-2:]]]}},
        "data is a row": {"dataframe_split": {"columns": columns, "data": data[0]}},
        "data are records": {"dataframe_split": {"columns": columns, "data": records}},
        "long row": {"dataframe_split": {"columns": columns, "data": [[*data[0], 1]]}},
        "index too short": {"dataframe_split": {"columns": columns, "data": data, "index": [1]}},
        "index": {"dataframe_split": {"columns": columns, "data": data[:2], "index": [5, 5]}},
        "null": {"dataframe_split": None}, "records of lists": {"dataframe_records": data},
        "records object": {"dataframe_records": records[0]}, "records of text": {"dataframe_records": [SECRET]},
        "records with a hole": {"dataframe_records": [records[0], {columns[0]: data[1][0]}]},
        "records with more": {"dataframe_records": [{**records[0], SECRET: SECRET}]}, "no records": {"dataframe_records": []},
        "two formats": {"inputs": data, "instances": data}, "none": {}, "unknown": {SECRET: data},
        "unknown too": {"inputs": records, SECRET: 1}, "lists": {"inputs": data}, "lists too": {"instances": data},
        "signature": {"inputs": records, "signature_name": "a"}, "empty": {"inputs": []}, "empty too": {"instances": []},
        "scalars": {"inputs": records[0]}, "scalar": {"inputs": 1}, "text": {"inputs": SECRET}, "nothing": {"inputs": None},
        "unequal": {"inputs": {name: [1.0] * (1 + (name == columns[0])) for name in columns}},
        "hole": {"instances": [records[0], {columns[0]: data[1][0]}]}, "nested": {"inputs": {name: [[1.0]] for name in columns}},
        "params": {"dataframe_records": records, "params": [SECRET]}, "no params": {"dataframe_records": records, "params": None},
        "for a language model": {"prompt": SECRET}, "for one too": {"messages": [], "dataframe_records": records},
    }.items():  # fmt: skip
        yield name, JSON, json.dumps(content).encode()
    csv = rows.to_csv(index=False).encode()
    for name, kind, body in (
        ("no type", "", whole), ("xml", "text/xml", whole), ("charset", f"{JSON}; charset=latin-1", whole),
        ("parameter", f"{JSON}; {SECRET}=1", whole), ("upper case", "Application/JSON", whole),
        ("bytes", "text/csv", b"\xff\xfe"),
        ("empty csv", "text/csv", b""), ("csv of text", "text/csv", csv.replace(b".", SECRET.encode())),
        ("half csv", "text/csv", csv[: len(csv) // 2]), ("csv as json", JSON, csv),
        ("parquet", "application/vnd.apache.parquet", b"PAR1"),
    ):  # fmt: skip
        yield name, kind, body
