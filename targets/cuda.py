"""NVIDIA GPUs. Figures are the data sheets' of the first product of an architecture: A100 SXM 80 GB, H100 SXM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.targets.base import Target

# What calls the kernels is code for a CPU, of which nothing is known but that it has a GPU beside it.
_HOST_CPU = "x86-64-v2"


@dataclass(frozen=True)
class CudaTarget(Target):
    """One architecture of GPUs. `mcpu` is its name for the compiler, sm_XX; `lanes` are the threads of a warp,
    `vector_registers` the most 32-bit registers of a thread, `l1_bytes` the first-level cache with the shared memory in
    it.

    Of a multiprocessor (SM): `registers` of 32 bits, `threads`, `blocks`, and `shared_bytes`, of which one block may
    have `block_shared_bytes`, where it asks for them, and `static_shared_bytes` else. Of the whole device:
    `multiprocessors`, `bandwidth` in bytes a second, `fma` in float32 operations a second outside of tensor cores.
    """

    multiprocessors: int = 0
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared_bytes: int = 0
    block_shared_bytes: int = 0
    static_shared_bytes: int = 48 << 10
    block_threads: int = 1024
    bandwidth: float = 0.0
    fma: float = 0.0

    def tvm(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "arch": self.mcpu,
            "max_threads_per_block": self.block_threads,
            "max_shared_memory_per_block": self.static_shared_bytes,
            "thread_warp_size": self.lanes,
            "host": {"kind": "llvm", "mcpu": _HOST_CPU},
        }


SM80 = CudaTarget(
    name="cuda-sm80",
    kind="cuda",
    mcpu="sm_80",
    mattr=(),
    lanes=32,
    vector_registers=255,
    dot="none",
    requires=(),
    l1_bytes=192 << 10,
    l2_bytes=40 << 20,
    l3_bytes=0,
    description="NVIDIA Ampere (A100); later GPUs through PTX",
    multiprocessors=108,
    shared_bytes=164 << 10,
    block_shared_bytes=163 << 10,
    bandwidth=2.04e12,
    fma=19.5e12,
)

SM90 = CudaTarget(
    name="cuda-sm90",
    kind="cuda",
    mcpu="sm_90",
    mattr=(),
    lanes=32,
    vector_registers=255,
    dot="none",
    requires=(),
    l1_bytes=256 << 10,
    l2_bytes=50 << 20,
    l3_bytes=0,
    description="NVIDIA Hopper (H100); later GPUs through PTX",
    multiprocessors=132,
    shared_bytes=228 << 10,
    block_shared_bytes=227 << 10,
    bandwidth=3.35e12,
    fma=67e12,
)

TARGETS = {t.name: t for t in (SM80, SM90)}


def newest(capability: tuple[int, int] | None) -> CudaTarget:
    """The last target that a GPU of this compute capability runs; the first one without a GPU, or for an older one."""
    return next((t for t in reversed(TARGETS.values()) if runs(t, capability)), SM80)


def runs(target: CudaTarget, capability: tuple[int, int] | None) -> bool:
    """Does a GPU of this compute capability run code for `target`? None: there is no GPU."""
    return capability is not None and arch_number(target) <= 10 * capability[0] + capability[1]


def arch_number(target: Target) -> int:
    """80 of sm_80."""
    return int(target.mcpu.removeprefix("sm_"))
