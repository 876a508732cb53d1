"""NVIDIA GPUs. Figures are the data sheets' of the first product of an architecture: A100 SXM 80 GB, H100 SXM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llmc.targets.base import Target

# What calls the kernels is code for a CPU, of which nothing is known but that it has a GPU beside it.
_HOST_CPU = "x86-64-v2"


@dataclass(frozen=True)
class Pipes:
    """What one multiprocessor does in a cycle, and how long things take: what `llmc.gpu.predict` counts with.

    In a cycle: `issue` instructions of warps; instructions of `floats`, `integers` and `specials` lanes
    (exponentials, divisions); `tensor` operations of tensor cores by the type of their operands, as `mma.sync` reaches
    them; `l1` bytes of global memory. A wavefront of shared memory takes one cycle. Of the whole device: `clock` in Hz,
    `l2` bytes in a cycle. Latencies in cycles: `shared_latency`, `global_latency`, `math_latency` of one float
    operation after another, `barrier_latency`.

    Sources: [A] NVIDIA A100 Tensor Core GPU Architecture, whitepaper, 2020; [H] NVIDIA H100 Tensor Core GPU
    Architecture, whitepaper, 2022; [P] CUDA C++ Programming Guide, table of arithmetic instructions' throughput;
    [L] Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking, 2024
    (arXiv:2402.13499).
    """

    clock: float
    issue: float
    floats: float
    integers: float
    specials: float
    tensor: tuple[tuple[str, float], ...]
    l1: float
    l2: float
    shared_latency: float
    global_latency: float
    math_latency: float
    barrier_latency: float

    def tensor_operations(self, kind: str) -> float:
        """In a cycle, of operands of this type."""
        return dict(self.tensor)[kind]


_AMPERE = Pipes(
    clock=1.41e9,  # [A]: boost
    issue=4,  # [A]: four schedulers
    floats=64,  # [P]
    integers=64,  # [P]
    specials=16,  # [P]
    tensor=(("f16", 2048), ("bf16", 2048), ("s8", 4096), ("u8", 4096)),  # [A]: 1024 and 2048 multiply-adds
    l1=128,  # [A]: four sectors
    l2=5120,  # [A]
    shared_latency=29,  # [L]
    global_latency=466,  # [L]
    math_latency=4,  # [L]
    barrier_latency=30,  # assumed: about one trip to shared memory
)


@dataclass(frozen=True)
class CudaTarget(Target):
    """One architecture of GPUs. `mcpu` is its name for the compiler, sm_XX; `lanes` are the threads of a warp,
    `vector_registers` the most 32-bit registers of a thread, `l1_bytes` the first-level cache with the shared memory in
    it.

    Of a multiprocessor (SM): `registers` of 32 bits, `threads`, `blocks`, and `shared_bytes`, of which one block may
    have `block_shared_bytes`, where it asks for them, and `static_shared_bytes` else. Of the whole device:
    `multiprocessors`, `bandwidth` in bytes a second, `fma` in float32 operations a second outside of tensor cores.

    `pipes` are figures for predictions. `exact`: with instructions that GPUs of other compute capabilities do not have,
    later ones neither (NVIDIA's sm_90a), so that there is no PTX for those.
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
    pipes: Pipes = _AMPERE
    exact: bool = False

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

_HOPPER = Pipes(
    clock=1.83e9,  # what [H]'s 989 TFLOPS of float16 stand for
    issue=4,  # [H]
    floats=128,  # [P]
    integers=64,  # [P]
    specials=16,  # [P]
    # [H]: 4096 and 8192 operations, of which mma.sync reaches 62.9 % [L]; the rest is wgmma's.
    tensor=(("f16", 2576), ("bf16", 2576), ("s8", 5152), ("u8", 5152), ("e4m3", 5152), ("e5m2", 5152)),
    l1=128,
    l2=5120,  # [A]; [H] states none
    shared_latency=29,  # [L]
    global_latency=479,  # [L]
    math_latency=4,  # [L]
    barrier_latency=30,  # as above
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
    pipes=_HOPPER,
)

SM90A = replace(
    SM90,
    name="cuda-sm90a",
    mcpu="sm_90a",
    description="NVIDIA Hopper (H100) alone: products of warpgroups (wgmma), bulk copies",
    exact=True,
    pipes=replace(_HOPPER, tensor=(("f16", 4096), ("bf16", 4096), ("s8", 8192), ("u8", 8192), ("e4m3", 8192))),  # [H]
)

TARGETS = {t.name: t for t in (SM80, SM90, SM90A)}


def newest(capability: tuple[int, int] | None) -> CudaTarget:
    """The last target that a GPU of this compute capability and later ones run; the first one without a GPU, or for an
    older one."""
    return next((t for t in reversed(TARGETS.values()) if runs(t, capability) and not t.exact), SM80)


def runs(target: CudaTarget, capability: tuple[int, int] | None) -> bool:
    """Does a GPU of this compute capability run code for `target`? None: there is no GPU."""
    number = 0 if capability is None else 10 * capability[0] + capability[1]
    return number == arch_number(target) if target.exact else number >= arch_number(target)


def arch_number(target: Target) -> int:
    """80 of sm_80, 90 of sm_90a."""
    return int(target.mcpu.removeprefix("sm_").removesuffix("a"))
