"""The same tables in Unity Catalog, as Delta tables behind a SQL warehouse.

Delta commits one statement on one table; it has no locks, and does not enforce keys. So a transaction takes the store's
one lock, which is a row of `leases`; copies what it looks at into a SQLite file; does there what it does in any database;
and sends the rows that it changed back in one MERGE. The rules of the store are written once that way.
"""

import base64
import json
import logging
import random
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from alacarte.errors import StoreError, UserError
from alacarte.feedback.database import SCHEMA_VERSION, Database, feedback, layouts, leases, metadata, predictions
from alacarte.feedback.records import ALL, Scope
from alacarte.feedback.warehouse import Conflict, Missing, Refused, Warehouse

FORM = "databricks://WAREHOUSE_ID/CATALOG.SCHEMA"
LOCK = "write"  # a name in `leases`
LOCKED = 180.0  # seconds after which the lock of a process that died is free,
HURRY = 60.0  # and those after which a living one sends nothing any more: it would not end in time
PATIENCE = 30.0  # seconds that a transaction waits for the lock, and a statement for others that come between
BYTES = 8_000_000  # in one statement, before base64; a warehouse takes 16 MiB
ROW_BYTES = 500  # of names, numbers and quotes
NOW = "unix_micros(current_timestamp()) / 1e6D"  # Unix seconds
TYPES = {sa.Text: "STRING", sa.Double: "DOUBLE", sa.Boolean: "BOOLEAN", sa.LargeBinary: "BINARY", sa.Integer: "BIGINT",
         sa.BigInteger: "BIGINT"}  # fmt: skip

logger = logging.getLogger(__name__)


