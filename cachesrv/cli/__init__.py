"""The command `cachesrv`.

Exit status: 0 done; 1 failed; 2 wrong usage or configuration; 3 some paths failed and were named; 130 interrupted.
An error is one line on stderr. A command is a module of this package with a click command `command`, which returns an
exit status or nothing; it is imported when it is called, so that no command waits for what another one needs.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cachesrv.errors import CachesrvError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FAILED = 1
WRONG_USAGE = 2
SOME_FAILED = 3
INTERRUPTED = 130

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

COMMANDS: Mapping[str, str] = {
    "serve": "Answer Nix clients over HTTP.",
    "push": "Push store paths to a cache.",
    "hook": "Queue what Nix has just built (its post-build-hook).",
    "queue": "Push what hooks have queued, and see how it goes.",
    "watch-store": "Push what becomes valid in the local store, from now on.",
    "watch-exec": "Run a command, and push what it builds.",
    "pushed": "Tell what was pushed from here.",
    "ls": "List what is in a store path, here or in a cache.",
    "cat": "Print a file in a store path, here or in a cache.",
    "use": "Let Nix on this machine use a cache.",
    "key": "Make signing keys, and sign with them.",
    "token": "Say who may read, push and delete.",
    "pin": "Keep paths by name, whatever else is collected.",
    "gc": "Remove what the caches keep no longer.",
    "delete": "Delete paths from a cache.",
    "why": "Say what keeps a path, or where it has gone.",
    "reindex": "Rebuild catalog and index from storage.",
    "verify": "Look whether everything is there, whole and signed.",
    "check-config": "Say what is wrong with a configuration, or what it comes to.",
}
"""Name and help of each; its module has the same name, with underscores."""


class _Unfailing(FileIO):
    """Where messages go: those that cannot be written (a log on a full disk, a reader that has gone) are lost, and what
    they are about goes on.
    """

    def write(self, data: Any) -> int:
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


class LazyGroup(click.Group):
    """Imports a command when it is called, and none to list them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  the interface of click
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  see above
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"cachesrv.cli.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Names the command that was meant, where one is nearly so called."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and (meant := _nearest(name)):
            ctx.fail(f"there is no command {name!r}: did you mean {meant}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  see above
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, COMMANDS, 1)), "")


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cachesrv", message="%(prog)s %(version)s")
def cli() -> None:
    """A Nix binary cache: `serve` answers Nix clients, `push` fills it."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit; `arguments` are those of the process unless given."""
    _open_streams()
    _let_all_names_through()
    try:
        status = run(arguments)
    finally:
        _let_interrupts_end_it()
    sys.exit(status)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    try:
        status = cli.main(arguments, prog_name="cachesrv", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        return _wrong_usage(error)
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    except ConfigError as error:
        return _say(str(error), WRONG_USAGE)
    except CachesrvError as error:
        return _say(str(error), FAILED)
    except BrokenPipeError:
        _print_no_more()  # who read it has gone
        return FAILED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None:
            _print_no_more()
            return _say(f"the output cannot be written: {error.strerror}", FAILED)
        from cachesrv.limits import no_thread

        if refused := no_thread(error):
            return _say(refused, FAILED)
        if os.environ.get("CACHESRV_DEBUG"):
            raise
        return _say(f"defect, please report it: {type(error).__name__}: {error} (CACHESRV_DEBUG=1 says more)", FAILED)
    return status if isinstance(status, int) else 0


def _let_interrupts_end_it() -> None:
    """What is left is to wait for threads: who does not want to need not be shown where that was. An interrupt that is
    ignored, as of what runs in the background, still is.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _open_streams() -> None:
    """What the caller has closed leads nowhere; so its descriptor is not that of a file where what is printed lands."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115  for the whole process
    if isinstance(sys.stderr, TextIOWrapper) and sys.stderr is sys.__stderr__:
        unfailing = BufferedWriter(_Unfailing(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = TextIOWrapper(unfailing, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def _let_all_names_through() -> None:
    """Whatever the locale: what is read are names of files, what is printed is UTF-8, as JSON has to be."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding=sys.getfilesystemencoding(), errors="surrogateescape")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def _print_no_more() -> None:
    """What is still buffered must not be written at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _wrong_usage(error: click.ClickException) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        print(error.format_message(), file=sys.stderr)  # noqa: T201  as `--help`
        return WRONG_USAGE
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return _say(f"{error.format_message()}{hint}", WRONG_USAGE)


def _say(message: str, status: int) -> int:
    lines = "\n".join(map(printable, message.split("\n")))  # of a configuration there may be several
    print(f"cachesrv: {lines}", file=sys.stderr)  # noqa: T201  this is where errors are told
    return status


def printable(text: str) -> str:
    """For a terminal, which obeys what it is shown: names of files may hold anything."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
