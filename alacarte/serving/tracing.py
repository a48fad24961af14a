"""OpenTelemetry: a span for each request, sent to OTEL_EXPORTER_OTLP_ENDPOINT. Needs the extra [otel].

All variables of OpenTelemetry apply, such as OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER and OTEL_RESOURCE_ATTRIBUTES.
"""

import asyncio
import os
import threading

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alacarte.errors import UserError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
STOP_SECONDS = 5  # for the last spans, at the end of the server


def trace_requests(app: ASGIApp) -> ASGIApp:
    """The application with a span for each request; `app` itself if no endpoint is configured.

    UserError if the packages are missing.
    """
    endpoint = next(filter(os.environ.get, ENDPOINTS), None)
    if not endpoint:
        return app
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UserError(
            f"{endpoint} is set, but {error.name} is missing: pip install 'alacarte[otel]', or unset {endpoint}"
        ) from error
    os.environ.setdefault("OTEL_SERVICE_NAME", "alacarte-serve")
    provider = TracerProvider(resource=Resource.create(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    traced = OpenTelemetryMiddleware(app, tracer_provider=provider, exclude_spans=["receive", "send"])

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_after_last_spans(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                # A daemon, because a collector that is silent would hold up the end of the server.
                last = threading.Thread(target=provider.shutdown, daemon=True)
                last.start()
                await asyncio.to_thread(last.join, STOP_SECONDS)
                if last.is_alive():
                    print("serve: the last spans could not be sent")
            await send(message)

        await traced(scope, receive, send_after_last_spans if scope["type"] == "lifespan" else send)

    return application
