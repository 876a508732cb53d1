"""Where TVM's runtime libraries are: in the installed apache-tvm, or in the artifact itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.package.reader import Artifact


def installed_version() -> str | None:
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_library(entry: str, version: str) -> Path | None:
    """Where apache-tvm keeps the library that an artifact's entry is a copy of; None where it is not installed in this
    version, or has none. Finding the package's place runs none of its code."""
    if installed_version() != version:
        return None
    spec = importlib.util.find_spec("tvm")
    library = Path(spec.origin).parent / "lib" / Path(entry).name if spec and spec.origin else None
    return library if library is not None and library.is_file() else None


@contextmanager
def unpacked(artifact: Artifact, entry: str) -> Iterator[Path]:
    """An entry as a file, in a folder private to this user, while it is loaded."""
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        file = Path(folder) / Path(entry).name
        file.write_bytes(artifact.read(entry))
        yield file
