"""A SQL warehouse of Databricks: one statement at a time by its REST interface; what it answers comes as Arrow."""

import re
import time
from typing import Any

import pyarrow as pa
import requests

from alacarte.errors import StoreError, UserError

START = 600.0  # seconds that a warehouse has to start; after that a statement has
STATEMENT = 60.0
WAIT = 30  # seconds that one call waits for a statement; 5 to 50 are allowed
POLL = 0.5
RETRY = 10.0  # seconds in which a call that gets no answer is made again
LOGIN = "log in with DATABRICKS_HOST and DATABRICKS_TOKEN, or a profile of ~/.databrickscfg"


class Refused(StoreError):
    """The warehouse, or the workspace, says no: to a name, a right, a login, a statement. It would say so again."""


class Missing(Refused):
    """A table or a schema that is not there."""


class Conflict(StoreError):
    """Another statement changed the same rows at the same moment, and this one did nothing: it may be tried again."""


class Warehouse:
    """The warehouse `identifier` of the workspace whose login the environment holds. Safe to use from several threads.

    UserError where there is no login.
    """

    def __init__(self, identifier: str) -> None:
        from databricks.sdk import WorkspaceClient  # takes a third of a second, and few need it
        from databricks.sdk.config import Config

        self.identifier = identifier
        try:
            self._api = WorkspaceClient(
                config=Config(http_timeout_seconds=90, retry_timeout_seconds=RETRY)
            ).statement_execution
        except ValueError as error:
            raise UserError(f"Databricks takes no login: {_line(error)}: {LOGIN}") from None

    def run(self, statement: str, **values: str) -> None:
        """Execute a statement that changes something; it did so when this returns. `:name` in it stands for a value."""
        self._execute(statement, values)

    def query(self, statement: str, **values: str) -> pa.Table:
        """The rows of a SELECT."""
        from databricks.sdk.service.sql import Disposition, Format

        big = {"disposition": Disposition.EXTERNAL_LINKS, "format": Format.ARROW_STREAM}
        response = self._execute(statement, values, **big)
        links, tables = (response.result and response.result.external_links) or [], []
        while links:
            tables += [_download(link.external_link) for link in links]
            after = links[-1].next_chunk_index
            if after is None:
                break
            links = self._ask(self._api.get_statement_result_chunk_n, response.statement_id, after).external_links
        if not tables:  # no row, no link
            return pa.table({column.name: pa.nulls(0) for column in response.manifest.schema.columns})
        return pa.concat_tables(tables)

    def _execute(self, statement: str, values: dict[str, str], **options: Any) -> Any:
        from databricks.sdk.service.sql import StatementState

        began, patience, parameters = time.monotonic(), STATEMENT, _parameters(values)
        options |= {"parameters": parameters, "wait_timeout": f"{WAIT}s"}
        response = self._ask(self._api.execute_statement, statement, self.identifier, **options)
        going = (StatementState.PENDING, StatementState.RUNNING)
        while response.status.state in going:
            if response.status.state == StatementState.PENDING:
                patience = START
            if time.monotonic() - began > patience:
                self._ask(self._api.cancel_execution, response.statement_id)
                raise StoreError(f"warehouse {self.identifier} was asked and did not answer in {patience:g} seconds")
            time.sleep(POLL)
            response = self._ask(self._api.get_statement, response.statement_id)
        if response.status.state != StatementState.SUCCEEDED:
            error = response.status.error
            raise _error(_line(error.message if error else response.status.state.value))
        return response

    def _ask(self, call: Any, *arguments: Any, **options: Any) -> Any:
        from databricks.sdk import errors

        try:
            return call(*arguments, **options)
        except (errors.Unauthenticated, errors.PermissionDenied) as error:
            raise Refused(f"{_line(error)}: {LOGIN}") from error
        except (errors.InternalError, errors.TemporarilyUnavailable, errors.TooManyRequests) as error:
            raise StoreError(_line(error)) from error
        except errors.DatabricksError as error:
            raise _error(_line(error)) from error
        except (requests.RequestException, OSError) as error:  # a TimeoutError too
            raise StoreError(f"the workspace of warehouse {self.identifier} does not answer: {_line(error)}") from error


def _parameters(values: dict[str, str]) -> list[Any]:
    from databricks.sdk.service.sql import StatementParameterListItem

    return [StatementParameterListItem(name, type="STRING", value=value) for name, value in values.items()]


def _download(link: str) -> pa.Table:
    """A part of the rows, from where the workspace put it. The link is the right to read it: no login goes there."""
    try:
        answer = requests.get(link, timeout=90)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise StoreError(_line(error).replace(link, "the link to the rows")) from None
    with pa.ipc.open_stream(answer.content) as stream:
        return stream.read_all()


def _error(text: str) -> StoreError:
    if re.search(r"DELTA_CONCURRENT|Concurrent\w+Exception|DELTA_(METADATA|PROTOCOL)_CHANGED", text):
        return Conflict(text)
    missing = any(word in text for word in ("TABLE_OR_VIEW_NOT_FOUND", "SCHEMA_NOT_FOUND", "NO_SUCH_CATALOG"))
    return Missing(text) if missing else Refused(text)


def _line(error: object) -> str:
    """Without the settings that Databricks' client lists behind its messages."""
    return " ".join(str(error).split(" Config: ")[0].split())[:500]
