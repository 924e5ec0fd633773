"""How a push looks: as lines, as JSON, as bars; and what its summary counts."""

from __future__ import annotations

import io
import json
import re

import pytest

from cachesrv.push.events import (
    Event,
    Failed,
    Noted,
    PlanMade,
    Planned,
    Published,
    Realised,
    Resumed,
    Retrying,
    Sending,
    Sent,
    Stored,
    Summary,
)
from cachesrv.push.progress import JsonLines, Lines, size_text
from cachesrv.push.progress_bars import Bars
from cachesrv.push.tally import Tally

MIB = 1024 * 1024
A, B, C = ("0" * 31 + digit for digit in "123")
SUMMARY = Summary(
    paths=4, uploaded=1, present=1, upstream=1, failed=1, nar_bytes=10 * MIB, sent_bytes=2 * MIB, seconds=1.25
)
STORY: list[Event] = [
    Planned(path=f"{A}-one", decision="upload", reason="not in the cache", nar_size=10 * MIB),
    Planned(path=f"{B}-two", decision="present", reason="in the cache", nar_size=5),
    Planned(path=f"{C}-three", decision="upstream", reason="signed", nar_size=5),
    Planned(path=f"{C}-four", decision="conflict", reason="otherwise", nar_size=5),
    PlanMade(paths=4, upload=1, publish=0, present=1, upstream=1, conflict=1, nars=1, nar_bytes=10 * MIB),
    Failed(f"{C}-four", f"{C}-four otherwise"),
    Sending(f"{A}-one", 10 * MIB),
    Sent(f"{A}-one", 4 * MIB, MIB),
    Retrying(f"sending {A}-one", 1, 0.5, "the connection broke"),
    Sending(f"{A}-one", 10 * MIB),
    Sent(f"{A}-one", 10 * MIB, MIB),
    Resumed(f"{A}-one", 512 * 1024, 1, 3),
    Stored(f"{A}-one", 10 * MIB, MIB, 1.0),
    Published(f"{A}-one"),
    SUMMARY,
]


def lines(story: list[Event], *, dry_run: bool = False) -> tuple[list[str], list[str]]:
    """Of stdout and of stderr."""
    out, err = io.StringIO(), io.StringIO()
    with Lines(out, err, dry_run=dry_run) as rendering:
        for event in story:
            rendering(event)
    return out.getvalue().splitlines(), err.getvalue().splitlines()


def test_people_read_results_on_stdout_and_the_rest_on_stderr() -> None:
    out, err = lines(STORY)

    assert out == [
        "4 paths in 1.2 s: 1 pushed (10.0 MiB, 2.0 MiB sent), 1 already there, 1 left to upstream caches, 1 failed"
    ]
    assert err == [
        "1 of 4 paths to push, 1 NAR of 10.0 MiB",
        f"failed {C}-four: otherwise",
        f"the connection broke; trying again in 0.5 s (sending {A}-one, attempt 1)",
        f"resumed {A}-one  1 of 3 parts, 512.0 KiB, had been sent before",
        f"sent {A}-one  10.0 MiB as 1.0 MiB",
    ]


def test_what_goes_without_a_nar_is_told_too() -> None:
    plan = PlanMade(
        paths=2, upload=0, publish=1, present=1, upstream=0, conflict=0, nars=0, nar_bytes=0, realisations=1
    )
    realised = Realised("realisations/sha256:x!out.doi", f"{A}-one")
    _, err = lines([plan, Noted("no record can be kept"), Published(f"{A}-one"), realised])

    assert err == ["1 of 2 paths to push, 0 NARs of 0 B, 1 realisation", "note: no record can be kept"]


def test_names_of_any_kind_leave_the_terminal_alone() -> None:
    name = "no\x1b[31m\npath\udcff"
    _, err = lines([Failed(name, f"there is no {name}"), Noted("one\nline")])

    assert err == ["failed no [31m path: there is no no [31m path", "note: one line"]


def test_a_dry_run_says_of_each_path_what_and_why() -> None:
    out, _ = lines([*STORY[:4], Summary(paths=4, present=1)], dry_run=True)

    assert out[0] == f"upload   {A}-one  10.0 MiB: not in the cache"
    assert out[1] == f"present  {B}-two  5 B: in the cache"
    assert out[-1] == "4 paths in 0.0 s: 1 already there"


def test_scripts_read_an_object_a_line_and_the_summary_last() -> None:
    out = io.StringIO()
    with JsonLines(out) as rendering:
        for event in STORY:
            rendering(event)

    objects = [json.loads(line) for line in out.getvalue().splitlines()]
    assert objects[-1] == {
        "event": "summary",
        "paths": 4,
        "uploaded": 1,
        "present": 1,
        "upstream": 1,
        "failed": 1,
        "nar_bytes": 10 * MIB,
        "sent_bytes": 2 * MIB,
        "resumed_bytes": 0,
        "seconds": 1.25,
    }
    assert [one["event"] for one in objects if one["event"] != "planned"] == [
        *("plan", "failed", "sending", "retrying", "sending", "resumed", "stored", "published", "summary")
    ]
    assert objects[0] == {
        "event": "planned",
        "path": f"{A}-one",
        "decision": "upload",
        "reason": "not in the cache",
        "nar_size": 10 * MIB,
    }


def test_scripts_are_told_names_that_are_not_utf_8() -> None:
    out = io.StringIO()
    JsonLines(out)(Failed("./\udcff", "it leads nowhere"))

    assert out.getvalue().isascii()
    assert json.loads(out.getvalue()) == {"event": "failed", "path": "./\udcff", "error": "it leads nowhere"}


def test_a_summary_of_nothing_has_all_its_keys() -> None:
    out = io.StringIO()
    JsonLines(out)(Summary())

    assert len(json.loads(out.getvalue())) == 10


def bars(story: list[Event], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What is on stdout, and all that was ever on the terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out, err = io.StringIO(), io.StringIO()
    rendering = Bars(out, err)
    with rendering:
        for event in story:
            rendering(event)
            rendering._progress.refresh()
    return out.getvalue(), re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err.getvalue())


def test_bars_move_and_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    out, terminal = bars(STORY, monkeypatch)

    assert out.startswith("4 paths in 1.2 s: 1 pushed")
    assert f"failed {C}-four: otherwise" in terminal
    assert "the connection broke; trying again" in terminal
    whole = re.findall(r"(\d) of 1 path .*? ([\d.]+)/10.0 MiB", terminal)
    moves = [step for number, step in enumerate(whole) if number == 0 or whole[number - 1] != step]
    assert moves == [("0", "0.0"), ("0", "4.0"), ("0", "0.0"), ("0", "10.0"), ("1", "10.0")]


def test_markup_in_messages_is_only_text(monkeypatch: pytest.MonkeyPatch) -> None:
    _, terminal = bars([Failed("path", "[bold]not bold[/bold] [/")], monkeypatch)

    assert "[bold]not bold[/bold] [/" in terminal


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (5 * 2**50, "5120.0 TiB"),
    ],
)
def test_sizes_are_for_people(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_tally_counts_each_path_once() -> None:
    seen: list[Event] = []
    tally = Tally(seen.append)
    for event in [*STORY[:-1], Failed("nowhere", "leads nowhere")]:
        tally(event)

    summary = tally.summary()

    assert summary.seconds < 1
    assert (summary.paths, summary.uploaded, summary.present, summary.upstream, summary.failed) == (5, 1, 1, 1, 2)
    assert (summary.nar_bytes, summary.sent_bytes) == (10 * MIB, 2 * MIB)
    assert len(seen) == len(STORY)
