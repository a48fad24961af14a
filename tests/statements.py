"""The part of the stand-in workspace that is a SQL warehouse: the Statement Execution API before a real Spark SQL.

As documented: a call waits 5 to 50 seconds and then has a number to ask by; Arrow comes by links, which take no login and
are read in parts; a statement and its values are 16 MiB at most, and the values 256. A warehouse that stands still starts
with the first statement.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from conftest import ROOT, environment, free_port, wait_for
from parts import lacks

WAREHOUSE = "0123456789abcdef"
PART = 1_000  # rows behind one link
SIXTEEN_MIB = 16 * 2**20
API = "/api/2.0/sql/statements"
CATALOGS = '[{name="main", type="memory", initial_database=["default"]}]'


class Statement:
    def __init__(self, number: str, body: dict[str, Any]) -> None:
        self.number, self.body = number, body
        self.status: dict[str, Any] = {"state": "PENDING"}
        self.rows = pa.table({})
        self.done = threading.Event()


class Statements:
    """The statements of one warehouse. `slow` seconds pass before each; `stop` and the next one has to start it again."""

    def __init__(self, spark: str, url: str = "") -> None:
        self.spark, self.url = spark, url  # of the engine, and of the workspace
        self.known: dict[str, Statement] = {}
        self.schemas = {"default"}
        self.running, self.starts_in, self.slow = False, 0.2, 0.0
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def create_schema(self) -> str:
        """The `feedback.url` of an empty one."""
        name = f"schema{len(self.schemas)}"
        ask(self.spark, f"CREATE SCHEMA main.{name}", {})
        self.schemas.add(name)
        return f"databricks://{WAREHOUSE}/main.{name}"

    def stop(self) -> None:
        self.running = False

    def answer(self, method: str, path: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        rest = path.removeprefix(API).strip("/").split("/")
        match method, rest:
            case "POST", [""]:
                return self.execute(data)
            case "GET", [number]:
                return 200, self.described(self.known[number])
            case "GET", [number, "result", "chunks", part]:
                return 200, {"external_links": [self.link(self.known[number], int(part))]}
            case "POST", [number, "cancel"]:
                statement = self.known[number]
                if not statement.done.is_set():
                    statement.status = {"state": "CANCELED"}
                    statement.done.set()
                return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": f"No API found for '{method} {path}'"}

    def execute(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        wait = int(body.get("wait_timeout", "10s").removesuffix("s"))
        values = body.get("parameters", [])
        for wrong, message in (
            (body["warehouse_id"] != WAREHOUSE, f"{body['warehouse_id']} is not a valid endpoint id."),
            (wait != 0 and not 5 <= wait <= 50, "wait_timeout must be 0s or between 5s and 50s"),
            (body.get("format", "JSON_ARRAY") != "JSON_ARRAY" and body.get("disposition") != "EXTERNAL_LINKS",
             "The INLINE disposition supports only the JSON_ARRAY format"),
            (len(json.dumps(body)) > SIXTEEN_MIB, "The statement and its parameters are larger than 16 MiB"),
            (len(values) > 256, "More than 256 parameters"),
            (not all(set(one) <= {"name", "value", "type"} for one in values), "A parameter has a name, a value, a type"),
        ):  # fmt: skip
            if wrong:
                return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": message}
        statement = Statement(f"01ef-{next(self._numbers)}", body)
        self.known[statement.number] = statement
        threading.Thread(target=self.work, args=(statement,), daemon=True).start()
        asleep = not self.running  # the answer does not wait for a warehouse that starts
        statement.done.wait(0 if asleep else wait)
        return 200, self.described(statement)

    def work(self, statement: Statement) -> None:
        with self._lock:
            if not self.running:
                threading.Event().wait(self.starts_in)
                self.running = True
        statement.status = {"state": "RUNNING"}
        threading.Event().wait(self.slow)
        values = {one["name"]: one.get("value") for one in statement.body.get("parameters", [])}
        status: dict[str, Any] = {"state": "SUCCEEDED"}
        try:
            for catalog, schema in re.findall(r"`(\w+)`\.`(\w+)`\.", statement.body["statement"]):
                if catalog != "main":
                    raise RuntimeError(f"[NO_SUCH_CATALOG_EXCEPTION] Catalog '{catalog}' was not found.")
                if schema not in self.schemas:
                    raise RuntimeError(f"[SCHEMA_NOT_FOUND] The schema `{catalog}`.`{schema}` cannot be found.")
            statement.rows = ask(self.spark, statement.body["statement"], values)
        except RuntimeError as error:
            status = {"state": "FAILED", "error": {"error_code": "BAD_REQUEST", "message": str(error)}}
        if not statement.done.is_set():  # else it was canceled, after it was too late for that
            statement.status = status
            statement.done.set()

    def described(self, statement: Statement) -> dict[str, Any]:
        found: dict[str, Any] = {"statement_id": statement.number, "status": statement.status}
        if statement.status["state"] == "SUCCEEDED":
            rows = statement.rows
            columns = [{"name": name, "position": at} for at, name in enumerate(rows.column_names)]
            found["manifest"] = {
                "format": "ARROW_STREAM",
                "total_row_count": rows.num_rows,
                "schema": {"columns": columns},
            }
            found["result"] = {"external_links": [self.link(statement, 0)]} if rows.num_rows else {}
            if statement.body.get("disposition") != "EXTERNAL_LINKS":
                found["result"] = {"data_array": [], "row_count": 0}  # nobody here reads rows inline
        return found

    def link(self, statement: Statement, part: int) -> dict[str, Any]:
        link: dict[str, Any] = {"chunk_index": part, "external_link": f"{self.url}/storage/{statement.number}/{part}"}
        if (part + 1) * PART < statement.rows.num_rows:
            link["next_chunk_index"] = part + 1
        return link

    def part(self, path: str) -> bytes:
        """What a link leads to."""
        number, part = path.removeprefix("/storage/").split("/")
        rows = self.known[number].rows.slice(int(part) * PART, PART)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)
        return sink.getvalue().to_pybytes()


def ask(spark: str, statement: str, values: dict[str, str | None]) -> pa.Table:
    """RuntimeError with what the engine says where it refuses."""
    body = json.dumps({"statement": statement, "values": values}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(spark, body), timeout=60) as answer:
            return pa.ipc.open_stream(answer.read()).read_all()
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from None


@contextmanager
def spark_engine(folder: Path) -> Iterator[str]:
    """The address of a Spark SQL whose tables are in `folder`."""
    installed = Path(sys.prefix) / "warehouse"
    if not installed.is_dir():
        lacks(f"{installed} is missing: make setup")
    port = free_port()
    command = [sys.executable, str(ROOT / "tests" / "spark.py"), str(folder / "tables"), str(port)]
    env = environment(
        PYTHONPATH=str(installed), SAIL_CATALOG__LIST=CATALOGS, SAIL_CATALOG__DEFAULT_CATALOG="main", RUST_LOG="error"
    )
    with (folder / "spark.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # it holds nothing that matters
            process.wait(30)
