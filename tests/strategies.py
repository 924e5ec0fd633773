"""Hypothesis strategies for the values of `cachesrv.nix`, for all tests."""

import string

from hypothesis import strategies as st

from cachesrv.nix import base32
from cachesrv.nix.content_address import ContentAddress, Method
from cachesrv.nix.hashes import SIZES, Hash
from cachesrv.nix.narinfo import COMPRESSIONS, NarInfo
from cachesrv.nix.signing import Signature
from cachesrv.nix.store_path import DEFAULT_STORE_DIR, MAX_NAME_LENGTH, StorePath, is_name

NAME_CHARACTERS = string.ascii_letters + string.digits + "+-._?="
PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))

sizes = st.integers(1, 2**63 - 1)
hash_parts = st.text(base32.ALPHABET, min_size=32, max_size=32)
names = st.text(NAME_CHARACTERS, min_size=1, max_size=40).filter(is_name) | st.just("n" * MAX_NAME_LENGTH)
store_paths = st.builds(StorePath, hash_parts, names)
derivation_paths = st.builds(lambda path: StorePath(path.hash_part, f"{path.name[:40]}.drv"), store_paths)
store_dirs = st.sampled_from((DEFAULT_STORE_DIR, "/home/ann/.nix/store", "/s"))
key_names = st.text(PRINTABLE.replace(":", ""), min_size=1, max_size=20)
signatures = st.builds(Signature, key_names, st.binary(min_size=64, max_size=64))


def hashes(*algorithms: str) -> st.SearchStrategy[Hash]:
    """Hashes by one of these algorithms, or by any."""

    def with_digest(algorithm: str) -> st.SearchStrategy[Hash]:
        size = SIZES[algorithm]
        return st.builds(Hash, st.just(algorithm), st.binary(min_size=size, max_size=size))

    return st.sampled_from(algorithms or tuple(SIZES)).flatmap(with_digest)


content_addresses = st.one_of(
    st.builds(ContentAddress, st.just(Method.TEXT), hashes("sha256")),
    st.builds(ContentAddress, st.sampled_from((Method.FLAT, Method.RECURSIVE)), hashes()),
    st.builds(ContentAddress, st.just(Method.GIT), hashes("sha1", "sha256")),
)

narinfos = st.builds(
    NarInfo,
    store_path=store_paths,
    store_dir=store_dirs,
    url=st.text(PRINTABLE, min_size=1, max_size=80),
    compression=st.sampled_from(sorted(COMPRESSIONS)),
    file_hash=st.none() | hashes("sha256"),
    file_size=st.none() | sizes,
    nar_hash=hashes("sha256"),
    nar_size=sizes,
    references=st.lists(store_paths, max_size=4).map(tuple),
    deriver=st.none() | derivation_paths,
    system=st.none() | st.sampled_from(("x86_64-linux", "aarch64-darwin")),
    signatures=st.lists(signatures, max_size=3).map(tuple),
    ca=st.none() | content_addresses,
)
