"""The Open Inference Protocol (V2) over REST. A request becomes a body of `/invocations` and takes the same path.

Inputs are one tensor for each column, or one tensor with all columns. Outputs are `predictions` and `prediction_ids`, or the
tensors that the request names. `probabilities` is the third.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import chain
from math import prod
from typing import Annotated, Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from mlflow.version import VERSION

from alacarte.serving.description import TENSORS, datatype_of, describe_tensors, json_body
from alacarte.serving.follower import LoadedModel
from alacarte.serving.limits import LARGE_BODY
from alacarte.serving.model import ServedModel
from alacarte.serving.rows import RequestError
from alacarte.serving.state import AppState

Predict = Callable[[LoadedModel, bytes, str, bool, float], Awaitable[dict[str, Any]]]
OUTPUTS = ("predictions", "prediction_ids", "probabilities")
# The product of a long shape of large integers takes hours, and no other thread runs meanwhile.
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class Tensor(msgspec.Struct):
    name: str
    shape: Annotated[list[Size], msgspec.Meta(max_length=8)]
    datatype: str  # not used: the signature of the model says what it takes
    data: list[Any]


class RequestedOutput(msgspec.Struct):
    name: str


class InferenceRequest(msgspec.Struct):
    inputs: list[Tensor]
    id: str | None = None
    outputs: list[RequestedOutput] = []


def make_router(state: AppState, predict: Predict) -> APIRouter:
    """The routes below /v2. `predict` answers a body of `/invocations`."""
    router = APIRouter(prefix="/v2", tags=["inference protocol"])
    name = state.settings.registered_model_name

    def find_model(request: Request) -> LoadedModel:
        state.access.check(request.headers, request.client, "predict")
        if request.path_params["model_name"] != name:
            raise RequestError(404, f"this server serves the model {name}")
        current = state.current_model()
        if request.path_params.get("version") not in (None, current.version):
            raise RequestError(404, f"this server serves version {current.version}")
        return current

    @router.get("")
    async def server_metadata() -> dict[str, Any]:
        return {"name": "alacarte", "version": VERSION, "extensions": []}

    @router.get("/health/live")
    async def server_live() -> dict[str, bool]:
        state.check_live()
        return {"live": True}

    @router.get("/health/ready")
    async def server_ready() -> dict[str, bool]:
        state.current_model()
        return {"ready": True}

    async def model_metadata(request: Request) -> dict[str, Any]:
        current = find_model(request)
        signature, outputs = current.model.signature, [{"name": "prediction_ids", "datatype": "BYTES", "shape": [-1]}]
        if signature.outputs and len(signature.outputs.inputs) == 1:
            outputs.insert(0, {**describe_tensors(signature.outputs)[0], "name": "predictions"})
        return {
            "name": name, "versions": [current.version], "platform": "mlflow", "inputs": describe_tensors(signature.inputs),
            "outputs": outputs,
        }  # fmt: skip

    async def model_ready(request: Request) -> dict[str, Any]:
        find_model(request)
        return {"name": name, "ready": True}

    async def infer(request: Request) -> dict[str, Any]:
        started, status, body = time.perf_counter(), 200, b""
        try:
            current = find_model(request)
            body = await state.read_json(request, state.settings.max_body)
            if len(body) > LARGE_BODY:
                sent, table = await asyncio.to_thread(_convert, body, current.model)
            else:
                sent, table = _convert(body, current.model)
            names = [output.name for output in sent.outputs] or OUTPUTS[:2]
            reply = await predict(current, table, "application/json", "probabilities" in names, started)
            outputs = [_tensor(output, reply[output]) for output in names if reply.get(output)]
            identifier = {} if sent.id is None else {"id": sent.id}
            return {"model_name": name, "model_version": current.version, **identifier, "outputs": outputs}
        except RequestError as error:
            status = error.status
            raise
        finally:
            state.bodies.release(body)
            state.metrics.count_request("/v2/infer", status, time.perf_counter() - started)

    for path in ("/models/{model_name}", "/models/{model_name}/versions/{version}"):
        parameters = [{"name": key, "in": "path", "required": True, "schema": {"type": "string"}} for key in
                      ("model_name", "version") if key in path]  # fmt: skip
        extra: dict[str, Any] = {"parameters": parameters}
        router.add_api_route(path, model_metadata, methods=["GET"], openapi_extra=extra)
        router.add_api_route(f"{path}/ready", model_ready, methods=["GET"], openapi_extra=extra)
        router.add_api_route(f"{path}/infer", infer, methods=["POST"], openapi_extra={**extra, **json_body(TENSORS)})
    return router


def _convert(body: bytes, model: ServedModel) -> tuple[InferenceRequest, bytes]:
    """The request, and its inputs as a body of `/invocations`."""
    try:
        sent = msgspec.json.decode(body, type=InferenceRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RequestError(400, "send a JSON object with inputs; each has name, shape, datatype and data") from None
    if any(output.name not in OUTPUTS for output in sent.outputs):
        raise RequestError(400, f"outputs can be {', '.join(OUTPUTS)}")
    columns, values = [tensor.name for tensor in sent.inputs], [_read_values(tensor) for tensor in sent.inputs]
    shapes = [tensor.shape for tensor in sent.inputs]
    if len(columns) == 1 and (model.input_schema.tensor or (len(shapes[0]) == 2 and columns[0] not in model.columns)):
        rows = np.array([None, *values[0]], dtype=object)[1:].reshape(shapes[0]).tolist()
        return sent, msgspec.json.encode(
            {"instances": rows} if model.input_schema.tensor else _split(model.columns, rows)
        )
    if any(shape not in ([len(column)], [len(column), 1]) for shape, column in zip(shapes, values, strict=True)):
        raise RequestError(400, "the tensor of a column must have the shape [rows]")
    if len(set(map(len, values))) != 1:
        raise RequestError(400, "every column must have as many values")
    return sent, msgspec.json.encode(_split(columns, list(zip(*values, strict=True))))


def _split(columns: list[str], rows: list[Any]) -> dict[str, Any]:
    return {"dataframe_split": {"columns": columns, "data": rows}}


def _read_values(tensor: Tensor) -> list[Any]:
    """The values of a tensor in row-major order. A client may send them nested."""
    values = tensor.data
    while values and all(isinstance(value, list) for value in values):
        values = list(chain.from_iterable(values))
    if prod(tensor.shape) != len(values):
        raise RequestError(400, "the shape of a tensor must fit its data")
    return values


def _tensor(name: str, values: list[Any]) -> dict[str, Any]:
    """A tensor of the answer. Values that have no datatype are sent as JSON in BYTES."""
    if name == "probabilities":
        values = [list(row.values()) for row in values]
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths
        array = np.array([None])
    if array.dtype.kind not in "biufU":
        values = [msgspec.json.encode(value).decode() for value in values]
        array = np.array(values)
    data = values if array.ndim == 1 else array.ravel().tolist()
    return {"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape), "data": data}
