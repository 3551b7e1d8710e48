"""What a web process counts about its requests.

Under gunicorn the values live in files that the workers share (`gunicorn_conf.py`), so that a scrape which reaches one
worker tells about all.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

_registry = CollectorRegistry()
_requests = Counter(
    "drydock_http_requests",
    "Requests that this host's web processes have answered, by route pattern ('unknown': no such address). Many"
    " answers with a status of 500 or more mean that people see error pages: the log has the tracebacks.",
    ["method", "route", "status"],
    registry=_registry,
)
_seconds = Histogram(
    "drydock_http_request_duration_seconds",
    "Time until a response began, by route pattern: what people wait for. Queueing in the proxy is not in it.",
    ["method", "route"],
    buckets=BUCKETS,
    registry=_registry,
)


def observe(method: str, route: str, status: int, seconds: float) -> None:
    """Count a request; the labels have few values, whatever clients send."""
    method = method if method in METHODS else "other"
    _requests.labels(method, route, str(status)).inc()
    _seconds.labels(method, route).observe(seconds)


def collect() -> Iterable[Metric]:
    """Return the counts of all web processes of this server."""
    if values.ValueClass._multiprocess:
        return MultiProcessCollector(None).collect()
    return _registry.collect()
