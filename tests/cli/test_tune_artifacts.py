"""`llmc tune` without an ONNX file: an artifact's kernels, and kernels that a user names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmc import pipeline
from llmc.errors import KernelError
from llmc.schedules.base import Kernel
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING, LowBitEmbeddingWorkload
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.targets.detect import machine, native
from llmc.tune import effort, remote, stage
from llmc.tune.task import Measurement, Task

from ..graphs import Decoder
from .conftest import Call
from .pretender import NORM_64, Pretender, artifact, records, spec


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Decoder().plain(tmp_path_factory.mktemp("tune") / "toy.onnx")


@pytest.fixture(scope="module")
def calls(toy: Path) -> Mapping[Kernel, int]:
    """The toy's kernels, as its compilation sees them."""

    class Selected(Exception):
        pass

    def lower(plan: Any, *_: Any) -> None:
        raise Selected(plan.calls())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Selected) as selected:
        patch.setattr(pipeline, "lower", lower)
        pipeline.compile(toy, database=toy.with_name("none.db"))
    found: Mapping[Kernel, int] = selected.value.args[0]
    return found


def test_an_artifact_is_tuned_as_its_model_is(
    llmc: Call, toy: Path, calls: Mapping[Kernel, int], tmp_path: Path, pretended: type[Pretender]
) -> None:
    made = artifact(tmp_path / "toy.llmc", *(spec(kernel, count) for kernel, count in calls.items()))
    answers = []
    for subject in (toy, made):
        code, out, err = llmc("tune", subject, "--trials", 2, "--db", tmp_path / f"{subject.suffix}.db", "--json")
        assert code == 0, err
        answers.append({(k["template"], k["workload"], k["calls"], k["ratio"]) for k in json.loads(out)["kernels"]})
    assert f"{sum(calls.values())} calls of {len(calls)} kernels for {native().name}" in err
    model, same = answers
    assert model == same and {count for _, _, count, _ in same} == set(calls.values())
    keys = [{r.key for r in records(tmp_path / f"{suffix}.db")} for suffix in (".onnx", ".llmc")]
    assert keys[0] == keys[1]  # at the same sizes, too
    assert "left out" not in err


