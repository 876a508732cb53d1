"""Mutation controls over llmc's own kernels: what `mutants` knows to break in their CUDA C, one at a time, all of it.

Every mutant must be refused by the emulator or compute something wrong. Those that survive, and why:

| kernels | mutant | why it may survive |
| --- | --- | --- |
| all with copies ahead | the address of a copy of no bytes | nothing is read there: the copy writes zeros |
| low-bit int8 | one commit of a group of copies | the last steps begin no copies, and their groups are empty |
| warpgroups, bf16 | the commit behind a step's first product | the second one's takes it, and both are waited for |
| prefill | the wait behind the last block | what it waits for is not read; it keeps copies from outliving the block |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from llmc.emulator.emulator import EmulationError, available
from llmc.emulator.templates import EmulatedKernel
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.cuda_append import CUDA_KV_APPEND
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Arrays, Template
from llmc.schedules.embedding.cuda import CUDA_EMBEDDING, CUDA_LOWBIT_EMBEDDING
from llmc.schedules.embedding.dense import EmbeddingDenseWorkload
from llmc.schedules.embedding.lowbit import LowBitEmbeddingWorkload
from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
from llmc.schedules.gemm.cuda import CUDA_LINEAR, CUDA_LOWBIT
from llmc.schedules.gemm.cuda_f16 import MMA_F16
from llmc.schedules.gemm.cuda_fp8 import MMA_FP8
from llmc.schedules.gemm.cuda_mma import MMA_BF16, MMA_INT8, MMA_LOWBIT, HalfLinearWorkload
from llmc.schedules.gemm.cuda_outliers import MMA_OUTLIERS
from llmc.schedules.gemm.cuda_tables import MMA_TABLE
from llmc.schedules.gemm.cuda_wgmma import WGMMA_BF16, WGMMA_FP8, WGMMA_LOWBIT
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.schedules.gemm.f16 import F16LinearWorkload
from llmc.schedules.gemm.fp8 import Fp8LinearWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload
from llmc.schedules.norm.cuda import CUDA_NORM
from llmc.schedules.norm.norm import NormWorkload
from llmc.schedules.recurrent.cuda import CUDA_RECURRENT
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.schedules.sampling.cuda import CUDA_SAMPLE
from llmc.schedules.sampling.sample import SampleWorkload, reference
from llmc.targets.cuda import SM80, SM90, SM90A, CudaTarget
from tests.cuda_emulator.mutants import Mutant, Switch, mutated
from tests.schedules.attention.test_attention import make_inputs
from tests.schedules.attention.test_masks import inputs_of
from tests.schedules.gemm.test_cuda_mma import outlying, table, untied
from tests.schedules.sampling.test_cuda import rows as sampled_rows

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")

# Kind of mutant, what the mutated line looks like, and why it survives.
EXPLAINED = [
    ("global", r"cp_async.*, \(uint\)0\);$", "the address of a copy of no bytes"),
    ("commit", r"", "an empty group, or one that the next commit takes with it"),
    ("wait", r"wait_group_0\(\);$", "nothing reads what it waits for"),
]
# Whole tiles and parts of them: what only rows beyond M compute is of no consequence.
STEPS = ({"steps": 1, "B": 1}, {"steps": 5, "B": 6})
ROWS = ({"M": 3}, {"M": 16}, {"M": 64}, {"M": 130})
MANY = ({"M": 64}, {"M": 130})
LARGE = 300.0  # of scores with which softmax under a wrong maximum overflows, or has only zeros


@dataclass(frozen=True)
class Call:
    """Inputs, packed weights, and the outputs wanted, to `tolerance` times their largest."""

    inputs: Mapping[str, np.ndarray]
    packed: Arrays
    expected: Arrays
    tolerance: float

    def right(self, kernel: EmulatedKernel) -> bool:
        found = kernel.run(self.inputs, self.packed)
        for name, want in self.expected.items():
            want = want.astype(np.float64)
            error = np.abs(found[name].astype(np.float64) - want)
            if not error.max() <= self.tolerance * max(1.0, np.abs(want).max()):  # NaN is not less
                return False
        return True


Calls = Callable[[EmulatedKernel], Iterator[Call]]


def rows(*dims: Mapping[str, int], tolerance: float = 1e-5) -> Calls:
    """Calls with the family's own examples."""

    def calls(kernel: EmulatedKernel) -> Iterator[Call]:
        template, workload, rng = kernel.template, kernel.workload, np.random.default_rng(0)
        weights = template.example_weights(workload, rng)
        packed = template.prepack(weights, workload, kernel.config, kernel.target)
        for each in dims:
            inputs = template.example_inputs(workload, each, rng)
            if template is MMA_INT8:
                inputs["x"] = untied(inputs["x"], workload.group_size)
            yield Call(inputs, packed, template.reference(workload, inputs, weights), tolerance)

    return calls


