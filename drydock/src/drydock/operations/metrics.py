"""Everything that Prometheus scrapes. A scrape always succeeds, soon: what does not answer shows as down."""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

from django.db import connections
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import drydock
from drydock import storage_errors
from drydock.jobs import kinds
from drydock.jobs import metrics as job_metrics
from drydock.jobs.metrics import Measured
from drydock.operations import web_metrics

logger = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
DATABASES_TIMEOUT_SECONDS = 4.0
STATEMENT_TIMEOUT_MS = 2000


class _Collected(Collector):
    """Metrics that were collected already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self.metrics


def scrape() -> bytes:
    """Return all metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Collected([*_build(), *_web(), *_databases()]))
    return generate_latest(registry)


def _build() -> Iterator[Metric]:
    family = GaugeMetricFamily("drydock_build_info", "The version that runs on this host.", labels=["version"])
    family.add_metric([drydock.__version__], 1)
    yield family


def _web() -> Iterable[Metric]:
    try:
        return list(web_metrics.collect())
    except Exception:
        logger.exception("the counts of the web processes cannot be read")
        return []


def _databases() -> Iterator[Metric]:
    measured = _measure_all()
    up = GaugeMetricFamily(
        "drydock_database_up",
        "Whether this host got an answer from the database at this scrape. 0: what is counted there is absent.",
        labels=["database"],
    )
    for database in kinds.databases():
        up.add_metric([database], database in measured)
    yield up
    yield from job_metrics.families(measured, named=frozenset({storage_errors.SUBJECT}))
    if core := measured.get("core"):
        yield _s3_errors(core)


def _s3_errors(core: Measured) -> Metric:
    family = CounterMetricFamily(
        "drydock_s3_errors",
        "Calls of the object storage that failed, after their retries, by operation: uploads, downloads and PDFs fail.",
        labels=["operation"],
    )
    counted = {event: count for (subject, event), count in core.counts.items() if subject == storage_errors.SUBJECT}
    for operation in sorted({*storage_errors.OPERATIONS, *counted}):
        family.add_metric([operation], counted.get(operation, 0))
    return family


def _measure_all() -> dict[str, Measured]:
    """Ask all databases at the same time; who does not answer in time is left out."""
    names = kinds.databases()
    executor = ThreadPoolExecutor(max_workers=len(names), thread_name_prefix="metrics")
    futures = {executor.submit(_measure, name): name for name in names}
    finished, _ = wait(futures, timeout=DATABASES_TIMEOUT_SECONDS)
    # Whoever hangs ends by its own time limits; nobody waits for it here.
    executor.shutdown(wait=False, cancel_futures=True)
    answers = {name: future.result() for future, name in futures.items() if future in finished}
    return {name: said for name, said in answers.items() if said}


def _measure(database: str) -> Measured | None:
    try:
        with connections[database].cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, false)", [str(STATEMENT_TIMEOUT_MS)])
        return job_metrics.measure(database)
    except Exception as error:  # noqa: BLE001 - whatever it is, the scrape goes on
        logger.warning("database %s tells no figures: %s", database, error)
        return None
    finally:
        # This thread's own connection.
        connections.close_all()
