# Names and network

variable "name" {
  description = "Prefix of the names of what is made."
  type        = string
  default     = "cachesrv"
  validation {
    condition     = can(regex("^[a-z][a-z0-9]*(-[a-z0-9]+)*$", var.name)) && length(var.name) <= 24
    error_message = "Expected 1 to 24 lower-case letters, digits and single dashes, the first a letter, the last no dash."
  }
}

variable "domain_name" {
  description = "Host name of the load balancer, as in cache.example.org; point its DNS record at the output load_balancer."
  type        = string
  validation {
    condition     = can(regex("^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z]{2,63}$", var.domain_name))
    error_message = "Expected a host name in lower case, without https:// and without a final dot."
  }
}

variable "certificate_arn" {
  description = "ACM certificate for domain_name, in the region of the module."
  type        = string
  validation {
    condition     = can(regex("^arn:[a-z-]+:acm:[a-z0-9-]+:[0-9]{12}:certificate/[0-9a-f-]+$", var.certificate_arn))
    error_message = "Expected the ARN of an ACM certificate."
  }
}

variable "vpc_id" {
  description = "VPC to live in."
  type        = string
  validation {
    condition     = can(regex("^vpc-[0-9a-f]+$", var.vpc_id))
    error_message = "Expected the ID of a VPC, vpc-..."
  }
}

variable "load_balancer_subnet_ids" {
  description = "Subnets of the load balancer, in two zones or more: public ones, unless it is internal."
  type        = list(string)
  validation {
    condition     = length(distinct(var.load_balancer_subnet_ids)) >= 2 && alltrue([for id in var.load_balancer_subnet_ids : can(regex("^subnet-[0-9a-f]+$", id))])
    error_message = "Expected two or more different IDs of subnets, subnet-..."
  }
}

variable "node_subnet_ids" {
  description = "Private subnets of the nodes, with a way to S3, SSM and the Amazon Linux repositories. Without postgresql the one node and its volume live in the first."
  type        = list(string)
  validation {
    condition     = length(var.node_subnet_ids) >= 1 && alltrue([for id in var.node_subnet_ids : can(regex("^subnet-[0-9a-f]+$", id))])
    error_message = "Expected one or more IDs of subnets, subnet-..."
  }
}

variable "internal" {
  description = "Whether the load balancer has private addresses only."
  type        = bool
  default     = false
}

variable "allowed_cidrs" {
  description = "IPv4 networks that may reach the load balancer; CloudFront, if used, may in any case. There is no default, so that the internet is let in on purpose."
  type        = set(string)
  validation {
    condition     = alltrue([for cidr in var.allowed_cidrs : can(regex("^[0-9.]+/[0-9]+$", cidr)) && can(cidrnetmask(cidr))])
    error_message = "Expected IPv4 networks such as 10.0.0.0/8, or 0.0.0.0/0 for everybody."
  }
}

# The cache

variable "bucket_name" {
  description = "S3 bucket to make for the objects. Its name is unique in the world."
  type        = string
  validation {
    # Dots are legal, but break TLS with virtual addressing.
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "Expected 3 to 63 lower-case letters, digits and dashes, without dots."
  }
}

variable "cache_name" {
  description = "Name of the cache: it is served at https://<domain_name>/<cache_name>."
  type        = string
  default     = "main"
  validation {
    condition     = can(regex("^[0-9A-Za-z][0-9A-Za-z_-]{0,62}$", var.cache_name)) && !contains(["api", "health", "metrics", "nar", "log", "realisations", "build-trace-v2", "debuginfo"], var.cache_name)
    error_message = "Expected 1 to 63 letters, digits, dashes and underscores, and no name that HTTP paths of cachesrv have."
  }
}

variable "public" {
  description = "Whether everybody who reaches it may read; otherwise readers need a token."
  type        = bool
  default     = false
}

variable "priority" {
  description = "Nix asks caches in ascending order of this; cache.nixos.org has 40."
  type        = number
  default     = 40
  validation {
    condition     = var.priority >= 0 && var.priority <= 10000 && floor(var.priority) == var.priority
    error_message = "Expected a whole number from 0 to 10000."
  }
}

variable "public_key" {
  description = "Public half of the signing key, as `cachesrv key generate` prints it; for the outputs only."
  type        = string
  validation {
    condition     = can(regex("^[!-9;-~]{1,255}:[0-9A-Za-z+/]{43}=$", var.public_key))
    error_message = "Expected a public key, <name>:<base64>."
  }
}

variable "signing_key_parameter" {
  description = "Name of the SSM parameter (SecureString, key alias/aws/ssm) with the secret signing key."
  type        = string
  validation {
    condition     = can(regex("^/[0-9A-Za-z_./-]{1,1000}$", var.signing_key_parameter))
    error_message = "Expected the name of an SSM parameter that begins with a slash."
  }
}

variable "push_token_parameter" {
  description = "Name of the SSM parameter (SecureString, key alias/aws/ssm) with the token that may push."
  type        = string
  validation {
    condition     = can(regex("^/[0-9A-Za-z_./-]{1,1000}$", var.push_token_parameter))
    error_message = "Expected the name of an SSM parameter that begins with a slash."
  }
}

