from __future__ import annotations

import dataclasses

import pytest

from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload
from llmc.schedules.norm.norm import NormWorkload
from llmc.targets.x86 import AVX2, AVX512
from llmc.tune.known import history_of, parse_workload
from llmc.tune.record import Key, Record
from tests.tune.synthetic import Machine, dense, sample

TASK = dense(1536, 384, bias=True, activation="gelu")


@pytest.mark.parametrize(
    "workload",
    [
        TASK.kernel.workload,
        AttentionWorkload(12, 12, 32, 32**-0.5, causal=False, key_bias=True, softcap=50.0),
        KVAppendWorkload(9, 3, 64, in_place=True),
        LowBitLinearWorkload(960, 576, 4, 32, zero=8.0, activation="silu_mul"),
        NormWorkload(576, kind="layer", epsilon=1e-12),
    ],
    ids=lambda w: type(w).__name__,
)
def test_keys_are_read_back(workload):
    assert parse_workload(type(workload), workload.key()) == workload


@pytest.mark.parametrize("text", ["", "NormWorkload", "NormWorkload(K=x)", "NormWorkload(K=5,gone=1)", "Other(K=5)"])
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
