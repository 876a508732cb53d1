"""Hopper's asynchronous instructions behind names: products of warpgroups, mbarriers, bulk copies. PTX for sm_90a.

A warpgroup is four warps whose first one's number is a multiple of four. Its products have 64 rows, of which warp w
makes rows 16 w … 16 w + 15: A and C of a warp lie in registers as `llmc.targets.mma` has them for 16 rows, C with 8
columns side by side for every four registers. B is in shared memory, its columns as rows of k with 128 bytes each:
chunks of 16 bytes that are swizzled, chunk c of row r in the place of c ^ (r % 8). Eight rows begin at an address that
is a multiple of 1024.

All this is asynchronous. Between `issue` and the wait for it, neither its registers nor B may be touched;
`order_registers` stands between what wrote registers and the products that take them. What threads wrote to shared
memory must be made known to these instructions by the thread that wrote it (`publish`), before a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.targets.threads import Cell
from llmc.tvm_shim import T

GROUP = 128  # threads
_DEPTH_BYTES = 32  # of a row of B that one product takes
ALIGNED = 1024  # where eight swizzled rows of 128 bytes begin
_SWIZZLE_128, _EIGHT_ROWS = 1 << 62, ALIGNED // 16 << 32  # of a matrix descriptor
_UNUSED_LEADING = 1 << 16


def describe(row: Any) -> Cell:
    """The descriptor of B, whose first element of its first row is `row`."""
    address = T.bitwise_and(T.cuda.cvta_generic_to_shared(T.address_of(row)), T.uint32(0x3FFFF))
    start = T.Cast("uint64", T.shift_right(address, T.uint32(4)))
    return Cell(T.bitwise_or(start, T.uint64(_SWIZZLE_128 | _EIGHT_ROWS | _UNUSED_LEADING)), "uint64")


def order_registers() -> None:
    """Products that follow see what registers hold here."""
    T.evaluate(T.ptx["wgmma.fence.sync.aligned"]())


def issue(kind: str, c: Sequence[Cell], a: Sequence[Any], b: Cell, i: int, accumulate: bool) -> None:
    """C := A B, or C += A B: begins 64 rows by 2 len(c) columns. `kind` "f16", "bf16" or "e4m3", sums in float32; `a`
    are four registers, `b` is a descriptor, of whose rows product i takes 32 bytes."""
    halves = kind != "e4m3"
    name = f"wgmma.mma_async.sync.aligned.m64n{2 * len(c)}k{16 if halves else 32}.f32.{kind}.{kind}"
    at = b.v + T.uint64(i * _DEPTH_BYTES // 16)
    way = (0,) if halves else ()  # B is K-major, as bytes always are
    T.evaluate(T.ptx[name](*[cell.v for cell in c], *a, at, T.bool(accumulate), 1, 1, *way))


def commit() -> None:
    """Products issued since the last call become one group."""
    T.evaluate(T.ptx["wgmma.commit_group.sync.aligned"]())


def wait(pending: int) -> None:
    """Waits until at most `pending` groups are in flight."""
    T.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](pending))


def publish() -> None:
    """Products see what this thread wrote to shared memory, behind a barrier."""
    T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())


def make_phase(phase: Any) -> None:
    """`phase`, a uint64 in shared memory, counts the bytes that one thread expects. Others use it behind a barrier."""
    T.evaluate(T.ptx["mbarrier.init.shared::cta.b64"](T.address_of(phase), T.uint32(1)))


def publish_phases() -> None:
    """Copies may be counted by phases that this thread made."""
    T.evaluate(T.ptx["fence.mbarrier_init.release.cluster"]())


def expect(phase: Any, count: Any) -> None:
    """The phase ends when so many bytes have come."""
    T.evaluate(T.ptx["mbarrier.arrive.expect_tx.shared::cta.b64"](T.address_of(phase), T.Cast("uint32", count)))


def copy(to: Any, source: Any, count: int, phase: Any) -> None:
    """Begins to copy `count` bytes, a multiple of 16, from global to shared memory."""
    name = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    T.evaluate(T.ptx[name](T.address_of(to), T.address_of(source), T.uint32(count), T.address_of(phase)))


def await_phase(phase: Any, parity: Any) -> None:
    """Waits for the end of the phase of this parity, 0 for the first one: what it counted is then seen."""
    done = Cell(T.uint32(0), "uint32")
    with T.While(done.v == T.uint32(0)):
        name = "mbarrier.try_wait.parity.shared::cta.b64"
        T.evaluate(T.ptx[name](done.v, T.address_of(phase), T.Cast("uint32", parity)))
