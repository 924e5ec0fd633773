"""The command as users meet it: exit statuses, errors of one line, help, and what is imported for it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import pytest

import cachesrv.__main__
import cachesrv.cli
from cachesrv.cli import COMMANDS, run
from cachesrv.errors import BadInput, ConfigError
from tests.push_doubles import FakeCache, answer, hang

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiohttp import web


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@dataclass
class User:
    """Who has a home, a Nix store of their own, and the command."""

    home: Path
    environ: dict[str, str]

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cachesrv", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environ,
        )

    async def runs(self, *arguments: str, stdin: str = "") -> Outcome:
        process = await self.start(*arguments)
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 60)
        assert process.returncode is not None
        return Outcome(process.returncode, out.decode(), err.decode())

    async def pushes(self, cache: FakeCache, *arguments: str, stdin: str = "") -> Outcome:
        self.environ["CACHESRV_URL"] = cache.url
        return await self.runs("push", "--store", str(self.home / "root"), *arguments, stdin=stdin)

    def adds(self, name: str, text: str) -> str:
        """A path to the store."""
        file = self.home / name
        file.write_text(text)
        done = subprocess.run(
            ["nix-store", "--store", str(self.home / "root"), "--add", str(file)],
            check=True,
            capture_output=True,
            text=True,
            env=self.environ | {"NIX_REMOTE": ""},
        )
        return done.stdout.strip()


@pytest.fixture
def user(tmp_path: Path) -> User:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CACHESRV_TOKEN": "secret"}
    return User(tmp_path, environ)


async def test_push_sends_and_says_so(user: User, cache: FakeCache) -> None:
    path = user.adds("greeting", "hello")

    done = await user.pushes(cache, path)

    assert (done.status, done.err.count("sent ")) == (0, 1)
    assert done.out.startswith("1 path in ")
    assert set(cache.published) == {path.removeprefix("/nix/store/")}


async def test_push_takes_links_names_inside_and_standard_input(user: User, cache: FakeCache) -> None:
    one, two = user.adds("one", "1"), user.adds("two", "2")
    (user.home / "result").symlink_to(one)

    done = await user.pushes(cache, str(user.home / "result"), "--stdin", stdin=f"\n  {two}/bin/x  \n{one}\n")

    assert done.status == 0
    assert set(cache.published) == {path.removeprefix("/nix/store/") for path in (one, two)}


async def test_push_for_scripts_ends_in_a_summary(user: User, cache: FakeCache) -> None:
    done = await user.pushes(cache, "--json", user.adds("greeting", "hello"))

    assert done.err == ""
    events = [json.loads(line) for line in done.out.splitlines()]
    assert events[-1]["event"] == "summary"
    assert events[-1]["uploaded"] == 1


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("CACHESRV_TOKEN", "another", 1),
        ("CACHESRV_URL", "http://127.0.0.1:1/main", 1),
        ("CACHESRV_URL", "gopher://cache", 2),
        ("NIX_REMOTE", "gopher://store", 2),
    ],
)
async def test_push_for_scripts_that_fails_at_once_ends_in_a_summary(
    user: User, cache: FakeCache, variable: str, value: str, status: int
) -> None:
    path = user.adds("greeting", "hello")
    user.environ |= {"CACHESRV_URL": cache.url, "NIX_REMOTE": str(user.home / "root"), variable: value}
    done = await user.runs("push", "--json", path)

    assert (done.status, done.err.count("\n")) == (status, 1)
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "retrying"] == ["summary"]
    assert (events[-1]["paths"], events[-1]["failed"]) == (0, 0)


async def test_push_that_fails_at_once_says_why_and_nothing_else(user: User, cache: FakeCache) -> None:
    user.environ["CACHESRV_TOKEN"] = "another"
    done = await user.pushes(cache, user.adds("greeting", "hello"))

    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert "does not accept the token" in done.err


async def test_push_that_fails_later_sums_up(user: User, cache: FakeCache) -> None:
    """What is known of some paths is not kept back."""
    cache.fail("nar", answer(507, "full"))
    done = await user.pushes(cache, user.adds("greeting", "hello"))

    assert done.status == 1
    assert done.out.startswith("1 path in ")


async def test_push_of_nothing_is_done(user: User, cache: FakeCache) -> None:
    user.adds("greeting", "hello")
    done = await user.pushes(cache, "--stdin")

    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("0 paths in ")


async def test_push_of_some_bad_paths_names_them(user: User, cache: FakeCache) -> None:
    missing = f"/nix/store/{'0' * 32}-missing"

    done = await user.pushes(cache, user.adds("greeting", "hello"), missing, "./nowhere")

    assert done.status == 3
    assert f"failed {missing}:" in done.err
    assert "failed ./nowhere:" in done.err
    assert len(cache.published) == 1


async def test_push_without_a_url_or_paths_is_wrong_usage(user: User) -> None:
    assert await user.runs("push", "x") == Outcome(
        2,
        "",
        "cachesrv: which cache? give its URL (--to for pushes), set CACHESRV_URL, or write it to"
        f" {user.home}/.config/cachesrv/"
        'client.toml (a line: url = "https://…/main")\n',
    )
    no_paths = await user.runs("push", "--to", "http://127.0.0.1:1/main")
    assert no_paths == Outcome(2, "", "cachesrv: which paths? name them, or say --stdin (see cachesrv push --help)\n")


async def test_push_to_nobody_is_one_line(user: User) -> None:
    path = user.adds("greeting", "hello")
    async with FakeCache() as gone:
        user.environ["CACHESRV_URL"] = gone.url

    done = await user.runs("push", "--store", str(user.home / "root"), path)

    assert (done.status, done.out) == (1, "")
    url = user.environ["CACHESRV_URL"]
    assert done.err.splitlines()[-1].startswith(f"cachesrv: {url} cannot be reached: Connection refused")
    assert "Traceback" not in done.err


async def test_push_with_a_wrong_token_does_not_show_it(user: User, cache: FakeCache) -> None:
    path = user.adds("greeting", "hello")
    user.environ["CACHESRV_TOKEN"] = "hunter2"

    done = await user.pushes(cache, path)

    assert done.status == 1
    assert done.err == f"cachesrv: {cache.url} does not accept the token from $CACHESRV_TOKEN: no valid token\n"


async def test_interrupting_a_push_ends_it_at_once(user: User, cache: FakeCache) -> None:
    path = user.adds("greeting", "hello")
    sending = asyncio.Event()

    async def begin(request: web.Request) -> web.StreamResponse:
        sending.set()
        return await hang(request)

    cache.fail("nar", begin)
    user.environ["CACHESRV_URL"] = cache.url
    process = await user.start("push", "--store", str(user.home / "root"), "--json", path)
    await asyncio.wait_for(sending.wait(), 20)

    process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), 20)

    assert process.returncode == 130
    assert err.strip() == b"cachesrv: interrupted"
    assert json.loads(out.splitlines()[-1])["event"] == "summary"


def all_of(terminal: int) -> bytes:
    """What is written to its other end until that is closed: the terminal itself holds 4 KiB."""
    shown = b""
    with open(terminal, "rb", buffering=0) as file, suppress(OSError):  # EIO is the end of a terminal
        while piece := file.read(4096):
            shown += piece
    return shown


async def test_bars_are_for_terminals(user: User, cache: FakeCache) -> None:
    path = user.adds("greeting", "hello")
    cache.fail("nar", answer(422, "not that one"))
    terminal, end = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cachesrv", "push", "--store", str(user.home / "root"), path),
        stdout=asyncio.subprocess.PIPE,
        stderr=end,
        env=user.environ | {"CACHESRV_URL": cache.url, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(end)
    reading = asyncio.create_task(asyncio.to_thread(all_of, terminal))
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    shown = (await reading).decode()

    assert process.returncode == 3
    assert out.startswith(b"1 path in ")
    assert "\x1b[" in shown
    assert "not that one" in shown


async def test_help_says_how(user: User) -> None:
    done = await user.runs("push", "--help")

    assert done.status == 0
    for text in ("Examples:", "cachesrv push ./result", "--token-file", "Exit status"):
        assert text in done.out
    assert (await user.runs("--help")).out.count("\n  ") >= len(COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["queue"]])
async def test_without_a_command_it_helps(user: User, arguments: list[str]) -> None:
    done = await user.runs(*arguments)

    assert (done.status, done.out) == (2, "")
    assert done.err == (await user.runs(*arguments, "--help")).out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nonsense"], "cachesrv: No such command 'nonsense'. (see cachesrv --help)"),
        (["pusch"], "cachesrv: there is no command 'pusch': did you mean push? (see cachesrv --help)"),
        (["push", "--jobs", "0", "x"], "cachesrv: Invalid value for '--jobs': 0 is not in the range 1<=x<=256."),
        (["push", "--nonsense"], "cachesrv: No such option"),
        (["push", "--level", "20", "x"], "cachesrv: Invalid value for '--level': '20' is neither a number"),
        (["verify", "--from", "x"], "cachesrv: --from is for --repair and --determinism (see cachesrv verify --help)"),
        (["verify", "--force"], "cachesrv: --force is for --repair (see cachesrv verify --help)"),
        (["verify", "--determinism"], "cachesrv: --determinism: which paths? (see cachesrv verify --help)"),
        (["push", "--level", "²", "x"], "cachesrv: Invalid value for '--level': '²' is neither a number"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


def _command(error: BaseException | int | None) -> Callable[[], click.Command]:
    @click.command()
    def command() -> int | None:
        if isinstance(error, BaseException):
            raise error
        return error

    return lambda *_: command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (BadInput("not a path"), 1, "cachesrv: not a path\n"),
        (ConfigError("no such key"), 2, "cachesrv: no such key\n"),
        (BadInput("no \x1b[2J\udcff in it"), 1, "cachesrv: no \\x1b[2J\\udcff in it\n"),
        (KeyboardInterrupt(), 130, "cachesrv: interrupted\n"),
        (click.Abort(), 130, "cachesrv: interrupted\n"),
        (
            ZeroDivisionError("x"),
            1,
            "cachesrv: defect, please report it: ZeroDivisionError: x (CACHESRV_DEBUG=1 says more)\n",
        ),
    ],
)
def test_each_end_has_its_status_and_at_most_a_line(
    error: BaseException | int | None,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cachesrv.cli.LazyGroup, "get_command", _command(error))

    assert run(["push"]) == status
    assert capsys.readouterr().err.lstrip() == line


def test_an_interruption_comes_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cachesrv.cli, "main", interrupted)
    monkeypatch.setattr(sys, "argv", ["cachesrv", "push"])
    with pytest.raises(SystemExit, match="130"):
        cachesrv.__main__.main()


def test_a_defect_can_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cachesrv.cli.LazyGroup, "get_command", _command(ZeroDivisionError()))
    monkeypatch.setenv("CACHESRV_DEBUG", "1")

    with pytest.raises(ZeroDivisionError):
        run(["push"])


async def test_a_reader_who_leaves_early_is_no_defect(user: User, cache: FakeCache) -> None:
    paths = [user.adds(name, name) for name in ("one", "two")]
    user.environ["CACHESRV_URL"] = cache.url
    command = " ".join([sys.executable, "-m cachesrv push --dry-run --store", str(user.home / "root"), *paths])
    shell = await asyncio.create_subprocess_shell(
        f"({command}; echo $? >&2) | true", stderr=asyncio.subprocess.PIPE, env=user.environ
    )
    _, err = await asyncio.wait_for(shell.communicate(), 60)

    assert err in (b"1\n", b"0\n")


async def in_shell(user: User, command: str) -> Outcome:
    """What `cachesrv` does as a shell starts it, which knows more about redirections than we do."""
    shell = await asyncio.create_subprocess_shell(
        command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=user.environ | {"cachesrv": f"{sys.executable} -m cachesrv"},
    )
    out, err = await asyncio.wait_for(shell.communicate(), 60)
    assert shell.returncode is not None
    return Outcome(shell.returncode, out.decode(), err.decode())


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
async def test_streams_may_be_closed(user: User, cache: FakeCache, closed: str) -> None:
    path = user.adds("greeting", "hello")
    user.environ["CACHESRV_URL"] = cache.url
    done = await in_shell(user, f"echo {path} | $cachesrv push --stdin --store {user.home}/root {path} {closed}")

    assert done.status == 0
    assert "defect" not in done.err
    assert path.rpartition("/")[2] in cache.published


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "utf-8:strict"])
async def test_names_go_through_whatever_the_locale(user: User, encoding: str) -> None:
    user.environ |= {"PYTHONIOENCODING": encoding, "CACHESRV_URL": "http://127.0.0.1:9/main"}
    names = b"./\xff\n./\xc3\xbc\n"
    user.adds("greeting", "hello")
    process = await user.start("push", "--json", "--stdin", "--store", str(user.home / "root"))
    out, err = await asyncio.wait_for(process.communicate(names), 60)

    assert err == b""
    assert [json.loads(line).get("path") for line in out.splitlines()] == ["./\udcff", "./ü", None]


@pytest.mark.parametrize("command", ["--help", "push --dry-run --json", "ls", "cat"])
async def test_output_that_finds_no_room_is_told(user: User, cache: FakeCache, command: str) -> None:
    path = user.adds("greeting", "hello")
    user.environ["CACHESRV_URL"] = cache.url
    user.environ["NIX_REMOTE"] = str(user.home / "root")
    done = await in_shell(user, f"$cachesrv {command} {path if command != '--help' else ''} > /dev/full")

    assert (done.status, done.err) == (1, "cachesrv: the output cannot be written: No space left on device\n")


def test_every_command_is_there_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert run([name, "--help"]) == 0
        assert f"Usage: cachesrv {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "never"),
    [
        (["--help"], {"asyncio", "aiohttp", "msgspec", "rich", "sqlalchemy", "boto3"}),
        (["push", "--help"], {"asyncio", "aiohttp", "rich", "sqlalchemy"}),
        (["push", "--to", "http://127.0.0.1:1/main", "--stdin"], {"rich", "sqlalchemy", "boto3", "structlog", "lmdb"}),
    ],
)
async def test_a_command_imports_only_what_it_needs(user: User, arguments: list[str], never: set[str]) -> None:
    user.adds("greeting", "hello")
    code = (
        "import sys; from cachesrv.cli import run; status = run(sys.argv[1:]);"
        "print(status, *sorted(sys.modules), file=sys.stderr)"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *arguments, "--store" if "--to" in arguments else "--help"),
        *([str(user.home / "root")] if "--to" in arguments else []),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=user.environ,
    )
    _, err = await asyncio.wait_for(process.communicate(), 60)
    status, *imported = err.decode().split()

    assert status == "0"
    assert never.isdisjoint(imported), never.intersection(imported)
