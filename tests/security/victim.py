"""Gives hostile files to the command line, in a process with limits; prints one JSON object a file.

    python -m tests.security.victim WARM_UP FILE...

Run as a program so that a crash, a hang or a lack of memory is seen from outside. WARM_UP is a model that is refused
too: it loads what a refusal needs, so that the rest measures refusals alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time
from pathlib import Path

from llmc.cli import main

MEMORY = 256 << 20


def status(key: str) -> int:
    """A figure of this process in bytes, such as VmHWM: the most memory that was resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def refuse(path: str) -> dict[str, object]:
    """What the command line does with a file: exit code, what it says, seconds of CPU, growth of the peak in bytes."""
    words = ["inspect", path] if path.endswith(".llmc") else ["compile", path, "--output", f"{path}.out.llmc"]
    out, err = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    peak, start = status("VmHWM"), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    seconds = time.process_time() - start
    return {"file": path, "code": code, "says": err.getvalue(), "seconds": seconds, "grown": status("VmHWM") - peak}


if __name__ == "__main__":
    warm_up, *files = sys.argv[1:]
    refuse(warm_up)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + MEMORY,) * 2)
    for file in files:
        print(json.dumps({"file": file}), flush=True)
        print(json.dumps(refuse(file)), flush=True)
