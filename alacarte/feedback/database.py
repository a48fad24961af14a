"""The tables, and transactions with two possible ends: complete, or StoreError with nothing changed."""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import Boolean, Column, Double, Index, Integer, LargeBinary, Table, Text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from alacarte.errors import StoreError, UserError

SCHEMA_VERSION = 4  # earlier ones were never released
ALLOWED_URLS = "write sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
INSERT_ROWS = 256  # predictions in one INSERT, a power of 2
MAX_CONNECTIONS = 40  # beside the five that stay open

logger = logging.getLogger(__name__)

# Identifiers sort by time in every collation, but bytes compare faster.
Id = Text().with_variant(Text(collation="C"), "postgresql")
Serial = sa.BigInteger().with_variant(Integer, "sqlite")

metadata = sa.MetaData()
schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))
input_schemas = Table(
    "input_schemas",
    metadata,
    Column("id", Id, primary_key=True),
    Column("columns", Text, nullable=False),  # JSON list of the input columns, in their order
)
predictions = Table(
    "predictions",
    metadata,
    Column("id", Id, primary_key=True),  # of the request: 16 hex digits of its time in ns, 10 random ones
    Column("time", Double, nullable=False),  # Unix seconds
    Column("registered_model_name", Text, nullable=False),
    Column("model_version", Text, nullable=False),
    Column("n_rows", Integer, nullable=False),
    Column("input_schema", Id, nullable=False),
    Column("format", Text, nullable=False),  # of the inputs: "f8" (n x d little-endian float64), "json" (n lists of d)
    Column("inputs", LargeBinary, nullable=False),
    Column("outputs", Text, nullable=False),  # JSON list of n
    Column("confidence", Text),  # JSON list of n: the probability of each output
    Column("latency_ms", Double, nullable=False),
    Column("audit", Text),  # JSON list of the rows drawn for a label; null: none
    Column("audit_share", Double, nullable=False),  # probability with which a stored row is drawn
    Column("sample", Double, nullable=False),  # probability with which a request is stored
    Index("predictions_of_model", "registered_model_name", "id"),
)
feedback = Table(  # a label keeps a copy of its row, because predictions are deleted
    "feedback",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("prediction_id", Id, nullable=False),  # of one row: the id of the request, with ".row" if it has several
    Column("registered_model_name", Text, nullable=False),
    Column("model_version", Text, nullable=False),
    Column("input_schema", Id, nullable=False),
    Column("format", Text, nullable=False),
    Column("inputs", LargeBinary, nullable=False),
    Column("prediction", Text, nullable=False),  # JSON
    Column("audit", Boolean, nullable=False),  # the row was drawn for a label
    Column("label", Text, nullable=False),  # JSON, in the type of the classes
    Column("is_correction", Boolean, nullable=False),  # differs from the prediction
    Column("annotator", Text, nullable=False),  # "token:NAME", "token:", "address:IP", or "local:USER": see Feedback
    Column("source", Text),
    Column("comment", Text),
    Column("time", Double, nullable=False),  # Unix seconds
    Column("state", Text, nullable=False),  # new, accepted, rejected, used
    Column("reason", Text),  # why it is in this state, where that needs a word
    Column("reviewed", Double),  # when an administrator decided; Unix seconds
    Column("used_run_id", Text),  # the training that used it; of an accepted label: that has claimed it
    Column("used_version", Text),  # the version that came out
    Index("feedback_of_prediction", "prediction_id"),
    Index("feedback_in_state", "registered_model_name", "state", "id"),
    sqlite_autoincrement=True,  # an id is never given twice: trainings record them
)
# Floating point numbers do not shrink; PostgreSQL would try.
sa.event.listen(
    predictions,
    "after_create",
    sa.DDL("ALTER TABLE predictions ALTER COLUMN inputs SET STORAGE EXTERNAL").execute_if(dialect="postgresql"),
)


