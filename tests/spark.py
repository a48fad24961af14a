"""Spark SQL on Delta tables in a process of its own: a statement in, Arrow out. `statements.py` puts the REST calls before it.

    PYTHONPATH=.venv/warehouse python tests/spark.py FOLDER PORT

It is Sail, which speaks Spark's protocol and writes real Delta tables. Two statements that change one table at the same
moment meet there as they do on Databricks: one of them fails.
"""

import json
import re
import sys
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

warnings.simplefilter("ignore")

import pyarrow as pa  # noqa: E402
from pysail.spark import SparkConnectServer  # noqa: E402
from pyspark.sql import SparkSession  # noqa: E402

MARKER = re.compile(r":([a-z]\w*)")
# What Sail says, and what a warehouse says then.
SAID = (
    ("Failed to commit transaction", "[DELTA_CONCURRENT_APPEND] Files were added by a concurrent update"),
    ("TABLE_OR_VIEW_NOT_FOUND", "[TABLE_OR_VIEW_NOT_FOUND] The table or view cannot be found"),
)


class Handler(BaseHTTPRequestHandler):
    spark: SparkSession
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(200, b"up")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            rows = self.execute(fill(asked["statement"], asked["values"]))
        except Exception as error:
            text = str(error)
            said = next((ours for theirs, ours in SAID if theirs in text), text)
            self.answer(400, f"{said} SQLSTATE: {type(error).__name__} {text[:200]}".encode())
            return
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)
        self.answer(200, sink.getvalue().to_pybytes())

    def execute(self, statement: str) -> pa.Table:
        """Sail trips over a log that another statement is just writing a checkpoint into; it did nothing then."""
        for _ in range(9):
            try:
                return self.spark.sql(statement).toArrow()
            except Exception as error:
                if "Missing commit file" not in str(error):
                    raise
                time.sleep(0.05)
        return self.spark.sql(statement).toArrow()

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def fill(statement: str, values: dict[str, str | None]) -> str:
    """Sail takes no parameters where a table is changed, so each goes in as a literal, for all statements alike."""

    def literal(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"[UNBOUND_SQL_PARAMETER] Found the unbound parameter: {match[1]}")
        value = values[match[1]]
        return "NULL" if value is None else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"

    return MARKER.sub(literal, statement)


if __name__ == "__main__":
    folder, port = sys.argv[1], int(sys.argv[2])
    engine = SparkConnectServer("127.0.0.1", 0)
    engine.start(background=True)
    Handler.spark = SparkSession.builder.remote(f"sc://127.0.0.1:{engine.listening_address[1]}").getOrCreate()
    Handler.spark.conf.set("spark.sql.warehouse.dir", folder)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
