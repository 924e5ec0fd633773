"""The HTTP side of `cachesrv serve`."""
