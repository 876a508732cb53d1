from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import KVAppendWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.embedding.dense import EMBEDDING_DENSE, EmbeddingDenseWorkload
from llmc.schedules.recurrent.recurrent import RECURRENT
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.targets.x86 import AVX2, AVX512
from llmc.tune import features
from llmc.tune.task import Point, Task
from llmc.tune.tasks import points_of
from tests.tune.synthetic import attention, dense, lowbit, norm, sample


def _task(template, workload):
    kernel = Kernel(template, workload)
    return Task(kernel, AVX512, points_of(kernel))


TASKS = {
    "dense": dense(576, 576),
    "silu_mul": dense(3072, 576, activation="silu_mul"),
    "lowbit_a8": lowbit(960, 576),
    "lowbit_a32": lowbit(960, 576, activations="a32"),
    "attention": attention(),
    "norm": norm(),
    "kv_append": _task(KV_APPEND, KVAppendWorkload(9, 3, 64, in_place=True)),
    "embedding": _task(EMBEDDING_DENSE, EmbeddingDenseWorkload(1000, 576)),
    "recurrent": _task(RECURRENT, RecurrentWorkload(256, "gru", "bidirectional")),
}


def _value(task: Task, M: int, config: dict[str, int | str], name: str, threads: int = 2) -> float:
    """A feature of one configuration, as it was before the logarithm."""
    vector = features.matrix(task, Point((("M", M),)), [config], threads)[0]
    return float(2.0 ** vector[features.names().index(name)])


def _default(task: Task, **knobs: int) -> dict[str, int | str]:
    return task.kernel.template.default(task.kernel.workload, task.target) | knobs


@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_vectors_are_whole_and_tell_configurations_apart(task, target):
    task = Task(task.kernel, target, task.points)
    configs = sample(task, 50)
    for point in task.points:
        X = features.matrix(task, point, configs, threads=2)
        assert X.shape == (len(configs), len(features.names()))
        assert not np.isinf(X).any()
        code = X[:, len(features.TASK) : len(features.TASK) + len(features.CODE)]
        assert (~np.isnan(code)).any(axis=0).sum() >= 4, "the template describes its code"
    together = np.hstack([features.matrix(task, p, configs, 2) for p in task.points])
    assert len(np.unique(np.nan_to_num(together), axis=0)) > 1


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_descriptions_speak_the_documented_vocabulary(task):
    describe = features._DESCRIBE[task.kernel.template.name]
    for point in task.points:
        for config in sample(task, 20):
            counts = describe(task.kernel.workload, config, task.target, point.sizes(), 2)
            assert set(counts) <= set(features.CODE)
            assert all(np.isfinite(v) and v >= 0 for v in counts.values()), counts


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_the_default_relates_to_itself_as_nothing(task):
    for point in task.points:
        relative = features.matrix(task, point, [_default(task)], 2)[0, -len(features.CODE) :]
        assert np.nansum(np.abs(relative)) == 0


def test_knobs_without_effect_leave_no_trace():
    task = lowbit(960, 576)
    one = Point((("M", 1),))
    a, b = (features.matrix(task, one, [_default(task, MR=MR)], 2) for MR in (3, 4))
    np.testing.assert_array_equal(a, b)
    many = Point((("M", 128),))
    c, d = (features.matrix(task, many, [_default(task, MR=MR)], 2) for MR in (3, 4))
    assert not np.array_equal(c, d, equal_nan=True)


def test_counts_by_hand():
    task = dense(576, 576)
    block = _default(task, MR=8, NV=3, KU=4)
    assert _value(task, 128, block, "registers") == pytest.approx((8 * 3 + 3 + 1) / 32)
    assert _value(task, 128, block, "loads_per_op") == pytest.approx(1 / 8 + 1 / 3)
    assert _value(task, 128, block, "body") == pytest.approx(4 * 8 * 3)
    assert _value(task, 128, block, "panel_l1") == pytest.approx(4 * 576 * 48 / AVX512.l1_bytes)
    assert _value(task, 130, block, "tail") == pytest.approx(2 / 130)
    # One row: 576 / 48 = 12 panels for 8 threads: 2 for the busiest, 1.5 on average.
    assert _value(task, 1, block, "imbalance", threads=8) == pytest.approx(2 / 1.5)
    assert _value(task, 1, block, "tasks", threads=8) == pytest.approx(1.5)
    # 576 columns in panels of 4 * 16: none is wasted; in panels of 128 for 3 * 16 = 48 none either.
    assert _value(dense(100, 576), 1, _default(task, NV=2), "waste") == pytest.approx(128 / 100)


def test_padded_rows_are_waste():
    task = lowbit(960, 576)
    config = _default(task, MR=6)
    assert _value(task, 128, config, "waste") == pytest.approx(22 * 6 / 128)
    assert _value(task, 126, config, "waste") == pytest.approx(1)


def test_prefetch_distance_is_that_of_the_body_that_runs():
    task = lowbit(960, 576)
    config = _default(task, ahead_one=2048, ahead_many=8192)
    assert _value(task, 1, config, "prefetch") == pytest.approx(2048)
    assert _value(task, 4, config, "prefetch") == pytest.approx(8192)


def test_machine_code_follows_the_description():
    task = lowbit(960, 576)
    default, other = {"spills": 4, "hot_loads": 0.5}, {"spills": 16, "hot_loads": 0}
    X = features.matrix(task, task.points[0], [_default(task, MR=3)], 2)
    long = np.hstack([X, [features.built_vector(other, default)]])
    names = features.names(built=True)
    assert long.shape == (1, len(names)) and names[: X.shape[1]] == features.names()
    vector = dict(zip(names, long[0], strict=True))
    assert (vector["spills"], vector["~spills"]) == (4, 2)
    assert vector["~hot_loads"] < -5 and np.isnan(vector["zmm"]) and np.isnan(vector["~zmm"])
    assert np.isnan(features.built_vector({}, default)).all()
    assert np.isnan(features.built_vector(other, {})).sum() == 2 * len(features.BUILT) - 2


def test_the_defaults_vector_follows_from_any_other():
    task, point = lowbit(960, 576), Point((("M", 128),))
    default, other = {"spills": 4, "hot_loads": 0.5}, {"spills": 16, "hot_loads": 0.25}
    X = features.matrix(task, point, [_default(task), *sample(task, 5)], 2)
    np.testing.assert_allclose(features.of_default(X), np.broadcast_to(X[0], X.shape), atol=1e-5)
    codes = [default, *[other] * 5]
    long = np.hstack([X, [features.built_vector(code, default) for code in codes]])
    np.testing.assert_allclose(features.of_default(long), np.broadcast_to(long[0], long.shape), atol=1e-5)


def test_the_documentation_lists_all_features():
    text = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| feature | meaning |")]
    documented = [tuple(cell.strip() for cell in row.split("|")[1:3]) for table in tables for row in table[2:]]
    assert documented == [item for part in (features.TASK, features.CODE, features.BUILT) for item in part.items()]


def test_foreign_measurements_are_marked():
    task = dense(576, 576)
    at = features.names().index("foreign")
    own, foreign = (features.matrix(task, task.points[0], [_default(task)], 2, f)[0] for f in (False, True))
    assert (own[at], foreign[at]) == (0, 1)
