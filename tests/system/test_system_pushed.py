"""What was just pushed is not asked for again: builds as Hydra reads them, and the real Nix."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.system.push import PATIENCE, push
from tests.system.server import CACHESRV

if TYPE_CHECKING:
    from tests.system.nix import Nix
    from tests.system.server import Server

RELEASE = """
    let
      release = name: needs: derivation {
        inherit name needs;
        system = builtins.currentSystem;
        builder = "/bin/sh";
        outputs = [ "out" "doc" ];
        args = [ "-c" ''
            PATH=/usr/bin:/bin
            for o in $out $doc; do
                mkdir -p $o/nix-support $o/share
                echo "doc manual $o/share" > $o/nix-support/hydra-build-products
                echo "$needs" > $o/share/index
            done
            echo 1.0 > $out/nix-support/hydra-release-name
        '' ];
      };
    in rec {
      library = release "library" "";
      program = release "program" library;
    }
"""
PRODUCTS = "nix-support/hydra-build-products"


@pytest.fixture
def outputs(builder: Nix, cache: Server) -> list[str]:
    """All outputs of two builds, pushed."""
    builder.environment["XDG_STATE_HOME"] = str(builder.folder / "state")
    file = builder.folder / "default.nix"
    file.write_text(RELEASE)
    drvs = builder.run("nix-instantiate", str(file)).split()
    paths = builder.run("nix-store", "--realise", *drvs).split()
    assert len(paths) == 4
    push(builder, cache, *paths)
    return paths


def cachesrv(nix: Nix, *arguments: str) -> str:
    done = subprocess.run(
        [*CACHESRV, *arguments],
        check=False,
        env=nix.environment,
        cwd=nix.folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def requests(cache: Server) -> int:
    """All that it has answered so far, questions for its metrics apart."""
    text = cache.client().get("/metrics").text
    counted = re.findall(r"^cachesrv_http_requests_total\{([^}]*)\} ([0-9.]+)$", text, re.MULTILINE)
    return sum(int(float(count)) for labels, count in counted if 'route="metrics"' not in labels)


def test_build_products_are_read_without_a_request(builder: Nix, cache: Server, outputs: list[str]) -> None:
    before = requests(cache)

    for path in outputs:
        assert cachesrv(builder, "cat", f"{path}/{PRODUCTS}") == f"doc manual {path}/share\n"
        assert "share/index" in cachesrv(builder, "ls", "-R", path)

    assert requests(cache) == before > 0


def test_nor_when_the_store_has_them_no_more(builder: Nix, cache: Server, outputs: list[str]) -> None:
    """A build machine that collects garbage, and a cache that is gone."""
    builder.run("nix-store", "--delete", "--ignore-liveness", *outputs)
    before = requests(cache)

    for path in outputs:
        assert cachesrv(builder, "cat", f"{path}/{PRODUCTS}") == f"doc manual {path}/share\n"
        listed = json.loads(cachesrv(builder, "ls", "--json", "-R", path))
        assert listed["entries"]["share"]["entries"]["index"]["type"] == "regular"

    assert requests(cache) == before
    # what is not on record comes from the cache
    builder.environment |= {"CACHESRV_URL": cache.main}
    assert cachesrv(builder, "cat", f"{outputs[-1]}/share/index") is not None
    assert requests(cache) > before


def test_the_listing_of_what_was_pushed_is_in_the_cache_and_true(
    builder: Nix, cache: Server, outputs: list[str]
) -> None:
    for path in outputs:
        hash_part = path.rpartition("/")[2][:32]
        listed = json.loads(cache.client().get(f"/main/{hash_part}.ls").body)
        on_record = json.loads(cachesrv(builder, "ls", "--json", "-R", path))
        assert listed == {"root": on_record, "version": 1}


def test_a_program_pushes_and_reads_as_the_readme_says(builder: Nix, cache: Server, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    (path,) = builder.build(RELEASE, "program")
    environment = {
        "CACHESRV_URL": cache.main,
        "CACHESRV_TOKEN": cache.token,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "NIX_REMOTE": "local",
    }

    def run(**more: str) -> tuple[int, str]:
        command = [sys.executable, str(tmp_path / "program.py"), path]
        variables = builder.environment | environment | more
        done = subprocess.run(
            command, check=False, env=variables, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path
        )
        assert done.stderr == ""
        return done.returncode, done.stdout

    status, told = run()
    assert status == 0
    assert f"published {path.rpartition('/')[2]}\n" in told
    content = f"doc manual {path}/share\n".encode()
    assert f"{PRODUCTS} {len(content)} {sha256(content).hexdigest()} {content!r}\n" in told
    assert run(CACHESRV_TOKEN="wrong")[1].startswith("no push: ")


def test_nix_reads_kept_nars_instead_of_the_cache(builder: Nix, cache: Server, tmp_path: Path) -> None:
    (path,) = builder.build(RELEASE, "program")
    nars = tmp_path / "nars"
    push(builder, cache, "--keep-nars", str(nars), path)
    for file in (cache.objects / "nar").iterdir():
        file.unlink()  # only the narinfos can be had from it now

    store = f"{cache.main}?local-nar-cache={nars}"

    assert builder.run("nix", "store", "cat", "--store", store, f"{path}/{PRODUCTS}") == f"doc manual {path}/share"
    listed = builder.run("nix", "store", "ls", "-R", "--store", store, path)
    assert "./share/index" in listed
    (nars / f"{path.rpartition('/')[2][:32]}.ls").unlink()
    assert builder.run("nix", "store", "cat", "--store", store, f"{path}/{PRODUCTS}") == f"doc manual {path}/share"
