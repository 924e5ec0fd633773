"""What Terraform itself says of the module, where it is installed, and without providers: its form, the rules of its
variables, and how it renders the templates.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_terraform_node import CONFIG, MODULE, NODE, SCRIPT, SETTINGS, render

TERRAFORM = shutil.which("terraform")

pytestmark = pytest.mark.skipif(TERRAFORM is None, reason="needs Terraform; the module is read without it elsewhere")

ARN = "arn:aws:acm:eu-central-1:123456789012:certificate/12345678-1234-1234-1234-123456789012"

RIGHT: dict[str, Any] = {
    "domain_name": "cache.example.org",
    "certificate_arn": ARN,
    "vpc_id": "vpc-0123",
    "load_balancer_subnet_ids": ["subnet-01", "subnet-02"],
    "node_subnet_ids": ["subnet-03"],
    "allowed_cidrs": ["10.0.0.0/8"],
    "bucket_name": "nix-cache-example",
    "public_key": "cache.example.org-1:k1qjwZdX8tQhOSg9v/vRleVUMg9luhH+3b/C9Oz5Wuc=",
    "signing_key_parameter": "/cachesrv/signing-key",
    "push_token_parameter": "/cachesrv/push-token",
    "bundle": "cachesrv.tar.gz",
}

FRONT = {"domain_name": "nix.example.org", "certificate_arn": ARN.replace("eu-central-1", "us-east-1")}
DATABASE = {"password_parameter": "/cachesrv/database-password"}

ALSO_RIGHT: list[dict[str, Any]] = [
    {},
    {"public": True, "cloudfront": FRONT, "allowed_cidrs": []},
    {"postgresql": DATABASE, "nodes": 3, "node_subnet_ids": ["subnet-03", "subnet-04"]},
    {"environment": {"CACHESRV_TOKEN__0__CACHES": "*", "CACHESRV_UPSTREAM__0__URL": "https://a.example/?b=[c]&d^e|f~"}},
    {"name": "nix-cache-2", "cache_name": "Team_1", "intelligent_tiering_days": 0, "instance_type": "t4g.large"},
]

WRONG: list[dict[str, Any]] = [
    {"name": "Cache"},
    {"name": "a--b"},
    {"name": "a" * 25},
    {"domain_name": "https://cache.example.org"},
    {"certificate_arn": "arn:aws:iam::123456789012:server-certificate/x"},
    {"vpc_id": "main"},
    {"load_balancer_subnet_ids": ["subnet-01", "subnet-01"]},
    {"node_subnet_ids": []},
    {"allowed_cidrs": ["10.0.0.0"]},
    {"allowed_cidrs": ["::/0"]},
    {"bucket_name": "nix.cache"},
    {"cache_name": "../x"},
    {"cache_name": "health"},
    {"priority": -1},
    {"priority": 0.5},
    {"public_key": "k1qjwZdX8tQhOSg9v/vRleVUMg9luhH+3b/C9Oz5Wuc="},
    {"signing_key_parameter": "signing-key"},
    {"push_token_parameter": '/x"; rm -r /; "'},
    {"environment": {"PATH": "/tmp"}},
    {"environment": {"CACHESRV_DATA_DIR": "/tmp"}},
    {"environment": {"CACHESRV_LOOKUP__TIMEOUT": "$(id)"}},
    {"environment": {"CACHESRV_LOOKUP__TIMEOUT": '5"\nLD_PRELOAD="x'}},
    {"environment": {"CACHESRV_LOOKUP__TIMEOUT": "a\\b"}},
    {"environment": {"CACHESRV_LOOKUP__TIMEOUT": "`id`"}},
    {"bundle": "cachesrv.whl"},
    {"instance_type": "large"},
    {"nodes": 0},
    {"nodes": 2},
    {"data_gib": 10},
    {"undelete_days": 0},
    {"intelligent_tiering_days": -1},
    {"cloudfront": FRONT},
    {"public": True, "internal": True, "cloudfront": FRONT},
    {"public": True, "cloudfront": FRONT | {"certificate_arn": ARN}},
    {"public": True, "cloudfront": FRONT | {"domain_name": "cache.example.org"}},
    {"postgresql": DATABASE},
    {"postgresql": {"password_parameter": "x"}, "node_subnet_ids": ["subnet-03", "subnet-04"]},
]


def terraform(*arguments: str, where: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    command = ["terraform", f"-chdir={where}", *arguments]
    alone = {**os.environ, "CHECKPOINT_DISABLE": "1"}
    return subprocess.run(command, input=given, env=alone, text=True, capture_output=True, check=False)


def test_the_files_have_the_usual_form() -> None:
    done = terraform("fmt", "-check", "-recursive", "-diff", where=MODULE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The module's variables, without the module."""
    shutil.copy(MODULE / "variables.tf", tmp_path)
    return tmp_path


def plan(rules: Path, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (rules / "terraform.tfvars.json").write_text(json.dumps(RIGHT | values))
    return terraform("plan", "-no-color", "-input=false", "-lock=false", where=rules)


@pytest.mark.parametrize("values", ALSO_RIGHT, ids=str)
def test_right_values_are_accepted(rules: Path, values: dict[str, Any]) -> None:
    done = plan(rules, values)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_wrong_values_are_refused_in_words(rules: Path, values: dict[str, Any]) -> None:
    said = plan(rules, values).stderr
    assert said.count("Error:") == said.count("Invalid value for variable") == 1, said


def test_terraform_renders_the_templates_as_the_tests_do(tmp_path: Path) -> None:
    for template, values in [(CONFIG, SETTINGS), (SCRIPT, {**NODE, "config": render(CONFIG, SETTINGS)})]:
        (tmp_path / "main.tf.json").write_text(json.dumps({"variable": {"values": {"default": values}}}))
        call = f'jsonencode(templatefile("{template}", var.values))'
        done = terraform("console", where=tmp_path, given=call)
        assert done.returncode == 0, done.stderr
        assert json.loads(json.loads(done.stdout)) == render(template, values)
