"""What tests of several kinds share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from tests.radosgw import Gateway, shared_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSTEM = Path(__file__).parent / "system"


def pytest_configure() -> None:
    """What a shell starts in the background ignores interrupts; so would all processes that are interrupted here."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that no process is left alone with it at the end: what is marked `long`, then
    whatever starts servers.
    """
    items.sort(key=lambda item: (item.get_closest_marker("long") is None, SYSTEM not in item.path.parents))


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """Commands set the umask and the log of their process; in a test, that is the process of all others too."""
    before = os.umask(0o022)
    yield
    os.umask(before)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """An S3 server, one for the whole run."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # of pytest-xdist: each has a folder below that of the run
        folder = folder.parent
    with shared_gateway(folder / "gateway") as running:
        yield running


@pytest.fixture(scope="session")
def bucket(gateway: Gateway) -> str:
    """A bucket of this process, for tests that each take a prefix of their own."""
    return gateway.make_bucket()
