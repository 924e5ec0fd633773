"""What is to be pushed later: hooks write it down and return, `cachesrv queue run` pushes it.

Nothing that a hook imports (`directory`, `spool`, `hook`) may import more than os, sys and time: every build waits.
"""
