"""Counters that workers share, and logs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cachesrv.telemetry import COUNTERS, METHODS, ROUTES, STATUSES, Metrics

LOG = """
import structlog
from cachesrv.telemetry import configure_logging
configure_logging("info")
log = structlog.get_logger()
log.debug("hidden")
log.info("told", number=1)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed", text="two\\nlines")
"""


WORKERS = """
import json, os
from cachesrv.telemetry import Metrics
metrics = Metrics(3)
metrics.request("GET", "nar", 200)
for worker in (1, 2, 1):
    pid = os.fork()
    if pid == 0:
        metrics.become(worker)
        metrics.request("GET", "nar", 200)
        metrics.add("sent_bytes", 10)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
cell = metrics.request_cell("GET", "nar", 200)
row = len(metrics.cells) // 3
requests = sum(metrics.cells[cell % row :: row])
print(json.dumps({"bytes": metrics.total("sent_bytes"), "requests": requests}))
"""


def samples(metrics: Metrics, *gauges: tuple[str, str, float]) -> dict[tuple[str, ...], float]:
    """What Prometheus reads: value by name and values of labels."""
    families = text_string_to_metric_families(metrics.render(gauges).decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_requests_are_counted_by_method_route_and_status() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.request("GET", "narinfo", 200)
    metrics.request("GET", "narinfo", 404)
    metrics.request("PUT", "nar", 204)
    metrics.request("BREW", "nar", 299)
    assert {key[1:]: value for key, value in samples(metrics).items() if key[0] == "cachesrv_http_requests_total"} == {
        ("GET", "narinfo", "200"): 3,
        ("GET", "narinfo", "404"): 1,
        ("PUT", "nar", "204"): 1,
        ("other", "nar", "other"): 1,
    }


def test_a_route_that_is_not_listed_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        Metrics().request("GET", "/main/x.narinfo", 200)


def test_counters_and_gauges() -> None:
    metrics = Metrics()
    for number, name in enumerate(COUNTERS):
        metrics.add(name, number)
        assert metrics.total(name) == number
    found = samples(metrics, ("index_paths", "Paths in the index.", 7))
    for number, name in enumerate(COUNTERS):
        assert found[f"cachesrv_{name}_total",] == number
    assert found["cachesrv_index_paths",] == 7


def test_cells_are_the_same_as_calls() -> None:
    metrics = Metrics(2)
    metrics.become(1)
    metrics.cells[metrics.request_cell("GET", "nar", 206)] += 5
    metrics.cells[metrics.counter_cell("sent_bytes")] += 2**40
    assert samples(metrics)["cachesrv_http_requests_total", "GET", "nar", "206"] == 5
    assert metrics.total("sent_bytes") == 2**40


def test_no_two_cells_are_one() -> None:
    metrics = Metrics(3)
    cells = []
    for worker in range(3):
        metrics.become(worker)
        cells += [metrics.request_cell(*key) for key in _every_request()]
        cells += [metrics.counter_cell(name) for name in COUNTERS]
    assert len(cells) == len(set(cells))
    assert 0 <= min(cells) <= max(cells) < len(metrics.cells)


def _every_request() -> list[tuple[str, str, int]]:
    return [(method, route, status) for method in METHODS for route in ROUTES for status in (*STATUSES, 0)]


def test_workers_are_summed_up_over_processes() -> None:
    """A forked process counts in the same memory; the one that takes its place goes on where it was."""
    done = subprocess.run([sys.executable, "-c", WORKERS], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"bytes": 30, "requests": 4}


def test_logs_are_json_where_nobody_reads_along() -> None:
    done = subprocess.run([sys.executable, "-c", LOG], check=True, capture_output=True, text=True)
    assert done.stdout == ""
    told, failed = (json.loads(line) for line in done.stderr.splitlines())
    assert (told["event"], told["number"], told["level"]) == ("told", 1, "info")
    assert (failed["event"], failed["text"], failed["level"]) == ("failed", "two\nlines", "error")
    assert "ZeroDivisionError" in failed["exception"]
    assert told["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_logs_are_for_people_on_a_terminal(variables: dict[str, str], coloured: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    terminal, end = pty.openpty()
    subprocess.run([sys.executable, "-c", LOG], check=True, env=environment | {"TERM": "xterm"} | variables, stderr=end)
    os.close(end)
    shown = os.read(terminal, 1_000_000).decode()
    os.close(terminal)

    assert "told" in shown
    assert "ZeroDivisionError" in shown
    assert ("\x1b[" in shown) == coloured
