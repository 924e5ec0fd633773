"""Pushes, downloads, lookups and collections at once, with kill -9 of the collector; `bench/soak.py` is for longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.soak import Soak
from tests.system.conftest import FILES, PROXY

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.conftest import MakeBucket

SECONDS = {FILES: 12, PROXY: 18}


@pytest.mark.parametrize("storage", [FILES, PROXY], indirect=True)
def test_no_client_sees_a_hole(tmp_path: Path, storage: str, make_bucket: MakeBucket) -> None:
    stored = None if storage == FILES else make_bucket(storage)
    world = Soak(tmp_path / "soak", seed=6, stored=stored).run(SECONDS[storage])
    assert world.violations == []
    for what in ("pushed", "NARs", "lookups", "collections", "collectors killed", "collected: path"):
        assert world.counts[what], f"{what}: nothing, this shows nothing"
