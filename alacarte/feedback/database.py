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
from sqlalchemy import Boolean, Column, Double, ForeignKey, Index, Integer, LargeBinary, Table, Text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from alacarte.errors import StoreError, UserError

try:
    import psycopg
except ModuleNotFoundError:  # alacarte[postgres] is not installed; sqlite3 has exceptions of the same names
    import sqlite3 as psycopg  # type: ignore[no-redef]

SCHEMA_VERSION = 3  # 1 and 2 were never released
FORMS = "write sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
ROW_BYTES = 300  # of a prediction, beside inputs and outputs
AT_ONCE = 256  # predictions in one INSERT, a power of 2
MISTAKES = (sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError, sqlite3.IntegrityError,
            psycopg.DataError)  # fmt: skip

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
    Column("n_stored", Integer, nullable=False),  # n: rows in inputs, outputs and confidence
    Column("stored_rows", Text),  # JSON list of n: which of the n_rows these are; null: all
    Index("predictions_of_model", "registered_model_name", "id"),
)
feedback = Table(
    "feedback",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("prediction_id", Id, ForeignKey(predictions.c.id), nullable=False),
    Column("row", Integer, nullable=False),
    Column("label", Text, nullable=False),  # JSON, in the type of the classes
    Column("given", Text),  # JSON, as it came, where that was another type
    Column("source", Text),
    Column("comment", Text),
    Column("time", Double, nullable=False),  # Unix seconds
    Column("state", Text, nullable=False),  # new, accepted, rejected, used
    Column("reason", Text),  # why it is in this state, where that needs a word
    Column("is_correction", Boolean, nullable=False),  # differs from the prediction
    Column("audit", Boolean, nullable=False),  # the row was drawn for a label
    Column("times", Integer, nullable=False, default=1),  # how often this label was given for this row
    Column("reviewed", Double),  # when an administrator decided; Unix seconds
    Column("used_run_id", Text),  # the training that used it; of an accepted label: that has claimed it
    Column("used_version", Text),  # the version that came out
    Column("annotator", Text, nullable=False),  # "token:NAME", "token:", "address:IP", or "local:USER": see Feedback
    Index("feedback_of_prediction", "prediction_id", "row"),
    Index("feedback_in_state", "state", "id"),
    sqlite_autoincrement=True,  # an id is never given twice: trainings record them
)
leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("until", Double, nullable=False),  # Unix seconds, by the clock of the database
)
# Floating point numbers do not shrink; PostgreSQL would try.
sa.event.listen(
    predictions,
    "after_create",
    sa.DDL("ALTER TABLE predictions ALTER COLUMN inputs SET STORAGE EXTERNAL").execute_if(dialect="postgresql"),
)

THREADS = 40  # of a server that may ask at once


