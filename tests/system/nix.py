"""Machines with Nix: each has its own store, settings and client caches, all below one folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING, Any

from tests.system.server import inherited

if TYPE_CHECKING:
    from pathlib import Path

STORE_DIR = "/nix/store"
PATIENCE = 120.0
"""Seconds after which a command of Nix is taken to hang."""

CHAIN = """
    let
      sh = name: references: script: derivation {
        inherit name references;
        system = builtins.currentSystem;
        builder = "/bin/sh";
        args = [ "-c" ("PATH=/usr/bin:/bin; echo building " + name + "; " + script) ];
      };
    in rec {
      library = sh "library" [ ] "mkdir $out $out/lib; echo some text > $out/lib/library; ln -s library $out/lib/link";
      tool = sh "tool" [ library ] "mkdir $out $out/bin; echo $references $out > $out/bin/tool; chmod +x $out/bin/tool";
      program = sh "program" [ library tool ] "echo $references > $out";
    }
"""
"""Three builds, each of which refers to those before it, and one of them to itself."""

MANY = """
    let
      make = number: builtins.toFile "path-${toString number}" "%s ${references number}";
      references = number: if number == 0 then "" else "${path (number - 1)} ${path (number / 2)}";
      path = number: builtins.elemAt paths number;
      paths = builtins.genList make %d;
    in paths
"""
"""Text files: a word for all of them, and how many. Each refers to the one before it and to that at half its number."""

CONTENT_ADDRESSED = """
    let
      sh = name: references: script: derivation {
        inherit name references;
        system = builtins.currentSystem;
        builder = "/bin/sh";
        args = [ "-c" ("PATH=/usr/bin:/bin; " + script) ];
        __contentAddressed = true;
        outputHashMode = "recursive";
        outputHashAlgo = "sha256";
      };
    in rec {
      library = sh "library" [ ] "mkdir $out; echo $out > $out/self";
      program = sh "program" [ library ] "echo $references > $out";
    }
"""
"""Two builds whose paths follow from what is in them."""


class Nix:
    """A machine. Its store is a chroot store, unless it `builds`: then its store directory is a folder of its own,
    because that is how any user can build.
    """

    def __init__(self, folder: Path, *, builds: bool = False, store_dir: str = STORE_DIR) -> None:
        self.folder = folder
        self.store_dir = str(folder / "store") if builds else store_dir
        self.store = "auto" if builds else str(folder / "root")
        self._caches = count()
        self._settings = {
            "experimental-features": "nix-command flakes ca-derivations",
            "build-users-group": "",
            "sandbox": "false",
            "substituters": "",
            "store": self.store,
            "connect-timeout": "5",
            "fsync-metadata": "false",  # no power is lost
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **inherited(),
            "HOME": str(folder),
            "NIX_CONF_DIR": str(folder / "etc"),
            "NIX_STORE_DIR": self.store_dir,
        }
        if builds:
            self.environment |= {"NIX_STATE_DIR": str(folder / "var"), "NIX_LOG_DIR": str(folder / "log")}
        self.configure()
        self.forget()

    @property
    def root(self) -> Path:
        """Where the files of store paths really lie."""
        return self.folder / ("store" if self.store == "auto" else "root/nix/store")

    def configure(self, **settings: str) -> None:
        """Add to nix.conf; a dash is written as an underscore."""
        self._settings |= {name.replace("_", "-"): value for name, value in settings.items()}
        (self.folder / "etc").mkdir(exist_ok=True)
        lines = [f"{name} = {value}\n" for name, value in self._settings.items()]
        (self.folder / "etc" / "nix.conf").write_text("".join(lines))

    def log_in(self, token: str, host: str = "127.0.0.1") -> None:
        """Put a token into netrc."""
        netrc = self.folder / "etc" / "netrc"
        netrc.write_text(f"machine {host}\nlogin any\npassword {token}\n")
        netrc.chmod(0o600)
        self.configure(netrc_file=str(netrc))

    def forget(self) -> None:
        """Begin with client caches that are empty: a warm one answers without asking anybody."""
        caches = self.folder / f"cache-{next(self._caches)}"
        shutil.rmtree(caches, ignore_errors=True)  # of a run before this one
        self.environment["XDG_CACHE_HOME"] = str(caches)

    def attempt(self, *command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            check=False,
            env=self.environment,
            cwd=self.folder,
            input=text,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def run(self, *command: str, text: str | None = None) -> str:
        """What a command prints, which has to succeed."""
        done = self.attempt(*command, text=text)
        assert done.returncode == 0, f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr}"
        return done.stdout.strip()

    def build(self, expression: str, *attributes: str) -> list[str]:
        """Build attributes of an expression; their outputs."""
        file = self.folder / "default.nix"
        file.write_text(textwrap.dedent(expression))
        chosen = [word for attribute in attributes for word in ("-A", attribute)]
        return self.run("nix-build", "--no-out-link", str(file), *chosen).split()

    def add(self, name: str, content: str | bytes) -> str:
        """A file in the store, without references, with a content address."""
        file = self.folder / "added" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return self.run("nix-store", "--add", str(file))

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, which may put files into the store."""
        return json.loads(
            self.run("nix-instantiate", "--eval", "--strict", "--json", "--read-write-mode", "-E", expression)
        )

    def plant(self, path: str, content: str, references: list[str] | None = None) -> None:
        """A valid path as a build would have left it: without a content address, and of any name and references."""
        file = self.root / os.path.basename(path)  # noqa: PTH119  a store path is text
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o444)
        os.utime(file, (1, 1))
        nar = subprocess.run(["nix-store", "--dump", str(file)], check=True, capture_output=True).stdout
        fields = [path, sha256(nar).hexdigest(), len(nar), "", len(references or ()), *(references or ())]
        self.run("nix-store", "--load-db", text="".join(f"{field}\n" for field in fields))

    def infos(self, *paths: str, store: str | None = None) -> dict[str, dict[str, Any]]:
        """What `nix path-info` says of paths and all that they need, by path."""
        options = ("--store", store) if store else ()
        listed = json.loads(self.run("nix", "path-info", "--json", "-r", *options, *paths))
        return {info["path"]: info for info in listed}

    def hashes(self, *paths: str, store: str | None = None) -> dict[str, str]:
        """The NAR hashes of paths and all that they need."""
        return {path: info["narHash"] for path, info in self.infos(*paths, store=store).items()}
