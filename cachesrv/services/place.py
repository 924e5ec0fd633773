"""Which machine this is, whatever it is called: many are called alike."""

from pathlib import Path


def place() -> str:
    """Where process ids mean the same: this boot of this kernel, in this namespace. Sources: proc(5), namespaces(7)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespace = Path("/proc/self/ns/pid").readlink()
    return f"{boot} {namespace}"