class Database:
    """A database by its URL. UserError for one that cannot be opened; one that only does not answer yet is warned about.

    `timeout`: seconds that a transaction waits for others, and for a connection.
    """

    def __init__(self, url: str, timeout: float) -> None:
        try:
            parsed = sa.make_url(url)
        except (ArgumentError, ValueError):
            raise UserError(f"feedback.url is not the URL of a database: {FORMS}") from None
        self.shown = parsed.set(query={}).render_as_string(hide_password=True)  # options may hold a password too
        self.timeout = timeout
        self.is_sqlite = parsed.drivername in ("sqlite", "sqlite+pysqlite")
        self._lock, self._ready = threading.Lock(), False
        self._file: tuple[int, int] | None = None  # device and inode
        if self.is_sqlite:
            self._path, self.engine = self._open_file(parsed)
        elif parsed.drivername in ("postgresql", "postgresql+psycopg"):
            if psycopg is sqlite3:
                raise UserError(f"feedback.url={self.shown}: psycopg is missing: pip install 'alacarte[postgres]'")
            limits = {"connect_timeout": max(2, int(timeout)), "options": f"-c lock_timeout={int(timeout * 1000)}"}
            self.engine = sa.create_engine(
                parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_timeout=timeout,
                max_overflow=THREADS, hide_parameters=True,
                connect_args={key: value for key, value in limits.items() if key not in parsed.query},
            )  # fmt: skip
        else:
            raise UserError(f"feedback.url={self.shown}: SQLite and PostgreSQL are supported: {FORMS}")
        try:
            with self.read():
                pass
        except StoreError as error:
            if not _is_away(error.__cause__):
                raise UserError(f"feedback.url={self.shown}: {error}: {FORMS}") from None
            logger.warning("feedback.url=%s: %s; it is tried again with each use", self.shown, error)
        except sa.exc.DBAPIError as error:  # an option that the driver does not know
            raise UserError(f"feedback.url={self.shown}: {str(error.orig).splitlines()[0]}: {FORMS}") from None

    def _open_file(self, url: sa.URL) -> tuple[Path, sa.Engine]:
        if url.database in (None, "", ":memory:") or url.query:
            raise UserError(f"feedback.url={self.shown}: a store is a file, without options: write sqlite:///FILE")
        path = Path(str(url.database)).absolute()
        try:
            # Others must not read it. From here on it is never made again: a file that vanished is an error, not an empty
            # store. SQLite gives the files -wal and -shm the mode of this one.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise UserError(f"feedback.url={self.shown}: {error.strerror}: name a file that can be written") from None

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(
                f"file:{quote(str(path))}?mode=rw", uri=True, timeout=self.timeout, isolation_level=None,
                check_same_thread=False, cached_statements=256,
            )  # fmt: skip
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA journal_size_limit=67108864")
            return connection

        pool = {"poolclass": sa.QueuePool, "pool_timeout": self.timeout, "max_overflow": THREADS}
        return path, sa.create_engine("sqlite://", creator=connect, hide_parameters=True, **pool)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One view of the data."""
        with self._errors(), self._connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def write(self, *, durable: bool) -> Iterator[sa.Connection]:
        """One transaction. `durable`: a file too is on disk before this returns, should the machine lose its power then."""
        with self._errors(), self._connect() as connection:
            transaction = connection.begin()
            if self.is_sqlite:
                connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            self._look()
            transaction.commit()

    def append(self, schema_rows: Sequence[tuple], prediction_rows: Sequence[tuple]) -> None:
        """Store all of them or none; what is there already stays as it is."""
        with self.write(durable=False) as connection:
            self._insert(connection, input_schemas, schema_rows)
            start, size = 0, AT_ONCE  # few statements: each hands the interpreter to the server's thread and back
            while start < len(prediction_rows):
                while size > len(prediction_rows) - start:
                    size //= 2
                self._insert(connection, predictions, prediction_rows[start : start + size])
                start += size

    def _insert(self, connection: sa.Connection, table: Table, rows: Sequence[tuple]) -> None:
        """All rows in one statement, leaving out those that are there; values in the order of the table's columns."""
        values = tuple(value for row in rows for value in row)
        text = _insert_text(table.name, tuple(column.name for column in table.columns), len(rows), self.is_sqlite)
        if self.is_sqlite:
            connection.exec_driver_sql(text, values)
        else:  # the other cursor reads through the text for each row
            psycopg.RawCursor(connection.connection.driver_connection).execute(text, values)  # type: ignore[arg-type]

    @contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        self._look()
        if not self._ready:
            if not self._lock.acquire(timeout=self.timeout):
                raise StoreError("it does not answer")
            try:
                self._prepare()
            finally:
                self._lock.release()
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error, psycopg.Error, OSError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            if _is_mistake(cause):
                raise
            self._ready = False
            raise StoreError(" ".join(str(cause).split())) from (cause or error)

    def _look(self) -> None:
        """A process that has a deleted or replaced file open would keep writing to it: look at the path each time."""
        if not self.is_sqlite:
            return
        status = self._path.stat()
        if self._file != (status.st_dev, status.st_ino):
            if self._file:
                self.engine.dispose()
            self._ready, before, self._file = False, self._file, (status.st_dev, status.st_ino)
            if before:
                raise StoreError("its file was replaced just now")

    # --- the tables ---

    def _prepare(self) -> None:
        """Make the tables where there are none; any number of processes may do so at once."""
        end = time.monotonic() + self.timeout
        while not self._ready:
            try:
                with self.engine.connect() as connection:
                    if not sa.inspect(connection).has_table("schema_version"):
                        if sa.inspect(connection).has_table("alembic_version"):
                            raise StoreError("it is another program's database, such as MLflow's own")
                        self._create(connection)
                    version = connection.execute(sa.select(schema_version.c.version)).scalar_one()
                if version != SCHEMA_VERSION:
                    raise StoreError(
                        f"its tables are of version {version}, this code knows {SCHEMA_VERSION}: name a new one"
                    )
                self._ready = True
            except DBAPIError as error:
                if not _is_busy(error.orig) or time.monotonic() > end:
                    raise
                time.sleep(0.02)  # to turn a file to WAL SQLite does not wait for others by itself

    def _create(self, connection: sa.Connection) -> None:
        if self.is_sqlite:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        # One process makes the tables, others wait.
        lock = "BEGIN IMMEDIATE" if self.is_sqlite else "SELECT pg_advisory_xact_lock(7238041950)"
        connection.exec_driver_sql(lock)
        if not sa.inspect(connection).has_table("schema_version"):
            metadata.create_all(connection)
            connection.execute(schema_version.insert().values(version=SCHEMA_VERSION))
        connection.commit()

    def now(self, connection: sa.Connection) -> float:
        """Unix seconds by the one clock that all who share this database see."""
        if self.is_sqlite:
            return time.time()
        return float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())

    def excess(self, connection: sa.Connection, name: str, limit: float) -> float:
        """Bytes by which the rows of a registered model are above `limit`, 0 below it.

        Room that deleted rows left does not count: SQLite and PostgreSQL keep it for new rows.
        """
        if self.is_sqlite:
            pages, free, page = (
                connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one()
                for pragma in ("page_count", "freelist_count", "page_size")
            )
            return max(0.0, (pages - free) * page * self._share(connection, name) - limit)
        relations = "pg_total_relation_size('predictions') + pg_total_relation_size('feedback')"
        if connection.exec_driver_sql(f"SELECT {relations}").scalar_one() <= limit:
            return 0.0  # else count: a relation keeps its size when rows are deleted
        row = f"pg_column_size(p.inputs) + pg_column_size(p.outputs) + {ROW_BYTES}"
        label = f"coalesce(pg_column_size(f.comment), 0) + {ROW_BYTES}"
        total = sa.text(
            f"SELECT (SELECT coalesce(sum({row}), 0) FROM predictions p WHERE p.registered_model_name = :name) + "
            f"(SELECT coalesce(sum({label}), 0) FROM feedback f JOIN predictions p ON p.id = f.prediction_id "
            "WHERE p.registered_model_name = :name)"
        )
        return max(0.0, float(connection.execute(total, {"name": name}).scalar_one()) - limit)

    def _share(self, connection: sa.Connection, name: str) -> float:
        """The share of a model among the predictions of all models."""
        model = predictions.c.registered_model_name
        ends = sa.select(*(sa.select(end(model)).scalar_subquery() for end in (sa.func.min, sa.func.max)))
        if set(connection.execute(ends).one()) == {name}:  # the usual case, known from the index
            return 1.0
        size = sa.func.length(predictions.c.inputs) + sa.func.length(predictions.c.outputs) + ROW_BYTES
        sizes = dict(connection.execute(sa.select(model, sa.func.sum(size)).group_by(model)).tuples().all())
        return sizes.get(name, 0) / max(1, sum(sizes.values()))


def _is_mistake(error: Any) -> bool:
    """Whether what was to be written is wrong, and not the store."""
    if isinstance(error, psycopg.ProgrammingError | psycopg.IntegrityError):
        return error.sqlstate is None or error.sqlstate.startswith("23")
    return isinstance(error, MISTAKES)


def _is_busy(error: Any) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _is_away(error: Any) -> bool:
    """Whether waiting may help: a lock, or a server that is down. What a server refuses, it refuses again."""
    if not hasattr(error, "sqlstate"):
        return _is_busy(error)
    if error.sqlstate is None:  # not connected; the text is all there is
        return not any(word in str(error) for word in ("authentication", "does not exist", "pg_hba", "permission"))
    return error.sqlstate[:2] in ("08", "53", "55", "57")


@lru_cache(32)
def _insert_text(table: str, columns: tuple[str, ...], n_rows: int, is_sqlite: bool) -> str:
    marks = ["?" if is_sqlite else f"${i + 1}" for i in range(n_rows * len(columns))]
    rows = [f"({', '.join(marks[i : i + len(columns)])})" for i in range(0, len(marks), len(columns))]
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join(rows)} ON CONFLICT DO NOTHING"
