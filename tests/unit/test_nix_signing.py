"""Keys, signatures and what is signed, against those that Nix made."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput
from cachesrv.nix import narinfo
from cachesrv.nix.hashes import Hash
from cachesrv.nix.narinfo import NarInfo
from cachesrv.nix.signing import PublicKey, SecretKey, Signature, fingerprint, trusted_keys, verify_any
from tests.strategies import key_names, signatures

VECTORS = Path(__file__).parents[1] / "vectors"
SECRETS = [SecretKey.parse(file.read_text()) for file in sorted((VECTORS / "keys").glob("*.secret"))]
PUBLICS = [PublicKey.parse(file.read_text()) for file in sorted((VECTORS / "keys").glob("*.public"))]
SECRET, PUBLIC = SECRETS[0], PUBLICS[0]
NIXOS = PublicKey.parse("cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=")
NARINFOS = [narinfo.parse(file.read_bytes()) for file in sorted((VECTORS / "cache").glob("*.narinfo"))]
CURL = narinfo.parse((VECTORS / "cache.nixos.org" / "syd87l2rxw8cbsxmxl853h0r6pdwhwjr.narinfo").read_bytes())


@pytest.mark.parametrize("info", NARINFOS, ids=lambda info: info.store_path.base_name)
def test_we_sign_as_nix_does(info: NarInfo) -> None:
    by_name = {key.name: key for key in SECRETS}
    assert info.signatures
    for signature in info.signatures:
        assert by_name[signature.name].sign(info.fingerprint) == signature
        assert trusted_keys(PUBLICS)[signature.name].verify(info.fingerprint, signature)


def test_the_fingerprint_is_the_text_that_nix_signs() -> None:
    assert CURL.fingerprint == (
        b"1;/nix/store/syd87l2rxw8cbsxmxl853h0r6pdwhwjr-curl-7.82.0-bin"
        b";sha256:1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0;196040;"
        b"/nix/store/0jqd0rlxzra1rs38rdxl43yh6rxchgc6-curl-7.82.0,"
        b"/nix/store/6w8g7njm4mck5dmjxws0z1xnrxvl81xa-glibc-2.34-115,"
        b"/nix/store/j5jxw3iy7bbz4a57fh9g2xm2gxmyal8h-zlib-1.2.12,"
        b"/nix/store/yxvjs9drzsphm9pcf42a4byzj1kb9m7k-openssl-1.1.1n"
    )


def test_the_public_cache_s_signature_holds() -> None:
    assert NIXOS.verify(CURL.fingerprint, CURL.signatures[0])


def test_references_are_signed_sorted_and_once() -> None:
    value = Hash.of("sha256", b"")
    assert fingerprint("/s/a", value, 1, ["/s/c", "/s/b", "/s/c"]) == fingerprint("/s/a", value, 1, ["/s/b", "/s/c"])
    assert fingerprint("/s/a", value, 1, []).endswith(b";1;")


def test_the_public_half_is_the_one_that_nix_derives() -> None:
    assert [key.public for key in SECRETS] == PUBLICS


@settings(max_examples=20)
@given(key_names, st.binary(max_size=100))
def test_a_new_key_s_signatures_hold_for_what_it_signed_alone(name: str, text: bytes) -> None:
    secret = SecretKey.generate(name)
    public = PublicKey.parse(secret.public.render())
    signature = SecretKey.parse(secret.render()).sign(text)
    assert signature.name == name
    assert public.verify(text, Signature.parse(signature.render()))
    assert not public.verify(text + b"x", signature)
    assert not SecretKey.generate(name).public.verify(text, signature)
    assert not PublicKey("other", public.data).verify(text, signature)


def test_no_two_keys_are_alike() -> None:
    assert SecretKey.generate("a").data != SecretKey.generate("a").data


@given(signatures)
def test_signatures_are_read_back(signature: Signature) -> None:
    assert Signature.parse(signature.render()) == signature
    assert str(signature) == signature.render()


@given(st.text() | st.builds("{}:{}".format, key_names, st.text("ABCDEFGHabcdefgh0123+/=\n ", max_size=100)))
def test_any_text_is_a_value_or_bad_input(text: str) -> None:
    for kind in (Signature, PublicKey, SecretKey):
        try:
            value = kind.parse(text)
        except BadInput:
            continue
        assert value.render() == text.rstrip()


def test_key_files_may_end_in_line_breaks() -> None:
    assert SecretKey.parse(SECRET.render() + "\n\n") == SECRET
    assert PublicKey.parse(PUBLIC.render() + "\r\n") == PUBLIC


def test_signatures_may_not() -> None:
    with pytest.raises(BadInput):
        Signature.parse(SECRET.sign(b"").render() + "\n")


def test_the_first_colon_ends_the_name() -> None:
    with pytest.raises(BadInput):
        PublicKey.parse("a:" + PUBLIC.render())


GOOD = PUBLIC.render().partition(":")[2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "name",
        "name:",
        f":{GOOD}",
        f"name{GOOD}",
        f"name:{GOOD[:-1]}",
        f"name:{GOOD}=",
        f"name:{GOOD[:-4]}",
        f"name:{GOOD[:4]}\n{GOOD[4:]}",
        f"name:{GOOD[:4]} {GOOD[4:]}",
        f"name:{GOOD[:-2]}B=" if GOOD[-2] != "B" else f"name:{GOOD[:-2]}C=",
        f"name:{GOOD[:-1]}é",
        f"na me:{GOOD}",
        f"na\nme:{GOOD}",
        f"é:{GOOD}",
        f"{'n' * 256}:{GOOD}",
        "name:AAAA",
        SECRET.render(),
    ],
)
def test_what_is_no_public_key(text: str) -> None:
    with pytest.raises(BadInput):
        PublicKey.parse(text)


def test_stray_bits_in_base64_are_refused() -> None:
    text = Signature("a", bytes(64)).render()
    assert text.endswith("A==")
    with pytest.raises(BadInput):
        Signature.parse(text.removesuffix("A==") + "B==")


def test_halves_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(BadInput, match="do not belong together"):
        SecretKey("mixed", SECRETS[0].data[:32] + SECRETS[1].data[32:])


def test_secrets_are_not_shown() -> None:
    encoded = SECRET.render().partition(":")[2]
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", repr([SECRET])):
        assert SECRET.name in shown
        assert encoded not in shown
        assert repr(SECRET.data)[2:20] not in shown


@pytest.mark.parametrize("spoil", [lambda text: text[:-1], lambda text: text + "!", lambda text: text.replace(":", "")])
def test_messages_about_secrets_do_not_repeat_them(spoil: Callable[[str], str]) -> None:
    text = SECRET.render()
    with pytest.raises(BadInput) as caught:
        SecretKey.parse(spoil(text))
    assert text[20:40] not in str(caught.value)
    assert caught.value.__cause__ is None


def test_of_keys_with_one_name_the_first_counts() -> None:
    other = SecretKey.generate(PUBLIC.name).public
    assert trusted_keys([PUBLIC, other]) == {PUBLIC.name: PUBLIC}
    assert trusted_keys([other, PUBLIC]) == {PUBLIC.name: other}


def test_any_trusted_signature_will_do() -> None:
    text = b"text"
    forged = Signature(PUBLIC.name, bytes(64))
    stranger = SecretKey.generate("stranger").sign(text)
    good = SECRETS[1].sign(text)
    trusted = trusted_keys(PUBLICS)
    assert verify_any(text, [forged, stranger, good], trusted) == good
    assert verify_any(text, [forged, stranger], trusted) is None
    assert verify_any(text, [good], {}) is None
    assert verify_any(b"else", [good], trusted) is None
