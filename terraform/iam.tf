# What a node may do.

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "node" {
  statement {
    sid       = "Objects"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.cache.arn}/${local.prefix}/*"]
  }

  statement {
    # Of the whole bucket: without it, or with a condition on the prefix, S3 answers 403 and not 404 for what is not
    # there, and an absence could not be told from a missing permission.
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.cache.arn]
  }

  statement {
    sid       = "Install"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.cache.arn}/${aws_s3_object.bundle.key}"]
  }

  statement {
    # The AWS-managed key of SSM decrypts for whoever may read the parameter.
    sid       = "Secrets"
    actions   = ["ssm:GetParameter"]
    resources = [for name in local.secret_parameters : "arn:${local.partition}:ssm:${local.region}:${local.account}:parameter${name}"]
  }

  dynamic "statement" {
    for_each = aws_ebs_volume.data
    content {
      sid       = "AttachVolume"
      actions   = ["ec2:AttachVolume"]
      resources = [statement.value.arn]
    }
  }

  dynamic "statement" {
    for_each = aws_ebs_volume.data
    content {
      sid       = "AttachToNodes"
      actions   = ["ec2:AttachVolume"]
      resources = ["arn:${local.partition}:ec2:${local.region}:${local.account}:instance/*"] # of nodes to come
      condition {
        test     = "StringEquals"
        variable = "aws:ResourceTag/Name"
        values   = [var.name]
      }
    }
  }

  statement {
    # A shell through Session Manager, without SSH. These know no resources. The managed policy
    # AmazonSSMManagedInstanceCore would do, but lets nodes read every parameter of the account.
    sid       = "SessionManager"
    resources = ["*"]
    actions = [
      "ssm:UpdateInstanceInformation",
      "ssmmessages:CreateControlChannel",
      "ssmmessages:CreateDataChannel",
      "ssmmessages:OpenControlChannel",
      "ssmmessages:OpenDataChannel",
    ]
  }
}

resource "aws_iam_role" "node" {
  name_prefix        = "${var.name}-"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy" "node" {
  name   = "cachesrv"
  role   = aws_iam_role.node.id
  policy = data.aws_iam_policy_document.node.json
}

resource "aws_iam_instance_profile" "node" {
  name_prefix = "${var.name}-"
  role        = aws_iam_role.node.name
}
