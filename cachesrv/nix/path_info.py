"""What a Nix store knows of a valid path beside its contents. [Nix, src/libstore/path-info.cc]"""

from collections.abc import Iterable
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from cachesrv.errors import BadInput
from cachesrv.nix.hashes import Hash
from cachesrv.nix.store_path import StorePath


@dataclass(frozen=True, slots=True)
class PathInfo:
    """One valid path.

    nar_hash: sha256 of the NAR; nar_size: its bytes, 0 where an old store never noted it.
    references: sorted; the path itself is among them when it names itself.
    signatures: `name:base64`, sorted; ca: content address as Nix writes it, None for input-addressed paths.
    registration_time: seconds since the epoch; ultimate: built here, hence trusted without a signature.
    """

    store_path: StorePath
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...] = ()
    deriver: StorePath | None = None
    signatures: tuple[str, ...] = ()
    ca: str | None = None
    registration_time: int = 0
    ultimate: bool = False


def in_reference_order(infos: Iterable[PathInfo]) -> list[PathInfo]:
    """The same infos, each after all it refers to; the order depends on nothing but the set itself.

    References that are not among the infos do not count. A cycle other than a self-reference, which no Nix store
    can hold, raises `BadInput`.
    """
    by_path = {info.store_path: info for info in infos}
    graph = TopologicalSorter[StorePath]()
    for path in sorted(by_path):
        graph.add(path, *(other for other in by_path[path].references if other != path and other in by_path))
    try:
        return [by_path[path] for path in graph.static_order()]
    except CycleError as error:
        raise BadInput(f"{error.args[1][0]} is part of a cycle of references") from None
