from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from llmc.errors import OptionError
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.embedding.dense import EMBEDDING_DENSE, EmbeddingDenseWorkload
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING, LowBitEmbeddingWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.schedules.recurrent.recurrent import RECURRENT
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.targets.x86 import AVX2, AVX512
from llmc.tune.known import history_of, kernel_of, parse_kernel, parse_workload
from llmc.tune.record import Key, Record
from tests.tune.synthetic import Machine, dense, sample

TASK = dense(1536, 384, bias=True, activation="gelu")
KERNELS = [
    TASK.kernel,
    Kernel(ATTENTION, AttentionWorkload(12, 12, 32, 32**-0.5, causal=False, key_bias=True, softcap=50.0)),
    Kernel(ATTENTION, AttentionWorkload(9, 3, 64, 0.125, window=1020, sinks=4, alibi=True)),
    Kernel(KV_APPEND, KVAppendWorkload(9, 3, 64, in_place=True)),
    Kernel(EMBEDDING_DENSE, EmbeddingDenseWorkload(49152, 576, panel=48)),
    Kernel(LOWBIT_EMBEDDING, LowBitEmbeddingWorkload(49152, 576, 8, 32, False, zero_dtype="float16")),
    Kernel(LOWBIT, LowBitLinearWorkload(960, 576, 4, 32, zero=8.0, activation="silu_mul", scale_dtype="float16")),
    Kernel(NORM, NormWorkload(576, kind="layer", epsilon=1e-12)),
    Kernel(RECURRENT, RecurrentWorkload(256, "gru_after", "bidirectional", initial=True)),
]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.template.name)


@each_kernel
def test_keys_are_read_back(kernel: Kernel) -> None:
    workload = kernel.workload
    assert parse_workload(type(workload), workload.key()) == workload
    assert parse_kernel(str(kernel)) == kernel


@each_kernel
def test_what_artifacts_say_is_read_back(kernel: Kernel) -> None:
    fields = json.loads(json.dumps(vars(kernel.workload)))
    assert kernel_of(kernel.template.name, kernel.template.version, fields) == kernel


def test_users_leave_out_what_has_a_default() -> None:
    kernel = Kernel(LOWBIT, LowBitLinearWorkload(960, 576, 4, 32, activations="a32"))
    assert parse_kernel(" lowbit  LowBitLinearWorkload(K=576, N=960,bits=4,group_size=32, activations=a32)") == kernel


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a template and its workload"),
        ("dense", "'dense' is not a template and its workload"),
        ("gone NormWorkload(K=5)", "no template 'gone'"),
        ("dense NormWorkload(K=5)", "dense has no workload NormWorkload"),
        ("norm NormWorkload()", "needs K"),
        ("norm NormWorkload(5)", "'5' is not NAME=VALUE"),
        ("norm NormWorkload(K=5,K=6)", "K is given twice"),
        ("norm NormWorkload(K=x)", "K is 'x', which is no int"),
        ("norm NormWorkload(K=-5)", "K is -5, which is no size"),
        ("norm NormWorkload(K=5,M=1)", "has no M"),
        ("norm NormWorkload(K=5,bias=yes)", "bias is 'yes', which is no bool"),
        ("norm NormWorkload(K=5,kind=batch)", "kind is batch, not one of rms, layer"),
        ("norm NormWorkload(K=5,sum_output=True)", "has no sum to return"),
        ("dense DenseLinearWorkload(N=5,K=5,dtype=int3)", "dtype is int3, not one of float32"),
        ("dense DenseLinearWorkload(N=5,K=5,activation=tan)", "'tan' is unknown (one of none, relu"),
        ("attention AttentionWorkload(n_heads=4,n_kv_heads=0,head_dim=8,scale=1)", "n_kv_heads is 0"),
        ("attention AttentionWorkload(n_heads=4,n_kv_heads=2,head_dim=8,scale=1,window=-1)", "window is -1"),
    ],
)
def test_what_users_get_wrong(text: str, said: str) -> None:
    with pytest.raises(OptionError, match="an example: 'lowbit LowBitLinearWorkload") as error:
        parse_kernel(text)
    assert said in error.value.what


@pytest.mark.parametrize(
    ("template", "version", "fields", "said"),
    [
        ("gone", 1, {"K": 5}, "no such template"),
        ("norm", 99, {"K": 5}, f"version is 99, this llmc has {NORM.version}"),
        ("norm", NORM.version, None, "no fields"),
        ("norm", NORM.version, {"K": 5.0}, "K is 5.0, which is no int"),
        ("norm", NORM.version, {"K": True}, "K is True, which is no int"),
        ("norm", NORM.version, {"K": 5, "kind": ["rms"]}, "not one of"),
    ],
)
def test_what_artifacts_may_not_say(template: str, version: int, fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kernel_of(template, version, fields)


@pytest.mark.parametrize(
    "text",
    [
        *("", "NormWorkload", "NormWorkload(K=x)", "NormWorkload(K=5,gone=1)", "Other(K=5)", "NormWorkload(K=5)"),
        "NormWorkload(K=5,bias=False,epsilon=1e-05,kind=rms,residual=False,sum_output=True)",
    ],
)
def test_keys_of_other_versions_are_no_workload(text):
    assert parse_workload(NormWorkload, text) is None


def test_history_is_what_was_recorded():
    measured = list(Machine().measure(TASK, sample(TASK, 3)))
    records = [Record(Key.of(TASK), m) for m in measured]
    assert history_of(records, [AVX2, AVX512]) == [(TASK, m) for m in measured]


def test_what_is_not_understood_is_left_out():
    (measured,) = Machine().measure(TASK, sample(TASK, 1))
    key = Key.of(TASK)
    changes = [{"version": 99}, {"template": "gone"}, {"target": "cuda-sm90(x)"}, {"workload": "Gone(N=1)"}]
    records = [Record(dataclasses.replace(key, **change), measured) for change in changes]
    assert history_of(records, [AVX512]) == []
