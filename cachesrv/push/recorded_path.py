"""A store path that was pushed from here, as far as the record goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.push import members

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.nix.listing import ListingNode
    from cachesrv.push.inspection import SeenFile
    from cachesrv.push.members import Names


class RecordedPath:
    """`path`: in full; `listing` is None where it was too large to be kept."""

    def __init__(self, path: str, listing: ListingNode | None, files: Iterable[SeenFile]) -> None:
        self._path = path
        self._listing = listing
        self._files = {file.name: file for file in files}

    def find(self, names: Names, *, follow: bool) -> tuple[Names, ListingNode] | None:
        """See `contents.Contents`; None when the record does not say. Raises NotFound when it says that there is no
        such thing.
        """
        if self._listing is None:
            return None
        return members.find(self._listing, names, self._path, follow=follow)

    def content(self, names: Names) -> bytes | None:
        """The contents of a file, links followed; None when they are not on record. Raises NotFound, BadInput as `find`
        and `members.find_file` do.
        """
        if self._listing is not None:
            names, _ = members.find_file(self._listing, names, self._path)
        file = self._files.get("/".join(names))
        return None if file is None else file.content
