"""`cachesrv check-config --probe` with storage in a bucket says what is wrong before the server stumbles over it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.radosgw import STRANGER
from tests.system.fault_proxy import REFUSALS, FaultProxy
from tests.system.server import CACHESRV

if TYPE_CHECKING:
    from pathlib import Path

    from tests.radosgw import Gateway
    from tests.system.fault_proxy import Answer


def probe(folder: Path, endpoint: str, environment: dict[str, str]) -> tuple[int, str]:
    """The exit status, and what is said."""
    settings = {"KIND": "s3", "ENDPOINT": endpoint, "PREFIX": folder.name, "ADDRESSING_STYLE": "path"}
    environ = {"PATH": os.environ["PATH"], "CACHESRV_DATA_DIR": str(folder / "data")}
    environ |= {f"CACHESRV_STORAGE__{key}": value for key, value in settings.items()} | environment
    done = subprocess.run(
        [*CACHESRV, "check-config", "--probe"], check=False, capture_output=True, text=True, env=environ, timeout=60
    )
    assert bool(done.stdout) == (done.returncode == 0)
    return done.returncode, done.stderr


def test_a_bucket_that_can_be_used(gateway: Gateway, bucket: str, tmp_path: Path) -> None:
    environment = gateway.environment() | {"CACHESRV_STORAGE__BUCKET": bucket}
    assert probe(tmp_path, gateway.endpoint, environment) == (0, "")


def test_a_bucket_that_is_not_there(gateway: Gateway, tmp_path: Path) -> None:
    environment = gateway.environment() | {"CACHESRV_STORAGE__BUCKET": "nobody-has-this-bucket"}
    status, said = probe(tmp_path, gateway.endpoint, environment)
    assert status == 2
    assert "storage: " in said
    assert "there is no such bucket" in said


def test_permissions_that_are_missing(gateway: Gateway, bucket: str, tmp_path: Path) -> None:
    environment = gateway.environment() | {
        "AWS_ACCESS_KEY_ID": STRANGER,
        "AWS_SECRET_ACCESS_KEY": STRANGER,
        "CACHESRV_STORAGE__BUCKET": bucket,
    }
    status, said = probe(tmp_path, gateway.endpoint, environment)
    assert status == 2
    assert said.count("access denied: the credentials need s3:") == 7


@pytest.mark.parametrize(("answer", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_is_said_with_what_to_do(
    gateway: Gateway, bucket: str, tmp_path: Path, answer: Answer, words: str
) -> None:
    environment = gateway.environment() | {"CACHESRV_STORAGE__BUCKET": bucket}
    with FaultProxy(gateway.endpoint) as proxy:
        proxy.plan(answer, times=100)
        status, said = probe(tmp_path, proxy.url, environment)
    assert status == 2
    assert words in said


def test_an_endpoint_that_is_not_there(gateway: Gateway, tmp_path: Path) -> None:
    environment = gateway.environment() | {"CACHESRV_STORAGE__BUCKET": "bucket"}
    status, said = probe(tmp_path, "http://127.0.0.1:1", environment)
    assert status == 2
    assert "no answer" in said
    assert "Traceback" not in said
