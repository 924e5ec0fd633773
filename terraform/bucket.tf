# The bucket: objects/<cache>/... is a standard binary cache, deploy/ holds what nodes install.
# Nothing here ever expires what is current: a narinfo would outlive its NAR. That is the work of `cachesrv gc`.

resource "aws_s3_bucket" "cache" {
  bucket = var.bucket_name
}

resource "aws_s3_bucket_public_access_block" "cache" {
  bucket                  = aws_s3_bucket.cache.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "cache" {
  bucket = aws_s3_bucket.cache.id
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "cache" {
  bucket = aws_s3_bucket.cache.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_versioning" "cache" {
  bucket = aws_s3_bucket.cache.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "cache" {
  bucket     = aws_s3_bucket.cache.id
  depends_on = [aws_s3_bucket_versioning.cache]

  rule {
    id     = "abort-stale-uploads"
    status = "Enabled"
    filter {}
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }

  rule {
    id     = "forget-what-was-deleted"
    status = "Enabled"
    filter {}
    noncurrent_version_expiration {
      noncurrent_days = var.undelete_days
    }
    expiration {
      expired_object_delete_marker = true
    }
  }

  dynamic "rule" {
    for_each = var.intelligent_tiering_days[*]
    content {
      id     = "tier-nars"
      status = "Enabled"
      filter {
        prefix = "${local.prefix}/${var.cache_name}/nar/"
      }
      transition {
        days          = rule.value
        storage_class = "INTELLIGENT_TIERING"
      }
    }
  }
}

data "aws_iam_policy_document" "bucket" {
  statement {
    sid       = "TlsOnly"
    effect    = "Deny"
    actions   = ["s3:*"] # a Deny of everything
    resources = [aws_s3_bucket.cache.arn, "${aws_s3_bucket.cache.arn}/*"]
    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }

  dynamic "statement" {
    for_each = aws_cloudfront_distribution.cache
    content {
      sid       = "CloudFrontReadsNars"
      actions   = ["s3:GetObject"]
      resources = ["${aws_s3_bucket.cache.arn}/${local.prefix}/${var.cache_name}/nar/*"]
      principals {
        type        = "Service"
        identifiers = ["cloudfront.amazonaws.com"]
      }
      condition {
        test     = "StringEquals"
        variable = "aws:SourceArn"
        values   = [statement.value.arn]
      }
    }
  }
}

resource "aws_s3_bucket_policy" "cache" {
  bucket = aws_s3_bucket.cache.id
  policy = data.aws_iam_policy_document.bucket.json
}

# Called by its hash, so that a new bundle makes a new launch template and thereby new nodes.
resource "aws_s3_object" "bundle" {
  bucket      = aws_s3_bucket.cache.id
  key         = "deploy/${local.bundle_sha256}.tar.gz"
  source      = var.bundle
  source_hash = local.bundle_sha256
}