variable "environment" {
  description = "Any other key of cachesrv's configuration, as { CACHESRV_LOOKUP__NEGATIVE_TTL = \"1 h\" }. Not for secrets: it is readable in the state and in the user data."
  type        = map(string)
  default     = {}
  validation {
    condition     = alltrue([for key in keys(var.environment) : can(regex("^CACHESRV_[A-Z]+(__[0-9]{1,4})?__[0-9A-Z_]+$", key))])
    error_message = "Expected names of the form CACHESRV_<SECTION>__<KEY> or CACHESRV_<SECTION>__<NUMBER>__<KEY>."
  }
  validation {
    # What neither a shell nor systemd takes for anything else between double quotes.
    condition     = alltrue([for value in values(var.environment) : can(regex("^[ !#%-\\[\\]^_a-~]*$", value))])
    error_message = "Expected values of printable ASCII without \", $, ` and backslash."
  }
}

# The nodes

variable "bundle" {
  description = "Local .tar.gz with the wheels of cachesrv and of all that it needs, for Python 3.11 on the architecture of instance_type; README.md says how to make it."
  type        = string
  validation {
    condition     = endswith(var.bundle, ".tar.gz")
    error_message = "Expected the path of a .tar.gz file."
  }
}

variable "instance_type" {
  description = "Type of the nodes: a Nitro one, x86_64 or arm64."
  type        = string
  default     = "m7i-flex.large"
  validation {
    condition     = can(regex("^[a-z0-9-]+[.][a-z0-9-]+$", var.instance_type))
    error_message = "Expected an EC2 instance type such as m7i-flex.large."
  }
}

variable "nodes" {
  description = "Number of nodes. More than one need postgresql: SQLite lives on the disk of one."
  type        = number
  default     = 1
  validation {
    condition     = var.nodes >= 1 && var.nodes <= 100 && floor(var.nodes) == var.nodes
    error_message = "Expected a whole number from 1 to 100."
  }
  validation {
    condition     = var.nodes <= 1 || var.postgresql != null
    error_message = "Several nodes need postgresql."
  }
}

variable "data_gib" {
  description = "Disk in GiB, half of it for the disk cache of NARs, half for catalog and index; on the volume that outlives the node, or with postgresql on each node's own."
  type        = number
  default     = 100
  validation {
    condition     = var.data_gib >= 20 && var.data_gib <= 16384 && floor(var.data_gib) == var.data_gib
    error_message = "Expected a whole number from 20 to 16384."
  }
}

# The bucket's lifecycle

variable "undelete_days" {
  description = "Days for which deleted objects can be brought back, and are paid for."
  type        = number
  default     = 7
  validation {
    condition     = var.undelete_days >= 1 && floor(var.undelete_days) == var.undelete_days
    error_message = "Expected a whole number, 1 or more."
  }
}

variable "intelligent_tiering_days" {
  description = "Days after which NARs move to S3 Intelligent-Tiering; null for never."
  type        = number
  default     = null
  validation {
    condition     = var.intelligent_tiering_days == null ? true : var.intelligent_tiering_days >= 0 && floor(var.intelligent_tiering_days) == var.intelligent_tiering_days
    error_message = "Expected a whole number of days, or null."
  }
}

# What is optional

variable "cloudfront" {
  description = "CloudFront in front of a public cache: readers use its domain_name, pushes go on to var.domain_name. The certificate is one for that name in us-east-1."
  type = object({
    domain_name     = string
    certificate_arn = string
    price_class     = optional(string, "PriceClass_100")
  })
  default = null
  validation {
    condition     = var.cloudfront == null ? true : can(regex("^arn:[a-z-]+:acm:us-east-1:[0-9]{12}:certificate/[0-9a-f-]+$", var.cloudfront.certificate_arn)) && can(regex("^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z]{2,63}$", var.cloudfront.domain_name)) && var.cloudfront.domain_name != var.domain_name
    error_message = "Expected a host name other than domain_name, and the ARN of an ACM certificate in us-east-1."
  }
  validation {
    condition     = var.cloudfront == null ? true : var.public && !var.internal
    error_message = "CloudFront gives NARs to whoever asks, and asks the load balancer over the internet: expected public = true and internal = false."
  }
}

variable "postgresql" {
  description = "A PostgreSQL database (RDS) for the catalog in place of SQLite. The SSM parameter (SecureString) holds its password: letters and digits, in which a new one is announced by a higher password_version. See README.md first."
  type = object({
    password_parameter = string
    password_version   = optional(number, 1)
    engine_version     = optional(string, "17")
    instance_class     = optional(string, "db.t4g.medium")
    storage_gib        = optional(number, 20)
    multi_az           = optional(bool, true)
  })
  default = null
  validation {
    condition     = var.postgresql == null ? true : can(regex("^/[0-9A-Za-z_./-]{1,1000}$", var.postgresql.password_parameter)) && var.postgresql.storage_gib >= 20 && startswith(var.postgresql.instance_class, "db.")
    error_message = "Expected the name of an SSM parameter that begins with a slash, 20 GiB or more, and a db. instance class."
  }
  validation {
    condition     = var.postgresql == null ? true : length(distinct(var.node_subnet_ids)) >= 2
    error_message = "RDS wants node_subnet_ids in two zones or more."
  }
}
