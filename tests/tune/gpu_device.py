"""A machine with a GPU that serves tuners elsewhere, under the emulated driver: `gpu_server`'s own main.

    python -m tests.tune.gpu_device HOST:PORT KEY KERNELS

The emulated driver runs CUDA C: the file KERNELS holds that of all kernels which may come, pickled.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from llmc.emulator import driver


def main() -> None:
    driver.install((8, 0))
    for name, source, module in pickle.loads(Path(sys.argv[3]).read_bytes()):
        driver.register_kernel(name, source, module)

    from llmc.tune import gpu_server
    from llmc.tune.worker import die_with_parent

    die_with_parent()
    gpu_server._FLUSHED = 1 << 16
    gpu_server.main()


if __name__ == "__main__":
    main()
