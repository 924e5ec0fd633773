"""The uploader behind `cachesrv push`."""
