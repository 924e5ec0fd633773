"""The index: hash part to answer, one read of a memory map."""
