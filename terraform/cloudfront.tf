# Optional: CloudFront, read-only. NARs, which never change, come from its caches or from the bucket without a node in
# the way; all else is asked of the nodes each time, so that what was just pushed is found at once.

locals {
  with_cloudfront = var.cloudfront == null ? 0 : 1
}

data "aws_cloudfront_cache_policy" "nars" {
  count = local.with_cloudfront
  name  = "Managed-CachingOptimized"
}

data "aws_cloudfront_cache_policy" "none" {
  count = local.with_cloudfront
  name  = "Managed-CachingDisabled"
}

resource "aws_cloudfront_origin_access_control" "bucket" {
  count                             = local.with_cloudfront
  name                              = var.bucket_name
  origin_access_control_origin_type = "s3"
  signing_behavior                  = "always"
  signing_protocol                  = "sigv4"
}

resource "aws_cloudfront_distribution" "cache" {
  count           = local.with_cloudfront
  comment         = var.name
  enabled         = true
  is_ipv6_enabled = true
  http_version    = "http2and3"
  price_class     = var.cloudfront.price_class
  aliases         = [var.cloudfront.domain_name]

  origin {
    origin_id                = "bucket"
    domain_name              = aws_s3_bucket.cache.bucket_regional_domain_name
    origin_path              = "/${local.prefix}"
    origin_access_control_id = aws_cloudfront_origin_access_control.bucket[0].id
  }

  origin {
    origin_id   = "nodes"
    domain_name = var.domain_name
    custom_origin_config {
      http_port              = 80
      https_port             = 443
      origin_protocol_policy = "https-only"
      origin_ssl_protocols   = ["TLSv1.2"]
      origin_read_timeout    = 60
    }
  }

  # What is not in the bucket, nodes may have from an upstream; and they say 404 where S3 says 403.
  origin_group {
    origin_id = "bucket-then-nodes"
    failover_criteria {
      status_codes = [403, 404, 500, 502, 503, 504]
    }
    member {
      origin_id = "bucket"
    }
    member {
      origin_id = "nodes"
    }
  }

  ordered_cache_behavior {
    path_pattern           = "/${var.cache_name}/nar/*"
    target_origin_id       = "bucket-then-nodes"
    viewer_protocol_policy = "https-only"
    allowed_methods        = ["GET", "HEAD"]
    cached_methods         = ["GET", "HEAD"]
    cache_policy_id        = data.aws_cloudfront_cache_policy.nars[0].id
  }

  default_cache_behavior {
    target_origin_id       = "nodes"
    viewer_protocol_policy = "https-only"
    allowed_methods        = ["GET", "HEAD"]
    cached_methods         = ["GET", "HEAD"]
    cache_policy_id        = data.aws_cloudfront_cache_policy.none[0].id
  }

  restrictions {
    geo_restriction {
      restriction_type = "none"
    }
  }

  viewer_certificate {
    acm_certificate_arn      = var.cloudfront.certificate_arn
    ssl_support_method       = "sni-only"
    minimum_protocol_version = "TLSv1.2_2021"
  }
}

data "aws_ec2_managed_prefix_list" "cloudfront" {
  count = local.with_cloudfront
  name  = "com.amazonaws.global.cloudfront.origin-facing"
}

resource "aws_vpc_security_group_ingress_rule" "cloudfront" {
  count             = local.with_cloudfront
  security_group_id = aws_security_group.load_balancer.id
  description       = "HTTPS from CloudFront"
  prefix_list_id    = data.aws_ec2_managed_prefix_list.cloudfront[0].id
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}
