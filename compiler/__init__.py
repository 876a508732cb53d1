"""llmc compiles ONNX models, large language models above all, into tuned artifacts, and runs them.

Names resolve on first use: importing llmc alone loads neither numpy nor TVM, and running an artifact never loads the
compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmc.errors import (
    ArtifactError,
    CheckError,
    InputError,
    KernelError,
    LlmcError,
    ModelError,
    OptionError,
    ShapeError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from llmc.pipeline import compile
    from llmc.runtime import Model, Session, generate, generate_all, load

__version__ = "0.1.0"

_HOMES = {
    "compile": "llmc.pipeline",
    "Model": "llmc.runtime",
    "Session": "llmc.runtime",
    "generate": "llmc.runtime",
    "generate_all": "llmc.runtime",
    "load": "llmc.runtime",
}

__all__ = [
    "ArtifactError",
    "CheckError",
    "InputError",
    "KernelError",
    "LlmcError",
    "Model",
    "ModelError",
    "OptionError",
    "Session",
    "ShapeError",
    "UnsupportedError",
    "compile",
    "generate",
    "generate_all",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