class Database:
    """A database by its URL. UserError if it cannot be opened; a warning if it only does not answer yet.

    `timeout`: seconds that a transaction waits for other transactions, and for a connection.
    """

    def __init__(self, url: str, timeout: float) -> None:
        try:
            parsed = sa.make_url(url)
        except (ArgumentError, ValueError):
            raise UserError(f"feedback.url is not the URL of a database: {ALLOWED_URLS}") from None
        self.timeout, self._preparing, self._is_ready = timeout, threading.Lock(), False
        self.is_sqlite = parsed.drivername in ("sqlite", "sqlite+pysqlite")
        key = f"feedback.url={parsed.set(query={}).render_as_string(hide_password=True)}"  # options may hold a password too
        try:
            if self.is_sqlite:
                self.engine = self._open_file(parsed)
            elif parsed.drivername in ("postgresql", "postgresql+psycopg"):
                self.engine = self._open_server(parsed.set(drivername="postgresql+psycopg"))
            else:
                raise UserError("SQLite and PostgreSQL are supported")
            with self.read():
                pass
        except UserError as error:
            raise UserError(f"{key}: {error}: {ALLOWED_URLS}") from None
        except ModuleNotFoundError:
            raise UserError(f"{key}: psycopg is missing: pip install 'alacarte[postgres]'") from None
        except DBAPIError as error:  # an option that the driver does not know
            raise UserError(f"{key}: {str(error.orig).splitlines()[0]}: {ALLOWED_URLS}") from None
        except StoreError as error:
            if not _may_answer_later(error.__cause__):
                raise UserError(f"{key}: {error}: {ALLOWED_URLS}") from None
            logger.warning("%s: %s; it is tried again with each use", key, error)

    def _open_file(self, url: sa.URL) -> sa.Engine:
        if url.database in (None, "", ":memory:") or url.query:
            raise UserError("a store is a file, without options")
        self.path = Path(str(url.database)).absolute()
        self._file: tuple[int, int] | None = None  # device and inode
        try:
            # Only the owner may read it; SQLite gives the files -wal and -shm the same mode. The file is created here and
            # never again: a file that vanished is an error, not an empty store.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise UserError(f"{error.strerror}: name a file that can be written") from None
        url = sa.URL.create("sqlite", database=f"file:{quote(str(self.path))}", query={"mode": "rw", "uri": "true"})
        options = {"timeout": self.timeout, "isolation_level": None, "cached_statements": 256}
        return self._create_engine(url, options)

    def _open_server(self, url: sa.URL) -> sa.Engine:
        from psycopg import RawCursor, RawServerCursor  # the other cursors parse the text of a statement each time

        # With keepalives the server notices within minutes that a machine is gone which holds a lock.
        settings = f"-c lock_timeout={int(self.timeout * 1000)} -c tcp_keepalives_idle=15 -c tcp_keepalives_interval=15"
        options = {"connect_timeout": max(2, int(self.timeout)), "options": settings}
        options = {key: value for key, value in options.items() if key not in url.query} | {"cursor_factory": RawCursor}
        engine = self._create_engine(url, options, paramstyle="numeric_dollar", pool_pre_ping=True)
        sa.event.listen(
            engine, "connect", lambda connection, _: setattr(connection, "server_cursor_factory", RawServerCursor)
        )
        return engine

    def _create_engine(self, url: sa.URL, options: dict[str, Any], **more: Any) -> sa.Engine:
        pool = {"pool_timeout": self.timeout, "max_overflow": MAX_CONNECTIONS}
        return sa.create_engine(url, connect_args=options, hide_parameters=True, **pool, **more)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One view of the data."""
        with self.errors(), self._connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def write(self, *, durable: bool) -> Iterator[sa.Connection]:
        """One transaction. `durable`: SQLite has it on disk before this returns, in case the machine loses its power."""
        with self.errors(), self._connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            self._check_file()
            connection.commit()

    def append(self, table: Table, rows: Sequence[tuple], connection: sa.Connection) -> None:
        """Insert rows with values in the order of the table's columns. A row that is stored already stays as it is.

        Each statement releases the interpreter lock. With one statement for each row, the thread of the server takes the
        lock each time, and 10,000 rows take seconds. SQLAlchemy's insert with many VALUES takes three times the CPU time.
        """
        start, size = 0, INSERT_ROWS
        while start < len(rows):
            while size > len(rows) - start:
                size //= 2  # few different statements, so that they stay prepared
            text = _insert_text(table.name, tuple(table.columns.keys()), size, "?" if self.is_sqlite else "${}")
            connection.exec_driver_sql(text, tuple(value for row in rows[start : start + size] for value in row))
            start += size

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise StoreError for a database that does not work. An error in the values to store is raised as it is."""
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            if _is_about_values(error):
                raise
            self._is_ready = False
            cause = getattr(error, "orig", None) or error
            raise StoreError(" ".join(str(cause).split())) from cause

    @contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        self._check_file()
        if not self._is_ready:
            if not self._preparing.acquire(timeout=self.timeout):
                raise StoreError("it does not answer")
            try:
                self._prepare()
            finally:
                self._preparing.release()
        with self.engine.connect() as connection:
            yield connection

    def _check_file(self) -> None:
        """A process that has a deleted or replaced file open would keep writing to it. So look at the path each time."""
        if not self.is_sqlite:
            return
        status = self.path.stat()
        before, self._file = self._file, (status.st_dev, status.st_ino)
        if before and before != self._file:
            self._is_ready = False
            self.engine.dispose()
            raise StoreError("its file was replaced just now")

    def _prepare(self) -> None:
        """Create the tables if there are none. Any number of processes may do so at the same time."""
        end = time.monotonic() + self.timeout
        while not self._is_ready:
            try:
                with self.engine.connect() as connection:
                    self._create(connection)
                    version = connection.execute(sa.select(schema_version.c.version)).scalar_one()
            except DBAPIError as error:
                if not _is_busy(error.orig) or time.monotonic() > end:
                    raise
                time.sleep(0.02)  # SQLite does not wait for others by itself while it changes the file to WAL
                continue
            if version != SCHEMA_VERSION:
                raise StoreError(
                    f"its tables are of version {version}, this code knows {SCHEMA_VERSION}: name a new one"
                )
            self._is_ready = True

    def _create(self, connection: sa.Connection) -> None:
        """One process creates the tables, others wait."""
        if sa.inspect(connection).has_table("schema_version"):
            return
        if sa.inspect(connection).has_table("alembic_version"):
            raise StoreError("it is another program's database, such as MLflow's own")
        if self.is_sqlite:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        lock = "BEGIN IMMEDIATE" if self.is_sqlite else "SELECT pg_advisory_xact_lock(7238041950)"
        connection.exec_driver_sql(lock)
        if not sa.inspect(connection).has_table("schema_version"):
            metadata.create_all(connection)
            connection.execute(schema_version.insert().values(version=SCHEMA_VERSION))
        connection.commit()


