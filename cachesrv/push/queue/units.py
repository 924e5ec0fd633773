"""The units of systemd that run the queue, as they are shipped in `systemd/` beside this module."""

from __future__ import annotations

import re
import stat
import sys
from importlib import resources
from pathlib import Path

from cachesrv.errors import StoreError

NAMES = ("cachesrv-queue.service", "cachesrv-queue.socket")

_PROGRAM = "@cachesrv@"

_HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"))
"""What ProtectHome= takes out of sight. Source: systemd.exec(5)."""

_plain = re.compile(r"[A-Za-z0-9_./+-]+").fullmatch


def units() -> dict[str, str]:
    """Text by name, for the installation that this process runs from."""
    folder = resources.files(__package__) / "systemd"
    return {name: (folder / name).read_text().replace(_PROGRAM, _this_program()) for name in NAMES}


def write_units(folder: Path) -> list[Path]:
    """Into a directory of systemd, in place of older ones. Raises StoreError."""
    written = []
    for name, text in units().items():
        try:
            folder.joinpath(name).write_text(text)
            folder.joinpath(name).chmod(0o644)
        except OSError as error:
            raise StoreError(f"{folder / name} cannot be written: {error.strerror}") from error
        written.append(folder / name)
    return written


def unseen_folder() -> Path | None:
    """A folder of this installation in which the service would find nothing; its user is one that has no rights."""
    for file in (_program(), Path(sys.executable), Path(__file__)):
        for folder in (*reversed(file.parents), *reversed(file.resolve().parents)):
            if folder in _HIDDEN or not folder.stat().st_mode & stat.S_IXOTH:
                return folder
    return None


def _program() -> Path:
    python = Path(sys.executable)
    script = python.with_name("cachesrv")
    return script if script.exists() else python


def _this_program() -> str:
    """As the first words of ExecStart=. Source: systemd.service(5), Command lines; systemd.syntax(7), Quoting."""
    program = _program()
    words = [str(program)] if program.name == "cachesrv" else [str(program), "-m", "cachesrv"]
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """Variables are not looked for in the name of a program."""
    if _plain(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
