"""The only module that names version-specific paths of TVM.

Everything else imports TVM through here, so that a new release is one file's work. Importing this module loads the
compiler library (about one second and 250 MB): nothing that only loads or inspects an artifact may import it.
"""

from __future__ import annotations

import os

# TVM's default is half of the logical cores, which is one thread on a 2-core machine without SMT; it is read once,
# when the library's thread pool starts.
os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import tvm  # noqa: E402
from tvm import relax, tirx  # noqa: E402
from tvm.ir import Expr, IRModule  # noqa: E402
from tvm.s_tir import Schedule  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.script.ir_builder import tirx as T  # noqa: E402
from tvm.sym import Analyzer  # noqa: E402
from tvm.target import Target as TvmTarget  # noqa: E402
from tvm.tirx import PrimFunc  # noqa: E402

TVM_VERSION = tvm.__version__
REQUIRED_TVM, REQUIRED_FFI = "0.27.0.post1", "0.1.14.post1"

__all__ = [
    "TVM_VERSION",
    "Analyzer",
    "Expr",
    "IRBuilder",
    "IRModule",
    "PrimFunc",
    "Schedule",
    "T",
    "TvmTarget",
    "relax",
    "tirx",
    "tvm",
]
