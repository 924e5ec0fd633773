"""Realisations: which path an output of a content-addressed derivation came out as.

Two layouts of Nix, both experimental:

up to 2.34, `realisations/<id>.doi` where the id is `sha256:<base16>!<output>`, and the JSON repeats it:

    {"id": "sha256:…!out", "outPath": "<base name>", "signatures": ["<name>:<base64>"],
     "dependentRealisations": {"sha256:…!out": "<base name>"}}

from 2.35, `build-trace-v2/<base name of the derivation>/<output>.doi`:

    {"outPath": "<base name>", "signatures": [{"keyName": "<name>", "sig": "<base64>"}]}

`signatures` and `dependentRealisations` may be absent, signatures of the second layout may be strings too,
and unknown keys are passed over. An id has one spelling here (lower-case base-16), as it is part of a name.

What is written is what Nix writes, to the byte: keys and signatures sorted, no blanks. Signatures are made over
such JSON too (`fingerprints`).

Source: Nix, `src/libstore/realisation.cc` of 2.8, 2.34 and 2.36.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import msgspec

from cachesrv.errors import BadInput
from cachesrv.nix import json_document
from cachesrv.nix.hashes import Hash
from cachesrv.nix.signing import Signature
from cachesrv.nix.store_path import StorePath, is_name

DEFAULT_LIMIT = 1 << 20
"""Bytes of the largest realisation that is read unless the caller says otherwise."""


@dataclass(frozen=True, slots=True, order=True)
class OutputId:
    """An output of a derivation as the first layout names it: `sha256:<base16>!<output>`.

    `derivation` is that prefix; it is a hash of the derivation modulo how its inputs were made.
    """

    derivation: str
    output: str

    def __post_init__(self) -> None:
        if Hash.parse(self.derivation).base16 != self.derivation or not self.derivation.startswith("sha256:"):
            raise BadInput(f"{self.derivation[:150]!r} is not sha256:<lower-case base-16>")
        _check_output(self.output)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an id; raises BadInput."""
        derivation, mark, output = text.partition("!")
        if not mark:
            raise BadInput(f"{text[:300]!r} is not the id <hash>!<output> of a realisation")
        return cls(derivation, output)

    def __str__(self) -> str:
        return f"{self.derivation}!{self.output}"


@dataclass(frozen=True, slots=True, order=True)
class TracedOutput:
    """An output of a derivation as the second layout names it; BadInput unless the path ends in `.drv`."""

    derivation: StorePath
    output: str

    def __post_init__(self) -> None:
        if not self.derivation.is_derivation:
            raise BadInput(f"{self.derivation} is not the path of a derivation")
        _check_output(self.output)

    @classmethod
    def parse(cls, derivation: str, output: str) -> Self:
        """Read the two parts of the name, without `.doi`; raises BadInput."""
        return cls(StorePath.parse(derivation), output)


@dataclass(frozen=True, slots=True)
class Realisation:
    """What either layout says of an output. `dependencies` (first layout only) are by id."""

    out_path: StorePath
    signatures: tuple[Signature, ...]
    dependencies: tuple[tuple[OutputId, StorePath], ...] = ()


RealisedOutput = OutputId | TracedOutput
"""An output by its name in either layout."""


class _SignatureParts(msgspec.Struct, rename="camel"):
    key_name: str
    sig: str


class _Value(msgspec.Struct, rename="camel"):
    out_path: str
    signatures: tuple[str | _SignatureParts, ...] = ()


class _Entry(_Value, rename="camel", kw_only=True):
    id: str
    dependent_realisations: dict[str, str] = msgspec.field(default_factory=dict)


def parse_realisation(data: bytes, name: OutputId, *, limit: int = DEFAULT_LIMIT) -> Realisation:
    """Read the JSON of `realisations/<name>.doi`, at most `limit` bytes (TooLarge beyond).

    Raises BadInput when it is corrupt or speaks of another output.
    """
    entry = json_document.decode(data, _Entry, what="a realisation", limit=limit)
    if entry.id != str(name):
        raise BadInput(f"the realisation {name} says that it is {entry.id[:300]!r}")
    dependencies = [
        (OutputId.parse(text), StorePath.parse(base_name)) for text, base_name in entry.dependent_realisations.items()
    ]
    return Realisation(
        out_path=StorePath.parse(entry.out_path),
        signatures=_read_signatures(entry.signatures),
        dependencies=tuple(sorted(dependencies)),
    )


def parse_build_trace(data: bytes, *, limit: int = DEFAULT_LIMIT) -> Realisation:
    """Read the JSON of `build-trace-v2/<derivation>/<output>.doi`, at most `limit` bytes (TooLarge beyond).

    Raises BadInput when it is corrupt.
    """
    value = json_document.decode(data, _Value, what="an entry of the build trace", limit=limit)
    return Realisation(StorePath.parse(value.out_path), _read_signatures(value.signatures))


def object_name(output: RealisedOutput) -> str:
    """Where a cache has what it says of an output."""
    if isinstance(output, OutputId):
        return f"realisations/{output}.doi"
    return f"build-trace-v2/{output.derivation}/{output.output}.doi"


def render(output: RealisedOutput, realisation: Realisation) -> bytes:
    """The JSON of the object of that name."""
    signatures = sorted(signature.render() for signature in realisation.signatures)
    if isinstance(output, OutputId):
        return _encode(_first_layout(output, realisation) | {"signatures": signatures})
    parts = (signature.partition(":") for signature in signatures)
    signed = [{"keyName": name, "sig": text} for name, _, text in parts]
    return _encode({"outPath": realisation.out_path.base_name, "signatures": signed})


def fingerprints(output: RealisedOutput, realisation: Realisation) -> tuple[bytes, ...]:
    """The texts that a signature may be made over. Of the first layout, Nix up to 2.32 signs the dependencies too, and
    2.33 and 2.34 say that there are none, whether there are or not.
    """
    if isinstance(output, OutputId):
        full = _first_layout(output, realisation)
        return tuple(dict.fromkeys((_encode(full), _encode(full | {"dependentRealisations": {}}))))
    key = {"drvPath": output.derivation.base_name, "outputName": output.output}
    return (_encode({"key": key, "value": {"outPath": realisation.out_path.base_name}}),)


def _first_layout(output: OutputId, realisation: Realisation) -> dict[str, object]:
    return {
        "id": str(output),
        "outPath": realisation.out_path.base_name,
        "dependentRealisations": {str(other): path.base_name for other, path in realisation.dependencies},
    }


def _encode(value: dict[str, object]) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _read_signatures(signatures: Iterable[str | _SignatureParts]) -> tuple[Signature, ...]:
    return tuple(
        Signature.parse(text if isinstance(text, str) else f"{text.key_name}:{text.sig}") for text in signatures
    )


def _check_output(output: str) -> None:
    if not is_name(output):
        raise BadInput(f"{output[:250]!r} is not the name of an output")
