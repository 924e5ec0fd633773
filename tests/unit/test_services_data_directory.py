"""What several processes that are started for the first time make of one data directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from cachesrv.nix.signing import SecretKey
from cachesrv.services import data_directory
from cachesrv.services.data_directory import DataDirectory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def data(tmp_path: Path) -> DataDirectory:
    data = DataDirectory(tmp_path / "data")
    data.make()
    return data


def test_all_have_what_the_quickest_one_made(data: DataDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file comes into being after it was found missing."""
    truly = data_directory.write_new

    def write_as_the_second(path: Path, text: str, *, mode: int) -> None:
        truly(path, text if path.suffix == ".public" else others[path.name], mode=mode)
        truly(path, text, mode=mode)

    elsewhere = DataDirectory(data.root / "elsewhere")
    elsewhere.make()
    key = elsewhere.signing_key("main")
    others = {"main.secret": key.render(), "push-token": "csrv_other"}
    monkeypatch.setattr(data_directory, "write_new", write_as_the_second)

    assert data.signing_key("main").render() == key.render()
    assert data.token() == "csrv_other"
    assert data.public_key("main").read_text() == elsewhere.public_key("main").read_text()
    assert {file.name for file in data.root.rglob("*") if file.is_file()} == {
        *others,
        "main.public",
        *(file.name for file in elsewhere.root.rglob("*") if file.is_file()),
    }


def test_the_public_key_follows_the_secret_one(data: DataDirectory) -> None:
    first = data.signing_key("main")
    with capture_logs() as logs:
        assert data.signing_key("main").render() == first.render()
    assert logs == []
    second = SecretKey.generate("main-2")
    data.secret_key("main").write_text(f"{second.render()}\n")
    with capture_logs() as logs:
        data.signing_key("main")
        data.signing_key("main")
    assert data.public_key("main").read_text() == f"{second.public.render()}\n"
    (log,) = logs
    assert log["event"] == "the secret key has been replaced: the public key beside it is new too"
    assert log["key"] == second.public.render()
    assert second.render() not in str(logs)


def test_a_public_key_that_cannot_be_written_stops_nobody(data: DataDirectory) -> None:
    data.signing_key("main")
    data.public_key("main").unlink()
    data.public_key("main").mkdir()
    with capture_logs() as logs:
        data.signing_key("main")
    assert [log["event"] for log in logs] == ["the public key beside a secret key cannot be brought up to date"]


def test_a_key_is_on_disk_under_its_name_before_it_is_shown(
    data: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or clients would have been told to trust one that is another after the next loss of power."""
    synced: list[tuple[int, bool]] = []

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, data.secret_key("main").exists()))

    monkeypatch.setattr(os, "fsync", sync)
    data.signing_key("main")
    file, folder = (path.stat().st_ino for path in (data.secret_key("main"), data.secret_key("main").parent))
    assert synced[:2] == [(file, False), (folder, True)]
