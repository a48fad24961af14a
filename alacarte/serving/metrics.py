"""The metrics that Prometheus reads at /metrics."""

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counters of the hot path, and gauges that are set when somebody looks."""

    def __init__(self, name: str) -> None:
        labels = ["registered_model_name"]
        self._name = name
        self._requests = Counter("serve_requests", "Requests answered", [*labels, "path", "status"])
        self._latency = Histogram(
            "serve_latency_seconds", "From the request read to the answer sent", labels,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        ).labels(name)  # fmt: skip
        self._rows = Counter("serve_rows", "Rows predicted", labels).labels(name)
        self._gauges = {
            key: Gauge(f"serve_{key}", text, labels).labels(name)
            for key, text in (
                ("ready", "1 when a model is loaded, else 0"),
                ("swaps", "Times that another version took over"),
                ("failures", "Versions and reads of the registry that failed"),
                ("dropped", "Predictions that could not be stored"),
                ("model_version", "The version that serves"),
            )
        }
        self._children: dict[tuple[str, int], Counter] = {}

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count one answer."""
        child = self._children.get((path, status))
        if child is None:
            child = self._children[path, status] = self._requests.labels(self._name, path, str(status))
        child.inc()
        if path == "/invocations":
            self._latency.observe(seconds)

    def rows(self, count: int) -> None:
        self._rows.inc(count)

    def text(self, values: Mapping[str, float]) -> bytes:
        """All metrics in Prometheus' text format; `values` are the present values of the gauges."""
        for key, value in values.items():
            self._gauges[key].set(value)
        return generate_latest()
