"""What runs beside a GPU that tuners elsewhere measure on: TVM's RPC server, with what it lacks for GPUs.

    python -m llmc.tune.gpu_server HOST:9190 KEY

serves this machine's first GPU by KEY to the tracker at HOST. Each session has a process of its own.
"""

from __future__ import annotations

import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from llmc.tune.gpu_names import FLUSH, LOAD
from llmc.tune.gpu_subject import load_runtime
from llmc.tvm_shim import rpc, tvm, tvm_ffi

_FLUSHED = 256 << 20  # bytes: more than the second-level cache of any GPU
_PORT, _AGAIN_S = 9090, 1.0


def register() -> None:
    """Make the functions of a session known in this process."""
    tvm_ffi.register_global_func(LOAD, load, override=True)
    tvm_ffi.register_global_func(FLUSH, flush, override=True)


def load(name: str) -> Any:
    """The module of an uploaded library NAME.so, with the kernels beside it, NAME.so.0 and so on."""
    module = tvm.runtime.load_module(name)
    from_bytes = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda")
    for kernel in sorted(Path.cwd().glob(f"{name}.*")):
        module.import_module(from_bytes(kernel.read_bytes()))
    return module


def flush(*_: Any) -> None:
    """Leave nothing of earlier calls in the second-level cache."""
    source, to = _buffers()
    source.copyto(to)


@cache
def _buffers() -> tuple[Any, Any]:
    source, to = (tvm.runtime.empty((_FLUSHED // 4,), "float32", tvm.cuda(0)) for _ in range(2))
    return source, to


def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    load_runtime()
    register()
    while True:
        server = rpc.server.PopenRPCServerState("0.0.0.0", _PORT, tracker_addr=(host, int(port)), key=sys.argv[2])
        server.thread.join()
        time.sleep(_AGAIN_S)  # TVM's server ends with a kernel that crashes


if __name__ == "__main__":
    main()
