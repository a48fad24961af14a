"""OpenTelemetry: a real collector's route receives a span for each request; without an endpoint nothing is loaded."""

import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from conftest import Project
from servers import ROWS, register_constant, serving

from alacarte.errors import UserError
from alacarte.serving.tracing import trace_requests

NAME = "traced"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """The address of a receiver of OTLP over HTTP, and the requests that it received."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


def test_each_request_is_a_span(project: Project, collector):
    endpoint, received = collector
    register_constant(project, NAME, 1)
    arguments = (f"registered_model_name={NAME}", f"serve.cache={project.root}/cache")
    with serving(project, *arguments, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as server:
        server.wait()
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        assert server.ask("/invocations", ROWS, traceparent=parent).status == 200
        assert server.ask("/invocations", b"{").status == 400
        assert server.stop() == 0
    resources = [resource for request in received for resource in request.resource_spans]
    names = {pair.key: pair.value.string_value for resource in resources for pair in resource.resource.attributes}
    assert names["service.name"] == "alacarte-serve"
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    asked = [span for span in spans if span.name == "POST /invocations"]
    codes = [{pair.key: pair.value for pair in span.attributes}["http.status_code"].int_value for span in asked]
    assert codes == [200, 400] and asked[0].trace_id.hex() == parent.split("-")[1]
    assert all(span.name.startswith(("GET ", "POST ")) for span in spans)  # no spans for the parts of a request


def test_a_silent_collector_does_not_hold_up_the_end(project: Project):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with serving(project, "registered_model_name=none", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as server:
            assert server.ask("/livez").status == 200
            assert server.stop() == 0
    assert "serve: the last spans could not be sent\n" in server.lines


def test_without_an_endpoint_nothing_changes_and_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    async def app(*_: object) -> None: ...

    assert trace_requests(app) is app
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.asgi", None)
    with pytest.raises(UserError, match=r"alacarte\[otel\]"):
        trace_requests(app)
