"""The rules by which a path enters a cache, as data: what is known comes in, a verdict comes out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cachesrv.catalog.base import NarRecord
from cachesrv.errors import BadInput, Conflict, Mismatch, MissingReferences, Unsigned
from cachesrv.nix.content_address import ContentAddress
from cachesrv.nix.hashes import Hash
from cachesrv.nix.signing import SecretKey
from cachesrv.nix.store_path import StorePath
from cachesrv.services import admission
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.candidate import Candidate, FileClaim
from tests.samples import Sample, path_of
from tests.service_site import KEY, served_cache

SAMPLE = Sample("sample", b"content", (path_of("library"), path_of("sample"), path_of("tool")))
CANDIDATE = Candidate.from_narinfo(SAMPLE.info)
OTHER = Hash.of("sha256", b"other")
NAR = NarRecord(
    key=f"main/nar/{SAMPLE.nar_name}",
    scope="main",
    compression="none",
    file_hash=Hash.of("sha256", SAMPLE.file).nix32,
    file_size=len(SAMPLE.file),
    nar_hash=SAMPLE.nar_hash.nix32,
    nar_size=len(SAMPLE.nar),
    listing=None,
    verified_at=0,
)
CACHE = served_cache()


def test_the_store_directory_is_that_of_the_cache() -> None:
    admission.check_claims(CACHE, CANDIDATE)
    with pytest.raises(BadInput, match=r"/gnu/store.*/nix/store"):
        admission.check_claims(CACHE, replace(CANDIDATE, store_dir="/gnu/store"))


@pytest.mark.parametrize(
    ("path", "ca", "references", "holds"),
    [
        # builtins.toFile "foo" "bar"
        ("vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo", "text:sha256", (), True),
        ("vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-bar", "text:sha256", (), False),
        ("vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo", "fixed:sha256", (), False),
        ("vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo", "text:sha256", (path_of("library"),), False),
    ],
)
def test_a_content_address_leads_to_its_path(
    path: str, ca: str, references: tuple[StorePath, ...], holds: bool
) -> None:
    candidate = replace(
        CANDIDATE,
        store_path=StorePath.parse(path),
        references=references,
        ca=ContentAddress.parse(f"{ca}:{Hash.of('sha256', b'bar').bare_nix32}"),
    )
    if holds:
        admission.check_claims(CACHE, candidate)
    else:
        with pytest.raises(BadInput, match="does not lead to"):
            admission.check_claims(CACHE, candidate)


def test_a_published_path_keeps_its_contents() -> None:
    admission.check_immutable(CANDIDATE, None)
    admission.check_immutable(CANDIDATE, SAMPLE.info)
    # everything but the contents may differ: another compression, another file
    admission.check_immutable(CANDIDATE, replace(SAMPLE.info, compression="xz", url="nar/x", file_hash=OTHER))
    with pytest.raises(Conflict, match="not deterministic") as caught:
        admission.check_immutable(CANDIDATE, replace(SAMPLE.info, nar_hash=OTHER))
    assert OTHER.nix32 in str(caught.value)
    assert SAMPLE.nar_hash.nix32 in str(caught.value)


def test_a_hash_part_has_one_name() -> None:
    other = StorePath(SAMPLE.path.hash_part, "other")
    with pytest.raises(Conflict, match="has the hash part of"):
        admission.check_immutable(CANDIDATE, replace(SAMPLE.info, store_path=other))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"nar_hash": OTHER.nix32}, "NarHash"),
        ({"nar_size": 1}, "NarSize"),
        ({"compression": "xz"}, "Compression"),
        ({"file_hash": OTHER.nix32}, "FileHash"),
        ({"file_size": 1}, "FileSize"),
    ],
)
def test_a_nar_is_what_the_path_says(change: dict[str, str | int], field: str) -> None:
    admission.check_nar(CANDIDATE, NAR)
    found = replace(NAR, **change)  # type: ignore[arg-type]  # each of these is of the type of its field
    with pytest.raises(Mismatch, match=f"^{field} says "):
        admission.check_nar(CANDIDATE, found)


def test_a_file_of_which_nothing_is_said() -> None:
    found = replace(NAR, compression="zstd", file_hash=OTHER.nix32, file_size=1)
    admission.check_nar(replace(CANDIDATE, file=None), found)
    admission.check_nar(replace(CANDIDATE, file=FileClaim("x", "zstd", None, None)), found)
    with pytest.raises(Mismatch, match="NarSize"):
        admission.check_nar(replace(CANDIDATE, file=None), replace(NAR, nar_size=1))


def test_references_resolve() -> None:
    """But for the one to itself."""
    library, tool = path_of("library").hash_part, path_of("tool").hash_part
    admission.check_references(CACHE, CANDIDATE, {library, tool})
    with pytest.raises(MissingReferences) as caught:
        admission.check_references(CACHE, CANDIDATE, {library})
    assert path_of("tool").base_name in str(caught.value)
    assert path_of("library").base_name not in str(caught.value)
    admission.check_references(served_cache(references=ReferencePolicy.ANY), CANDIDATE, set())


def test_of_many_missing_references_some_are_named() -> None:
    many = replace(CANDIDATE, references=tuple(path_of(f"library-{number}") for number in range(100)))
    with pytest.raises(MissingReferences, match="and 95 more") as caught:
        admission.check_references(CACHE, many, set())
    assert len(str(caught.value)) < 1000


def test_trust() -> None:
    trusted, stranger = SecretKey.generate("trusted-1"), SecretKey.generate("stranger-1")
    wanting = served_cache(trusted_keys={"trusted-1": trusted.public})
    for signatures, enough in (
        ((), False),
        ((stranger.sign(CANDIDATE.fingerprint),), False),
        ((trusted.sign(b"something else"),), False),
        ((replace(stranger.sign(CANDIDATE.fingerprint), name="trusted-1"),), False),
        ((stranger.sign(CANDIDATE.fingerprint), trusted.sign(CANDIDATE.fingerprint)), True),
    ):
        candidate = replace(CANDIDATE, signatures=signatures)
        admission.check_trust(CACHE, candidate, content_addressed=False)
        admission.check_trust(wanting, candidate, content_addressed=True)
        if enough:
            admission.check_trust(wanting, candidate, content_addressed=False)
        else:
            with pytest.raises(Unsigned, match="trusted-1"):
                admission.check_trust(wanting, candidate, content_addressed=False)


def test_what_is_published_is_what_is_stored() -> None:
    """File and compression are those of the stored NAR, and the URL leads there."""
    nar = replace(NAR, key="main/nar/stored.nar.zst", compression="zstd", file_hash=OTHER.nix32, file_size=7)
    info = admission.to_publish(CACHE, replace(CANDIDATE, file=None), nar, None)
    assert (info.url, info.compression, info.file_hash, info.file_size) == ("nar/stored.nar.zst", "zstd", OTHER, 7)
    assert (info.nar_hash, info.nar_size) == (SAMPLE.nar_hash, len(SAMPLE.nar))
    assert (info.store_path, info.references) == (SAMPLE.path, CANDIDATE.references)
    assert KEY.public.verify(info.fingerprint, info.signatures[0])


def test_every_key_of_the_cache_signs() -> None:
    keys = (SecretKey.generate("old-1"), SecretKey.generate("new-1"))
    info = admission.to_publish(served_cache(signing_keys=keys), CANDIDATE, NAR, None)
    assert [signature.name for signature in info.signatures] == ["old-1", "new-1"]
    for key, signature in zip(keys, info.signatures, strict=True):
        assert key.public.verify(info.fingerprint, signature)
    assert admission.to_publish(served_cache(signing_keys=()), CANDIDATE, NAR, None).signatures == ()