class DeltaDatabase:
    """What `Database` is, in the schema that a URL `databricks://WAREHOUSE_ID/CATALOG.SCHEMA` names.

    UserError for one that cannot be opened. The tables are made where there are none; the schema is not.
    """

    arrives_in = 10.0  # seconds from a prediction's answer to its row here, when other servers write too
    pruned_every = 86400.0  # seconds: nobody pays for a warehouse that is kept awake for it

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.make_url(url)
        except (ArgumentError, ValueError):
            raise UserError(f"feedback.url is not the URL of a warehouse: write {FORM}") from None
        schema = (parsed.database or "").split(".")
        if not parsed.host or len(schema) != 2 or not all(schema) or parsed.query or parsed.username:
            raise UserError(f"feedback.url={parsed.render_as_string()}: write {FORM}; the login is Databricks' own")
        self._schema = ".".join(f"`{part.replace('`', '``')}`" for part in schema)
        self._ahead = 0.0  # seconds by which the warehouse's clock is ahead of this machine's
        self._one = threading.Lock()  # threads of one process do not quarrel over there
        self._ready = False
        self._layouts: set[str] = set()  # that are there
        try:
            self._warehouse = Warehouse(parsed.host)
            self._prepare()
        except Missing as error:
            raise UserError(f"feedback.url={url}: {error}: write {FORM}, of a schema that is there") from None
        except Refused as error:
            raise UserError(f"feedback.url={url}: {error}: {FORM} is due") from None
        except StoreError as error:
            logger.warning("feedback.url=%s: %s; it is tried again with each use", url, error)

    def close(self) -> None:
        pass

    # --- transactions ---

    @contextmanager
    def read(self, scope: Scope = ALL) -> Iterator[sa.Connection]:
        """A view of the rows in `scope`."""
        with self._copy(scope) as copy, copy.read() as connection:
            yield connection

    @contextmanager
    def write(self, scope: Scope = ALL, *, durable: bool) -> Iterator[sa.Connection]:
        """One transaction on the rows in `scope`, which changes labels or leases; its commit is always durable."""
        with self._one, self._locked() as (last_id, held), self._copy(scope, held) as copy:
            began = time.monotonic()
            with copy.write(durable=False) as connection:
                set_last = "INSERT INTO sqlite_sequence (name, seq) VALUES ('feedback', ?)"
                connection.exec_driver_sql("DELETE FROM sqlite_sequence")
                connection.exec_driver_sql(set_last, (last_id,))
                before = {table: _rows(connection, table) for table in (feedback, leases)}
                yield connection
                changed = {table: _rows(connection, table) - rows for table, rows in before.items()}
            if time.monotonic() - began > HURRY:
                raise StoreError(f"warehouse {self._warehouse.identifier} is too slow: nothing was changed")
            assert not (changed[feedback] and changed[leases]), "a commit is of one table"
            for table, rows in changed.items():
                if rows:
                    self._merge(table, list(rows), "WHEN MATCHED THEN UPDATE SET *")

    def append(self, layout_rows: Sequence[tuple], prediction_rows: Sequence[tuple]) -> None:
        """Store what is not there yet, without the lock. ValueError for a request that no statement takes."""
        new = [row for row in layout_rows if row[0] not in self._layouts]
        self._merge(layouts, new)
        self._layouts |= {row[0] for row in new}
        start = size = 0
        for end, row in enumerate(prediction_rows):
            more = ROW_BYTES + sum(len(value) for value in row if isinstance(value, str | bytes))
            if more > BYTES:
                raise ValueError(f"a request of {more / 1e6:.0f} MB is larger than a statement can be")
            if size + more > BYTES:
                self._merge(predictions, prediction_rows[start:end])
                start, size = end, 0
            size += more
        self._merge(predictions, prediction_rows[start:])

    def prune(self, name: str, oldest: str) -> int:
        """Delete the predictions of model `name` with ids before `oldest` that have no label; how many."""
        free = (
            f"SELECT p.id FROM {self._of(predictions)} p LEFT ANTI JOIN {self._of(feedback)} f ON f.prediction_id = p.id "
            "WHERE p.registered_model_name = :name AND p.id < :oldest"
        )
        with self._one, self._locked():  # labels take the lock too: none comes in between
            (n,) = self._query(f"SELECT count(*) AS n FROM ({free})", name=name, oldest=oldest)["n"].to_pylist()
            if n:
                delete = (
                    f"MERGE INTO {self._of(predictions)} t USING ({free}) s ON t.id = s.id WHEN MATCHED THEN DELETE"
                )
                self._change(delete, name=name, oldest=oldest)
        return n

    def now(self, connection: sa.Connection) -> float:
        """Unix seconds by the one clock that all who share these tables see: the warehouse's."""
        return time.time() + self._ahead

    # --- the copy ---

    @contextmanager
    def _copy(self, scope: Scope, held: Sequence[tuple] = ()) -> Iterator[Database]:
        """A database of this machine with the rows in `scope`, and with the leases `held`."""
        wanted: dict[sa.Table, Sequence[tuple]] = {}
        if scope.requests is None or scope.requests:
            where, values = _condition(scope, self._of(feedback))
            ids = f"SELECT id FROM {self._of(predictions)} WHERE {where}"
            conditions = {
                layouts: ("true", {}),
                predictions: (where, values),
                feedback: (f"prediction_id IN ({ids})", values),
            }
            with ThreadPoolExecutor(len(conditions)) as pool:
                asked = [pool.submit(self._fetch, table, scope, *rest) for table, rest in conditions.items()]
                wanted = dict(zip(conditions, (one.result() for one in asked), strict=True))
            known = {row[0] for row in wanted[predictions]}  # a label may have come in between with its prediction
            wanted[feedback] = [row for row in wanted[feedback] if row[1] in known]
        wanted[leases] = held
        with tempfile.TemporaryDirectory(prefix="feedback-") as folder:
            copy = Database(f"sqlite:///{Path(folder)}/copy.db", timeout=5)
            try:
                with copy.write(durable=False) as connection:
                    for table, rows in wanted.items():
                        marks = ", ".join("?" * len(table.columns))
                        if rows:
                            connection.exec_driver_sql(f"INSERT INTO {table.name} VALUES ({marks})", list(rows))
                yield copy
            finally:
                copy.close()

    def _fetch(self, table: sa.Table, scope: Scope, where: str, values: dict[str, str]) -> list[tuple]:
        names = [f"`{column.name}`" for column in table.columns]
        if table is predictions and not scope.inputs:
            names[list(table.columns.keys()).index("inputs")] = "X'' AS inputs"
        found = self._query(f"SELECT {', '.join(names)} FROM {self._of(table)} WHERE {where}", **values)
        return list(zip(*(column.to_pylist() for column in found.columns), strict=True))

    # --- statements ---

    def _query(self, statement: str, **values: str) -> pa.Table:
        self._prepare()
        return self._warehouse.query(statement, **values)

    def _change(self, statement: str, **values: str) -> None:
        """Execute one statement; again where another one came between, which changes nothing then."""
        self._prepare()
        self._insist(statement, **values)

    def _insist(self, statement: str, **values: str) -> None:
        end, pause = time.monotonic() + PATIENCE, 0.1
        while True:
            try:
                return self._warehouse.run(statement, **values)
            except Conflict:
                if time.monotonic() > end:
                    raise
            time.sleep(random.uniform(0, pause))
            pause = min(2.0, 2 * pause)

    def _of(self, table: sa.Table) -> str:
        return f"{self._schema}.`{table.name}`"

    def _prepare(self) -> None:
        """Make the tables where there are none; any number of processes may do so at once."""
        if self._ready:
            return
        version = metadata.tables["schema_version"]
        query = f"SELECT max(version) AS version FROM {self._of(version)}"
        with suppress(Missing):
            self._ready = self._check(self._warehouse.query(query))
        if self._ready:
            return
        for table in metadata.sorted_tables:
            columns = [f"`{c.name}` {_type(c)}{'' if c.nullable else ' NOT NULL'}" for c in table.columns]
            self._insist(f"CREATE TABLE IF NOT EXISTS {self._of(table)} ({', '.join(columns)}) USING delta")
        self._insist(
            f"MERGE INTO {self._of(version)} t USING (SELECT {SCHEMA_VERSION} AS version) s ON t.version = s.version "
            "WHEN NOT MATCHED THEN INSERT *"
        )
        self._ready = self._check(self._warehouse.query(query))

    @staticmethod
    def _check(found: pa.Table) -> bool:
        (version,) = found["version"].to_pylist()
        if version not in (None, SCHEMA_VERSION):
            raise Refused(f"its tables are of version {version}, this code knows {SCHEMA_VERSION}")
        return version is not None

    @contextmanager
    def _locked(self) -> Iterator[tuple[int, list[tuple]]]:
        """While the store's lock is held: the last id of a label, and all other leases."""
        me, end, table = secrets.token_hex(8), time.monotonic() + PATIENCE, self._of(leases)
        take = (
            f"MERGE INTO {table} t USING (SELECT :lock AS name, :me AS holder, {NOW} AS now) s ON t.name = s.name "
            f"WHEN MATCHED AND t.until < s.now THEN UPDATE SET holder = s.holder, until = s.now + {LOCKED} "
            f"WHEN NOT MATCHED THEN INSERT (name, holder, until) VALUES (s.name, s.holder, s.now + {LOCKED})"
        )
        look = (
            f"SELECT name, holder, until, (SELECT max(id) FROM {self._of(feedback)}) AS last, {NOW} AS now FROM {table}"
        )
        self._prepare()
        while True:
            with suppress(Conflict):
                self._warehouse.run(take, lock=LOCK, me=me)
            found = self._warehouse.query(look).to_pylist()
            if any(one["name"] == LOCK and one["holder"] == me for one in found):
                break
            if time.monotonic() > end:
                raise StoreError(
                    f"another process is writing, or died while it did: then it is free in {LOCKED:g} seconds"
                )
            time.sleep(random.uniform(0.1, 0.6))
        self._ahead = found[0]["now"] - time.time()
        held = [(one["name"], one["holder"], one["until"]) for one in found if one["name"] != LOCK]
        try:
            yield found[0]["last"] or 0, held
        finally:
            with suppress(StoreError):  # it expires
                self._change(f"UPDATE {table} SET until = 0D WHERE name = :lock AND holder = :me", lock=LOCK, me=me)

    def _merge(self, table: sa.Table, rows: Sequence[tuple], matched: str = "") -> None:
        """Insert rows, in one statement; for those whose key is there, do what `matched` says, or nothing."""
        if not rows:
            return
        key = f"`{next(iter(table.primary_key)).name}`"
        kinds = [_type(column) for column in table.columns]
        fields = [
            f"`{c.name}` {'STRING' if kind == 'BINARY' else kind}" for c, kind in zip(table.columns, kinds, strict=True)
        ]
        values = [f"unbase64(`{c.name}`) AS `{c.name}`" if kind == "BINARY" else f"`{c.name}`"
                  for c, kind in zip(table.columns, kinds, strict=True)]  # fmt: skip
        source = (
            f"SELECT {', '.join(values)} FROM (SELECT inline(from_json(:rows, 'array<struct<{', '.join(fields)}>>')))"
        )
        self._change(
            f"MERGE INTO {self._of(table)} t USING ({source}) s ON t.{key} = s.{key} {matched} WHEN NOT MATCHED THEN INSERT *",
            rows=_as_json(table, rows),
        )


