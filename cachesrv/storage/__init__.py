"""Objects by key: the standard binary cache layout in files, in S3 or in memory."""
