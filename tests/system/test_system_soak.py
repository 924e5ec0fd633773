"""Pushes, downloads, lookups and collections at once, with kill -9 of the collector; `bench/soak.py` is for longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.soak import Soak

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 12


def test_no_client_sees_a_hole(tmp_path: Path) -> None:
    world = Soak(tmp_path, seed=6).run(SECONDS)
    assert world.violations == []
    for what in ("pushed", "NARs", "lookups", "collections", "collectors killed", "collected: path"):
        assert world.counts[what], f"{what}: nothing, this shows nothing"
