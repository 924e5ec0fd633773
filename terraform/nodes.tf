# The nodes: an autoscaling group, so that what fails is replaced and what changes is rolled out.
#
# Without postgresql it is a group of one. Its catalog (SQLite), index and disk cache lie on a volume of their own,
# that each new node attaches; objects lie in the bucket in any case. With postgresql nodes keep nothing of value.

data "aws_partition" "this" {}
data "aws_region" "this" {}
data "aws_caller_identity" "this" {}

data "aws_ec2_instance_type" "node" {
  instance_type = var.instance_type
}

data "aws_subnet" "first" {
  id = var.node_subnet_ids[0]
}

locals {
  partition = data.aws_partition.this.partition
  region    = data.aws_region.this.region
  account   = data.aws_caller_identity.this.account_id

  single            = var.postgresql == null
  port              = 5000
  prefix            = "objects"
  bundle_sha256     = filesha256(var.bundle)
  architecture      = contains(data.aws_ec2_instance_type.node.supported_architectures, "arm64") ? "arm64" : "x86_64"
  base_url          = "https://${var.cloudfront == null ? var.domain_name : var.cloudfront.domain_name}"
  secret_parameters = compact([var.signing_key_parameter, var.push_token_parameter, local.database.password_parameter])

  config = templatefile("${path.module}/cachesrv.toml.tftpl", {
    port           = local.port
    workers        = data.aws_ec2_instance_type.node.default_vcpus
    base_url       = local.base_url
    bucket         = aws_s3_bucket.cache.id
    prefix         = local.prefix
    region         = local.region
    disk_cache_gib = floor(var.data_gib / 2)
    cache_name     = var.cache_name
    public         = var.public
    priority       = var.priority
  })

  user_data = templatefile("${path.module}/node.sh.tftpl", {
    region                      = local.region
    config                      = local.config
    environment                 = join("\n", [for key, value in var.environment : "${key}=\"${value}\""])
    bundle_url                  = "s3://${aws_s3_bucket.cache.id}/${aws_s3_object.bundle.key}"
    bundle_sha256               = local.bundle_sha256
    volume_id                   = join("", aws_ebs_volume.data[*].id)
    signing_key_parameter       = var.signing_key_parameter
    push_token_parameter        = var.push_token_parameter
    database_host               = local.database.host
    database_password_parameter = local.database.password_parameter
  })
}

resource "aws_ebs_volume" "data" {
  count             = local.single ? 1 : 0
  availability_zone = data.aws_subnet.first.availability_zone
  type              = "gp3"
  size              = var.data_gib
  encrypted         = true
  final_snapshot    = true
  tags              = { Name = "${var.name}-data" }
}

resource "aws_launch_template" "node" {
  name_prefix            = "${var.name}-"
  image_id               = "resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-${local.architecture}"
  instance_type          = var.instance_type
  vpc_security_group_ids = [aws_security_group.node.id]
  user_data              = base64encode(local.user_data)

  iam_instance_profile {
    arn = aws_iam_instance_profile.node.arn
  }

  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_type           = "gp3"
      volume_size           = local.single ? 10 : var.data_gib
      encrypted             = true
      delete_on_termination = true
    }
  }

  tag_specifications {
    resource_type = "instance"
    tags          = { Name = var.name } # what iam.tf knows nodes by
  }
}

resource "aws_autoscaling_group" "nodes" {
  name                      = var.name
  min_size                  = var.nodes
  max_size                  = var.nodes
  vpc_zone_identifier       = local.single ? [data.aws_subnet.first.id] : var.node_subnet_ids
  target_group_arns         = [aws_lb_target_group.nodes.arn]
  health_check_type         = "ELB"
  health_check_grace_period = 900       # the wait for the volume of the node before, and the installation
  wait_for_elb_capacity     = var.nodes # `terraform apply` is done when nodes answer
  wait_for_capacity_timeout = "20m"

  launch_template {
    id      = aws_launch_template.node.id
    version = aws_launch_template.node.latest_version
  }

  instance_refresh {
    strategy = "Rolling"
    preferences {
      min_healthy_percentage = local.single ? 0 : 50 # one node gives up its volume before the next can have it
    }
  }

  # What a node needs from its first minute on.
  depends_on = [
    aws_iam_role_policy.node,
    aws_lb_listener.https,
    aws_vpc_security_group_egress_rule.to_https,
  ]
}
