# Optional: the catalog in PostgreSQL, for several nodes. See README.md: cachesrv itself has to know it first.

check "postgresql" {
  assert {
    condition     = var.postgresql == null
    error_message = "This version of cachesrv refuses postgresql:// URLs: its nodes will not start with this database."
  }
}

locals {
  database = {
    host               = join("", aws_db_instance.catalog[*].address)
    password_parameter = var.postgresql == null ? "" : var.postgresql.password_parameter
  }
}

# Read while Terraform runs, kept in no state and no plan.
ephemeral "aws_ssm_parameter" "database_password" {
  count = local.single ? 0 : 1
  arn   = "arn:${local.partition}:ssm:${local.region}:${local.account}:parameter${var.postgresql.password_parameter}"
}

resource "aws_db_subnet_group" "catalog" {
  count       = local.single ? 0 : 1
  name_prefix = "${var.name}-"
  subnet_ids  = var.node_subnet_ids
}

resource "aws_db_instance" "catalog" {
  count                     = local.single ? 0 : 1
  identifier_prefix         = "${var.name}-"
  engine                    = "postgres"
  engine_version            = var.postgresql.engine_version
  instance_class            = var.postgresql.instance_class
  storage_type              = "gp3"
  allocated_storage         = var.postgresql.storage_gib
  storage_encrypted         = true
  multi_az                  = var.postgresql.multi_az
  db_name                   = "cachesrv"
  username                  = "cachesrv"
  password_wo               = ephemeral.aws_ssm_parameter.database_password[0].value
  password_wo_version       = var.postgresql.password_version
  db_subnet_group_name      = aws_db_subnet_group.catalog[0].name
  vpc_security_group_ids    = aws_security_group.database[*].id
  backup_retention_period   = 7
  deletion_protection       = true
  final_snapshot_identifier = "${var.name}-final"
}

resource "aws_security_group" "database" {
  count       = local.single ? 0 : 1
  name_prefix = "${var.name}-database-"
  description = "${var.name}: database"
  vpc_id      = var.vpc_id
  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_ingress_rule" "database_from_nodes" {
  count                        = local.single ? 0 : 1
  security_group_id            = aws_security_group.database[0].id
  description                  = "PostgreSQL from nodes"
  referenced_security_group_id = aws_security_group.node.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

resource "aws_vpc_security_group_egress_rule" "to_database" {
  count                        = local.single ? 0 : 1
  security_group_id            = aws_security_group.node.id
  description                  = "PostgreSQL"
  referenced_security_group_id = aws_security_group.database[0].id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}
