"""The uploader behind `cachesrv push`, and its Python API: push store paths from a program.

    settings = find_settings(Given(to="https://cache.example.org/main"), os.environ)
    async with opened_store(None, os.environ) as store:
        summary = await push(["/nix/store/…"], store, settings, Options(record=record_file(os.environ)), emit)

`push` may run several times at once, over one store too; nothing is global. `emit` is called with events (see
`events`) in the loop's thread: it must not block and must not raise.

A path that cannot be pushed is told of as Failed, with a `kind` (see `failure`), and does not hold up the others. What
concerns all of them is raised: NotAllowed, ServerError, DaemonError, StoreError, ConfigError, all of `cachesrv.errors`.
To end a push, cancel its task: what was published stays, all else leaves nothing half-done, and the next push goes on
from there. What was pushed can be read without asking the cache: `open_pushed`, `read_file`.

All names are imported when they are first used, for the sake of hooks, which import next to nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cachesrv.push.connection import Timeouts
    from cachesrv.push.contents import Where, open_contents
    from cachesrv.push.events import (
        Emit,
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
    from cachesrv.push.inspection import SeenFile
    from cachesrv.push.journal import journal_file
    from cachesrv.push.local_store import LocalStore, open_store, opened_store
    from cachesrv.push.pushed import Pushed, PushedOutput, open_pushed, read_file
    from cachesrv.push.record import PushedPath, Reads, record_file
    from cachesrv.push.retry import Backoff
    from cachesrv.push.run import Options, push
    from cachesrv.push.settings import Given, Settings, find_settings
    from cachesrv.push.upstreams import Upstream

__all__ = [
    "Backoff",
    "Emit",
    "Event",
    "Failed",
    "Given",
    "LocalStore",
    "Noted",
    "Options",
    "PlanMade",
    "Planned",
    "Published",
    "Pushed",
    "PushedOutput",
    "PushedPath",
    "Reads",
    "Realised",
    "Resumed",
    "Retrying",
    "SeenFile",
    "Sending",
    "Sent",
    "Settings",
    "Stored",
    "Summary",
    "Timeouts",
    "Upstream",
    "Where",
    "find_settings",
    "journal_file",
    "open_contents",
    "open_pushed",
    "open_store",
    "opened_store",
    "push",
    "read_file",
    "record_file",
]

_MODULES = {
    "connection": ("Timeouts",),
    "contents": ("Where", "open_contents"),
    "inspection": ("SeenFile",),
    "journal": ("journal_file",),
    "local_store": ("LocalStore", "open_store", "opened_store"),
    "pushed": ("Pushed", "PushedOutput", "open_pushed", "read_file"),
    "record": ("PushedPath", "Reads", "record_file"),
    "retry": ("Backoff",),
    "run": ("Options", "push"),
    "settings": ("Given", "Settings", "find_settings"),
    "upstreams": ("Upstream",),
}
"""Where the names are that do not come from `events`."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415  see the module

    module = next((module for module, names in _MODULES.items() if name in names), "events")
    return getattr(import_module(f"{__name__}.{module}"), name)
