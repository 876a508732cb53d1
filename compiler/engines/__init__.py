"""llmc and its peers behind one interface, so that one bench and one check serve all. Each is imported on first use."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from llmc.engines.base import Engine
from llmc.errors import OptionError

__all__ = ["ENGINES", "Engine", "demand_engine", "open_engine"]

# name: (module here, class, distribution to install, if it is one)
ENGINES = {
    "llmc": ("artifact", "ArtifactEngine", "llmc"),
    "onnxruntime": ("ort", "OnnxRuntimeEngine", "onnxruntime"),
    "onnxruntime-genai": ("genai", "GenAiEngine", "onnxruntime-genai"),
    "llama.cpp": ("llama_cpp", "LlamaCppEngine", ""),
    "openvino": ("openvino_", "OpenVinoEngine", "openvino"),
    "openvino-int4": ("openvino_", "OpenVinoInt4Engine", "openvino nncf"),
}


def demand_engine(name: str) -> None:
    """Raises OptionError for an unknown engine."""
    if name not in ENGINES:
        raise OptionError(f"no engine '{name}'", hint=f"known: {', '.join(ENGINES)}")


def open_engine(name: str, path: str | Path, threads: int, **options: Any) -> Engine:
    """Load `path` (an artifact for llmc, GGUF for llama.cpp, ONNX for the others) with `threads` threads.

    Raises OptionError for an unknown engine and for one that is not installed.
    """
    demand_engine(name)
    module, kind, distribution = ENGINES[name]
    try:
        engine: Engine = getattr(importlib.import_module(f"llmc.engines.{module}"), kind)(
            Path(path), threads, **options
        )
    except ModuleNotFoundError as error:
        raise OptionError(
            f"{name} needs the module {error.name}, which is not installed", hint=f"pip install {distribution}"
        ) from None
    return engine