@lru_cache(32)
def _insert_text(table: str, columns: tuple[str, ...], n_rows: int, mark: str) -> str:
    marks = [mark.format(i + 1) for i in range(n_rows * len(columns))]
    rows = [f"({', '.join(marks[i : i + len(columns)])})" for i in range(0, len(marks), len(columns))]
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join(rows)} ON CONFLICT DO NOTHING"


def _is_about_values(error: Exception) -> bool:
    """Whether the values to store are wrong, and not the database. Only errors of a PostgreSQL server have a `sqlstate`."""
    if isinstance(error, sa.exc.DataError | sa.exc.IntegrityError):
        return True
    return isinstance(error, sa.exc.InterfaceError | sa.exc.ProgrammingError) and not getattr(
        error.orig, "sqlstate", None
    )


def _is_busy(error: BaseException | None) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _may_answer_later(error: Any) -> bool:
    """Whether waiting may help: a lock, or a server that is down. A server that refuses will refuse again."""
    if not hasattr(error, "sqlstate"):
        return _is_busy(error)
    if error.sqlstate:
        return error.sqlstate[:2] in ("08", "53", "55", "57")
    refusals = ("authentication", "does not exist", "pg_hba", "permission")  # not connected: only the text tells
    return not any(word in str(error) for word in refusals)
