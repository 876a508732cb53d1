"""Files that appear under their names only when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llmc.errors import LlmcError


@contextlib.contextmanager
def replacing(path: Path, failure: type[LlmcError] = LlmcError) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises `failure` if it cannot be written; `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space or choose another disk" if full else "choose a folder that exists and can be written"
        raise failure(f"cannot be written: {error.strerror or error}", where=str(path), hint=hint) from error
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written refuses that too
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
