# A private cache for a team, with a certificate and a DNS record in Route 53, in a VPC that is there already.

terraform {
  required_version = ">= 1.11"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 6.0, < 7.0"
    }
  }
}

provider "aws" {
  region = "eu-central-1"
}

variable "vpc_id" {
  description = "VPC."
  type        = string
}

variable "public_subnet_ids" {
  description = "Public subnets in two zones, for the load balancer."
  type        = list(string)
}

variable "private_subnet_ids" {
  description = "Private subnets, for the node."
  type        = list(string)
}

variable "zone_name" {
  description = "Hosted zone in Route 53, such as example.org."
  type        = string
}

variable "public_key" {
  description = "What `cachesrv key generate` printed."
  type        = string
}

locals {
  domain_name = "cache.${var.zone_name}"
  validation  = one(aws_acm_certificate.cache.domain_validation_options)
}

data "aws_route53_zone" "this" {
  name = var.zone_name
}

resource "aws_acm_certificate" "cache" {
  domain_name       = local.domain_name
  validation_method = "DNS"
  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_route53_record" "validation" {
  zone_id = data.aws_route53_zone.this.zone_id
  name    = local.validation.resource_record_name
  type    = local.validation.resource_record_type
  records = [local.validation.resource_record_value]
  ttl     = 300
}

resource "aws_acm_certificate_validation" "cache" {
  certificate_arn         = aws_acm_certificate.cache.arn
  validation_record_fqdns = [aws_route53_record.validation.fqdn]
}

module "cachesrv" {
  source = "../.."

  domain_name              = local.domain_name
  certificate_arn          = aws_acm_certificate_validation.cache.certificate_arn
  vpc_id                   = var.vpc_id
  load_balancer_subnet_ids = var.public_subnet_ids
  node_subnet_ids          = var.private_subnet_ids
  allowed_cidrs            = ["0.0.0.0/0"] # readers need a token: public is false

  bucket_name           = "nix-cache-${replace(var.zone_name, ".", "-")}"
  public_key            = var.public_key
  signing_key_parameter = "/cachesrv/signing-key"
  push_token_parameter  = "/cachesrv/push-token"
  bundle                = "${path.module}/cachesrv.tar.gz"
}

resource "aws_route53_record" "cache" {
  zone_id = data.aws_route53_zone.this.zone_id
  name    = local.domain_name
  type    = "A"
  alias {
    name                   = module.cachesrv.load_balancer.dns_name
    zone_id                = module.cachesrv.load_balancer.zone_id
    evaluate_target_health = false
  }
}

output "nix_conf" {
  description = "The lines for nix.conf of clients."
  value       = module.cachesrv.nix_conf
}

output "push_url" {
  description = "Where to push."
  value       = module.cachesrv.push_url
}
