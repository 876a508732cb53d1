"""NVIDIA's tools: what they make, that it is kept, and what is said where they are not, or refuse."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc.errors import KernelError, OptionError
from llmc.gpu import nvrtc, toolchain
from llmc.gpu.binary import occupancy, resources
from llmc.gpu.fatbin import fatbin
from llmc.targets.cuda import SM80, SM90
from tests.gpu.tools import SOURCE, needs_compiler


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llmc" / "cuda"


@needs_compiler
def test_a_source_becomes_machine_code_and_ptx(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = toolchain.find_toolchain()
    binary = tools.compile(SOURCE, "sm_80")
    assert binary.cubin.startswith(b"\x7fELF") and b".target sm_80" in binary.ptx
    found = resources(binary)
    assert found.shared_bytes == 256 and found.spill_bytes == found.hmma == found.imma == 0
    assert 0 < found.registers < 64
    assert found.accesses["LDG.4"] == found.accesses["STG.4"] == found.accesses["STS.4"] == 1

    def fails(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(nvrtc, "compile", fails)
    assert tools.compile(SOURCE, "sm_80") == binary
    (entry,) = cache.glob("*.zip")
    entry.write_bytes(entry.read_bytes()[:100])  # cut off: made again
    with pytest.raises(AssertionError, match="compiled again"):
        tools.compile(SOURCE, "sm_80")


@needs_compiler
def test_a_source_that_is_refused_is_named() -> None:
    with pytest.raises(KernelError, match=r"double_it for sm_90: .*refuses this kernel: .*nothing_known") as error:
        toolchain.find_toolchain().compile(SOURCE.replace("tile[63", "nothing_known[63"), "sm_90")
    assert error.value.hint


def test_without_tools_the_command_that_installs_them_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_wheels", list)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not toolchain.available()
    with pytest.raises(OptionError, match=r"pip install 'llmc\[cuda\]'"):
        toolchain.find_toolchain()
    with pytest.raises(OptionError, match=r"pip install 'llmc\[cuda\]'"):
        toolchain.disassemble(b"")


@pytest.fixture
def nvidia_tools() -> Iterator[Path]:
    for folder in toolchain._wheels():
        if all((folder / "bin" / tool).is_file() for tool in ("fatbinary", "cuobjdump")):
            yield folder / "bin"
            return
    pytest.skip("NVIDIA's fatbinary and cuobjdump are not installed")


@needs_compiler
def test_the_container_is_nvidias(nvidia_tools: Path, tmp_path: Path) -> None:
    """The same headers as NVIDIA's own tool writes, but for the size of the PTX, from which that tool takes comments;
    and another tool of NVIDIA's finds both entries."""
    binary = toolchain.find_toolchain().compile(SOURCE, "sm_80")
    ours = fatbin(80, binary.cubin, binary.ptx)
    (tmp_path / "k.cubin").write_bytes(binary.cubin)
    (tmp_path / "k.ptx").write_bytes(binary.ptx)
    (tmp_path / "ours.fatbin").write_bytes(ours)
    images = [f"--image3=kind={kind},sm=80,file=k.{name}" for kind, name in (("elf", "cubin"), ("ptx", "ptx"))]
    command = [str(nvidia_tools / "fatbinary"), "--create=theirs.fatbin", "--compress=false", "-64", *images]
    subprocess.run(command, check=True, cwd=tmp_path)
    theirs = (tmp_path / "theirs.fatbin").read_bytes()
    first = 16 + 64 + -(-len(binary.cubin) // 8) * 8  # where the PTX's entry begins
    assert ours[:8] == theirs[:8] and ours[16:first] == theirs[16:first]
    assert ours[first : first + 8] == theirs[first : first + 8]
    assert ours[first + 16 : first + 80] == theirs[first + 16 : first + 80]

    def listed(kind: str) -> str:
        command = [str(nvidia_tools / "cuobjdump"), f"--list-{kind}", "ours.fatbin"]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    assert "sm_80" in listed("elf") and "sm_80" in listed("ptx")


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "share"),
    [
        (SM80, 256, 32, 0, 1.0),
        (SM80, 256, 128, 0, 0.25),  # 65,536 registers hold two blocks
        (SM80, 128, 32, 40 << 10, 4 * 128 / 2048),  # 164 KiB hold four times 41
        (SM90, 128, 32, 40 << 10, 5 * 128 / 2048),
        (SM80, 32, 16, 0, 0.5),  # 32 blocks at most
    ],
)
def test_occupancy_is_what_the_scarcest_resource_allows(
    target: object, threads: int, registers: int, shared: int, share: float
) -> None:
    assert occupancy(target, threads, registers, shared) == share  # type: ignore[arg-type]


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no toolkit with nvcc is installed")


@needs_nvcc
@needs_compiler
def test_a_toolkits_nvcc_serves_where_the_wheels_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source for both architectures: what nvcc makes is machine code and PTX, and takes what nvrtc's takes."""
    wheels, folders = toolchain.find_toolchain(), toolchain._wheels
    monkeypatch.setattr(toolchain, "_wheels", list)
    tools = toolchain.find_toolchain()
    assert tools.nvrtc is None and tools.identity.startswith("nvcc 1") and tools.identity != wheels.identity
    for arch in ("sm_80", "sm_90"):
        binary = tools.compile(SOURCE, arch)
        assert binary.cubin.startswith(b"\x7fELF") and f".target {arch}".encode() in binary.ptx
        assert fatbin(int(arch[3:]), binary.cubin, binary.ptx)
        with monkeypatch.context() as only_here:
            only_here.setattr(toolchain, "_wheels", folders)  # the disassembler comes with them
            found, same = resources(binary), resources(wheels.compile(SOURCE, arch))
        assert (found.shared_bytes, found.spill_bytes, found.accesses) == (256, 0, same.accesses)


@needs_nvcc
def test_nvccs_refusal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_wheels", list)
    with pytest.raises(KernelError, match=r"double_it for sm_80: .*\(nvcc .*refuses this kernel: .*nothing_known"):
        toolchain.find_toolchain().compile(SOURCE.replace("tile[63", "nothing_known[63"), "sm_80")


@needs_compiler
def test_what_was_disassembled_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubin = toolchain.find_toolchain().compile(SOURCE, "sm_80").cubin
    code = toolchain.disassemble(cubin)
    assert "double_it" in code

    def fails(*_: object) -> None:
        raise AssertionError("disassembled again")

    monkeypatch.setattr(toolchain, "_disassemble", fails)
    assert toolchain.disassemble(cubin) == code
    (entry,) = cache.glob("*.sass.gz")
    entry.write_bytes(entry.read_bytes()[:20])  # cut off: done again
    with pytest.raises(AssertionError, match="disassembled again"):
        toolchain.disassemble(cubin)
