"""How long every build waits for the post-build-hook, against an interpreter that does nothing."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATHS = " ".join(f"/nix/store/{digit * 32}-output" for digit in "0123")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()), help="on the disk of the queue")
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.data) as folder:
        bare, script = install(Path(folder) / "venv")
        environment = {"CACHESRV_QUEUE_DIR": f"{folder}/queue", "OUT_PATHS": PATHS, "DRV_PATH": f"{PATHS[:50]}.drv"}
        ways = {
            "python3 -c pass": [bare, "-c", "pass"],
            "cachesrv-hook": [script],
            "python3 -m cachesrv hook": [bare, "-m", "cachesrv", "hook"],
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, command in ways.items():
                begun = time.perf_counter()
                subprocess.run(command, env=environment, check=True)
                taken[name].append(time.perf_counter() - begun)
        nothing = taken["python3 -c pass"]
        for name, times in taken.items():
            ratio = statistics.median(ours / theirs for ours, theirs in zip(times, nothing, strict=True))
            print(f"{name:25} {1000 * statistics.median(times):6.1f} ms  {ratio:.2f}")
        assert len(os.listdir(f"{folder}/queue/incoming")) == 2 * options.rounds  # noqa: PTH208  counted, not walked


def install(folder: Path) -> tuple[str, str]:
    """An environment with the package as it is here; its interpreter, and the script that pip would make."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python3"
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "cachesrv").symlink_to(ROOT / "cachesrv")
    script = folder / "bin" / "cachesrv-hook"
    lines = ["import sys", "from cachesrv.__main__ import hook_main", "sys.exit(hook_main())"]
    script.write_text("\n".join([f"#!{python}", *lines, ""]))
    script.chmod(0o755)
    return str(python), str(script)


if __name__ == "__main__":
    sys.exit(main())
