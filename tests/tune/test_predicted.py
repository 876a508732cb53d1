"""Tuning without a GPU: what is predicted is marked, kept apart, and seen to compute the right thing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from llmc import tune
from llmc.emulator.emulator import available
from llmc.errors import KernelError, OptionError
from llmc.schedules.base import Config, Kernel
from llmc.schedules.gemm.cuda_mma import MMA_LOWBIT, HalfLinearWorkload
from llmc.schedules.norm.cuda import CUDA_NORM, CudaNorm
from llmc.schedules.norm.norm import NormWorkload
from llmc.targets.base import Target
from llmc.targets.cuda import SM80
from llmc.tune import choose_configs, effort, emulated, logs, predicted, stage
from llmc.tune.database import Database
from llmc.tune.effort import Effort, Tuning, resolve_tuning
from llmc.tune.logs import LogError
from llmc.tune.overview import overview, preferred
from llmc.tune.predicted import Predictor
from llmc.tune.record import PREDICTOR, Key, Record
from llmc.tune.subject import Rejected
from llmc.tune.task import Measurement, Point, Predicted, Task, Timing
from tests.gpu.tools import needs_compiler

NORM = Kernel(CUDA_NORM, NormWorkload(576))
TASK = Task(NORM, SM80, (Point((("M", 1),)), Point((("M", 32),), 0.5)))
DEFAULT = CUDA_NORM.default(NORM.workload, SM80)
needs_emulator = pytest.mark.skipif(not available(), reason="the emulator needs g++")


def said(ratio: float, mark: Predicted = "emulated", threads: int = 512, verified: bool = True) -> Measurement:
    """A prediction, or with an empty mark a measurement."""
    timings = {str(p): Timing(ratio * 1e-5, 1e-5, 0.05 if mark else 0.01) for p in TASK.points}
    return Measurement({"threads": threads}, "ok", timings, "", 0.0, verified, {}, mark)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "t.db") as database:
        yield database


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "compute_capability", lambda: None)


class Here:
    """Stands for `LocalPool`, whose processes take seconds to start."""

    def __init__(self, function: Callable[..., object], workers: int | None, limit_s: float) -> None:
        self.function = function

    def build(self, task: Task, configs: Iterable[Config], careful: bool) -> Iterator[tuple[Config, object]]:
        yield from ((config, self.function(task, config, careful)) for config in configs)

    def close(self) -> None: ...


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted, "LocalPool", Here)


# The mark


def test_the_mark_survives_database_and_logs(database: Database, tmp_path: Path) -> None:
    made = [
        said(0.8),
        said(0.9, "ranked", 256, False),
        dataclasses.replace(said(1, "ranked"), status="gate", timings={}),
    ]
    for m in made:
        database.add(TASK, m)
    assert [r.measurement for r in database.records(TASK, predicted=True)] == made and not database.records(TASK)
    logs.export(database, tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert all('"predicted":' in line and '"us":' not in line and PREDICTOR in line for line in lines)
    with Database(tmp_path / "other.db") as other:
        assert logs.import_(other, tmp_path / "a.jsonl") == 3 and logs.import_(other, tmp_path / "a.jsonl") == 0
        assert {r.measurement.predicted for r in other.records()} == {"ranked", "emulated"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": None}, "its times are 'predicted_us', and it is not marked as predicted"),
        (
            {"predicted": None, "predicted_us": None, "us": True},
            "not marked as predicted, and its machine is 'predicted",
        ),
        ({"cpu": "NVIDIA A100"}, "is marked as predicted, and its machine is 'NVIDIA A100'"),
        ({"us": True}, "its times are 'us', and it is marked as predicted"),
        ({"predicted": "surely"}, "the mark 'surely' is unknown"),
        ({"predicted_us": None}, "its times are not those of its points"),
    ],
)
def test_a_wrong_mark_is_refused(database: Database, tmp_path: Path, change: dict, message: str) -> None:
    """Nothing of such a log comes in."""
    right = Record(Key.of(TASK, predicted=True), said(0.8)).to_json()
    data = json.loads(right)
    times = data["predicted_us"]
    for name, value in change.items():
        data.pop(name, None)
        if value is not None:
            data[name] = times if value is True else value
    log = tmp_path / "wrong.jsonl"
    log.write_text(f"{right}\n{json.dumps(data)}\n")
    with pytest.raises(LogError, match=message):
        logs.import_(database, log)
    assert database.records() == []


def test_records_and_their_keys_agree() -> None:
    for predicted_key, mark in ((True, ""), (False, "ranked")):
        with pytest.raises(ValueError, match="predicted"):
            Record(Key.of(TASK, predicted_key), said(0.8, mark))  # type: ignore[arg-type]


# What is chosen


def test_predictions_decide_only_where_nobody_measured(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen() -> tuple[str, object, float]:
        choice = choose_configs([NORM], SM80, tmp_path / "t.db")[NORM]
        return choice.provenance, choice.config["threads"], choice.ratio

    assert chosen()[:2] == ("default", DEFAULT["threads"])
    database.add(TASK, said(0.99))  # no clear difference
    database.add(TASK, said(0.7, verified=False, threads=32))  # nobody looked at it closely
    assert chosen()[0] == "default"
    database.add(TASK, said(0.9, "ranked", 64))
    assert chosen() == ("predicted", 64, pytest.approx(0.9))
    database.add(TASK, said(0.8, "emulated", 256))
    assert chosen() == ("predicted+emulated", 256, pytest.approx(0.8))
    shipped = Record(Key.of(TASK, predicted=True), said(0.5, threads=32))
    monkeypatch.setattr(tune, "shipped", lambda target: (shipped,))
    assert chosen()[1] == 256, "the user's own go first"
    database.add(TASK, said(1.1, "", 256, verified=False))  # on a GPU, none is better than the default
    assert chosen()[:2] == ("default", DEFAULT["threads"])
    database.add(TASK, said(0.95, "", 64))
    assert chosen() == ("tuned", 64, pytest.approx(0.95))
    (best,) = preferred(overview(database.records()))
    assert best.best is not None and not best.key.predicted and best.best.config == {"threads": 64}


def test_a_shipped_prediction_gives_way_to_a_measurement(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = (Record(Key.of(TASK, predicted=True), said(0.5, threads=32)),)
    monkeypatch.setattr(tune, "shipped", lambda target: shipped)
    assert choose_configs([NORM], SM80, tmp_path / "t.db")[NORM].provenance == "predicted+emulated"
    database.add(TASK, said(1.1, "", 32, verified=False))
    assert choose_configs([NORM], SM80, tmp_path / "t.db")[NORM].provenance == "default"


def test_neither_teaches_anything_about_the_other(database: Database) -> None:
    measured, guessed = said(0.9, ""), said(0.8)
    for m in (measured, guessed):
        database.add(TASK, m)
    assert stage.known(database, SM80) == [(TASK, measured)]
    assert stage.known(database, SM80, predicted=True) == [(TASK, guessed)]
    older = Record(dataclasses.replace(Key.of(TASK, predicted=True), cpu="predicted by model 0"), said(0.6))
    database.insert([older])
    assert stage.known(database, SM80, predicted=True) == [(TASK, guessed)], "of this model alone"


# How it is predicted


def test_where_there_is_no_gpu_tuning_predicts(no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "find_toolchain", lambda: None)
    tuning = resolve_tuning("quick", SM80, database=tmp_path / "t.db")
    assert tuning is not None and tuning.predicted
    monkeypatch.setattr(effort, "compute_capability", lambda: (8, 6))
    tuning = resolve_tuning("quick", SM80, database=tmp_path / "t.db")
    assert tuning is not None and not tuning.predicted

    def missing() -> None:
        raise OptionError("NVIDIA's compiler is not installed")

    monkeypatch.setattr(effort, "find_toolchain", missing)
    with pytest.raises(OptionError, match="not installed"):
        resolve_tuning("quick", SM80, database=tmp_path / "t.db")


@needs_compiler
def test_candidates_are_compiled_examined_and_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the pool's own are the same function."""
    half, whole = (predicted.examine(TASK, {"threads": n}, False) for n in (32, 512))
    assert isinstance(half, predicted.Examined) and isinstance(whole, predicted.Examined)
    assert set(half.seconds) == {"M=1", "M=32"} and half.seconds["M=1"] > whole.seconds["M=1"] > 0
    assert half.predicted == "ranked" and not half.failed and half.code["gpu_registers"] > 0
    m = predicted._judged({"threads": 512}, whole, half, careful=False)
    assert m.predicted == "ranked" and m.status == "ok" and m.cost(TASK.points) < 1 and m.noise(TASK.points) == 0.05
    m = predicted._judged({}, dataclasses.replace(whole, failed="it spills 8 bytes"), half, careful=True)
    assert (m.status, m.detail, m.predicted, m.verified) == ("gate", "it spills 8 bytes", "ranked", True)

    class Broken(CudaNorm):
        def build(self, workload, target, config):
            raise KernelError("no such kernel")

    m = predicted.examine(dataclasses.replace(TASK, kernel=Kernel(Broken(), NORM.workload)), DEFAULT, False)
    assert isinstance(m, Measurement) and m.status == "build" and "no such kernel" in m.detail and m.predicted


