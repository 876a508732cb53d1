"""Sampling on GPUs: a block of threads a row, and no sort.

Both cuts are thresholds. The bits of a float, with those of a negative one turned around, are an integer in the same
order: a radix select finds the largest one above and at which there are k tokens, or enough weight, eight bits a round
(Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012, selects ranks so; FlashInfer, Ye et
al., 2025, rejects by thresholds instead, and takes several random numbers for it). Weights are integers: sums come out
the same however threads take turns, and the same token is drawn every time. It is found by going down: of the row's
parts, one a warp, the one in which the sum passes the wanted number, then of this one's parts, to a single token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.schedules.base import Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.sampling.sample import MOST_TOKENS, ONE, SampleWorkload, reference
from llmc.targets.base import Target
from llmc.targets.threads import WARP, BlockReduction, Cell, barrier, launch, shared, strided
from llmc.tvm_shim import IRBuilder, T

_DIGIT = 8  # bits of a round
_BINS = 1 << _DIGIT
_SIDE = 16  # bins that are first looked at as one
_COPIES = 8  # of every bin, among which lanes are shared out: most logits have the same first bits
_LARGEST = 3.4028234663852886e38


class CudaSample(Template):
    """Template "sample_cuda". Knob: `threads` of a row's block."""

    name = "sample_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, SampleWorkload) and target.kind == "cuda" and 0 < workload.V < MOST_TOKENS

    def space(self, workload: SampleWorkload, target: Target) -> Space:
        return Space({"threads": (128, 256, 512)})

    def default(self, workload: SampleWorkload, target: Target) -> dict[str, int | str]:
        return {"threads": 512 if workload.V >= 1 << 12 else 128}

    def build(self, workload: SampleWorkload, target: Target, config: Config) -> Any:
        threads = int(config["threads"])
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name("sample")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            args = (*workload.inputs(), *workload.outputs())
            handles = [T.arg(arg.name, T.handle()) for arg in args]
            R = T.int64()
            shapes = [tuple(R if isinstance(d, str) else d for d in arg.shape) for arg in args]
            buffers = {
                arg.name: T.match_buffer(handle, shape, arg.dtype)
                for arg, handle, shape in zip(args, handles, shapes, strict=True)
            }
            with launch(threads, R) as (thread, r):
                _Row(workload.V, buffers, r, thread, threads).run()
        return ib.get()

    def reference(
        self, workload: SampleWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return reference(inputs)

    def work(self, workload: SampleWorkload, dims: Mapping[str, int]) -> Work:
        """The logits are read once from memory, and again from the cache for every round of a cut."""
        return Work(ops=dims["R"] * workload.V, bytes=4 * dims["R"] * workload.V)

    def example_inputs(self, workload: SampleWorkload, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
        """Rows with both cuts, with one of them, with none, and greedy ones, in turn."""
        R = dims["R"]
        kind = np.arange(R) % 5
        return {
            "logits": 3 * rng.standard_normal((R, workload.V), np.float32),
            "temperature": np.where(kind == 4, 0, 0.8).astype(np.float32),
            "top_k": np.where((kind == 0) | (kind == 1), 40, 0),
            "top_p": np.where((kind == 0) | (kind == 2), 0.9, 1).astype(np.float32),
            "uniform": rng.random(R, np.float32),
        }

    def corners(self, workload: SampleWorkload) -> Sequence[Mapping[str, int]]:
        return [{"R": 1}, {"R": 5}]


class _Row:
    """One row's block. `threshold` and `ties` are what is left of the vocabulary: the tokens with larger keys, and the
    first `ties` ones with this key."""

    def __init__(self, V: int, buffers: dict[str, Any], r: Any, thread: Any, threads: int) -> None:
        self.V, self.buffers, self.r, self.thread, self.threads = V, buffers, r, thread, threads
        self.warps = threads // WARP
        self.lane, self.warp = (T.bind(f(thread, T.int64(WARP))) for f in (T.floormod, T.floordiv))
        self.bins, self.coarse = shared((_BINS * _COPIES,), "uint64"), shared((_BINS // _SIDE,), "uint64")
        self.masses, self.equals = shared((self.warps,), "uint64"), shared((self.warps,), "uint64")
        self.temperature = Cell(buffers["temperature"][r])
        self.threshold, self.ties = Cell(T.uint32(0), "uint32"), Cell(T.uint64(V), "uint64")

    def run(self) -> None:
        block = BlockReduction(self.thread, self.threads)
        best = Cell(T.float32(-np.inf))

        def look(i: Any, x: Any) -> None:
            best.v = T.max(best.v, T.Select(_is_nan(x), T.float32(np.inf), x))

        self._each(look)
        self.best = block.max(best.v)
        finite = T.And(self.best.v <= T.float32(_LARGEST), self.best.v >= T.float32(-_LARGEST))
        with T.If(finite):
            with T.Then(), T.If(self.temperature.v == T.float32(0)):
                with T.Then():
                    self._greedy(block)
                with T.Else():
                    self._cut()
                    self._draw()
            with T.Else():
                self._store(T.int64(-1))

    def _greedy(self, block: BlockReduction) -> None:
        """The first of the best; numbers of tokens are exact in float32."""
        first = Cell(T.float32(-self.V))

        def look(i: Any, x: Any) -> None:
            with T.If(x == self.best.v), T.Then():
                first.v = T.max(first.v, T.float32(0) - T.Cast("float32", i))

        self._each(look)
        self._store(T.Cast("int64", T.float32(0) - block.max(first.v).v))

    def _cut(self) -> None:
        k, p = Cell(self.buffers["top_k"][self.r], "int64"), Cell(self.buffers["top_p"][self.r])
        with T.If(T.And(k.v > T.int64(0), k.v < T.int64(self.V))), T.Then():
            self._select(lambda x: T.uint64(1), T.Cast("uint64", k.v))
        with T.If(p.v < T.float32(1)), T.Then():
            self._weigh(T.int64(0), self.V, self._parts[0])
            total = self._total()
            wanted = T.Cast("uint64", T.ceil(T.Cast("float64", p.v) * T.Cast("float64", total.v)))
            self._select(self._weight, T.min(T.max(wanted, T.uint64(1)), total.v))
            weight = Cell(self._weight(_float(self.threshold.v)), "uint64")
            self.ties.v = T.truncdiv(self.ties.v + weight.v - T.uint64(1), weight.v)

    def _select(self, measure: Callable[[Any], Any], wanted: Any) -> None:
        """threshold := the largest key at and above which the measures add up to what is wanted, ties := how much of
        it those above leave to its own tokens. Tokens below the old threshold do not count."""
        rest, prefix = Cell(wanted, "uint64"), Cell(T.uint32(0), "uint32")
        digit = Cell(T.int32(0), "int32")
        with T.serial(0, 32 // _DIGIT) as round_:
            shift = T.bind(T.Cast("uint32", 32 - _DIGIT - round_ * _DIGIT))
            with strided(_BINS * _COPIES, self.thread, self.threads) as i:
                T.buffer_store(self.bins, T.uint64(0), [i])
            barrier()

            def count(i: Any, x: Any, shift: Any = shift) -> None:
                key = Cell(_key(x), "uint32")
                before = T.shift_right(T.shift_right(key.v, shift), T.uint32(_DIGIT))
                with T.If(T.And(before == prefix.v, key.v >= self.threshold.v)), T.Then():
                    bin_ = T.bitwise_and(T.shift_right(key.v, shift), T.uint32(_BINS - 1))
                    place = T.Cast("int64", bin_) * _COPIES + T.floormod(self.lane, T.int64(_COPIES))
                    _add(self.bins, place, measure(x))

            self._each(count)
            barrier()
            with strided(_BINS, self.thread, self.threads) as i:
                sum_ = Cell(self.bins[i * _COPIES], "uint64")
                for copy in range(1, _COPIES):
                    sum_.v = sum_.v + self.bins[i * _COPIES + copy]
                T.buffer_store(self.bins, sum_.v, [i * _COPIES])
            barrier()
            with strided(_BINS // _SIDE, self.thread, self.threads) as i:
                sum_ = Cell(T.uint64(0), "uint64")
                with T.serial(0, _SIDE) as j:
                    sum_.v = sum_.v + self.bins[(i * _SIDE + T.Cast("int64", j)) * _COPIES]
                T.buffer_store(self.coarse, sum_.v, [i])
            barrier()
            digit.v = T.int32(0)
            _descend(digit, rest, _BINS // _SIDE, lambda i: self.coarse[i])
            digit.v = digit.v * _SIDE
            _descend(digit, rest, _SIDE, lambda i: self.bins[i * _COPIES])
            prefix.v = T.bitwise_or(T.shift_left(prefix.v, T.uint32(_DIGIT)), T.Cast("uint32", digit.v))
            barrier()  # before the next round's zeros
        self.threshold.v = prefix.v
        self.ties.v = rest.v

    @property
    def _parts(self) -> list[int]:
        """Tokens of a part, in each step on the way down to one."""
        sizes = [-(-self.V // self.warps)]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // self.warps))
        return sizes

    def _draw(self) -> None:
        first, size = Cell(T.int64(0), "int64"), self.V
        wanted = Cell(T.uint64(0), "uint64")
        for step, part in enumerate(self._parts):
            self._weigh(first.v, size, part)
            if step == 0:
                total = self._total()
                share = T.Cast("float64", self.buffers["uniform"][self.r]) * T.Cast("float64", total.v)
                wanted.v = T.min(T.Cast("uint64", share), total.v - T.uint64(1))
            self._enter(first, wanted, part)
            if part > 1:
                barrier()  # before zeros take the place of what was read
            size = part
        self._store(first.v)

    def _weigh(self, first: Any, size: int, part: int) -> None:
        """Each warp's part of the `size` tokens from `first` on: the weight of those above the threshold, and how many
        are at it."""
        with strided(self.warps, self.thread, self.threads) as i:
            T.buffer_store(self.masses, T.uint64(0), [i])
            T.buffer_store(self.equals, T.uint64(0), [i])
        barrier()
        mass, equal = Cell(T.uint64(0), "uint64"), Cell(T.uint64(0), "uint64")
        with strided(part, self.lane, WARP) as i:
            at = T.bind(self.warp * part + i)
            with T.If(T.And(at < T.int64(size), first + at < T.int64(self.V))), T.Then():
                x = Cell(self.buffers["logits"][self.r, first + at])
                key = Cell(_key(x.v), "uint32")
                with T.If(key.v > self.threshold.v):
                    with T.Then():
                        mass.v = mass.v + self._weight(x.v)
                    with T.Else(), T.If(key.v == self.threshold.v), T.Then():
                        equal.v = equal.v + T.uint64(1)
        _add(self.masses, self.warp, mass.v)
        _add(self.equals, self.warp, equal.v)
        barrier()
        self.of_tie = Cell(self._weight(_float(self.threshold.v)), "uint64")

    def _total(self) -> Cell:
        """The weight of all parts."""
        total, ties = Cell(T.uint64(0), "uint64"), Cell(self.ties.v, "uint64")
        with T.serial(0, self.warps) as part:
            equal = Cell(T.min(self.equals[part], ties.v), "uint64")
            total.v = total.v + self.masses[part] + equal.v * self.of_tie.v
            ties.v = ties.v - equal.v
        return total

    def _enter(self, first: Cell, wanted: Cell, part: int) -> None:
        """first := where the part begins in which the sum passes `wanted`; wanted and ties := what is left for it."""
        found = Cell(T.int32(0), "int32")
        with T.serial(0, self.warps) as i, T.If(found.v == 0), T.Then():
            equal = Cell(T.min(self.equals[i], self.ties.v), "uint64")
            mass = Cell(self.masses[i] + equal.v * self.of_tie.v, "uint64")
            with T.If(wanted.v < mass.v):
                with T.Then():
                    found.v = T.int32(1)
                with T.Else():
                    first.v = first.v + part
                    wanted.v = wanted.v - mass.v
                    self.ties.v = self.ties.v - equal.v

    def _weight(self, x: Any) -> Any:
        share = T.exp((x - self.best.v) / self.temperature.v)
        return T.Cast("uint64", share * T.float32(ONE))

    def _each(self, body: Callable[[Any, Any], None]) -> None:
        """`body` of each of the thread's tokens: number and logit. Four neighbours are one load where rows allow."""
        n = 4 if self.V % 4 == 0 else 1
        few = T.alloc_buffer((n,), "float32", scope="local")
        with strided(self.V // n, self.thread, self.threads) as i:
            at = T.ramp(i * n, 1, n) if n > 1 else i
            T.buffer_store(few, self.buffers["logits"][self.r, at], [T.ramp(0, 1, n) if n > 1 else 0])
            for j in range(n):
                body(i * n + j, few[j])

    def _store(self, token: Any) -> None:
        with T.If(self.thread == 0), T.Then():
            T.buffer_store(self.buffers["token"], token, [self.r])


def _key(x: Any) -> Any:
    """Integers in the order of floats; both zeros are one number."""
    sign = T.uint32(1 << 31)
    bits = T.reinterpret("uint32", T.Select(x == T.float32(0), T.float32(0), x))
    return T.Select(bits < sign, T.bitwise_or(bits, sign), T.bitwise_not(bits))


def _is_nan(x: Any) -> Any:
    """By the bits: TVM takes x != x for false."""
    return T.bitwise_and(T.reinterpret("uint32", x), T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000)


def _float(key: Any) -> Any:
    sign = T.uint32(1 << 31)
    return T.reinterpret("float32", T.Select(key < sign, T.bitwise_not(key), T.bitwise_xor(key, sign)))


def _descend(digit: Cell, rest: Cell, count: int, sum_of: Callable[[Any], Any]) -> None:
    """digit := the last of `count` bins from `digit` on which, with all after it, has what is wanted; rest := what is
    left for it."""
    base, found = Cell(digit.v, "int32"), Cell(T.int32(0), "int32")
    with T.serial(0, count) as i, T.If(found.v == 0), T.Then():
        at = T.bind(base.v + (count - 1) - i)
        sum_ = Cell(sum_of(T.Cast("int64", at)), "uint64")
        with T.If(sum_.v >= rest.v):
            with T.Then():
                digit.v = at
                found.v = T.int32(1)
            with T.Else():
                rest.v = rest.v - sum_.v


# TVM's own atomic_add passes a uint64_t*, which CUDA's has no form for.
_ADD = """
__device__ __forceinline__ void llmc_add_u64(uint64_t* sum, uint64_t value) {
  atomicAdd((unsigned long long*)sum, (unsigned long long)value);
}
"""


def _add(buffer: Any, at: Any, value: Any) -> None:
    T.evaluate(T.cuda.func_call("llmc_add_u64", T.address_of(buffer[at]), value, source_code=_ADD))


CUDA_SAMPLE = CudaSample()
