"""Permission for AMX tiles: asked for when an artifact needs them, and told plainly where it is refused."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest

from llmc.errors import ArtifactError
from llmc.package.archive import write_artifact
from llmc.package.manifest import TargetSpec
from llmc.runtime import library, load
from llmc.targets.x86 import AMX
from tests import amx_emulator
from tests.runtime import toys


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact that says that it needs tiles; its code uses none."""
    manifest = dataclasses.replace(toys.mlp_manifest(), target=TargetSpec(AMX.name, AMX.mcpu, ("amx_tile",)))
    tensors = {f"t.{name}": w for name, w in toys.mlp_weights().items()}
    write_artifact(tmp_path / "m.llmc", manifest, lib=toys.mlp_library(), tensors=tensors)
    return tmp_path / "m.llmc"


def test_permission_is_asked_for(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(library, "cpu_flags", lambda: frozenset(AMX.requires))
    monkeypatch.setattr(library, "permit_tiles", lambda: asked.append(True))
    load(artifact)
    assert asked == [True]


def test_a_refusal_is_an_error(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(library, "cpu_flags", lambda: frozenset(AMX.requires))
    monkeypatch.setattr(library, "permit_tiles", refuse)
    with pytest.raises(ArtifactError, match="does not let this process use AMX tiles: Operation not permitted") as e:
        load(artifact)
    assert e.value.exit_code == 6 and e.value.where == str(artifact) and "x86-avx512" in str(e.value.hint)


def test_a_cpu_without_tiles_comes_first(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(ArtifactError, match="needs amx_tile, which this CPU lacks"):
        load(artifact)


@pytest.mark.skipif(amx_emulator.NATIVE, reason="this CPU has tiles")
def test_linux_refuses_without_tiles() -> None:
    """The system call itself: an old kernel and a CPU without tiles both refuse it."""
    with pytest.raises(OSError) as e:
        library.permit_tiles()
    assert e.value.errno in (errno.EINVAL, errno.EOPNOTSUPP)


@pytest.mark.skipif(not amx_emulator.NATIVE, reason="this CPU has no tiles")
def test_linux_permits_tiles() -> None:
    library.permit_tiles()
