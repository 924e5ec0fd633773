"""Metrics and logs.

Counters live in memory that all worker processes of one server share, a row of cells a worker: to count is to add to a
cell of one's own, without a lock, and any worker can answer for all of them. The set of cells is fixed when the
memory is made. A worker that is restarted goes on in the row of the one before it, so that no counter moves back.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

ROUTES = (
    "nix-cache-info",
    "narinfo",
    "nar",
    "listing",
    "log",
    "realisation",
    "debuginfo",
    "api",
    "page",
    "health",
    "metrics",
    "unmatched",
)
METHODS = ("GET", "HEAD", "PUT", "POST", "other")
STATUSES = (
    200,
    201,
    204,
    206,
    304,
    307,
    400,
    401,
    403,
    404,
    405,
    408,
    409,
    411,
    413,
    416,
    422,
    500,
    502,
    503,
    504,
    507,
)
OTHER_STATUS = 0
COUNTERS = {
    "sent_bytes": "bytes of NARs sent to clients",
    "received_bytes": "bytes of NARs received from clients, as sent",
    "nars_stored": "NARs verified and stored",
    "paths_published": "paths made visible by a push",
    "pushes_refused": "paths that were refused",
    "bucket_requests": "requests to the bucket that objects lie in",
    "bucket_failures": "requests to the bucket that failed, and may have been tried again",
    "verifications": "verifications that this server had done",
    "verifications_failed": "verifications that came to no end",
    "collections": "garbage collections that this server had done",
    "collections_failed": "garbage collections that came to no end",
    "paths_collected": "paths that these took away",
    "nars_collected": "NARs that these deleted",
    "collected_bytes": "bytes of NARs that these deleted",
}

Gauge = tuple[str, str, float]
"""Name, help and present value."""


class Metrics:
    """The counters of one worker, and the sum over all of them."""

    def __init__(self, workers: int = 1) -> None:
        statuses = (*STATUSES, OTHER_STATUS)
        self._requests = {
            (method, route, status): number
            for number, (method, route, status) in enumerate(
                (method, route, status) for method in METHODS for route in ROUTES for status in statuses
            )
        }
        self._counters = {name: len(self._requests) + number for number, name in enumerate(COUNTERS)}
        self._row = len(self._requests) + len(self._counters)
        self._cells = memoryview(mmap.mmap(-1, 8 * self._row * workers)).cast("Q")
        self._start = 0

    def become(self, worker: int) -> None:
        """Count in the row of this worker from now on."""
        self._start = worker * self._row

    def request(self, method: str, route: str, status: int) -> None:
        """Count an answered request."""
        self._cells[self.request_cell(method, route, status)] += 1

    def request_cell(self, method: str, route: str, status: int) -> int:
        """Where such requests are counted in `cells`, for those that cannot spend a call on it."""
        key = (method if method in METHODS else "other", route, status if status in STATUSES else OTHER_STATUS)
        return self._start + self._requests[key]

    def counter_cell(self, name: str) -> int:
        """Where a counter of COUNTERS stands in `cells`."""
        return self._start + self._counters[name]

    @property
    def cells(self) -> memoryview:
        """The shared memory: unsigned 64-bit numbers."""
        return self._cells

    def add(self, name: str, amount: int = 1) -> None:
        """Add to a counter of COUNTERS."""
        self._cells[self._start + self._counters[name]] += amount

    def total(self, name: str) -> int:
        """A counter of COUNTERS, summed over the workers."""
        return self._sum(self._counters[name])

    def render(self, gauges: Iterable[Gauge] = ()) -> bytes:
        """All of it in Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(lambda: self._families(gauges)))
        return generate_latest(registry)

    def _sum(self, cell: int) -> int:
        return sum(self._cells[cell :: self._row])

    def _families(self, gauges: Iterable[Gauge]) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "cachesrv_http_requests", "Requests answered.", labels=("method", "route", "status")
        )
        for (method, route, status), cell in self._requests.items():
            if value := self._sum(cell):
                requests.add_metric((method, route, str(status or "other")), value)
        yield requests
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"cachesrv_{name}", f"{text[0].upper()}{text[1:]}.", value=self.total(name))
        for name, text, gauge in gauges:
            yield GaugeMetricFamily(f"cachesrv_{name}", text, value=gauge)


class _Collector:
    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()


def configure_logging(level: str = "info") -> None:
    """Log to stderr: for people on a terminal, one JSON object a line elsewhere. Source for $NO_COLOR: no-color.org."""
    on_terminal = sys.stderr.isatty()
    colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not on_terminal),
            structlog.processors.StackInfoRenderer(),
            *([] if on_terminal else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer(colors=colors) if on_terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
