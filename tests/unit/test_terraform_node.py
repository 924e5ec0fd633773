"""What the Terraform module makes a node of: the script, and what it writes."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cachesrv import config

MODULE = Path(__file__).parents[2] / "terraform"
CONFIG = MODULE / "cachesrv.toml.tftpl"
SCRIPT = MODULE / "node.sh.tftpl"

SETTINGS = {
    "port": "5000",
    "workers": "2",
    "base_url": "https://cache.example.org",
    "bucket": "nix-cache-example",
    "prefix": "objects",
    "region": "eu-central-1",
    "disk_cache_gib": "50",
    "cache_name": "team",
    "public": "false",
    "priority": "30",
}

NODE = {
    "region": "eu-central-1",
    "environment": 'CACHESRV_LOOKUP__NEGATIVE_TTL="10 min"\nCACHESRV_CACHE__0__TRUSTED_KEYS=""',
    "bundle_url": "s3://nix-cache-example/deploy/abc.tar.gz",
    "bundle_sha256": "abc",
    "volume_id": "vol-0123456789abcdef0",
    "signing_key_parameter": "/cachesrv/signing-key",
    "push_token_parameter": "/cachesrv/push-token",
    "database_host": "",
    "database_password_parameter": "",
}

WITH_DATABASE = NODE | {
    "volume_id": "",
    "database_host": "db.example.internal",
    "database_password_parameter": "/cachesrv/database-password",
}

NODES = pytest.mark.parametrize("node", [NODE, WITH_DATABASE], ids=["sqlite", "postgresql"])


def render(template: Path, values: dict[str, str]) -> str:
    """As Terraform's `templatefile`, for templates that do nothing but name values."""
    text = template.read_text()
    assert set(re.findall(r"\$\{(.*?)\}", text)) == set(values)
    assert "%{" not in text
    assert "$${" not in text
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


def script(node: dict[str, str]) -> str:
    return render(SCRIPT, {**node, "config": render(CONFIG, SETTINGS)})


def written(node: dict[str, str], path: str) -> str:
    """The file that the script writes there."""
    match = re.search(rf"^cat > {re.escape(path)} <<'EOF'\n(.*?)^EOF$", script(node), re.DOTALL | re.MULTILINE)
    assert match, path
    return match[1]


def environment(text: str) -> dict[str, str]:
    """What systemd and a shell both take from it."""
    return dict(line.split("=", 1) for line in shlex.split(text))


@pytest.mark.parametrize(("template", "values"), [(CONFIG, SETTINGS), (SCRIPT, {**NODE, "config": ""})])
def test_templates_get_the_values_that_they_name(template: Path, values: dict[str, str]) -> None:
    call = re.search(
        rf'templatefile\("\S+/{template.name}", \{{\n(.*?)\n  \}}\)', (MODULE / "nodes.tf").read_text(), re.DOTALL
    )
    assert call
    assert set(re.findall(r"^    (\w+) +=", call[1], re.MULTILINE)) == set(values)


@NODES
def test_the_scripts_are_bash(node: dict[str, str]) -> None:
    inner = ["/usr/local/sbin/cachesrv-secrets", "/usr/local/bin/cachesrv"]
    for text in [script(node), *(written(node, path) for path in inner)]:
        assert text.startswith("#!/bin/bash\n")
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@NODES
def test_the_script_fits_into_user_data(node: dict[str, str]) -> None:
    assert len(script(node).encode()) < 12_000  # of 16 KiB: the rest is for settings and long names


@pytest.mark.parametrize("public", ["true", "false"])
def test_the_configuration_is_one_that_cachesrv_loads(tmp_path: Path, public: str) -> None:
    file = tmp_path / "cachesrv.toml"
    file.write_text(render(CONFIG, {**SETTINGS, "public": public}))
    variables = environment(written(NODE, "/etc/cachesrv.environment"))
    directory = config.data_dir(None, variables)
    loaded = config.load(file, directory, variables)
    assert str(directory) == "/var/lib/cachesrv"
    assert (loaded.storage.kind, loaded.storage.bucket, loaded.storage.prefix) == ("s3", "nix-cache-example", "objects")
    assert loaded.storage.region == "eu-central-1"
    assert loaded.delivery.disk_cache_size == 50 * 2**30
    (cache,) = loaded.cache
    assert (cache.name, cache.public, cache.priority, cache.root) == ("team", public == "true", 30, True)
    assert cache.signing_key_files == ("/run/cachesrv/signing-key",)
    assert (loaded.server.listen, loaded.server.workers) == (("0.0.0.0:5000",), 2)
    assert loaded.lookup.negative_ttl == 600


