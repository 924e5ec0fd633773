"""What a push tells while it goes on: typed events, in the order in which things happen.

    Planned       once for each path, references first: what will happen to it, and why
    PlanMade      the totals of that, before the first byte is sent
    Sending       the NAR of a path begins to leave (again, after a Retrying)
    Sent          so much of it has left: for progress bars
    Resumed       so much of it was there already, in parts that were sent before
    Stored        the server has the NAR, checked
    Published     the path is visible in the cache
    Realised      the cache says that an output of a derivation came out as a path
    Failed        the path will not be published by this push
    Retrying      something went wrong and is tried again
    Noted         something does not go as was wished, and the push goes on without it
    Summary       the end, always the last one

Each is a struct whose JSON form carries its tag as `event`; paths are base names, sizes bytes, times seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class _Event(msgspec.Struct, frozen=True, tag_field="event", tag=str.lower, omit_defaults=True):
    pass


class Planned(_Event, frozen=True, kw_only=True):
    """`decision` is a value of `plan.Decision`."""

    path: str
    decision: str
    reason: str
    nar_size: int


class PlanMade(_Event, frozen=True, kw_only=True, tag="plan", omit_defaults=False):
    """How many paths go which way; nar_bytes: what there is to dump and compress, each NAR once; realisations: how many
    are sent after the paths.
    """

    paths: int
    upload: int
    publish: int
    present: int
    upstream: int
    conflict: int
    nars: int
    nar_bytes: int
    realisations: int = 0


class Sending(_Event, frozen=True):
    path: str
    nar_size: int


class Sent(_Event, frozen=True):
    """Since the last one for this path."""

    path: str
    nar_bytes: int
    sent_bytes: int


class Resumed(_Event, frozen=True):
    """`resumed_bytes` of the compressed NAR, in `parts` of its `all_parts`."""

    path: str
    resumed_bytes: int
    parts: int = 0
    all_parts: int = 0


class Stored(_Event, frozen=True):
    """`sent_bytes` is the size of the compressed NAR and `level` that of its compression, both 0 when the server turned
    out to have it.
    """

    path: str
    nar_size: int
    sent_bytes: int
    seconds: float
    level: int = 0


class Published(_Event, frozen=True):
    path: str


class Realised(_Event, frozen=True):
    """`output` as its object in the cache is called, such as `realisations/<id>.doi`."""

    output: str
    path: str


class Failed(_Event, frozen=True):
    """`path` is a base name, the argument that could not be understood, or the `output` of a realisation; `kind` is for
    programs to decide by, see `failure`.
    """

    path: str
    error: str
    kind: str = "failed"


class Retrying(_Event, frozen=True):
    """`what` is tried again in `delay` seconds; `attempt` is the one that failed, counted from 1."""

    what: str
    attempt: int
    delay: float
    error: str


class Noted(_Event, frozen=True):
    text: str


class Summary(_Event, frozen=True, kw_only=True, omit_defaults=False):
    """paths = uploaded + present + upstream + failed (after an interruption some are none of these);
    nar_bytes: dumped and stored by this push; sent_bytes: what left for it, repetitions included; resumed_bytes: what
    had been sent before and was there.
    """

    paths: int = 0
    uploaded: int = 0
    present: int = 0
    upstream: int = 0
    failed: int = 0
    nar_bytes: int = 0
    sent_bytes: int = 0
    resumed_bytes: int = 0
    seconds: float = 0.0


Event = (
    Planned | PlanMade | Sending | Sent | Resumed | Stored | Published | Realised | Failed | Retrying | Noted | Summary
)

Emit = Callable[[Event], None]
"""Takes events; it must not block and must not raise."""


def ignore(event: Event) -> None:
    """For those who do not want to know."""
