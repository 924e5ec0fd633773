"""The worker protocol without a daemon: bytes in, bytes out."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, DaemonError, TooLarge
from cachesrv.nix.daemon_messages import Frame, HungUp, NarTail, OperationFailed, clean, find_error
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.store_path import StorePath
from cachesrv.nix.wire import encode_string, encode_strings, encode_u64
from cachesrv.nix.worker_protocol import (
    REALISATIONS,
    Session,
    Steps,
    Version,
    handshake,
    nar_from_path,
    perform,
    perform_all,
    query_path_info,
)
from tests.fake_daemon import LAST, encode_error, encode_path_info
from tests.strategies import derivation_paths, hashes, store_paths

T = TypeVar("T")

STORE = "/nix/store"
HELLO = StorePath("1" * 32, "hello")
WORLD = StorePath("2" * 32, "world")
SESSION = json.loads((Path(__file__).parent.parent / "vectors/daemon/session.json").read_text())
RECORDED_STORE = "/tmp/cachesrv-vectors/store"

path_infos = st.builds(
    PathInfo,
    store_path=store_paths,
    nar_hash=hashes("sha256"),
    nar_size=st.integers(0, 2**64 - 1),
    references=st.lists(store_paths, max_size=4, unique=True).map(sorted).map(tuple),
    deriver=st.none() | derivation_paths,
    signatures=st.lists(st.text(max_size=20), max_size=3, unique=True).map(sorted).map(tuple),
    ca=st.none() | st.just("text:sha256:0000000000000000000000000000000000000000000000000000"),
    registration_time=st.integers(0, 2**64 - 1),
    ultimate=st.booleans(),
)


def drive(steps: Steps[T], received: bytes) -> tuple[T, bytes, bytes]:
    """Runs an exchange over given bytes; returns its result, what it sent, and the bytes that it left."""
    sent = b""
    try:
        wanted = next(steps)
        while True:
            if isinstance(wanted, bytes):
                sent += wanted
                wanted = next(steps)
            elif wanted > len(received):
                steps.throw(HungUp("it hung up"))
            else:
                data, received = received[:wanted], received[wanted:]
                wanted = steps.send(data)
    except StopIteration as stop:
        return stop.value, sent, received


def greeting(version: Version, *, features: tuple[str, ...] = (), nix: str = "2.99", trust: int = 1) -> bytes:
    """What a daemon of this version sends until the first operation."""
    return b"".join(
        (
            encode_u64(0x6478696F) + encode_u64(version[0] << 8 | version[1]),
            encode_strings(features) if version >= (1, 38) else b"",
            encode_string(nix) if version >= (1, 33) else b"",
            encode_u64(trust) if version >= (1, 35) else b"",
            LAST,
        )
    )


def recorded(name: str) -> tuple[bytes, bytes]:
    return bytes.fromhex(SESSION[name]["sent"]), bytes.fromhex(SESSION[name]["received"])


# What nix-daemon 2.8.0 said and understood


def test_the_recorded_handshake() -> None:
    sent, received = recorded("handshake")
    assert drive(handshake(), received) == (Session((1, 34), "2.8.0", frozenset()), sent, b"")


def test_the_recorded_path_info() -> None:
    sent, received = recorded("valid")
    expected = SESSION["path-info"]
    path = StorePath.parse_full(expected["path"], RECORDED_STORE)
    info = PathInfo(
        store_path=path,
        nar_hash=Hash.parse(expected["narHash"]),
        nar_size=expected["narSize"],
        references=tuple(StorePath.parse_full(text, RECORDED_STORE) for text in expected["references"]),
        deriver=StorePath.parse_full(expected["deriver"], RECORDED_STORE),
        signatures=tuple(expected["signatures"]),
        ca=None,
        registration_time=expected["registrationTime"],
        ultimate=True,
    )
    assert path in info.references
    assert drive(perform(query_path_info(path, RECORDED_STORE)), received) == (info, sent, b"")


def test_the_recorded_answer_for_a_path_that_is_not_valid() -> None:
    sent, received = recorded("invalid")
    absent = StorePath("0" * 32, "absent")
    assert drive(perform(query_path_info(absent, RECORDED_STORE)), received) == (None, sent, b"")


def test_the_recorded_nar_follows_the_answer() -> None:
    sent, received = recorded("nar")
    path = StorePath.parse_full(SESSION["path-info"]["path"], RECORDED_STORE)
    nar = bytes.fromhex(SESSION["nar"]["then"])
    assert drive(perform(nar_from_path(path, RECORDED_STORE)), received + nar) == (None, sent, nar)
    tail = NarTail(SESSION["path-info"]["narSize"])
    tail.feed(nar)
    assert tail.whole
    assert tail.error() is None


def test_the_recorded_error_in_place_of_a_nar() -> None:
    tail = NarTail(1 << 20)
    tail.feed(bytes.fromhex(SESSION["no-nar"]["then"]))
    assert not tail.whole
    path = f"{RECORDED_STORE}/{'0' * 32}-absent"
    assert tail.error() == f"getting status of '{path}': No such file or directory"


# Handshake


@pytest.mark.parametrize("version", [(1, 32), (1, 33), (1, 34), (1, 35), (1, 36), (1, 37), (1, 38)])
def test_versions_up_to_ours_are_spoken(version: Version) -> None:
    session, sent, rest = drive(handshake(), greeting(version))
    assert session == Session(version, "2.99" if version >= (1, 33) else "", frozenset())
    features = encode_strings((REALISATIONS,)) if version == (1, 38) else b""
    assert sent == encode_u64(0x6E697863) + encode_u64(0x0126) + features + bytes(16)
    assert rest == b""


@pytest.mark.parametrize("version", [(1, 39), (1, 99), (1, 255)])
def test_with_a_newer_daemon_ours_is_spoken(version: Version) -> None:
    session, _, rest = drive(handshake(), greeting(version))
    assert session.version == (1, 38)
    assert rest == b""


@pytest.mark.parametrize("features", [(), ("delete-dead-specific-referrers", "realisation-with-path-not-hash"), ("x",)])
def test_features_of_the_daemon_are_read(features: tuple[str, ...]) -> None:
    session, _, rest = drive(handshake(), greeting((1, 38), features=features))
    assert session == Session((1, 38), "2.99", frozenset(features) & {REALISATIONS})
    assert rest == b""


@pytest.mark.parametrize("trust", [0, 1, 2])
def test_any_trust_will_do(trust: int) -> None:
    assert drive(handshake(), greeting((1, 35), trust=trust))[0].version == (1, 35)


@pytest.mark.parametrize("version", [(1, 10), (1, 21), (1, 31)])
def test_too_old_a_daemon_is_refused_with_a_way_out(version: Version) -> None:
    with pytest.raises(DaemonError, match=rf"protocol 1\.{version[1]}, at least 1\.32 .* Nix 2\.4 .* --store local"):
        drive(handshake(), greeting(version))


@pytest.mark.parametrize("version", [(0, 40), (2, 0), (2**40, 38)])
def test_another_major_version_is_refused(version: Version) -> None:
    with pytest.raises(DaemonError, match=rf"protocol {version[0]}\.{version[1]}, which is not"):
        drive(handshake(), greeting(version))


def test_a_daemon_that_hangs_up_at_once_may_not_like_the_user() -> None:
    with pytest.raises(HungUp, match=r"^it hung up, as it does with users that it does not allow$"):
        drive(handshake(), b"")
    with pytest.raises(HungUp, match=r"^it hung up$"):
        drive(handshake(), greeting((1, 34))[:10])


def test_another_protocol_is_bad_input() -> None:
    with pytest.raises(BadInput, match="SSH-2"):
        drive(handshake(), b"SSH-2.0-OpenSSH_9.2\r\n")


def test_a_daemon_that_cannot_open_its_store_says_so() -> None:
    received = greeting((1, 34)).removesuffix(LAST) + encode_error("opening the database: disk I/O error")
    with pytest.raises(OperationFailed, match=r"^opening the database: disk I/O error$"):
        drive(handshake(), received)


# Frames before the result


def test_log_lines_and_activities_are_passed_over() -> None:
    fields = encode_u64(2) + encode_u64(0) + encode_u64(7) + encode_u64(1) + encode_string("text")
    frames = (
        encode_u64(Frame.NEXT) + encode_string("warning: \x1b[31mred\x1b[0m\n"),
        encode_u64(Frame.NEXT) + encode_string(b"\xff not UTF-8"),
        encode_u64(Frame.START_ACTIVITY) + encode_u64(1) * 3 + encode_string("querying") + fields + encode_u64(0),
        encode_u64(Frame.RESULT) + encode_u64(1) * 2 + fields,
        encode_u64(Frame.STOP_ACTIVITY) + encode_u64(1),
    )
    operation = query_path_info(HELLO, STORE)
    assert drive(perform(operation), b"".join(frames) + LAST + encode_u64(0))[0] is None


@pytest.mark.parametrize("kind", [Frame.READ, Frame.WRITE])
def test_data_that_no_operation_of_ours_exchanges_is_bad_input(kind: Frame) -> None:
    with pytest.raises(BadInput, match="exchange data"):
        drive(perform(query_path_info(HELLO, STORE)), encode_u64(kind) + encode_u64(1))


@pytest.mark.parametrize(
    "received",
    [
        encode_u64(0xDEADBEEF),
        encode_u64(Frame.RESULT) + encode_u64(1) * 3 + encode_u64(2),
        encode_u64(Frame.ERROR) + encode_string("Warning"),
        encode_u64(Frame.ERROR) + encode_string("Error") + encode_u64(0) + encode_string("") * 2 + encode_u64(1),
    ],
    ids=["unknown frame", "unknown field", "unknown error", "error with position"],
)
def test_frames_that_no_daemon_sends_are_bad_input(received: bytes) -> None:
    with pytest.raises(BadInput):
        drive(perform(query_path_info(HELLO, STORE)), received + bytes(64))


def test_a_log_line_of_endless_length_is_refused() -> None:
    with pytest.raises(TooLarge):
        drive(perform(query_path_info(HELLO, STORE)), encode_u64(Frame.NEXT) + encode_u64(2**50))


# Errors


def test_an_error_becomes_one_plain_line() -> None:
    message = "\x1b[31;1merror:\x1b[0m path '\x1b[35;1m/nix/store/x\x1b[0m'\n  is \x1b]8;;http://x\x07corrupt\x00"
    with pytest.raises(OperationFailed) as caught:
        drive(perform(query_path_info(HELLO, STORE)), encode_error(message))
    assert str(caught.value) == "error: path '/nix/store/x' is corrupt"


def test_an_error_tells_what_the_daemon_was_doing() -> None:
    received = encode_error("disk is full", "while opening the database", "while \x1b[1mlooking\x1b[0m")
    with pytest.raises(OperationFailed, match=r"^disk is full \(while opening the database; while looking\)$"):
        drive(perform(query_path_info(HELLO, STORE)), received)


def test_an_error_of_any_length_stays_readable() -> None:
    with pytest.raises(OperationFailed) as caught:
        drive(perform(query_path_info(HELLO, STORE)), encode_error("x" * 100_000, *["while waiting"] * 1000))
    assert len(str(caught.value)) < 2500


def test_an_error_without_words_still_has_some() -> None:
    with pytest.raises(OperationFailed, match="without a message"):
        drive(perform(query_path_info(HELLO, STORE)), encode_error(""))


@given(st.binary(max_size=60) | st.text(max_size=60))
@example("\x1b[")
@example("\x9b31m")
@example(b"\xff\xfe")
@settings(max_examples=100)
def test_nothing_is_left_that_a_terminal_would_obey(message: str | bytes) -> None:
    text = clean(message)
    assert text.isprintable() or not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text)


# Operations


@given(path_infos)
@settings(max_examples=40)
def test_path_infos_come_back(info: PathInfo) -> None:
    result, sent, rest = drive(perform(query_path_info(info.store_path, STORE)), LAST + encode_path_info(info))
    assert result == info
    assert sent == encode_u64(26) + encode_string(f"{STORE}/{info.store_path}")
    assert rest == b""


def test_references_and_signatures_are_sorted_whatever_the_daemon_does() -> None:
    info = PathInfo(HELLO, Hash.of("sha256", b""), 120, (WORLD, HELLO), signatures=("b:x", "a:x"))
    result = drive(perform(query_path_info(HELLO, STORE)), LAST + encode_path_info(info))[0]
    assert result
    assert result.references == (HELLO, WORLD)
    assert result.signatures == ("a:x", "b:x")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (b"/nix/store/2222", b"/nix/stare/2222"),
        (b"2" * 32 + b"-world", b"2" * 32 + b"/world"),
        (b"2" * 32, b"e" * 32),
        (b"e3b0c44298fc1c149afbf4c8996fb924", b"x3b0c44298fc1c149afbf4c8996fb924"),
    ],
    ids=["other store", "no name", "no base-32", "no hash"],
)
def test_a_path_info_that_makes_no_sense_is_bad_input(right: bytes, wrong: bytes) -> None:
    received = LAST + encode_path_info(PathInfo(HELLO, Hash.of("sha256", b""), 120, (WORLD,)))
    assert right in received
    with pytest.raises(BadInput):
        drive(perform(query_path_info(HELLO, STORE)), received.replace(right, wrong))


def test_many_questions_are_asked_at_once_and_answered_in_order() -> None:
    infos = [PathInfo(path, Hash.of("sha256", b""), 120) for path in (WORLD, HELLO)]
    operations = [query_path_info(path, STORE) for path in (WORLD, StorePath("3" * 32, "no"), HELLO)]
    steps = perform_all(operations)
    assert next(steps) == b"".join(operation.request for operation in operations)
    received = LAST + encode_path_info(infos[0]) + LAST + encode_u64(0) + LAST + encode_path_info(infos[1])
    assert drive(perform_all(operations), received)[0] == [infos[0], None, infos[1]]


def test_after_a_failure_the_other_answers_are_read() -> None:
    operations = [query_path_info(HELLO, STORE)] * 4
    received = LAST + encode_u64(0) + encode_error("first") + encode_error("second") + LAST + encode_u64(0)
    with pytest.raises(OperationFailed, match=r"^first$"):
        drive(perform_all(operations), received)
    with pytest.raises(DaemonError, match=r"^first$") as caught:
        drive(perform_all(operations), received[:-1])
    assert not isinstance(caught.value, OperationFailed)


def test_a_failure_is_what_counts_when_the_daemon_then_hangs_up() -> None:
    operations = [query_path_info(HELLO, STORE)] * 3
    with pytest.raises(DaemonError, match="out of memory") as caught:
        drive(perform_all(operations), LAST + encode_u64(0) + encode_error("Nix daemon out of memory"))
    assert not isinstance(caught.value, OperationFailed)  # the connection is of no use any more


def test_without_a_failure_the_end_is_what_counts() -> None:
    with pytest.raises(HungUp):
        drive(perform_all([query_path_info(HELLO, STORE)] * 2), LAST + encode_u64(0))


# Truncation and garbage


@pytest.mark.parametrize("name", ["handshake", "valid", "invalid"])
def test_a_conversation_that_ends_anywhere_raises_what_the_driver_throws(name: str) -> None:
    _, received = recorded(name)
    for end in range(len(received)):
        exchange: Steps[Any] = handshake() if name == "handshake" else perform(query_path_info(HELLO, RECORDED_STORE))
        with pytest.raises(HungUp):
            drive(exchange, received[:end])


@given(st.binary(max_size=120), st.sampled_from(["", "magic", "1.38", "last", "info", "error"]))
@settings(max_examples=200)
def test_any_bytes_give_a_value_or_a_clear_error(garbage: bytes, start: str) -> None:
    starts = {
        "": b"",
        "magic": encode_u64(0x6478696F),
        "1.38": greeting((1, 38)).removesuffix(LAST),
        "last": LAST,
        "info": LAST + encode_u64(1),
        "error": encode_u64(Frame.ERROR) + encode_string("Error"),
    }
    exchange: Steps[Any] = (
        handshake() if start in ("", "magic", "1.38") else perform_all([query_path_info(HELLO, STORE)] * 2)
    )
    with suppress(BadInput, DaemonError):
        drive(exchange, starts[start] + garbage)


# The end of a NAR

NAR = bytes.fromhex(SESSION["nar"]["then"])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
@settings(max_examples=30)
def test_a_nar_is_whole_however_it_is_cut(sizes: list[int]) -> None:
    tail = NarTail(len(NAR))
    rest = NAR
    while rest:
        assert not tail.whole
        size = sizes[len(rest) % len(sizes)]
        tail.feed(rest[:size])
        rest = rest[size:]
        assert tail.left == len(rest)
    assert tail.whole


def test_bytes_that_end_otherwise_are_no_nar() -> None:
    tail = NarTail(len(NAR))
    tail.feed(NAR[:-1] + b"x")
    assert not tail.left
    assert not tail.whole
    assert tail.error() is None


def test_an_error_is_found_behind_a_large_nar_in_little_memory() -> None:
    tail = NarTail(1 << 30)
    for _ in range(100):
        tail.feed(bytes(100_000))
    tail.feed(encode_error("reading from file: Input/output error")[:50])
    tail.feed(encode_error("reading from file: Input/output error")[50:])
    assert tail.error() == "reading from file: Input/output error"
    assert tail.left == (1 << 30) - 10_000_000 - len(encode_error("reading from file: Input/output error"))
    assert sum(map(len, tail._recent)) < 300_000


def test_an_error_may_come_after_the_last_byte_that_was_due() -> None:
    error = encode_error("gone")
    tail = NarTail(20)
    tail.feed(error[:20])
    assert tail.error() is None
    assert tail.error(error[20:]) == "gone"


@given(st.binary(max_size=100))
@settings(max_examples=50)
def test_half_an_error_is_none(rest: bytes) -> None:
    assert find_error(encode_error("x")[:40]) is None
    find_error(encode_error("x")[:24] + rest)
