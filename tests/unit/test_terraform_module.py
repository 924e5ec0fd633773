"""The Terraform module, read as text: there is no provider here that `terraform validate` could ask."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hcl2
import pytest
from hcl2.utils import SerializationOptions

from cachesrv.web.front import IDLE_SECONDS

REPOSITORY = Path(__file__).parents[2]
MODULE = REPOSITORY / "terraform"
EXAMPLE = MODULE / "examples/team"
FOLDERS = pytest.mark.parametrize("folder", [MODULE, EXAMPLE], ids=["module", "example"])

LABELS = {"variable": 1, "output": 1, "module": 1, "provider": 1, "check": 1, "resource": 2, "data": 2, "ephemeral": 2}

ENDS_IN_THEMSELVES = {
    "aws_s3_bucket_public_access_block": "a setting of the bucket",
    "aws_s3_bucket_ownership_controls": "a setting of the bucket",
    "aws_s3_bucket_server_side_encryption_configuration": "a setting of the bucket",
    "aws_s3_bucket_lifecycle_configuration": "a setting of the bucket",
    "aws_s3_bucket_policy": "a setting of the bucket",
    "aws_lb_listener_rule": "a setting of the listener",
    "aws_vpc_security_group_ingress_rule": "a setting of the security group",
    "aws_vpc_security_group_egress_rule": "a setting of the security group",
    "aws_route53_record": "what clients look up",
}

WITHOUT_RESOURCES = {
    "ssm:UpdateInstanceInformation",
    "ssmmessages:CreateControlChannel",
    "ssmmessages:CreateDataChannel",
    "ssmmessages:OpenControlChannel",
    "ssmmessages:OpenDataChannel",
}
"""Actions of Session Manager, which AWS grants for everything or not at all."""

PERMISSIONS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "UploadPartCopy": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListParts": "s3:ListMultipartUploadParts",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
}
"""Source: "Required permissions for Amazon S3 API operations" in the S3 User Guide."""


@dataclass(frozen=True)
class Block:
    """`kind` and `labels` are what stands before the brace."""

    kind: str
    labels: tuple[str, ...]
    body: dict[str, Any]

    @property
    def address(self) -> str:
        """What others call it."""
        prefix = {"resource": (), "variable": ("var",)}.get(self.kind, (self.kind,))
        return ".".join((*prefix, *self.labels))


@cache
def blocks(folder: Path) -> tuple[Block, ...]:
    return tuple(block for file in sorted(folder.glob("*.tf")) for block in _blocks(parsed(file)))


def parsed(file: Path) -> dict[str, Any]:
    return hcl2.loads(file.read_text(), serialization_options=SerializationOptions(with_comments=False))


def _blocks(document: dict[str, Any]) -> Iterator[Block]:
    for kind, found in document.items():
        if kind == "__is_block__":
            continue
        for body in found:
            labels: tuple[str, ...] = ()
            for _ in range(LABELS.get(kind, 0)):
                (label, body), *_ = [item for item in body.items() if item[0] != "__is_block__"]  # noqa: PLW2901  into it
                labels += (label.strip('"'),)
            yield Block(kind, labels, body)


def named(folder: Path, kind: str) -> list[Block]:
    return [block for block in blocks(folder) if block.kind == kind]


def leaves(value: Any) -> Iterator[str]:
    """All texts in a body, names of arguments left out."""
    if isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, str):
        yield value


def code(text: str) -> str:
    """What Terraform evaluates of a text: strings within it are left out, what is interpolated into them is not."""
    found, inside, position = [], ['"'], 0
    while position < len(text):
        char = text[position]
        if inside[-1] == '"':
            if text.startswith(("$${", "\\"), position):
                position += 1
            elif text.startswith("${", position):
                inside.append("{")
                found.append(" ")
                position += 1
            elif char == '"' and len(inside) > 1:
                inside.pop()
        elif char in '"{':
            inside.append(char)
        elif char == "}":
            inside.pop()
        else:
            found.append(char)
        position += 1
    return "".join(found)


def references(block: Block) -> set[str]:
    """Addresses of all that a block refers to."""
    found = set()
    for leaf in leaves(block.body):
        text = leaf[1:-1] if leaf.startswith('"') else leaf
        for match in re.finditer(r"(?<![\w.)\]])([a-z_]\w*)((?:\.[a-z_]\w*)+)", code(text)):
            parts = [match[1], *match[2][1:].split(".")]
            length = 3 if parts[0] in {"data", "ephemeral"} else 2
            found.add(".".join(parts[:length]))
    return found


def iterators(value: Any) -> Iterator[str]:
    """Names that stand for an item: of `for`, and of dynamic blocks."""
    if isinstance(value, dict):
        for dynamic in value.get("dynamic", []):
            yield from (label.strip('"') for label in dynamic)
        for part in value.values():
            yield from iterators(part)
    elif isinstance(value, list):
        for part in value:
            yield from iterators(part)
    elif isinstance(value, str):
        for names in re.findall(r"\bfor (\w+(?:, \w+)?) in\b", value):
            yield from names.split(", ")


def locals_of(folder: Path) -> dict[str, Block]:
    """Each local as a block of its own, by its address."""
    return {
        f"local.{name}": Block("local", (name,), {name: value})
        for block in named(folder, "locals")
        for name, value in block.body.items()
        if name != "__is_block__"
    }


def everything(folder: Path) -> list[Block]:
    return [*(block for block in blocks(folder) if block.kind != "locals"), *locals_of(folder).values()]


def declared(folder: Path) -> set[str]:
    kinds = {"variable", "module", "resource", "data", "ephemeral", "local"}
    return {block.address for block in everything(folder) if block.kind in kinds}


def text(value: str) -> str:
    return value.strip('"')


def test_only_what_is_evaluated_counts() -> None:
    assert code('a ${b.c} "d.e"').split() == ["b.c"]
    assert code('${f("g.h-${i.j}.k", {l = m.n}, "$${o.p}")}').replace(" ", "") == "f(i.j,l=m.n,)"


@FOLDERS
def test_every_reference_has_its_declaration(folder: Path) -> None:
    for block in everything(folder):
        items = set(iterators(block.body)) | {"each", "count", "path"}
        for reference in references(block):
            assert reference in declared(folder) or reference.split(".")[0] in items, f"{block.address}: {reference}"


@FOLDERS
def test_every_declaration_is_referred_to(folder: Path) -> None:
    used = {reference for block in everything(folder) for reference in references(block) - {block.address}}
    idle = declared(folder) - used
    assert {address.split(".")[0] for address in idle} <= set(ENDS_IN_THEMSELVES)


@FOLDERS
def test_variables_are_used_outside_of_their_validation(folder: Path) -> None:
    used = {reference for block in everything(folder) if block.kind != "variable" for reference in references(block)}
    assert {variable.address for variable in named(folder, "variable")} <= used


@FOLDERS
def test_variables_and_outputs_are_described(folder: Path) -> None:
    for block in [*named(folder, "variable"), *named(folder, "output")]:
        assert len(text(block.body["description"])) > 3, block.address


@FOLDERS
def test_variables_have_types(folder: Path) -> None:
    for variable in named(folder, "variable"):
        assert variable.body["type"], variable.address


def test_variables_are_validated() -> None:
    for variable in named(MODULE, "variable"):
        rules = variable.body.get("validation", [])
        assert rules or variable.body["type"] == "bool", variable.address
        for rule in rules:
            assert text(rule["error_message"]).endswith("."), variable.address


def test_the_example_calls_the_module_as_it_is() -> None:
    (call,) = named(EXAMPLE, "module")
    assert (EXAMPLE / text(call.body["source"])).resolve() == MODULE
    given = set(call.body) - {"source", "__is_block__"}
    variables = {variable.labels[0]: variable for variable in named(MODULE, "variable")}
    assert given <= set(variables)
    assert {name for name, variable in variables.items() if "default" not in variable.body} <= given
    outputs = {output.labels[0] for output in named(MODULE, "output")}
    wanted = set(re.findall(r"module\.cachesrv\.(\w+)", (EXAMPLE / "main.tf").read_text()))
    assert wanted
    assert wanted <= outputs


@FOLDERS
def test_all_is_of_the_one_provider_that_is_required(folder: Path) -> None:
    (terraform,) = named(folder, "terraform")
    (required,) = terraform.body["required_providers"]
    assert set(required) - {"__is_block__"} == {"aws"}
    for block in blocks(folder):
        if block.kind in {"resource", "data", "ephemeral"}:
            assert block.labels[0].startswith("aws_")


def test_the_module_leaves_the_provider_to_its_caller() -> None:
    assert not named(MODULE, "provider")


def statements(document: str) -> list[dict[str, Any]]:
    """Those of an IAM policy, the optional ones included."""
    (block,) = [block for block in named(MODULE, "data") if block.labels == ("aws_iam_policy_document", document)]
    found = list(block.body.get("statement", []))
    for dynamic in block.body.get("dynamic", []):
        found += [content for part in dynamic.values() if isinstance(part, dict) for content in part["content"]]
    return found


def actions(statement: dict[str, Any]) -> set[str]:
    return {text(action) for action in statement["actions"]}


def test_nodes_may_do_nothing_to_everything() -> None:
    wide = {}
    for statement in statements("node"):
        assert not any("*" in action for action in actions(statement)), statement["sid"]
        if any(text(resource) == "*" for resource in statement["resources"]):
            wide[text(statement["sid"])] = actions(statement)
    assert wide == {"SessionManager": WITHOUT_RESOURCES}


def test_what_goes_for_any_instance_is_bound_to_a_condition() -> None:
    loose = [s for s in statements("node") if any("/*" in r and "aws_s3" not in r for r in map(str, s["resources"]))]
    assert [text(statement["sid"]) for statement in loose] == ["AttachToNodes"]
    assert text(loose[0]["condition"][0]["variable"]) == "aws:ResourceTag/Name"


def test_nodes_may_do_what_the_storage_asks_for() -> None:
    asked: set[str] = set()
    for file in (REPOSITORY / "cachesrv/storage").glob("s3*.py"):
        asked |= set(re.findall(r'\.(?:call|put|request)\(\s*"([A-Z]\w+)"', file.read_text()))
    assert {"PutObject", "GetObject", "ListObjectsV2"} <= asked
    needed = {PERMISSIONS[operation] for operation in asked}
    granted = {text(s["sid"]): actions(s) for s in statements("node")}
    assert granted["Objects"] | granted["List"] == needed


def test_nodes_cannot_change_what_they_install() -> None:
    for statement in statements("node"):
        resources = " ".join(map(str, statement["resources"]))
        if "s3:PutObject" in actions(statement):
            assert resources == '"${aws_s3_bucket.cache.arn}/${local.prefix}/*"'
    (bundle,) = [block for block in blocks(MODULE) if block.address == "aws_s3_object.bundle"]
    assert not text(bundle.body["key"]).startswith(text(locals_of(MODULE)["local.prefix"].body["prefix"]))


def test_the_bucket_lets_only_cloudfront_in_and_only_by_tls() -> None:
    deny, allow = statements("bucket")
    assert text(deny["effect"]) == "Deny"
    assert text(deny["condition"][0]["variable"]) == "aws:SecureTransport"
    assert actions(allow) == {"s3:GetObject"}
    assert text(allow["resources"][0]).endswith("/nar/*")
    assert text(allow["condition"][0]["variable"]) == "aws:SourceArn"


def resource(address: str) -> dict[str, Any]:
    (found,) = [block.body for block in named(MODULE, "resource") if block.address == address]
    return found


def test_the_bucket_is_private_and_encrypted() -> None:
    block = resource("aws_s3_bucket_public_access_block.cache")
    switches = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert all(block[switch] is True for switch in switches)
    (rule,) = resource("aws_s3_bucket_server_side_encryption_configuration.cache")["rule"]
    assert text(rule["apply_server_side_encryption_by_default"][0]["sse_algorithm"]) == "AES256"


def test_nothing_that_is_current_expires() -> None:
    rules = resource("aws_s3_bucket_lifecycle_configuration.cache")["rule"]
    assert any("abort_incomplete_multipart_upload" in rule for rule in rules)
    for rule in rules:
        for expiration in rule.get("expiration", []):
            assert set(expiration) - {"__is_block__"} == {"expired_object_delete_marker"}


def test_disks_are_encrypted() -> None:
    assert resource("aws_ebs_volume.data")["encrypted"] is True
    assert resource("aws_launch_template.node")["block_device_mappings"][0]["ebs"][0]["encrypted"] is True
    assert resource("aws_db_instance.catalog")["storage_encrypted"] is True


def test_nodes_and_database_are_reached_from_inside_only() -> None:
    doors = {
        block.labels[1]: block.body
        for block in named(MODULE, "resource")
        if block.labels[0] == "aws_vpc_security_group_ingress_rule"
    }
    by_network = {name for name, rule in doors.items() if "cidr_ipv4" in rule or "prefix_list_id" in rule}
    assert by_network == {"clients", "cloudfront"}
    for name in by_network:
        assert doors[name]["security_group_id"] == "${aws_security_group.load_balancer.id}"


def test_metadata_credentials_need_a_session() -> None:
    assert text(resource("aws_launch_template.node")["metadata_options"][0]["http_tokens"]) == "required"


def test_the_load_balancer_hangs_up_before_cachesrv_does() -> None:
    assert resource("aws_lb.cache")["idle_timeout"] < IDLE_SECONDS


def test_no_secret_gets_into_the_state() -> None:
    assert not [
        block for block in named(MODULE, "data") if "parameter" in block.labels[0] or "secret" in block.labels[0]
    ]
    for block in everything(MODULE):
        if any(reference.startswith("ephemeral.") for reference in references(block)):
            assert block.address == "aws_db_instance.catalog"
    database = resource("aws_db_instance.catalog")
    assert "password" not in database
    assert "ephemeral." in database["password_wo"]
    assert not any(
        name.endswith(("password", "token", "secret", "signing_key"))
        for name in (variable.labels[0] for variable in named(MODULE, "variable"))
    )