@needs_compiler
@needs_emulator
def test_a_search_and_its_continuation(database: Database, tmp_path: Path, no_gpu: None, in_this_process: None) -> None:
    """Five configurations are known whole after one run."""
    limits = Tuning(Effort(trials=16, batch=4, seconds=600), 0, tmp_path / "t.db", predicted=True)
    events = []
    (first,) = stage.tune_tasks([TASK], SM80, limits, events.append)
    (second,) = stage.tune_tasks([TASK], SM80, limits)
    assert len(first.trials) == 4 and not second.trials and all(e.predicted for e in events)
    assert first.verified is not None and first.verified.predicted == "emulated" and first.config != DEFAULT
    choice = choose_configs([NORM], SM80, tmp_path / "t.db")[NORM]
    assert choice.config == first.config and choice.provenance == "predicted+emulated"
    assert all(r.key.predicted for r in database.records())


class TooManyThreads(CudaNorm):
    def default(self, workload: NormWorkload, target: Target) -> dict[str, int | str]:
        return {"threads": 4096}


@needs_compiler
def test_a_default_that_does_not_compile_is_an_error(in_this_process: None) -> None:
    broken = dataclasses.replace(TASK, kernel=Kernel(TooManyThreads(), NORM.workload))
    with (
        Predictor(SM80, workers=1) as predictor,
        pytest.raises(KernelError, match="its default configuration cannot be predicted"),
    ):
        list(predictor.measure(broken, [DEFAULT]))


