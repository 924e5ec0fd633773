"""What clients can see of a server, and whether it can be kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.system.client import Answer
    from tests.system.nix import Nix
    from tests.system.server import Server


def check_what_is_visible(server: Server, client: Nix, paths: list[str]) -> set[str]:
    """Every narinfo, wherever it can be seen, has its whole NAR and all its references; the paths that HTTP shows.

    What was not acknowledged may have reached the catalog, or storage alone.
    """
    by_http = check_what_http_shows(server, paths)
    folder = server.stored.copy()
    in_folder = {_field(text, "StorePath"): text for text in _texts(folder)}
    _check_references(in_folder)
    in_catalog = {_field(content.decode(), "StorePath"): content.decode() for content in _published(server)}
    _check_references(in_catalog)
    assert by_http.items() <= in_catalog.items(), "clients are told something else than what is published"
    # a narinfo that was written anew, for the same NAR in another file, may have reached storage alone
    assert _nar_hashes(in_catalog).items() <= _nar_hashes(in_folder).items()
    for text in (*in_catalog.values(), *in_folder.values()):
        file = (folder / _field(text, "URL")).read_bytes()
        assert len(file) == int(_field(text, "FileSize"))
    for store, shown in ((server.main, by_http), (f"file://{folder}", in_folder)):
        if shown:
            client.forget()
            client.run("nix", "store", "verify", "--store", store, "--sigs-needed", "1", *shown)
    return set(by_http)


def check_what_http_shows(server: Server, paths: list[str]) -> dict[str, str]:
    """The narinfos that there are of these paths, none without those of all its references."""
    by_http = {path: answer.text for path in paths if (answer := _narinfo(server, path)).status == 200}
    _check_references(by_http)
    return by_http


def _narinfo(server: Server, path: str) -> Answer:
    return server.client().get(f"/main/{Path(path).name[:32]}.narinfo")


def _check_references(texts: dict[str, str]) -> None:
    names = {Path(path).name for path in texts}
    for path, text in texts.items():
        missing = set(_field(text, "References").split()) - names
        assert not missing, f"{path} is visible without {missing}"


def _nar_hashes(texts: dict[str, str]) -> dict[str, str]:
    return {path: _field(text, "NarHash") for path, text in texts.items()}


def _texts(folder: Path) -> list[str]:
    return [file.read_text() for file in folder.glob("*.narinfo")]


def _published(server: Server) -> list[bytes]:
    return [row[0] for row in server.query("select content from narinfos")]


def _field(text: str, key: str) -> str:
    (value,) = [line.partition(": ")[2] for line in text.splitlines() if line.startswith(f"{key}: ")]
    return value