def attend(*shapes: tuple[int, tuple[int, ...]], large: float = LARGE) -> Calls:
    """Calls with (queries, lengths of the batch); once more with every other query's scores `large`."""

    def calls(kernel: EmulatedKernel) -> Iterator[Call]:
        w = kernel.workload
        for S, lengths in shapes:
            inputs = inputs_of(w, S, lengths)
            if w.kv_cache == "float32" and not w.paged:  # what no query may see is NaN
                inputs |= {name: x for name, x in make_inputs(w, S, lengths).items() if name in inputs}
            inputs = {arg.name: inputs[arg.name] for arg in w.inputs()}
            rounds = w.rounds and S > 4
            yield Call(inputs, {}, ATTENTION.reference(w, inputs, {}), 2.0**-6 if rounds else 5e-6)
            if not rounds:  # bfloat16 would round large scores by more than one
                q = inputs["q"].reshape(-1, w.head_dim).copy()
                q[::2] *= np.float32(large)
                inputs = inputs | {"q": q.reshape(inputs["q"].shape)}
                yield Call(inputs, {}, ATTENTION.reference(w, inputs, {}), 1e-3)

    return calls


def append(kernel: EmulatedKernel) -> Iterator[Call]:
    w = kernel.workload
    for S, kv_len in ((1, (1,)), (2, (3, 65)), (65, (66, 128)), (7, (0, 3))):
        inputs = KV_APPEND.example_inputs(w, {"B": len(kv_len), "S": S, "CB": 3}, np.random.default_rng(S))
        inputs["kv_len"] = np.array(kv_len)
        yield Call(inputs, {}, KV_APPEND.reference(w, inputs, {}), 1e-6)


def sample(kernel: EmulatedKernel) -> Iterator[Call]:
    for seed in range(32):
        inputs = sampled_rows(kernel.workload.V, seed)
        yield Call(inputs, {}, reference(inputs), 0.0)


@dataclass(frozen=True)
class Case:
    """`only` names the kernels that the calls use in full; another case has the others. `knobs` replace defaults."""

    template: Template
    workload: Any
    calls: Calls
    target: CudaTarget = SM80
    only: tuple[str, ...] = ("",)
    knobs: Mapping[str, int] = field(default_factory=dict)


