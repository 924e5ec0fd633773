"""What happens to each path of a push, decided from data."""

from __future__ import annotations

import pytest

from cachesrv import api
from cachesrv.errors import ServerError
from cachesrv.push.plan import Answers, Decision, Plan, make_plan, plan_refused
from tests.push_doubles import path_info, store_path

BASE = path_info("base")
LEFT = path_info("left", ["base", "left"])
RIGHT = path_info("right", ["base"])
TOP = path_info("top", ["left", "right"])
DIAMOND = [TOP, RIGHT, LEFT, BASE]


def names(*infos: str) -> frozenset[str]:
    return frozenset(store_path(name).base_name for name in infos)


def missing(*infos: str, stored: tuple[str, ...] = ()) -> Answers:
    return Answers(names(*infos), names(*stored))


def decisions(plan: Plan) -> dict[str, str]:
    return {step.path.name: step.decision.value for step in plan.steps}


def test_paths_that_are_missing_are_uploaded_references_first() -> None:
    plan = make_plan(DIAMOND, missing("base", "left", "right", "top"))

    assert decisions(plan) == dict.fromkeys(("base", "left", "right", "top"), "upload")
    order = [step.path.name for step in plan.steps]
    assert (order[0], order[-1]) == ("base", "top")
    assert [nar.infos[0].store_path.name for nar in plan.nars] == order
    assert plan.nar_bytes == 400


def test_paths_that_are_there_are_left_alone() -> None:
    plan = make_plan(DIAMOND, missing("top"))

    assert decisions(plan) == {"base": "present", "left": "present", "right": "present", "top": "upload"}
    assert plan.count(Decision.PRESENT) == 3


def test_a_nar_that_is_stored_is_published_only() -> None:
    plan = make_plan([BASE], missing("base", stored=("base",)))

    assert decisions(plan) == {"base": "publish"}
    assert plan.nars == ()


def test_one_nar_of_several_paths_is_sent_once() -> None:
    twins = [path_info("a", nar="same"), path_info("b", nar="same"), path_info("c", nar="other")]

    plan = make_plan(twins, missing("a", "b", "c"))

    assert sorted(decisions(plan).values()) == ["publish", "upload", "upload"]
    assert sorted(len(nar.infos) for nar in plan.nars) == [1, 2]
    assert plan.nar_bytes == 200
    (shared,) = (step for step in plan.steps if step.decision is Decision.PUBLISH)
    assert "its NAR is that of" in shared.reason


def test_a_conflict_names_both_hashes() -> None:
    published = f"sha256:{'0' * 52}"

    plan = make_plan([BASE], Answers(conflicts={BASE.store_path.base_name: published}))

    assert decisions(plan) == {"base": "conflict"}
    assert published in plan.steps[0].reason
    assert BASE.nar_hash.nix32 in plan.steps[0].reason


def test_what_a_server_says_of_a_conflict_does_nothing_to_a_terminal() -> None:
    plan = make_plan([BASE], Answers(conflicts={BASE.store_path.base_name: "\x1b[2J\nsha256:0"}))

    assert plan.steps[0].reason.isprintable()
    assert "sha256:0" in plan.steps[0].reason


def test_what_an_upstream_has_is_left_to_it() -> None:
    plan = make_plan(DIAMOND, missing("base", "left", "right", "top"), {BASE.store_path: "somebody has it"})

    assert decisions(plan) == {"base": "upstream", "left": "upload", "right": "upload", "top": "upload"}
    assert plan.steps[0].reason == "somebody has it"


def test_a_path_in_the_cache_is_present_whoever_else_has_it() -> None:
    assert decisions(make_plan([BASE], Answers(), {BASE.store_path: "somebody has it"})) == {"base": "present"}


@pytest.mark.parametrize(
    "answers",
    [
        missing("base", "unasked"),
        missing(stored=("base",)),
        Answers(names("base"), conflicts={BASE.store_path.base_name: "sha256:x"}),
    ],
    ids=["unasked", "stored, not missing", "missing and in conflict"],
)
def test_answers_that_make_no_sense_are_refused(answers: Answers) -> None:
    with pytest.raises(ServerError):
        make_plan([BASE], answers)


def test_answers_to_batches_are_put_together() -> None:
    merged = Answers.merge(
        [
            api.MissingAnswer(["a", "b"], ["b"], []),
            api.MissingAnswer(["c"], [], [api.PublishedOtherwise("d", "sha256:x")]),
        ]
    )

    assert merged == Answers(frozenset("abc"), frozenset("b"), {"d": "sha256:x"})


def test_what_an_upstream_does_not_have_after_all_is_sent() -> None:
    answers = missing("base", "left", "right", "top")
    plan = make_plan(DIAMOND, answers, {BASE.store_path: "somebody has it"})
    now = answers.after(stored=[LEFT.store_path, RIGHT.store_path], published=[RIGHT.store_path])

    second = plan_refused(plan, [LEFT.store_path, TOP.store_path], now)

    assert second is not None
    assert decisions(second) == {"base": "upload", "left": "publish", "right": "present", "top": "upload"}


def test_nothing_is_made_up_for_when_nothing_was_left_to_upstreams() -> None:
    answers = missing("base", "left")
    plan = make_plan([BASE, LEFT], answers)

    assert plan_refused(plan, [LEFT.store_path], answers) is None
