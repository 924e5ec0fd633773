"""How often Python looks for garbage that holds on to itself.

By default it does so for every 700 objects more, and now and then goes through all there are. A process that has loaded
what it needs, and then holds thousands of records for a while, spends a tenth of its time and more on that, and finds
next to nothing: almost all goes by itself when nobody refers to it any more.
"""

from __future__ import annotations

import gc

_NEW_OBJECTS = 20_000
_YOUNG_COLLECTIONS = 20


def look_less_often() -> None:
    """For the rest of the process."""
    gc.set_threshold(_NEW_OBJECTS, _YOUNG_COLLECTIONS, _YOUNG_COLLECTIONS)


def keep_all_there_is() -> None:
    """Take what is in memory now for what stays, and do not look through it again."""
    gc.freeze()
    look_less_often()
