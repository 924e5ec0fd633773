"""Sorted tables on disk for one job."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import StoreError, StoreUnavailable
from cachesrv.index.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    scratch = Scratch(tmp_path / "a" / "b", ("one", "two"))
    yield scratch
    scratch.close()


def test_values_are_kept_by_table_and_come_in_order(scratch: Scratch) -> None:
    with scratch.changing() as changes:
        changes.put_many("one", [(b"c", b"3"), (b"a", b"1"), (b"b", b"2")])
        changes.put("two", b"a", b"another")
        assert changes.get("one", b"a") == b"1"
        assert changes.get("one", b"d") is None
        assert changes.scan("one", b"", 2) == [(b"a", b"1"), (b"b", b"2")]
        assert changes.scan("one", b"b", 2) == [(b"c", b"3")]
        assert changes.scan("one", b"c", 2) == []
    scratch.clear("one")
    with scratch.changing() as changes:
        assert changes.scan("one", b"", 9) == []
        assert changes.get("two", b"a") == b"another"


def test_no_value_has_a_key_that_none_can_have(scratch: Scratch) -> None:
    with scratch.changing() as changes:
        assert changes.get("one", b"") is None
        assert changes.get("one", b"x" * 10_000) is None


def test_what_an_error_interrupts_has_not_happened(scratch: Scratch) -> None:
    with suppress(KeyError), scratch.changing() as changes:
        changes.put("one", b"a", b"1")
        raise KeyError
    with scratch.changing() as changes:
        assert changes.get("one", b"a") is None


def test_it_is_there_for_the_next_process(tmp_path: Path) -> None:
    first = Scratch(tmp_path / "x", ("one",))
    with first.changing() as changes:
        changes.put("one", b"a", b"1")
    first.close()
    second = Scratch(tmp_path / "x", ("one",))
    with second.changing() as changes:
        assert changes.get("one", b"a") == b"1"
    second.discard()
    second.close()
    assert not (tmp_path / "x").exists()


def test_one_process_at_a_time(scratch: Scratch, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="another process"):
        Scratch(tmp_path / "a" / "b", ("one", "two"))


def test_files_that_are_no_good_are_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"garbage" * 10_000)
    scratch = Scratch(tmp_path, ("one",))
    with scratch.changing() as changes:
        assert changes.scan("one", b"", 1) == []
    scratch.close()


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot use"):
        Scratch(tmp_path / "file", ("one",))


def test_to_close_waits_for_another_thread(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "x", ("one",))
    begun, go_on, outcome = threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        with scratch.changing() as changes:
            begun.set()
            assert go_on.wait(60)
            changes.put("one", b"a", b"1")
        outcome.append("written")

    def close() -> None:
        scratch.close()
        outcome.append("closed")

    threads = [threading.Thread(target=work), threading.Thread(target=close)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert outcome == ["written", "closed"]
    with pytest.raises(StoreError, match="closed"):
        scratch.clear("one")
