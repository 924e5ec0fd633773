"""`python -m cachesrv`."""

from cachesrv.cli import main

main()