def test_what_takes_too_long_is_no_measurement_either(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted, "_LIMIT_S", 0.01)
    with Predictor(SM80, workers=1) as predictor:
        monkeypatch.setattr(predictor, "_default", lambda task: None)
        (lost,) = predictor.measure(TASK, [DEFAULT])
    assert (lost.status, lost.predicted) == ("timeout", "ranked")
    database.add(TASK, lost)
    assert [r.key.predicted for r in database.records()] == [True]


# Emulation of a winner


@needs_emulator
def test_a_configuration_that_computes_something_else_is_rejected() -> None:
    class Wrong(CudaNorm):
        def build(self, workload, target, config):
            return super().build(dataclasses.replace(workload, epsilon=0.5), target, config)

    emulated.check(NORM, DEFAULT, SM80)
    with pytest.raises(Rejected, match="emulated, y is off by"):
        emulated.check(Kernel(Wrong(), NORM.workload), DEFAULT, SM80)


@pytest.mark.parametrize("K", [576, 4096, 4096 + 64])
def test_small_workloads_are_of_the_same_kind(K: int) -> None:
    w = HalfLinearWorkload(8194, K, 4, 32, True, 8.0, "float16", activations="a32", activation="silu_mul")
    kernel = Kernel(MMA_LOWBIT, w)
    config: Config = MMA_LOWBIT.default(w, SM80)
    small = emulated.smaller(kernel, config, SM80)
    assert isinstance(small, HalfLinearWorkload) and config in MMA_LOWBIT.space(small, SM80)
    assert small.N <= 512 and small.K <= 1600 and small.K % 512 == K % 512 and small.columns % 128 == w.columns % 128
    whole = dataclasses.replace(w, group_size=K)
    small = emulated.smaller(Kernel(MMA_LOWBIT, whole), config, SM80)
    assert isinstance(small, HalfLinearWorkload) and small.group_size == small.K
