output "nix_conf" {
  description = "The lines for nix.conf of clients."
  value       = <<-EOT
    extra-substituters = ${local.base_url}/${var.cache_name}
    extra-trusted-public-keys = ${var.public_key}
  EOT
}

output "public_key_command" {
  description = "Prints the public key of the signing key that nodes have, to compare with nix_conf."
  value       = "aws ssm get-parameter --region ${local.region} --with-decryption --name ${var.signing_key_parameter} --query Parameter.Value --output text | cachesrv key public -"
}

output "push_url" {
  description = "What `cachesrv push --to` and `nix copy --to` want."
  value       = "https://${var.domain_name}/${var.cache_name}"
}

output "bucket_name" {
  description = "The bucket; objects lie in it under objects/<cache_name>/."
  value       = aws_s3_bucket.cache.id
}

output "load_balancer" {
  description = "What the DNS record of domain_name is an alias of."
  value = {
    dns_name = aws_lb.cache.dns_name
    zone_id  = aws_lb.cache.zone_id
  }
}

output "cloudfront" {
  description = "What the DNS record of cloudfront.domain_name is an alias of; null without CloudFront."
  value = one([for distribution in aws_cloudfront_distribution.cache : {
    dns_name = distribution.domain_name
    zone_id  = distribution.hosted_zone_id
  }])
}

output "autoscaling_group_name" {
  description = "For `aws autoscaling start-instance-refresh`, which replaces nodes by ones with the newest system."
  value       = aws_autoscaling_group.nodes.name
}

output "node_security_group_id" {
  description = "Let Prometheus in here, on port 5000, for /metrics."
  value       = aws_security_group.node.id
}
