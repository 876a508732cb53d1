"""What a launch asks of a GPU: its kernel's TIR, counted for given arguments. Nothing runs.

Some blocks stand for all. Of each, all threads go through the statements at a time: indices and conditions are
computed for every thread; of a loop the first iteration and one in the middle, which stands for all others. Memory has
no content here: an integer that a kernel loads from global memory is taken to be `content`, of floats nothing is known,
and a condition on what is not known is taken to hold.

The path of a block is what an in-order scoreboard makes of it. Loads between two barriers are under way together, as
compilers hoist them; who uses one waits for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.gpu.banks import LANES, sectors, wavefronts
from llmc.gpu.evaluate import Values, evaluate, name_of
from llmc.gpu.host import Launched
from llmc.targets.cuda import Pipes
from llmc.tvm_shim import PrimFunc, tvm

_SAMPLES = 3  # blocks that stand for all
_SCHEDULERS = 4  # of a multiprocessor, each with its own part of the pipes
_UNROLLED = 4  # iterations of a loop: assumed, as nvcc does where it does not know better
_BULK = 16  # bytes that a bulk copy moves at least: what a whole line is to one thread
_ILP = 2  # instructions of one thread that do not wait for each other: assumed
_FLOAT = ("Add", "Sub", "Mul", "Max", "Min", "LT", "LE", "GT", "GE", "EQ", "NE", "Select", "Cast")


@dataclass
class Demand:
    """Of a launch, all blocks together; `path` of one block.

    Instructions of warps: `floats` (an addition that follows a product is one with it), `specials` (roots,
    exponentials, divisions), `integers` (not those that only make indices), `others`. `tensor`: operations of tensor
    cores, by the type of their operands. `shared`: wavefronts of shared memory, with those of shuffles. `reads` and
    `writes`: bytes of global memory that are asked for, in whole sectors, by the number of the kernel's argument.
    `path`: cycles from a block's start to its end where nothing else is on its multiprocessor: the mean of the samples.

    `widths`: bytes of `reads`, before they are rounded to sectors, by (argument, bytes that a thread loads at once).
    `conflicts`: for each access of shared memory in the kernel, (wavefronts, those without conflicts).
    """

    floats: float = 0.0
    specials: float = 0.0
    integers: float = 0.0
    others: float = 0.0
    tensor: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    shared: float = 0.0
    reads: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    writes: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    path: float = 0.0
    widths: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    conflicts: dict[str, tuple[float, float]] = field(default_factory=dict)

    def width(self, argument: int) -> float:
        """Bytes that a thread loads of an array at once: the mean over all bytes; 0 where it loads none."""
        loads = [(width, bytes_) for (of, width), bytes_ in self.widths.items() if of == argument]
        return sum(w * b for w, b in loads) / sum(b for _, b in loads) if loads else 0.0

    @property
    def ways(self) -> tuple[float, float]:
        """(worst, mean) ways of bank conflicts; 1 is none."""
        if not self.conflicts:
            return 1.0, 1.0
        taken, ideal = (sum(each) for each in zip(*self.conflicts.values(), strict=True))
        return max(t / i for t, i in self.conflicts.values()), taken / ideal


def demand(kernel: PrimFunc, launch: Launched, content: int, pipes: Pipes) -> Demand:
    """Of one launch of a device function, as `lower` returns it."""
    total = Demand()
    numbers = sorted({round((i + 0.5) * launch.blocks / _SAMPLES - 0.5) for i in range(_SAMPLES)})
    for number in numbers:
        x, y = launch.grid[0], launch.grid[1]
        place = (number % x, number // x % y, number // (x * y))
        block = _Block(kernel, launch, place, content, pipes, total, launch.blocks / len(numbers))
        block.run(kernel.body)
        total.path += block.clock / len(numbers)
    return total


class _Block:
    """One block's walk over the kernel, which adds to `total`: `weight` times what it does, and its share of a path."""

    def __init__(
        self,
        kernel: PrimFunc,
        launch: Launched,
        place: tuple[int, int, int],
        content: int,
        pipes: Pipes,
        total: Demand,
        weight: float,
    ) -> None:
        self.total, self.weight, self.content, self.pipes = total, weight, content, pipes
        self.threads = -(-launch.threads // LANES) * LANES
        number = np.arange(self.threads)
        x, y, _ = launch.block
        inside = (number % x, number // x % y, number // (x * y))
        self.axes = {f"threadIdx.{a}": n for a, n in zip("xyz", inside, strict=True)}
        self.axes |= {f"blockIdx.{a}": np.asarray(n) for a, n in zip("xyz", place, strict=True)}
        self.mask = number < launch.threads
        self.counted: tuple[Any, int] = None, 0  # warps of a mask
        self.times = 1.0
        self.values: Values = {}
        self.arguments: dict[Any, int] = {}
        self.local: dict[Any, Any] = {}
        self.clock = self.since = self.arriving = self.waited = 0.0  # now, and when the last barrier was: cycles
        self.barriers = 0
        self.ready: dict[Any, float] = {}  # when what cells wait for has come
        self.groups: list[float] = []  # when copies that were committed have come
        self.sites: dict[Any, int] = {}
        for i, (param, value) in enumerate(zip(kernel.params, launch.arguments, strict=True)):
            if isinstance(value, int | np.integer):
                self.values[param] = int(value)
            else:
                self.arguments[param] = i

    # Statements

    def run(self, node: Any) -> None:
        match type(node).__name__:
            case "SeqStmt":
                for each in node.seq:
                    self.run(each)
            case "Bind":
                self.count(node.value)
                self.values[node.var] = self.value(node.value)
            case "AttrStmt":
                if node.attr_key == "thread_extent":
                    self.values[node.node.var] = self.axes[str(node.node.thread_tag)]
                self.run(node.body)
            case "DeclBuffer" if node.data is not None:
                self.arguments[node.buffer] = self.arguments.get(node.data, -1)
            case "For":
                self._loop(node)
            case "While":
                self.run(node.body)
            case "IfThenElse":
                self._branch(node)
            case "BufferStore":
                self._store(node)
            case "Evaluate":
                self.count(node.value)
        if type(node).__name__ in ("AllocBuffer", "DeclBuffer") and hasattr(node, "body"):
            self.run(node.body)

    def _loop(self, node: Any) -> None:
        extent = self.value(node.extent)
        with self._where(None if extent is None else np.asarray(extent) > 0) as any_:
            if any_:
                self._iterate(node, extent)

    def _iterate(self, node: Any, extent: Any) -> None:
        """A loop of threads that all go through it at least once; their mean stands for each."""
        first = self.value(node.min) or 0
        trips = 1.0 if extent is None else float(np.mean(np.broadcast_to(extent, self.mask.shape)[self.mask]))
        self._visit(node, first, 1.0)
        if trips > 1:
            began, waited, barriers = self.clock, self.waited, self.barriers
            self._visit(node, first + max(int(trips) // 2, 1), trips - 1)
            waited = self.waited - waited
            # Compilers unroll what has no barrier inside: its loads are then under way together.
            together = 1 if self.barriers > barriers else min(trips, _UNROLLED)
            self._later((trips - 2) * (self.clock - began - waited + waited / together))

    def _visit(self, node: Any, at: Any, trips: float) -> None:
        self.values[node.loop_var] = at
        self.since = self.clock
        with self._often(trips):
            self.run(node.body)

    def _wait(self, until: float) -> None:
        if until > self.clock:
            self.waited += until - self.clock
            self.clock = until

    def _later(self, cycles: float) -> None:
        """As much time passes, for all that is under way too."""
        self.clock += cycles
        self.since += cycles
        self.ready = {cell: time + cycles for cell, time in self.ready.items()}
        self.groups = [time + cycles for time in self.groups]

    @contextmanager
    def _often(self, trips: float) -> Iterator[None]:
        self.times *= trips
        yield
        self.times /= trips

    @contextmanager
    def _where(self, condition: Any) -> Iterator[bool]:
        """Threads for which it holds; false where there are none."""
        before = self.mask
        if condition is not None:
            self.mask = before & np.broadcast_to(np.asarray(condition, bool), before.shape)
        yield bool(self.mask.any())
        self.mask = before

    def _branch(self, node: Any) -> None:
        self.count(node.condition)
        condition = self.value(node.condition)
        with self._where(condition) as any_:
            if any_:
                self.run(node.then_case)
        if node.else_case is None or condition is None:
            return
        with self._where(np.logical_not(condition)) as any_:
            if any_:
                self.run(node.else_case)

    def _store(self, node: Any) -> None:
        self.arriving = 0.0
        self.count(node.value)
        if node.buffer.scope() != "local":
            self._wait(self.arriving)
            self._access(node.buffer, node.indices[0], node.value.ty, True)
            return
        cell = node.buffer, self._cell(node.indices)
        self.local[cell] = self.value(node.value)
        if type(node.value).__name__ == "TensorLoad":  # it arrives there by itself
            self.ready[node.buffer] = max(self.ready.get(node.buffer, 0.0), self.arriving)
        else:
            self._wait(self.arriving)

    def _cell(self, indices: Any) -> Any:
        index = self.value(indices[0]) if type(indices[0]).__name__ != "Ramp" else None
        return index if isinstance(index, int) else None

    # Expressions

    def value(self, expr: Any) -> Any:
        return evaluate(expr, self.values, self._loaded)

    def _loaded(self, expr: Any) -> Any:
        if type(expr).__name__ != "TensorLoad" or not str(expr.ty.dtype).startswith(("int", "uint")):
            return None
        if expr.source.scope() == "local":
            return self.local.get((expr.source, self._cell(expr.indices)))
        return self.content if expr.source.scope() in ("", "global") else None

    def count(self, expr: Any, index: bool = False) -> None:
        """Adds what computing `expr` takes; `index`: it only says where."""
        kind = type(expr).__name__
        if kind == "TensorLoad":
            self.count_all(expr.indices, True)
            if expr.source.scope() == "local":
                self.arriving = max(self.arriving, self.ready.pop(expr.source, 0.0))
            else:
                self._access(expr.source, expr.indices[0], expr.ty, False)
            return
        if isinstance(expr, tvm.ir.Call):
            self._call(expr, index)
            return
        children = [getattr(expr, f) for f in _CHILDREN.get(kind, ())]
        self.count_all(children, index)
        if not children or kind in ("Ramp", "Broadcast"):
            return
        type_, lanes = _type(expr)
        if type_.startswith(("float", "bfloat")):
            fused = kind in ("Add", "Sub") and any(type(child).__name__ == "Mul" for child in children)
            if kind == "Div":
                self._instructions("specials", lanes)
            elif kind in _FLOAT and not fused:
                # Two float16 at once.
                self._instructions("floats", lanes / 2 if type_ == "float16" else lanes)
        elif not index and kind != "Cast":
            self._instructions("integers", lanes)

    def count_all(self, exprs: Any, index: bool) -> None:
        for expr in exprs:
            self.count(expr, index)

    def _call(self, call: Any, index: bool) -> None:
        name = name_of(call)
        if name == "if_then_else":
            self.count(call.args[0], True)
            condition = self.value(call.args[0])
            with self._where(condition) as any_:
                if any_:
                    self.count(call.args[1], index)
            return
        words = [str(getattr(arg, "value", "")) for arg in call.args]
        if name == "ptx.mma" or (name.startswith("ptx.wgmma") and "mma_async" in words):
            self._multiply(words)
        elif name.startswith("ptx.cp_async_bulk"):
            self._copy_bulk(call)
        elif name == "ptx.ldmatrix":
            self._matrices(call)
        elif name in ("ptx.cp_async_cg", "ptx.cp_async_cg_src_size", "ptx.cp_async_ca", "ptx.cp_async_ca_src_size"):
            self._copy(call)
        elif name == "ptx.cp_async_commit_group":
            self.groups.append(self.since + self.pipes.global_latency)
        elif name == "ptx.cp_async_wait_group":
            under_way = int(call.args[0].value)
            done = self.groups[: len(self.groups) - under_way]
            self._wait(max(done, default=0.0))
            self.groups = self.groups[len(done) :]
        elif name in ("tvm_storage_sync", "cuda.warp_sync"):
            self._wait(self.arriving)
            self.clock += self.pipes.barrier_latency if name == "tvm_storage_sync" else 0
            self.since = self.clock
            self.barriers += 1
        elif "shfl" in name:
            self.count_all(call.args, index)
            self._instructions("others", 1)
            self.total.shared += self.weight * self.times * self._warps()
            self.clock += self.pipes.shared_latency / _ILP
        elif name in ("reinterpret", "address_of", "cuda.cvta_generic_to_shared"):
            self.count_all(call.args, index)
        else:
            self.count_all([a for a in call.args if not isinstance(a, tvm.ir.StringImm)], index)
            special = name in ("call_pure_extern", "exp", "exp2", "sqrt", "rsqrt", "tanh", "log", "sin", "cos", "pow")
            self._instructions("specials" if special else "others", 1)

    def _multiply(self, words: list[str]) -> None:
        shape = next(m for word in words if (m := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", word)))
        at = words.index(shape[0])
        type_ = next(word for word in words[at + 1 :] if word not in ("row", "col", "f32", "s32"))
        rows = min(int(shape[1]), 16)  # of one warp: four of them make the 64 of a warpgroup
        operations = 2.0 * rows * int(shape[2]) * int(shape[3])
        self.total.tensor[type_] += self.weight * self.times * self._warps() * operations
        self.total.others += self.weight * self.times * self._warps()
        self.clock += (
            _SCHEDULERS * operations / self.pipes.tensor_operations(type_)
        )  # a warp has its own quarter of the pipe

    def _matrices(self, call: Any) -> None:
        """Each eight lanes name the rows of a matrix: as accesses of 16 bytes."""
        (load,) = (found for arg in call.args if (found := _addressed(arg)) is not None and _is_shared(found))
        self._access(load.source, load.indices[0], load.ty, False, 16)

    def _copy(self, call: Any) -> None:
        to, source = (found for arg in call.args[:2] if (found := _addressed(arg)) is not None)
        width = int(call.args[2].value)
        self.count(to.indices[0], True)
        self._access(to.source, to.indices[0], to.ty, True, width)
        self._access(source.source, source.indices[0], source.ty, False, width, waits=False)

    def _copy_bulk(self, call: Any) -> None:
        source, size = _addressed(call.args[1]), int(call.args[2].value)
        asked = self.weight * self.times * float(self.mask.sum()) * size
        argument = self.arguments.get(source.source, -1)
        self.total.widths[argument, _BULK] += asked
        self.total.reads[argument] += asked
        self._instructions("others", 1)

    # Memory

    def _access(self, buffer: Any, index: Any, type_: Any, write: bool, width: int = 0, waits: bool = True) -> None:
        scope = buffer.scope()
        element = _bytes(str(buffer.dtype))
        base = index.base if type(index).__name__ == "Ramp" else index
        lanes = int(index.lanes) if type(index).__name__ == "Ramp" else 1
        width = width or min(element * lanes, 16)
        self._instructions("others", 1)
        at = self.value(base)
        addresses = None if at is None else np.broadcast_to(np.asarray(at, np.int64) * element, self.mask.shape)
        if scope.startswith("shared"):
            site = self.sites.setdefault(index, len(self.sites))
            self._shared(f"{'store' if write else 'load'} {site}", addresses, width)
            if not write:
                self.arriving = max(self.arriving, self.since + self.pipes.shared_latency)
            return
        argument = self.arguments.get(buffer, -1)
        asked = float(self.mask.sum()) * width
        if not write:
            self.total.widths[argument, width] += self.weight * self.times * asked
        if addresses is not None:
            asked = 32.0 * sectors(addresses, self.mask, width)
        (self.total.writes if write else self.total.reads)[argument] += self.weight * self.times * asked
        if not write and waits:
            self.arriving = max(self.arriving, self.since + self.pipes.global_latency)

    def _shared(self, site: str, addresses: np.ndarray | None, width: int) -> None:
        if addresses is None:
            taken = ideal = self._warps() * max(width // 4, 1)
        else:
            taken, ideal = wavefronts(addresses, self.mask, width)
            before = self.total.conflicts.get(site, (0.0, 0.0))
            often = self.weight * self.times
            self.total.conflicts[site] = (before[0] + often * taken, before[1] + often * ideal)
        self.total.shared += self.weight * self.times * taken

    # Counters

    def _warps(self) -> int:
        """Those with a thread that takes part."""
        if self.counted[0] is not self.mask:
            self.counted = self.mask, int(self.mask.reshape(-1, LANES).any(axis=1).sum())
        return self.counted[1]

    def _instructions(self, kind: str, count: float) -> None:
        setattr(self.total, kind, getattr(self.total, kind) + self.weight * self.times * self._warps() * count)
        self.clock += count * self.pipes.math_latency / _ILP


_CHILDREN = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "FloorDiv", "FloorMod", "Min", "Max"), ("a", "b")),
    **dict.fromkeys(("EQ", "NE", "LT", "LE", "GT", "GE", "And", "Or"), ("a", "b")),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LShift", "RShift"), ("a", "b")),
    "Not": ("a",),
    "Cast": ("value",),
    "Select": ("condition", "true_value", "false_value"),
    "Ramp": ("base", "stride"),
    "Broadcast": ("value",),
}


def _addressed(expr: Any) -> Any:
    """The element whose address an operand is."""
    while isinstance(expr, tvm.ir.Call) and name_of(expr) in ("cuda.cvta_generic_to_shared", "address_of"):
        expr = expr.args[0]
    return expr if type(expr).__name__ == "TensorLoad" else None


def _is_shared(load: Any) -> bool:
    return str(load.source.scope()).startswith("shared")


def _type(expr: Any) -> tuple[str, int]:
    """(type of an element, how many)."""
    text, _, lanes = str(expr.ty.dtype).partition("x")
    return text, int(lanes) if lanes.isdecimal() else 1


def _bytes(dtype: str) -> int:
    return max(int(tvm.runtime.DataType(dtype).bits) // 8, 1)
