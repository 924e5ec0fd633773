"""The state of the queue for Prometheus, in a file for the textfile collector of node_exporter.

Source: Prometheus, exposition formats, text; node_exporter, README, textfile collector.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from cachesrv.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prometheus_client.core import Metric

    from cachesrv.push.events import Summary
    from cachesrv.push.queue.entries import Counts


@dataclass(slots=True)
class Figures:
    """What has been counted since this process began."""

    pushed: int = 0
    dropped: int = 0
    failures: int = 0
    troubles: int = 0
    nar_bytes: int = 0
    sent_bytes: int = 0
    last_push: float = 0.0

    def count_push(self, paths: int, summary: Summary) -> None:
        """A push that took so many paths out of the queue."""
        self.pushed += paths
        self.nar_bytes += summary.nar_bytes
        self.sent_bytes += summary.sent_bytes
        self.last_push = time.time()

    def render(self, counts: Counts, *, in_trouble: bool) -> bytes:
        """In the text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(lambda: self._families(counts, in_trouble=in_trouble)))
        return generate_latest(registry)

    def _families(self, counts: Counts, *, in_trouble: bool) -> Iterator[Metric]:
        paths = GaugeMetricFamily("cachesrv_queue_paths", "Paths in the queue.", labels=("state",))
        for state, number in (("waiting", counts.waiting), ("in_flight", counts.pushing), ("failed", counts.failed)):
            paths.add_metric((state,), number)
        yield paths
        for name, text, value in (
            ("oldest_timestamp_seconds", "When the oldest path was queued; 0 if there is none.", counts.oldest or 0),
            ("trouble", "Whether nothing can be pushed at present.", int(in_trouble)),
            ("last_push_timestamp_seconds", "When a push ended last; 0 before the first.", self.last_push),
        ):
            yield GaugeMetricFamily(f"cachesrv_queue_{name}", text, value=value)
        for name, text, value in (
            ("pushed_paths", "Paths that left the queue because they are in the cache.", self.pushed),
            ("dropped_paths", "Paths that left the queue because the store has them no more.", self.dropped),
            ("failures", "Paths that failed, each time.", self.failures),
            ("troubles", "Times that nothing could be pushed.", self.troubles),
            ("nar_bytes", "Bytes of NARs that were dumped and stored.", self.nar_bytes),
            ("sent_bytes", "Bytes that were sent for them.", self.sent_bytes),
        ):
            yield CounterMetricFamily(f"cachesrv_queue_{name}", text, value=value)


def write_figures(file: Path, text: bytes) -> None:
    """Whole or not at all, and for all to read: another user collects it. Raises StoreError."""
    temporary = file.parent / f".{file.name}.{os.getpid()}"
    try:
        temporary.write_bytes(text)
        temporary.chmod(0o644)
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StoreError(f"{file} cannot be written: {error.strerror}") from error


class _Collector:
    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()