def _condition(scope: Scope, labels: str) -> tuple[str, dict[str, str]]:
    """Which predictions are in `scope`: a condition, and the values in it."""
    found, values = ["true"], {}
    if scope.name is not None:
        found.append("registered_model_name = :name")
        values["name"] = scope.name
    if scope.requests is not None:
        found.append("id BETWEEN :first AND :last AND array_contains(from_json(:requests, 'array<string>'), id)")
        wanted = sorted(scope.requests)
        values |= {"requests": json.dumps(wanted), "first": wanted[0], "last": wanted[-1]}
    if scope.between is not None:
        found.append("id >= :since AND id < :until")
        values["since"], values["until"] = scope.between
    if scope.states is not None:
        labelled = (
            f"SELECT prediction_id FROM {labels} WHERE array_contains(from_json(:states, 'array<string>'), state)"
        )
        found.append(f"id IN ({labelled})")
        values["states"] = json.dumps(list(scope.states))
    return " AND ".join(found), values


def _rows(connection: sa.Connection, table: sa.Table) -> set[tuple]:
    return set(map(tuple, connection.exec_driver_sql(f"SELECT * FROM {table.name}").all()))


def _as_json(table: sa.Table, rows: Sequence[tuple]) -> str:
    names = [column.name for column in table.columns]
    booleans = {column.name for column in table.columns if isinstance(column.type, sa.Boolean)}

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, bytes):
            return base64.b64encode(value).decode()
        assert value is None or isinstance(value, str | int | float), name
        return bool(value) if name in booleans else value

    return json.dumps(
        [{name: plain(name, value) for name, value in zip(names, row, strict=True)} for row in rows], ensure_ascii=False
    )


def _type(column: sa.Column) -> str:
    return TYPES[type(column.type)]
