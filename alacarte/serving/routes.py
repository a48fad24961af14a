"""Every route but `/invocations`: health, status, feedback, events, and the pages. FastAPI, so that /docs describes them."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline
from mlflow.version import VERSION
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from alacarte.errors import UserError
from alacarte.feedback import Feedback, Outcome, Store, StoreError
from alacarte.serving import webhooks
from alacarte.serving.auth import ANYBODY
from alacarte.serving.inputs import describe
from alacarte.serving.rows import RequestError
from alacarte.serving.state import AppState

Handler = Callable[..., Any]

PAGE = Path(__file__).with_name("page.html").read_text()

# Nothing on the page comes from elsewhere, and nothing on it can send anywhere else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"

LABEL_CHARACTERS = 1000
ROWS = {"type": "array", "items": {"type": "array", "items": {}}}
INVOCATIONS = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "description": "One of the four, as `mlflow models serve` takes them.",
                    "properties": {
                        "dataframe_split": {
                            "type": "object",
                            "required": ["data"],
                            "properties": {"columns": {"type": "array", "items": {"type": "string"}}, "data": ROWS},
                        },
                        "dataframe_records": {"type": "array", "items": {"type": "object"}},
                        "instances": {"type": "array", "items": {}},
                        "inputs": {},
                        "params": {"type": "object"},
                    },
                }
            },
            "text/csv": {"schema": {"type": "string"}},
        },
    }
}


def _check_label(given: Any) -> Any:
    """One message for what is none of the kinds below, instead of one for each of them."""
    if isinstance(given, bool | int | float) or (isinstance(given, str) and len(given) <= LABEL_CHARACTERS):
        return given
    due = f"text of at most {LABEL_CHARACTERS} characters, a number, true or false is due"
    raise PydanticCustomError("label", due)


AnyLabel = StrictBool | StrictInt | StrictFloat | Annotated[StrictStr, Field(max_length=LABEL_CHARACTERS)]
Label = Annotated[AnyLabel, BeforeValidator(_check_label)]


class Given(BaseModel):
    """What a person says of one prediction: the right label, which may be the predicted one."""

    model_config = ConfigDict(extra="forbid")
    prediction_id: str = Field(max_length=100)
    label: Label
    source: str | None = Field(None, max_length=200, description="who says so: a person, a team, a system")
    comment: str | None = Field(None, max_length=2000)


Labels = Annotated[list[Given], Field(fail_fast=True)]  # a list of millions of mistakes costs as much as one mistake


class Review(BaseModel):
    """What an administrator decides about labels that wait."""

    model_config = ConfigDict(extra="forbid")
    accept: bool
    reason: str | None = Field(None, max_length=2000)
    label: Label | None = Field(None, description="which one; needed to accept one of several")


def make_api(state: AppState, lifespan: Callable[[Any], Any]) -> FastAPI:
    """All routes. `/invocations` is among them for /docs only; app.py answers it."""
    settings, follower, access = state.settings, state.follower, state.access
    api = FastAPIOffline(
        title="MLOps à la carte", redoc_url=None, lifespan=lifespan,
        description=f"Serves the champion of {settings.registered_model_name} and takes feedback on its predictions.",
    )  # fmt: skip
    rate = state.label_rate

    def store() -> Store:
        if state.store is None:
            raise RequestError(404, "this server stores no predictions: feedback.url=null")
        return state.store

    def get(path: str, tag: str) -> Callable[[Handler], Handler]:
        """A route that answers GET, and HEAD too, which some monitors send. /docs shows GET alone: an id names one method."""

        def add(handler: Handler) -> Handler:
            api.add_api_route(path, handler, methods=["GET"], tags=[tag])
            api.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
            return handler

        return add

    # --- errors: one line each, the client's input never in it ---

    @api.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(state.refusal(error), error.status)

    @api.exception_handler(HTTPException)
    async def not_here(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            {"error_code": "BAD_REQUEST", "message": str(error.detail)}, error.status_code, error.headers
        )

    @api.exception_handler(RequestValidationError)
    async def not_as_described(_: Request, error: RequestValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of one label or a list of them, what was meant
        # A key that is not known is the client's own text.
        known = first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
        named = (part for part in known if isinstance(part, int) or str(part).isidentifier())
        where = ".".join(str(part) for part in named if part != Given.__name__)
        return JSONResponse(state.refusal(RequestError(422, f"{where}: {first['msg']}, see /docs")), 422)

    @api.exception_handler(StoreError)
    async def store_is_away(request: Request, error: StoreError) -> JSONResponse:
        what = "the feedback store does not work" if request.method == "GET" else "nothing was stored"
        return JSONResponse(state.refusal(RequestError(503, f"{what}: {error}; try again")), 503)

    # --- health and status ---

    @get("/ping", "health")
    @get("/health", "health")
    @get("/readyz", "health")
    async def readyz() -> Response:
        """200 when a model is loaded, else 503 with the reason."""
        if follower.current is None:
            raise RequestError(503, follower.reason())
        return Response("\n", media_type="application/json")

    @get("/livez", "health")
    async def livez() -> Response:
        """200 while the process works; 503 when a prediction hangs and cannot be stopped, so that it is restarted."""
        if state.batcher.stuck:
            raise RequestError(503, "a prediction hangs and does not stop")
        return Response("\n", media_type="application/json")

    @get("/version", "health")
    async def version() -> Response:
        """MLflow's version, as `mlflow models serve` answers."""
        return Response(VERSION, media_type="application/json")

    @get("/status", "health")
    async def status(request: Request) -> dict[str, Any]:
        """Which version serves, since when, how often it changed, and what failed last."""
        access.check(request.headers, "predict", "feedback", "admin")
        recorded = (
            {"dropped": state.prediction_log.dropped, "store_healthy": state.prediction_log.healthy}
            if state.prediction_log
            else {}
        )
        return {**follower.status(), **recorded}

    @get("/metrics", "health")
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        access.check(request.headers, "predict", "feedback", "admin")
        told = follower.status()
        number = str(told["model_version"] or "")
        values = {
            "ready": float(follower.current is not None),
            "swaps": told["swaps"],
            "failures": told["failures"],
            "dropped": state.prediction_log.dropped if state.prediction_log else 0,
            "model_version": float(number) if number.isdecimal() else math.nan,
        }
        return Response(state.metrics.text(values), media_type="text/plain; version=0.0.4")

    # --- the model ---

    @api.post("/invocations", tags=["model"], openapi_extra=INVOCATIONS)
    async def invocations(probabilities: bool = False) -> None:
        """Predict. The answer is `mlflow models serve`'s, with `model_version`, `prediction_ids` and `audit_ids`."""
        raise AssertionError("app.py answers this one itself")

    @get("/model", "model")
    async def model(request: Request) -> dict[str, Any]:
        """The inputs and classes of the model that serves, as the page needs them."""
        access.check(request.headers, "predict")
        if follower.current is None:
            raise RequestError(503, follower.reason())
        return {
            "registered_model_name": settings.registered_model_name,
            "model_version": follower.current.version,
            "feedback": state.store is not None,
            **describe(follower.current.model),
        }

    # --- feedback ---

    name = settings.registered_model_name

    @api.post("/feedback", tags=["feedback"])
    async def give(request: Request, given: Annotated[Given | Labels, Body()]) -> JSONResponse:
        """Say of one prediction, or of many, what the right label is. A confirmation counts as much as a correction.

        One label: 404 where the prediction is not stored, 422 where it is none of the classes. A list: 200 with a state
        for each label.
        """
        caller = access.check(request.headers, "feedback")
        address = request.client.host if request.client else ""
        annotator = f"address:{address}" if caller == ANYBODY else f"token:{caller.name or ''}"
        items = given if isinstance(given, list) else [given]
        if not 1 <= len(items) <= 1000:
            raise RequestError(400, "a request may have 1 to 1000 labels")
        feedback_store = store()
        rate.take(address if caller == ANYBODY else caller.key, len(items))
        if follower.current is None:
            raise RequestError(503, follower.reason())
        classes = follower.current.model.classes

        def add() -> list[Outcome]:
            assert state.prediction_log
            state.prediction_log.flush()  # so that a prediction answered just now is known
            labels = [Feedback(**item.model_dump(), annotator=annotator) for item in items]
            review = settings.feedback.review
            return feedback_store.add_feedback(name, labels, classes=classes, review=review)

        outcomes = await run_in_threadpool(add)
        first = outcomes[0]
        status = 200  # of a list, whatever its labels are: each has its own state
        if not isinstance(given, list) and (first.is_wrong or first.state == "unknown"):
            status = 422 if first.is_wrong else 404
        results = [
            {key: getattr(outcome, key) for key in ("prediction_id", "state", "message")} for outcome in outcomes
        ]
        refusal = {"error_code": "BAD_REQUEST", "message": first.message} if status != 200 else {}
        return JSONResponse({**refusal, "results": results}, status)

    @api.get("/feedback/{prediction_id}", tags=["feedback"])
    async def look_up(request: Request, prediction_id: str) -> dict[str, Any]:
        """The state and label of the feedback on one prediction."""
        access.check(request.headers, "feedback")
        if state.prediction_log:
            await run_in_threadpool(state.prediction_log.flush)
        stored = await run_in_threadpool(store().get_feedback, name, prediction_id)
        if stored is None:
            raise RequestError(404, "no such prediction")
        return stored

    @api.get("/feedback", tags=["feedback"])
    async def waiting(request: Request, state: str = "new", limit: int = 100) -> list[dict[str, Any]]:
        """Feedback in one state, oldest first; for administrators."""
        access.check(request.headers, "admin")
        if state not in ("new", "accepted", "rejected", "used") or not 1 <= limit <= 1000:
            raise RequestError(400, "state is new, accepted, rejected or used; limit is 1 to 1000")
        return await run_in_threadpool(store().list_feedback, name, state, limit)

    @api.post("/feedback/{prediction_id}/review", tags=["feedback"])
    async def review(request: Request, prediction_id: str, decision: Review) -> dict[str, Any]:
        """Accept or reject a label that waits; for administrators. 409 with the reason where that cannot be."""
        access.check(request.headers, "admin")
        decided = (name, prediction_id, decision.accept, decision.reason, decision.label)
        try:
            stored = await run_in_threadpool(store().review, *decided)
        except UserError as error:
            raise RequestError(409, str(error)) from None
        if stored is None:
            raise RequestError(404, "no feedback on such a prediction")
        return stored

    # --- the registry's events ---

    @api.post("/events", tags=["registry"])
    async def hear(request: Request) -> dict[str, str]:
        """MLflow's webhooks. An event is a hint: the alias is read again, whatever the event says."""
        if not settings.webhook_secret:
            raise RequestError(404, "this server takes no events: set SERVE_WEBHOOK_SECRET or serve.webhook=true")
        try:
            payload = webhooks.verify(request.headers, await request.body(), settings.webhook_secret, time.time())
        except webhooks.EventError as error:
            raise RequestError(error.status, error.message) from None
        if payload is None:
            return {"status": "seen"}
        if not webhooks.relevant(payload, settings.registered_model_name):
            return {"status": "ignored"}
        follower.refresh()
        return {"status": "ok"}

    # --- for people ---

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    return api
