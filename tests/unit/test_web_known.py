"""What is kept of answers, and for how long."""

from __future__ import annotations

import math

from cachesrv.web.known import Answer, Known

NOW = 1_700_000_000.0
ANSWER: Answer = (b"x" * 600, math.inf)


def test_answers_hold_for_one_version_of_the_index() -> None:
    known = Known()
    assert known.at(1, NOW) == {}
    known.remember(b"GET", ANSWER)
    assert known.at(1, NOW + 1) == {b"GET": ANSWER}
    assert known.at(2, NOW + 1) == {}
    assert known.at(1, NOW + 1) == {}


def test_answers_make_room_for_others_after_a_while() -> None:
    known = Known()
    known.at(1, NOW)
    known.remember(b"GET", ANSWER)
    assert known.at(1, NOW + 59)
    assert not known.at(1, NOW + 61)
    known.remember(b"GET", ANSWER)
    assert known.at(1, NOW + 119)


def test_all_is_forgotten_on_demand() -> None:
    known = Known()
    known.at(1, NOW)
    known.remember(b"GET", ANSWER)
    known.forget()
    assert known.at(1, NOW) == {}


def test_what_is_kept_is_bounded() -> None:
    known = Known(max_bytes=100_000)
    answers = known.at(1, NOW)
    for number in range(1000):
        if known.is_full:
            break
        known.remember(b"GET %d" % number, ANSWER)
    assert 100 <= len(answers) <= 115
    assert b"GET 0" in answers
    known.at(2, NOW)
    known.remember(b"GET 999", ANSWER)
    assert b"GET 999" in answers


def test_absences_take_room_too() -> None:
    known = Known(max_bytes=100_000)
    answers = known.at(1, NOW)
    for number in range(1000):
        if known.is_full:
            break
        known.remember(b"GET %d" % number, (None, NOW + 9))
    assert len(answers) < 350
