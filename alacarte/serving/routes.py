"""Every route but `/invocations`: health, status, feedback, events, and the pages. FastAPI, so that /docs describes them.

The order of checks is always the same: the token, the rate, the size of the body, the body.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from mlflow.version import VERSION
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Route

from alacarte.errors import UserError
from alacarte.feedback import Feedback, Outcome, Store, StoreError
from alacarte.serving import webhooks
from alacarte.serving.description import TABLE, describe, describe_model, json_body
from alacarte.serving.rows import RequestError
from alacarte.serving.state import AppState

PAGE = Path(__file__).with_name("page.html").read_text()
# Nothing on the page comes from elsewhere, and nothing on it can send anywhere else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"

LABELS_BYTES = 1_000_000  # of a body: 1,000 labels with a source and a comment each
SMALL_BYTES = 100_000  # of a body with a review or an event
LABEL_CHARACTERS = 1000


def _check_label(value: Any) -> Any:
    if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= LABEL_CHARACTERS):
        return value
    expected = f"expected text of at most {LABEL_CHARACTERS} characters, a number, true or false"
    raise PydanticCustomError("label", expected)


AnyLabel = bool | int | float | str
Label = Annotated[AnyLabel, PlainValidator(_check_label, json_schema_input_type=AnyLabel)]


class LabelBody(BaseModel):
    """The right label of one prediction, in the opinion of a person. It may be the predicted label."""

    model_config = ConfigDict(extra="forbid")
    prediction_id: str = Field(max_length=100)
    label: Label
    source: str | None = Field(None, max_length=200, description="who says so: a person, a team, a system")
    comment: str | None = Field(None, max_length=2000)


class ReviewBody(BaseModel):
    """The decision of an administrator about labels that wait."""

    model_config = ConfigDict(extra="forbid")
    accept: bool
    reason: str | None = Field(None, max_length=2000)
    label: Label | None = Field(None, description="which one; needed to accept one of several")


ONE_LABEL, REVIEW = TypeAdapter(LabelBody), TypeAdapter(ReviewBody)
# A list of many mistakes costs as much as one mistake.
LABELS: TypeAdapter[list[LabelBody]] = TypeAdapter(Annotated[list[LabelBody], Field(fail_fast=True)])
LABELS_SCHEMA = {"anyOf": [ONE_LABEL.json_schema(), {"type": "array", "items": ONE_LABEL.json_schema()}]}


def _parse(adapter: TypeAdapter, body: bytes) -> Any:
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        raise RequestError(422, _explain(dict(error.errors(include_url=False, include_input=False)[0]))) from None


def _explain(error: dict[str, Any]) -> str:
    """The first error of pydantic in one line, without any text of the client: an unknown key is such a text."""
    path = error["loc"][:-1] if error["type"] == "extra_forbidden" else error["loc"]
    return f"{'.'.join(map(str, path)) or 'body'}: {error['msg']}, see /docs"


def make_api(state: AppState, lifespan: Callable[[Any], Any]) -> FastAPI:
    """All routes. `/invocations` is among them for /docs only; app.py answers it."""
    settings, access, name = state.settings, state.access, state.settings.registered_model_name
    api = FastAPIOffline(
        title="MLOps à la carte", redoc_url=None, lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))],  # the button Authorize of /docs; `access` checks the token
        description=f"Serves the champion of {name} and takes feedback on its predictions.",
    )  # fmt: skip

    async def openapi(request: Request) -> JSONResponse:
        try:
            access.check(request.headers, request.client, "predict")
            return JSONResponse(describe_model(api, state.current_model().model))
        except RequestError:  # everybody may read the description of the routes, which is the same for every model
            return JSONResponse(api.openapi())

    api.router.routes.insert(0, Route("/openapi.json", openapi))  # before the route of FastAPI

    def open_store() -> Store:
        """The store, which knows every prediction that was answered before."""
        if state.store is None or state.prediction_log is None:
            raise RequestError(404, "this server stores no predictions: feedback.url=null")
        state.prediction_log.flush()
        return state.store

    # --- errors: one line each, the client's input never in it ---

    @api.exception_handler(RequestError)
    async def answer_refusal(request: Request, error: RequestError) -> JSONResponse:
        body = state.refusal(error)
        if request.url.path.startswith("/v2"):  # as the Open Inference Protocol prescribes
            body = {"error": body["message"]}
        return JSONResponse(body, error.status)

    @api.exception_handler(HTTPException)
    async def answer_unknown_route(request: Request, error: HTTPException) -> JSONResponse:
        answer = await answer_refusal(request, RequestError(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @api.exception_handler(RequestValidationError)
    async def answer_invalid_query(request: Request, error: RequestValidationError) -> JSONResponse:
        return await answer_refusal(request, RequestError(422, _explain(error.errors()[0])))

    @api.exception_handler(StoreError)
    async def answer_store_error(request: Request, error: StoreError) -> JSONResponse:
        effect = "the feedback store does not work" if request.method == "GET" else "nothing was stored"
        return await answer_refusal(request, RequestError(503, f"{effect}: {error}; try again"))

    @api.exception_handler(Exception)
    async def answer_failure(request: Request, _: Exception) -> JSONResponse:
        return await answer_refusal(request, RequestError(500, "the server failed; its log says why"))

    # --- health and status ---

    @api.get("/ping", tags=["health"])
    @api.get("/health", tags=["health"])
    @api.get("/readyz", tags=["health"])
    async def readyz() -> Response:
        """200 when a model is loaded, else 503 with the reason."""
        state.current_model()
        return Response("\n", media_type="application/json")

    @api.get("/livez", tags=["health"])
    async def livez() -> Response:
        """200 while the process works; 503 when a prediction hangs and cannot be stopped, so that it is restarted."""
        state.check_live()
        return Response("\n", media_type="application/json")

    @api.get("/version", tags=["health"])
    async def version() -> Response:
        """MLflow's version, as `mlflow models serve` answers."""
        return Response(VERSION, media_type="application/json")

    @api.get("/status", tags=["health"])
    async def status(request: Request) -> dict[str, Any]:
        """Which version serves, since when, how often it changed, and what failed last."""
        access.check(request.headers, request.client, "predict", "feedback", "admin")
        log = state.prediction_log
        stored = {"dropped": log.dropped, "store_healthy": log.healthy} if log else {}
        return {**state.follower.status(), **stored}

    @api.get("/metrics", tags=["health"])
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        access.check(request.headers, request.client, "predict", "feedback", "admin")
        return Response(generate_latest(), media_type="text/plain; version=0.0.4")

    # --- the model ---

    @api.post(
        "/invocations", tags=["model"], openapi_extra=json_body(TABLE, **{"text/csv": {"schema": {"type": "string"}}})
    )
    async def invocations(probabilities: bool = False) -> None:
        """Predict. The answer of `mlflow models serve`, and `model_version`, `prediction_ids` and `audit_ids`."""
        raise AssertionError("app.py answers this route")

    @api.get("/model", tags=["model"])
    async def model(request: Request) -> dict[str, Any]:
        """The inputs and classes of the model that serves, as the page needs them."""
        access.check(request.headers, request.client, "predict")
        current = state.current_model()
        return {
            "registered_model_name": name,
            "model_version": current.version,
            "feedback": state.store is not None,
            **describe(current.model),
        }

    # --- feedback ---

    @api.post("/feedback", tags=["feedback"], openapi_extra=json_body(LABELS_SCHEMA))
    async def give_feedback(request: Request) -> JSONResponse:
        """Say of one prediction, or of many, what the right label is. A confirmation counts as much as a correction.

        One label: 404 if the prediction is not stored, 422 if the label is none of the classes. A list: 200 with a state
        for each label.
        """
        caller = access.check(request.headers, request.client, "feedback")
        state.label_rate.check(caller.rate_key)
        body = await state.read_json(request, LABELS_BYTES)
        is_list = body.lstrip()[:1] == b"["
        labels = _parse(LABELS, body) if is_list else [_parse(ONE_LABEL, body)]
        if not 1 <= len(labels) <= 1000:
            raise RequestError(400, "a request may have 1 to 1000 labels")
        state.label_rate.take(caller.rate_key, len(labels))
        classes = state.current_model().model.classes

        def add() -> list[Outcome]:
            feedback = [Feedback(**label.model_dump(), annotator=caller.annotator) for label in labels]
            return open_store().add_feedback(name, feedback, classes=classes, review=settings.feedback.review)

        outcomes = await run_in_threadpool(add)
        results = [
            {key: getattr(outcome, key) for key in ("prediction_id", "state", "message")} for outcome in outcomes
        ]
        first = outcomes[0]
        if not is_list and (first.is_wrong or first.state == "unknown"):
            error = RequestError(422 if first.is_wrong else 404, first.message)
            return JSONResponse({**error.body(), "results": results}, error.status)
        return JSONResponse({"results": results})

    @api.get("/feedback/{prediction_id}", tags=["feedback"])
    async def get_feedback(request: Request, prediction_id: str) -> dict[str, Any]:
        """The state and label of the feedback on one prediction."""
        access.check(request.headers, request.client, "feedback")
        stored = await run_in_threadpool(lambda: open_store().get_feedback(name, prediction_id))
        if stored is None:
            raise RequestError(404, "no such prediction")
        return stored

    @api.get("/feedback", tags=["feedback"])
    async def list_feedback(request: Request, state: str = "new", limit: int = 100) -> list[dict[str, Any]]:
        """Feedback in one state, oldest first; for administrators."""
        access.check(request.headers, request.client, "admin")
        if state not in ("new", "accepted", "rejected", "used") or not 1 <= limit <= 1000:
            raise RequestError(400, "state is new, accepted, rejected or used; limit is 1 to 1000")
        return await run_in_threadpool(lambda: open_store().list_feedback(name, state, limit))

    @api.post("/feedback/{prediction_id}/review", tags=["feedback"], openapi_extra=json_body(REVIEW.json_schema()))
    async def review(request: Request, prediction_id: str) -> dict[str, Any]:
        """Accept or reject a label that waits; for administrators. 409 with the reason if that is not possible."""
        access.check(request.headers, request.client, "admin")
        decision = _parse(REVIEW, await state.read_json(request, SMALL_BYTES))

        def decide() -> dict[str, Any] | None:
            return open_store().review(name, prediction_id, decision.accept, decision.reason, decision.label)

        try:
            stored = await run_in_threadpool(decide)
        except UserError as error:
            raise RequestError(409, str(error)) from None
        if stored is None:
            raise RequestError(404, "no feedback on such a prediction")
        return stored

    # --- the registry's events ---

    @api.post("/events", tags=["registry"])
    async def receive_event(request: Request) -> dict[str, str]:
        """MLflow's webhooks. An event is a hint: the alias is read again, whatever the event says."""
        body = await state.read_json(request, SMALL_BYTES)
        if not settings.webhook_secret:
            raise RequestError(404, "this server takes no events: set SERVE_WEBHOOK_SECRET or serve.webhook=true")
        is_hint = webhooks.is_hint(request.headers, body, settings.webhook_secret, time.time(), name)
        if is_hint:
            state.follower.refresh()
        return {"status": "ok" if is_hint else "ignored"}

    # --- for people ---

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    return api