class Machine:
    """Stand-ins for the programs that the script of the secrets calls: `aws` knows the secrets, `install` keeps what it
    is given below a folder of ours.
    """

    def __init__(self, root: Path, secrets: dict[str, str]) -> None:
        self.root = root
        self._programs = root / "programs"
        self._secrets = root / "secrets"
        for name, value in secrets.items():
            (self._secrets / name[1:]).parent.mkdir(parents=True, exist_ok=True)
            (self._secrets / name[1:]).write_text(value)
        self._program(
            "aws",
            f"""
            [ "$1 $2 $3 $4 $5 $6" = "ssm get-parameter --region eu-central-1 --with-decryption --name" ]
            cat "{self._secrets}$7"
            """,
        )
        self._program(
            "install",
            f"""
            [ "$1 $2 $3 $4 $5 $6 $7" = "-o cachesrv -g cachesrv -m 0600 /dev/stdin" ]
            mkdir -p "{root}/kept$(dirname "$8")"
            cat > "{root}/kept$8"
            """,
        )

    def _program(self, name: str, text: str) -> None:
        self._programs.mkdir(exist_ok=True)
        (self._programs / name).write_text(f"#!/bin/bash\nset -eu\n{text}")
        (self._programs / name).chmod(0o755)

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{self._programs}:{os.environ['PATH']}"}
        return subprocess.run(["bash"], input=text, env=path, text=True, capture_output=True, check=False)

    def kept(self) -> dict[str, str]:
        files = (file for file in (self.root / "kept").rglob("*") if file.is_file())
        return {f"/{file.relative_to(self.root / 'kept')}": file.read_text() for file in files}


SECRETS = {
    "/cachesrv/signing-key": "cache.example.org-1:c2VjcmV0\n",
    "/cachesrv/push-token": "0123456789abcdef\n",
    "/cachesrv/database-password": "Secret5\n",
}


@NODES
def test_secrets_become_files_of_the_service(tmp_path: Path, node: dict[str, str]) -> None:
    machine = Machine(tmp_path, SECRETS)
    done = machine.run(written(node, "/usr/local/sbin/cachesrv-secrets"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    kept = machine.kept()
    database = kept.pop("/run/cachesrv/environment", "")
    assert kept == {
        "/run/cachesrv/signing-key": SECRETS["/cachesrv/signing-key"],
        "/var/lib/cachesrv/push-token": SECRETS["/cachesrv/push-token"],
    }
    url = "postgresql://cachesrv:Secret5@db.example.internal:5432/cachesrv?sslmode=require"
    assert environment(database) == ({"CACHESRV_CATALOG__URL": url} if node["database_host"] else {})


@pytest.mark.parametrize("missing", SECRETS)
def test_a_secret_that_cannot_be_had_keeps_the_service_from_starting(tmp_path: Path, missing: str) -> None:
    machine = Machine(tmp_path, {name: value for name, value in SECRETS.items() if name != missing})
    assert machine.run(written(WITH_DATABASE, "/usr/local/sbin/cachesrv-secrets")).returncode != 0
    assert machine.kept() == {}


def unit() -> dict[str, list[str]]:
    """The settings of the service, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in written(NODE, "/etc/systemd/system/cachesrv.service").splitlines():
        if "=" in line:
            found.setdefault(line.split("=", 1)[0], []).append(line.split("=", 1)[1])
    return found


def test_the_service_runs_what_the_script_wrote() -> None:
    service = unit()
    assert service["ExecStartPre"] == ["+/usr/local/sbin/cachesrv-secrets"]
    assert service["ExecStart"] == ["/opt/cachesrv/bin/cachesrv serve --config /etc/cachesrv.toml"]
    assert service["EnvironmentFile"] == ["/etc/cachesrv.environment", "-/run/cachesrv/environment"]
    assert service["RuntimeDirectory"] == ["cachesrv"]
    assert service["RuntimeDirectoryMode"] == ["0700"]
    assert service["User"] == ["cachesrv"]
