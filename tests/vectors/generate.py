"""Make the vectors in this folder anew, with the Nix that is installed.

Run it as root (the builds are sandboxed): `python tests/vectors/generate.py`. Made with Nix 2.8.0.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KEYS = ("cache.test-1", "cache.test-2")
ATTRIBUTES = ("program", "floatingProgram", "floatingProgram.dev", "fixedFile")
SANDBOX = "/bin /usr/bin /usr/lib /lib /lib64 /usr/lib64"
FIXED = [(method, algorithm) for method in ("", "--recursive") for algorithm in ("md5", "sha1", "sha256", "sha512")]


class Nix:
    """The installed Nix with a store of its own below `folder`; paths are named `/nix/store/…` all the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "nix.conf").write_text(
            "experimental-features = nix-command ca-derivations\nbuild-users-group =\nsubstituters =\n"
            f"sandbox = true\nsandbox-paths = {SANDBOX}\nsecret-key-files = {HERE / 'keys' / KEYS[0]}.secret\n"
        )
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "NIX_CONF_DIR": str(folder),
            "NIX_REMOTE": str(folder / "root"),
        }

    def run(self, *command: str, stdin: str = "") -> str:
        """What the command prints, stripped."""
        done = subprocess.run(
            command, check=True, env=self.environment, input=stdin, capture_output=True, text=True, cwd=self.folder
        )
        return done.stdout.strip()

    def lines(self, *command: str) -> list[str]:
        return self.run(*command).splitlines()


def make_keys(nix: Nix) -> None:
    folder = HERE / "keys"
    folder.mkdir(exist_ok=True)
    for name in KEYS:
        secret = folder / f"{name}.secret"
        if not secret.exists():
            secret.write_text(nix.run("nix", "key", "generate-secret", "--key-name", name))
        (folder / f"{name}.public").write_text(
            nix.run("nix", "key", "convert-secret-to-public", stdin=secret.read_text())
        )


def make_hashes(nix: Nix) -> None:
    forms = {"base16": "--to-base16", "nix32": "--to-base32", "base64": "--to-base64", "sri": "--to-sri"}
    vectors = []
    for algorithm in ("md5", "sha1", "sha256", "sha512"):
        for text in (b"", b"abc", b"cache"):
            digest = hashlib.new(algorithm, text).hexdigest()
            entry = {"algorithm": algorithm, "text": text.decode()}
            for form, option in forms.items():
                entry[form] = nix.run("nix", "hash", option.removeprefix("--"), "--type", algorithm, digest)
            vectors.append(entry)
    write_json("hashes.json", vectors)


def make_paths(nix: Nix) -> list[str]:
    """Build and add paths of all kinds; returns them with their closures and derivations."""
    expression = str(HERE / "paths.nix")
    built = [
        path.partition("!")[0]
        for attribute in ATTRIBUTES
        for command in (["nix-build", "--no-out-link"], ["nix-instantiate"])
        for path in nix.lines(*command, expression, "-A", attribute)
    ]
    for attribute in ("text", "textWithReferences"):
        evaluate = ("nix-instantiate", "--eval", "--read-write-mode", "--json", expression, "-A", attribute)
        built.append(json.loads(nix.run(*evaluate)))
    tree = nix.folder / "tree"
    (tree / "empty").mkdir(parents=True)
    (tree / "file").write_text("contents\n")
    (tree / "link").symlink_to("file")
    built += nix.lines("nix-store", "--add", str(tree))
    for method, algorithm in FIXED:
        source = tree if method else tree / "file"
        built += nix.lines("nix-store", *filter(None, [method]), "--add-fixed", algorithm, str(source))
    rewritten = json.loads(nix.run("nix", "store", "make-content-addressed", "--json", built[0]))["rewrites"]
    return sorted({*nix.lines("nix-store", "-q", "--requisites", *built), *rewritten.values()})


def make_cache(nix: Nix, paths: list[str]) -> None:
    cache = HERE / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    options = f"secret-key={HERE / 'keys' / KEYS[1]}.secret&write-nar-listing=true&index-debug-info=true"
    derivations = [path for path in paths if path.endswith(".drv")]
    # What a path depends on goes first, and each path goes only once: three compressions side by side.
    # A derivation stands for its outputs here, and takes their realisations along.
    for name, compression in (("-tree", "xz"), ("-library", "zstd"), ("", "none")):
        chosen = [path for path in paths if name in path]
        nix.run("nix", "copy", "--to", f"file://{cache}?compression={compression}&{options}", *chosen)
    nix.run("nix", "copy", "--derivation", "--to", f"file://{cache}?compression=none&{options}", *derivations)
    logged = next(path for path in derivations if path.endswith("-program-1.0.drv"))
    nix.run("nix", "store", "copy-log", "--to", f"file://{cache}", logged)


def make_store_paths(nix: Nix, paths: list[str]) -> None:
    """Each content-addressed path with what it follows from, as Nix's own database tells it."""
    derivations = [path for path in paths if path.endswith(".drv")]
    known = json.loads(nix.run("nix", "path-info", "--json", *(path for path in paths if path not in derivations)))
    known += json.loads(nix.run("nix", "path-info", "--derivation", "--json", *derivations))
    keys = ("path", "ca", "references", "narHash", "narSize")
    write_json("store_paths.json", [{key: info[key] for key in keys} for info in known if "ca" in info])


def write_json(name: str, value: object) -> None:
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        nix = Nix(Path(folder))
        make_keys(nix)
        make_hashes(nix)
        paths = make_paths(nix)
        make_store_paths(nix, paths)
        make_cache(nix, paths)


if __name__ == "__main__":
    main()
