"""The program `cachesrv`, also as `python -m cachesrv`.

Every build waits for the hook, so it is done before anything is imported that other commands need.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing typing would take a hook longer than all else
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command that the arguments of the process say, and exit."""
    match sys.argv[1:]:
        case ["hook"]:
            hook_main()
        case ["hook", "--queue", queue] if queue:
            hook_main(queue)
    try:
        from cachesrv.cli import main as any_command  # noqa: PLC0415  see above

        any_command()
    except KeyboardInterrupt:  # before there was anybody to tell it
        sys.exit(130)


def hook_main(queue: str | None = None) -> NoReturn:
    """The program `cachesrv-hook`, which takes no arguments: Nix gives none to a post-build-hook."""
    from cachesrv.push.queue.hook import hook  # noqa: PLC0415  see above

    hook(queue)
    sys.exit(0)


if __name__ == "__main__":
    main()