def test_an_artifact_of_an_older_llmc(llmc: Call, tmp_path: Path, pretended: type[Pretender]) -> None:
    older = spec(Kernel(DENSE, DenseLinearWorkload(96, 64)), 3, name="d", version=DENSE.version + 1)
    gone = spec(NORM_64, 1, name="g", template="gone")
    some = artifact(tmp_path / "some.llmc", spec(NORM_64, 5), older, gone)
    code, out, err = llmc("tune", some, "--trials", 1, "--db", tmp_path / "t.db", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert [(k["workload"], k["calls"]) for k in answer["kernels"]] == [(NORM_64.workload.key(), 5)]
    lines = [f"dense d: the template's version is {DENSE.version + 1}, this llmc has {DENSE.version}"]
    lines.append("gone g: this llmc has no such template")
    assert answer["left_out"] == lines and all(f"left out: {line}" in err for line in lines)

    code, out, err = llmc("tune", artifact(tmp_path / "none.llmc", older, gone), "--db", tmp_path / "t.db")
    assert (code, out) == (6, "")
    assert "holds no kernel that this llmc can tune" in err and all(line in err for line in lines)
    assert "compile the model again" in err


def test_artifacts_of_other_targets(llmc: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = artifact(tmp_path / "unknown.llmc", spec(NORM_64, 1), target="riscv")
    code, _, err = llmc("tune", unknown, "--db", tmp_path / "t.db")
    assert code == 6 and "unknown.llmc: is built for riscv" in err and "x86-avx2" in err

    here = artifact(tmp_path / "here.llmc", spec(NORM_64, 1))
    other = "x86-avx2" if native().name == "x86-avx512" else "x86-avx512"
    code, _, err = llmc("tune", here, "--target", other, "--db", tmp_path / "t.db")
    assert code == 2 and f"here.llmc is built for {native().name}" in err

    weak = dataclasses.replace(machine(), flags=frozenset())
    monkeypatch.setattr(effort, "machine", lambda: weak)
    code, _, err = llmc("tune", here, "--db", tmp_path / "t.db")
    assert code == 2 and f"target {native().name}: this machine cannot tune for it: it lacks" in err
    assert not (tmp_path / "t.db").exists()


def test_single_workloads(llmc: Call, tmp_path: Path, pretended: type[Pretender]) -> None:
    """Each once, at the rows that were asked for; as `llmc logs list` shows them, too."""
    words = ["--workload", "norm NormWorkload(K=64)", "--workload", "norm NormWorkload(epsilon=1e-05,K=64)"]
    db = tmp_path / "t.db"
    code, out, err = llmc("tune", *words, "--rows", "1,16", "--trials", 1, "--db", db, "--json")
    assert code == 0, err
    (only,) = json.loads(out)["kernels"]
    assert (only["template"], only["workload"], only["calls"]) == ("norm", NORM_64.workload.key(), 1)
    assert {r.key.points for r in records(db)} == {"M=1 1;M=16 1"}

    (listed,) = json.loads(llmc("logs", "list", "--db", db, "--json")[1])
    again = f"{listed['template']} {listed['workload']}"
    assert llmc("tune", "--workload", again, "--trials", 1, "--db", db)[0] == 0
    assert {r.key.points for r in records(db)} == {"M=1 1;M=16 1", "M=1 0.5;M=32 0.25;M=128 0.25"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["norm"], ["'norm' is not a template and its workload", "lowbit LowBitLinearWorkload(N=960"]),
        (["gone X(K=1)"], ["no template 'gone'", "known: attention AttentionWorkload, ", "norm NormWorkload"]),
        (["norm NormWorkload(J=1)"], ["NormWorkload needs K", "'norm NormWorkload(K=…,kind=rms,epsilon=1e-05"]),
        (["dense DenseLinearWorkload(N=5,K=4,dtype=float16)"], ["dense does not serve it on x86"]),
        ([str(Kernel(LOWBIT_EMBEDDING, LowBitEmbeddingWorkload(96, 64, 4, 32)))], ["one configuration"]),
        (["norm NormWorkload(K=4)", "--rows", "0"], ["--rows", "positive numbers"]),
        (["norm NormWorkload(K=4)", "--dim", "a=1"], ["--dim needs an ONNX file"]),
        (["kv_append KVAppendWorkload(n_heads=2,n_kv_heads=1,head_dim=8)", "--rows", "1"], ["kv_append has no rows"]),
        (["norm NormWorkload(K=4)", "model.onnx"], ["both a model and --workload"]),
    ],
    ids=lambda value: None if "--" in value[0] else value[0].partition(" ")[0],
)
def test_says_what_is_wrong_with_a_workload(llmc: Call, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    code, out, err = llmc("tune", "--workload", *words, "--db", tmp_path / "t.db")
    assert (code, out) == (2, ""), err
    assert all(part in err for part in parts), err


def test_what_cannot_be_measured_fails(llmc: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Pretender):
        def measure(self, task: Task, configs: Any, *, careful: bool = False) -> Iterator[Measurement]:
            if task.kernel == NORM_64:
                raise KernelError("its default configuration cannot be measured", where=task.key)
            return super().measure(task, configs, careful=careful)

    monkeypatch.setattr(stage, "Measurer", Broken)
    monkeypatch.setattr(stage, "shipped", lambda target: ())  # learning from what is known takes seconds
    words = ("tune", "--workload", str(NORM_64), "--trials", 4, "--db", tmp_path / "t.db")
    code, _, err = llmc(*words)
    assert code == 8 and "could not be tuned: norm" in err and "cannot be measured" in err
    code, _, err = llmc(*words, "--workload", "norm NormWorkload(K=65)")
    assert code == 0 and "could not be tuned: norm" in err


def test_a_devices_records_name_the_device(
    llmc: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretended: type[Pretender]
) -> None:
    asked = []

    def measurer(*arguments: object, seed: int) -> Pretender:
        asked.append((*arguments[1:], seed))
        return Pretender()

    monkeypatch.setattr(remote, "remote_measurer", measurer)
    monkeypatch.setattr(effort, "machine", lambda: dataclasses.replace(machine(), flags=frozenset()))
    made = artifact(tmp_path / "a.llmc", spec(NORM_64, 1))
    devices = ("--tracker", "192.0.2.7:9190", "--key", "board", "--builders", "tcp://192.0.2.8:8786")
    code, out, err = llmc("tune", made, *devices, "--trials", 1, "--db", tmp_path / "t.db", "--json")
    assert code == 0, err
    assert asked == [("192.0.2.7:9190", "board", "tcp://192.0.2.8:8786", 0)]
    assert {(r.key.cpu, r.key.cores) for r in records(tmp_path / "t.db")} == {("rpc:board", 0)}
    assert json.loads(out)["kernels"][0]["provenance"] == "tuned"


@pytest.mark.parametrize("given", ["--tracker 192.0.2.7:9190", "--key board", "--builders tcp://192.0.2.8:8786"])
def test_a_device_needs_an_address_and_a_key(llmc: Call, tmp_path: Path, given: str) -> None:
    code, out, err = llmc("tune", "--workload", "norm NormWorkload(K=64)", *given.split(), "--db", tmp_path / "t.db")
    assert (code, out) == (2, "")
    assert given.split()[0] in err and "--tracker HOST:PORT and --key KEY" in err
