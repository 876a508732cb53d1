"""Two artifacts side by side: least times of several turns; what cannot be compared is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmc.bench import Task
from llmc.errors import OptionError
from llmc.package.manifest import FunctionSpec, KernelSpec, Manifest, TargetSpec
from llmc.profile import Ceilings, Operator, Profile
from llmc.report import profiles
from llmc.report.profiles import TaskProfile, take_profiles

from ..runtime.toys import mlp_manifest, write_mlp

CEILINGS = Ceilings({"fma": 1e11, "dot": 4e11}, 1e10)
KERNEL = KernelSpec("dense_0", "dense", 1, {"N": 96, "K": 64}, {"MR": 8}, "default", 2)


def operator(name: str, seconds: float) -> Operator:
    return Operator(name, {}, 1, seconds, 1e6, 1e5, 1e-5 / seconds)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for `profile`: names the artifacts in the order in which they were profiled. Times rise for one kernel
    and fall for the other from turn to turn; those of the artifact `old` are ten times as long."""
    taken: list[str] = []

    def profile(path: Path, tasks: list[Task], **_: object) -> tuple[Ceilings, dict[str, Profile]]:
        taken.append(path.stem)
        turn, slow = taken.count(path.stem), 10 if path.stem == "old" else 1
        a, b = operator("a", slow * turn * 1e-3), operator("b", slow * (5 - turn) * 1e-3)
        whole = Profile(slow * 0.1 / turn, tuple(sorted((a, b), key=lambda o: -o.seconds)), turn * 1e-4, 1e-4)
        return CEILINGS, {t.name: whole for t in tasks}

    monkeypatch.setattr(profiles, "profile", profile)
    return taken


def artifact(path: Path, kernels: tuple[KernelSpec, ...] = (KERNEL,), **more: object) -> Path:
    return write_mlp(path, kernels=kernels, **more)


def test_the_least_of_turns_counts(tmp_path: Path, turns: list[str]) -> None:
    new, old = artifact(tmp_path / "new.llmc"), artifact(tmp_path / "old.llmc")
    found = take_profiles(new, old, [Task("call")], 3 * profiles.SECONDS)
    assert turns == ["new", "old"] * 3
    assert found.ceilings == CEILINGS and (found.artifact, found.before) == (str(new), str(old))
    task = found.tasks["call"]
    assert [(o.name, o.seconds) for o in task.after.operators] == [("b", 2e-3), ("a", 1e-3)]
    assert task.after.seconds == pytest.approx(0.1 / 3) and task.after.machine == 1e-4
    assert [(o.name, old and old.seconds / o.seconds) for o, old in task.operators] == [("b", 10), ("a", 10)]


def test_one_artifact_alone(tmp_path: Path, turns: list[str]) -> None:
    found = take_profiles(artifact(tmp_path / "new.llmc"), None, [Task("call")], 0.1)
    assert turns == ["new"] and found.before is None
    assert [old for _, old in found.tasks["call"].operators] == [None, None]


def test_a_kernel_without_counterpart_stands_alone() -> None:
    a, b = Profile(1, (operator("a", 1), operator("b", 1)), 0, 0), Profile(1, (operator("a", 2),), 0, 0)
    assert [(o.name, old and old.seconds) for o, old in TaskProfile(a, b).operators] == [("a", 2), ("b", None)]


def test_configurations_may_differ(tmp_path: Path, turns: list[str]) -> None:
    tuned = dataclasses.replace(KERNEL, config={"MR": 4}, provenance="tuned")
    take_profiles(artifact(tmp_path / "new.llmc", (tuned,)), artifact(tmp_path / "old.llmc"), [Task("call")], 2)
    assert turns


def _other_inputs(manifest: Manifest) -> dict[str, FunctionSpec]:
    main = manifest.functions["main"]
    return {"main": dataclasses.replace(main, inputs=tuple(reversed(main.inputs)))}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"kernels": (dataclasses.replace(KERNEL, workload={"N": 96, "K": 128}),)}, ["kernel dense_0", "128", "64"]),
        ({"kernels": (dataclasses.replace(KERNEL, calls=3),)}, ["kernel dense_0", "called 3 times"]),
        ({"kernels": ()}, ["its kernel dense_0 is absent"]),
        ({"kernels": (KERNEL, dataclasses.replace(KERNEL, name="dense_1"))}, ["kernel dense_1", "there it is absent"]),
        ({"target": TargetSpec("x86-other", "other", ())}, ["target is x86-other"]),
        ({"functions": _other_inputs(mlp_manifest())}, ["function main", "shift float32[rows, 3], x"]),
    ],
    ids=["workload", "calls", "fewer", "more", "target", "inputs"],
)
def test_other_models_are_refused(
    tmp_path: Path, turns: list[str], change: dict[str, object], parts: list[str]
) -> None:
    new, old = artifact(tmp_path / "new.llmc"), artifact(tmp_path / "old.llmc", **change)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="untuned and tuned") as error:
        take_profiles(new, old, [Task("call")], 2)
    assert str(old) in str(error.value) and all(part in str(error.value) for part in parts)
    assert not turns, "nothing is measured in vain"
