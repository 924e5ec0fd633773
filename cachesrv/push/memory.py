"""How the memory of a push is divided: among threads that compress, buffers that are read into, and what waits."""

from __future__ import annotations

from dataclasses import dataclass

import zstandard

DEFAULT_MEMORY = 128 * 1024 * 1024

_PARTS = 24 * 1024 * 1024
"""Bytes for parts of large NARs, whatever the number of cores."""


@dataclass(frozen=True, slots=True)
class Shares:
    """threads: that compress; buffers: of a frame each; budget: bytes for compressed frames until they are sent;
    parts: bytes for parts of large NARs until the server has them; bound: bytes that a frame can become by compression,
    at most.
    """

    threads: int
    buffers: int
    budget: int
    parts: int
    bound: int

    @classmethod
    def of(cls, memory: int | None, *, frame_size: int, level: int, cores: int, jobs: int) -> Shares:
        """Divide `memory` bytes, by default 128 MiB or as much more as many cores need. With little memory there are
        fewer threads than cores, with next to none it is exceeded by what a single frame needs.
        """
        bound = frame_size + frame_size // 128
        thread = _context_size(level, frame_size) + bound  # zstd's own, and what it writes to
        # two buffers for each core: what is compressed and what comes next
        core = thread + 2 * frame_size + bound
        usable = _usable(
            max(DEFAULT_MEMORY, _with_loss(cores * core + jobs * frame_size + _PARTS)) if memory is None else memory
        )
        threads = max(1, min(cores, (usable - jobs * frame_size) // core))
        rest = usable - threads * thread
        buffers = max(1, min(jobs + 2 * threads, (rest - threads * bound) // frame_size))
        waiting = rest - buffers * frame_size
        parts = min(waiting // 2, max(0, waiting - threads * bound))
        return cls(threads, buffers, max(bound, waiting - parts), parts, bound)


def _usable(memory: int) -> int:
    """Without what the allocator loses when some threads free what others have allocated: seen up to a fifth."""
    return memory * 4 // 5


def _with_loss(usable: int) -> int:
    return usable * 5 // 4 + 1


def _context_size(level: int, frame_size: int) -> int:
    parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=frame_size)
    return parameters.estimated_compression_context_size()
