"""Everything that cachesrv raises on purpose.

CachesrvError
├── BadInput            bytes, names or values from outside that are not what they claim to be
│   ├── TooLarge        … or that exceed a stated limit
│   └── Mismatch        … or whose hash or size is not the stated one
├── NotFound            a thing that was asked for by name is not there
├── Conflict            a published path would change (its NAR hash differs)
├── Refused             well-formed, but the cache's rules do not let it in
│   ├── MissingNar
│   ├── MissingReferences
│   └── Unsigned
├── NotAllowed          the caller may not do this
│   └── NotAuthenticated   … because it did not say who it is
├── ConfigError         the configuration or the command line cannot be used
├── StoreError          a store of ours failed; says nothing about what it holds
│   ├── StoreFull
│   ├── StoreDamaged    … for good, and others have it open
│   └── StoreInaccessible  … and nothing need be wrong with the object that was asked for
│       ├── StoreRefused      … because it does not let us, as by its permissions
│       └── StoreUnavailable
│           ├── BeingRemoved     … because what is asked for is just being deleted
│           └── LockLost         … because another process has taken over what this one was doing
└── PeerError           another program answered wrongly, failed or died; names it
    ├── DaemonError     … the Nix daemon
    ├── ServerError     … the cache server that we talk to
    └── PeerUnavailable … and may do better in a while

No HTTP status stands here: `cachesrv.web.errors` maps errors to statuses in one table.
Messages are for people: they say what is wrong and what to do, and hold no secret.
"""


class CachesrvError(Exception):
    """Root of the tree; never raised itself."""


class BadInput(CachesrvError):
    """Bytes, names or values from outside that are not what they claim to be."""


class TooLarge(BadInput):
    """Input that exceeds a stated limit."""


class Mismatch(BadInput):
    """Content whose hash or size is not the stated one."""


class NotFound(CachesrvError):
    """A thing that was asked for by name is not there."""


class Conflict(CachesrvError):
    """A published path would change."""


class Refused(CachesrvError):
    """Well-formed, but the cache's rules do not let it in."""


class MissingNar(Refused):
    """A path was to be published whose NAR is not here."""


class MissingReferences(Refused):
    """A path refers to paths that are neither in the cache nor in its upstreams."""


class Unsigned(Refused):
    """The cache wants a signature by one of its trusted keys, or a content address that holds."""


class NotAllowed(CachesrvError):
    """The caller may not do this."""


class NotAuthenticated(NotAllowed):
    """The caller did not say who it is, or not believably."""


class ConfigError(CachesrvError):
    """The configuration or the command line cannot be used."""


class StoreError(CachesrvError):
    """A store of ours failed; says nothing about what it holds."""


class StoreFull(StoreError):
    """No room for what was to be written; `missing` bytes, where that is known."""

    def __init__(self, message: str, *, missing: int = 0) -> None:
        super().__init__(message)
        self.missing = missing


class StoreDamaged(StoreError):
    """Files that nobody can use; whoever has them open has to end before they can be begun anew."""


class StoreInaccessible(StoreError):
    """Nothing can be told of an object now, and nothing need be wrong with it."""


class StoreRefused(StoreInaccessible):
    """A store does not let us do that, until something is set right."""


class StoreUnavailable(StoreInaccessible):
    """A store cannot be reached at present."""


class BeingRemoved(StoreUnavailable):
    """What is to be used is just being deleted; in a moment it can be made anew."""


class LockLost(StoreUnavailable):
    """Another process has taken over what this one was doing."""


class PeerError(CachesrvError):
    """Another program answered wrongly, failed or died; the message names it."""


class DaemonError(PeerError):
    """The Nix daemon answered wrongly, failed or died."""


class ServerError(PeerError):
    """The cache server that we talk to answered wrongly, failed or is out of reach."""


class PeerUnavailable(PeerError):
    """Another program is out of reach, fails, or asks to be left alone: for `after` seconds, if it said so."""

    def __init__(self, message: str, *, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after
