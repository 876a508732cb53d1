"""Attention and cache append on GPUs, emulated, against float64 numpy; and what their machine code is made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llmc.emulator import emulator as cuda_emulator
from llmc.emulator.templates import EmulatedKernel
from llmc.gpu.binary import resources
from llmc.gpu.sources import template_sources
from llmc.gpu.toolchain import available, find_toolchain
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.cuda_append import CUDA_KV_APPEND
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.targets.cuda import SM80, SM90, CudaTarget

from .test_attention import make_inputs
from .test_masks import inputs_of

GQA = AttentionWorkload(6, 2, 64, 0.125)
ATTEND = {
    "tiles": GQA,
    "tensor_cores": AttentionWorkload(4, 2, 40, 0.15, softcap=3.0, window=33, sinks=5, bf16=True),
    "rows": AttentionWorkload(3, 1, 6, 0.4, key_bias=True, causal=False),
    "pages_int4": dataclasses.replace(GQA, kv_cache="int4", paged=True),
    "wide_f16": AttentionWorkload(2, 1, 136, 0.08, f16=True),
}
MORE = {
    "tensor_cores_64": dataclasses.replace(GQA, bf16=True),
    "tensor_cores_int8": AttentionWorkload(4, 1, 32, 0.2, alibi=True, kv_cache="int8", bf16=True),
    "bias": AttentionWorkload(4, 2, 32, 0.2, causal=False, bias=True, bias_batch=True, bias_heads=True, bias_rows=True),
    "alibi_sinks": AttentionWorkload(6, 2, 32, 0.2, window=33, sinks=4, alibi=True),
    "prefix": AttentionWorkload(6, 2, 32, 0.2, prefix=True, alibi=True),
    "documents": AttentionWorkload(6, 2, 32, 0.2, documents=True),
    "tree_int8": AttentionWorkload(6, 2, 32, 0.2, tree=True, kv_cache="int8"),
    "d80": AttentionWorkload(4, 2, 80, 0.1, q_packed=True),
    "d128": AttentionWorkload(4, 4, 128, 0.08),
    "pages": dataclasses.replace(GQA, paged=True),
    "wide": AttentionWorkload(4, 2, 256, 0.06),
    "wide_pages_fp8": AttentionWorkload(4, 2, 160, 0.06, kv_cache="fp8", paged=True),
    "wide_tensor_cores": AttentionWorkload(4, 2, 256, 0.06, bf16=True, window=40),
    "tensor_cores_fp8": AttentionWorkload(4, 1, 32, 0.2, kv_cache="fp8", bf16=True),
    "tensor_cores_f16": dataclasses.replace(GQA, f16=True),
    "wide_group": AttentionWorkload(14, 1, 16, 0.25, window=40),
}
# (queries, lengths of the batch): parts that merge, empty rows, tails; decode and prefill
CALLS = ((1, (600, 64)), (4, (10, 4)), (5, (5,)), (33, (97, 33)))
APPEND = {
    "int8": KVAppendWorkload(4, 2, 40, in_place=True, kv_cache="int8"),
    "int4": KVAppendWorkload(4, 2, 40, in_place=True, kv_cache="int4", paged=True),
    "fp8": KVAppendWorkload(4, 2, 40, in_place=True, kv_cache="fp8"),
    "pages": KVAppendWorkload(4, 2, 32, in_place=True, paged=True),
}
emulated = pytest.mark.skipif(not cuda_emulator.available(), reason="the emulator of CUDA C needs g++ for x86-64")
compiled = pytest.mark.skipif(not available(), reason="NVIDIA's compiler is not installed: pip install 'llmc[cuda]'")


def attend(w: AttentionWorkload) -> None:
    kernel = EmulatedKernel(CUDA_ATTENTION, w, SM80)
    for S, lengths in CALLS:
        inputs = inputs_of(w, S, lengths)
        if w.kv_cache == "float32" and not w.paged:  # what no query may see is NaN
            inputs |= {name: x for name, x in make_inputs(w, S, lengths).items() if name in inputs}
        inputs = {arg.name: inputs[arg.name] for arg in w.inputs()}
        expected = ATTENTION.reference(w, inputs, {})["out"]
        out = kernel.run(inputs, {})["out"]
        rounded = ATTENTION.tolerance(w) if w.rounds and S > 4 else 0.0
        error = np.abs(out - expected).max()
        assert error <= (rounded * np.abs(expected).max() or 5e-6), f"S={S}, lengths={lengths}"


@emulated
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ATTEND)
def test_attention_matches_reference(name: str) -> None:
    attend(ATTEND[name])


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_attention_matches_reference(name: str) -> None:
    attend(MORE[name])


@emulated
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", APPEND)
def test_append_matches_reference(name: str) -> None:
    """Codes equal the reference's; tokens that were there stay, and so do pages of others."""
    w = APPEND[name]
    kernel = EmulatedKernel(CUDA_KV_APPEND, w, SM80)
    for S, kv_len in ((1, (1,)), (2, (3, 65)), (65, (66, 128)), (7, (0, 3))):
        inputs = KV_APPEND.example_inputs(w, {"B": len(kv_len), "S": S, "CB": 3}, np.random.default_rng(S))
        inputs["kv_len"] = np.array(kv_len)
        expected, found = KV_APPEND.reference(w, inputs, {}), kernel.run(inputs, {})
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, atol=1e-6, err_msg=f"{key}, S={S}, kv_len={kv_len}")


@compiled
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("tensor_cores", SM80),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("tensor_cores", SM90), ("tiles", SM80), ("tiles", SM90))
        ),
        *(
            pytest.param(name, target, marks=pytest.mark.slow)
            for name in ("pages_int4", "wide", "wide_tensor_cores", "tensor_cores_fp8")
            for target in (SM80, SM90)
        ),
    ],
)
def test_machine_code(name: str, target: CudaTarget) -> None:
    """Nothing spills; tensor cores multiply where they may; a float32 cache is read 16 bytes at a time."""
    w = (ATTEND | MORE)[name]
    sources = template_sources(CUDA_ATTENTION.build(w, target, CUDA_ATTENTION.default(w, target)), target)
    decode, _, prefill = (resources(find_toolchain().compile(s.source, target.mcpu)) for s in sources.values())
    shared = [int(s.launch.shared) for s in sources.values()]
    assert decode.spill_bytes == 0 and prefill.spill_bytes == 0
    assert shared[2] + prefill.shared_bytes <= target.block_shared_bytes
    assert decode.shared_bytes <= target.static_shared_bytes
    assert bool(prefill.hmma) == w.rounds
    if w.kv_cache == "float32":
        ahead = "LDG.16" if w.head_dim > 128 else "LDGSTS.16"  # there is no place for copies of wide heads
        assert decode.accesses["LDG.16"] and prefill.accesses[ahead]