HALF = {"activations": "a32"}
# Each of eight warps has keys, and somewhere the largest score.
LENGTHS = ((4, (10, 4)), (70, (150, 80)), (4, (700, 690)), (3, (690, 700)), (2, (1300, 700)), (1, (900, 800)))
ONE_WARP = {"chunk": 1, "warps": 1}  # where few keys are seen: others would have none
ATTENDING = ("_kernel", "_kernel_2")  # few queries and many; between them stands what merges parts
# Every warp has more steps of k than it copies ahead; weights of more columns than there are would not matter either.
DEEP = {"split": 1, "few_split": 1, "along": 2, "few_stages": 3}
CASES = {
    "norm": Case(CUDA_NORM, NormWorkload(576, "layer", bias=True, residual=True, sum_output=True), rows({"M": 3})),
    "embedding": Case(CUDA_EMBEDDING, EmbeddingDenseWorkload(50, 76), rows({"M": 5})),
    "low-bit embedding": Case(CUDA_LOWBIT_EMBEDDING, LowBitEmbeddingWorkload(50, 76, 4, 32, False), rows({"M": 5})),
    "append, int4": Case(
        CUDA_KV_APPEND, KVAppendWorkload(4, 2, 128, in_place=True, kv_cache="int4", paged=True), append
    ),
    "rows": Case(CUDA_ATTENTION, AttentionWorkload(3, 1, 6, 0.4, key_bias=True, causal=False), attend((5, (90, 7)))),
}
MORE = {
    "low-bit float16": Case(
        MMA_LOWBIT, HalfLinearWorkload(128, 580, 4, 32, True, 8.0, "float16", **HALF), rows(*ROWS), knobs=DEEP
    ),
    "dense": Case(
        CUDA_LINEAR, DenseLinearWorkload(70, 50, bias=True, activation="gelu", residual=True), rows({"M": 5}, {"M": 70})
    ),
    "low-bit float32": Case(CUDA_LOWBIT, LowBitLinearWorkload(70, 52, 4, 32, **HALF), rows({"M": 5}, {"M": 70})),
    "low-bit int8": Case(
        MMA_INT8,
        LowBitLinearWorkload(128, 1024, 4, 32, True, 8.0, "float16"),
        rows(*ROWS),
        knobs=DEEP,
    ),
    "gate": Case(
        MMA_LOWBIT,
        HalfLinearWorkload(256, 580, 8, 128, False, bias=True, activation="silu_mul", **HALF),
        rows(*ROWS),
        knobs=DEEP,
    ),
    "bf16": Case(
        MMA_BF16,
        Bf16LinearWorkload(128, 580, bias=True, activation="gelu", residual=True, activations="bf16"),
        rows(*ROWS),
        knobs=DEEP,
    ),
    "tables": Case(MMA_TABLE, table(128, 580, 4, 32, scale_dtype="float16", values="nf4"), rows(*ROWS), knobs=DEEP),
    "outliers": Case(MMA_OUTLIERS, outlying(128, 580, 8, 580, True, 128.0, outliers=16), rows(*ROWS), knobs=DEEP),
    "float16": Case(MMA_F16, F16LinearWorkload(128, 580, residual=True, activations="f16"), rows(*ROWS), knobs=DEEP),
    "fp8": Case(MMA_FP8, Fp8LinearWorkload(128, 580), rows(*ROWS), SM90, knobs=DEEP),
    "shared k": Case(
        MMA_LOWBIT,
        HalfLinearWorkload(128, 1100, 4, 32, True, 8.0, bias=True, residual=True, **HALF),
        rows(*ROWS),
        knobs={"split": 2, "few_split": 2, "one_split": 2, "along": 2, "few_stages": 2, "stages": 2, "warps": 4},
    ),
    "warpgroups": Case(
        WGMMA_LOWBIT, HalfLinearWorkload(140, 300, 4, 32, True, 8.0, "float16", **HALF), rows(*MANY), SM90A
    ),
    "warpgroups, zero points": Case(
        WGMMA_LOWBIT, HalfLinearWorkload(40, 300, 8, 128, False, bias=True, **HALF), rows(*MANY), SM90A
    ),
    "warpgroups, fp8": Case(WGMMA_FP8, Fp8LinearWorkload(39, 580, residual=True), rows(*MANY), SM90A),
    "warpgroups, bf16": Case(WGMMA_BF16, Bf16LinearWorkload(39, 300, activations="bf16"), rows(*MANY), SM90A),
    "append": Case(CUDA_KV_APPEND, KVAppendWorkload(4, 2, 40, in_place=True, kv_cache="int8"), append),
    "merge": Case(
        CUDA_ATTENTION,
        AttentionWorkload(2, 1, 16, 0.3),
        attend((4, (8300, 8290)), large=3e3),
        only=("_kernel_1",),
        knobs={"chunk": 1, "warps": 1},  # more parts than threads that merge
    ),
    "tiles": Case(
        CUDA_ATTENTION,
        AttentionWorkload(4, 2, 32, 0.2),
        attend(*LENGTHS, large=3e3),
        only=ATTENDING,
    ),
    "tensor cores": Case(
        CUDA_ATTENTION,
        AttentionWorkload(4, 2, 40, 0.15, bf16=True, key_bias=True),
        attend(*LENGTHS, large=3e3),
        only=ATTENDING,
    ),
    "wide heads": Case(
        CUDA_ATTENTION,
        AttentionWorkload(2, 1, 160, 0.08, bf16=True),
        attend((1, (300,)), (70, (150, 80))),
        only=ATTENDING,
        knobs=ONE_WARP,
    ),
    "window": Case(
        CUDA_ATTENTION,
        AttentionWorkload(4, 2, 40, 0.15, window=33, sinks=5),
        attend((1, (300, 64)), (70, (150, 80))),
        only=ATTENDING,
        knobs=ONE_WARP,
    ),
    "pages of int4": Case(
        CUDA_ATTENTION,
        AttentionWorkload(4, 2, 32, 0.2, kv_cache="int4", paged=True),
        attend(*LENGTHS, large=3e3),
        only=ATTENDING,
    ),
    "sampling": Case(CUDA_SAMPLE, SampleWorkload(1000), sample),
    "recurrent": Case(CUDA_RECURRENT, RecurrentWorkload(37, "lstm", "bidirectional", initial=True), rows(*STEPS)),
}


def survivors(case: Case) -> tuple[int, list[Mutant]]:
    """How many mutants there are that any call comes to, and those of them that nothing showed."""
    found: dict[str, list[Mutant]] = {}

    def change(name: str, source: str) -> str:
        text, found[name] = mutated(source)
        return text

    config = {**case.template.default(case.workload, case.target), **case.knobs}
    kernel = EmulatedKernel(case.template, case.workload, case.target, config, change=change)
    calls = list(case.calls(kernel))
    assert all(call.right(kernel) for call in calls)
    count, alive = 0, []
    for name, mutants in found.items():
        if not name.endswith(case.only):
            continue
        switch = Switch(kernel.emulators[name])
        for mutant in filter(lambda m: switch.reached(m.number), mutants):
            count += 1
            with switch.on(mutant.number):
                if all(_right(call, kernel) for call in calls):
                    alive.append(mutant)
    return count, alive


def _right(call: Call, kernel: EmulatedKernel) -> bool:
    try:
        return call.right(kernel)
    except EmulationError:
        return False


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_mutant_is_caught_or_explained(name: str) -> None:
    count, alive = survivors((CASES | MORE)[name])
    print(f"{name}: {count} mutants, {len(alive)} survive")
    assert count
    unexplained = [
        m for m in alive if not any(m.kind == kind and re.search(line, m.line) for kind, line, _ in EXPLAINED)
    ]
    assert not unexplained, "\n".join(f"{m.kind}: {m.line}" for m in unexplained)
