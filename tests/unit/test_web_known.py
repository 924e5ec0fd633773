"""What is kept of answers, and for how long."""

from __future__ import annotations

import math

from cachesrv.web.known import ABSENT, Known

NOW = 1_700_000_000.0
ANSWER = b"x" * 600


def fill(known: Known, answer: bytes) -> int:
    """How many there are when 1,000 of them are to be remembered, and those before."""
    for number in range(1000):
        known.remember(b"GET %s %d" % (answer[:1], number), answer, math.inf)
    return len(known.at(1, NOW))


def test_answers_hold_for_one_version_of_the_index() -> None:
    known = Known()
    assert known.at(1, NOW) == {}
    known.remember(b"GET", ANSWER, math.inf)
    assert known.at(1, NOW + 1) == {b"GET": ANSWER}
    assert known.at(2, NOW + 1) == {}
    assert known.at(1, NOW + 1) == {}


def test_answers_make_room_for_others_after_a_while() -> None:
    known = Known()
    known.at(1, NOW)
    known.remember(b"GET", ANSWER, math.inf)
    assert known.at(1, NOW + 59)
    assert not known.at(1, NOW + 61)
    known.remember(b"GET", ANSWER, math.inf)
    assert known.at(1, NOW + 119)


def test_answers_do_not_wait_for_the_time_from_which_a_clock_was_set_back() -> None:
    known = Known()
    known.at(1, NOW)
    known.remember(b"GET", ABSENT, math.inf)
    assert not known.at(1, NOW - 86_400)


def test_what_ends_before_is_not_remembered() -> None:
    known = Known()
    known.at(1, NOW)
    known.remember(b"GET", ABSENT, NOW + 59)
    known.remember(b"GET 2", ABSENT, NOW + 3600)
    assert known.at(1, NOW) == {b"GET 2": ABSENT}


def test_all_is_forgotten_on_demand() -> None:
    known = Known()
    known.at(1, NOW)
    known.remember(b"GET", ANSWER, math.inf)
    known.forget()
    assert known.at(1, NOW) == {}


def test_what_is_kept_is_bounded() -> None:
    known = Known(max_bytes=150_000)
    known.at(1, NOW)
    assert 100 <= fill(known, ANSWER) <= 120
    assert b"GET x 0" in known.at(1, NOW)
    known.at(2, NOW)
    known.remember(b"GET 999", ANSWER, math.inf)
    assert b"GET 999" in known.at(2, NOW)


def test_paths_leave_room_for_absences() -> None:
    known = Known(max_bytes=150_000)
    known.at(1, NOW)
    paths = fill(known, ANSWER)
    assert paths + 150 <= fill(known, ABSENT) <= paths + 250
