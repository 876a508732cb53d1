"""Profiles of small models: every call is seen, and its work is what arithmetic says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc import bench, ceilings, profile
from llmc.cli import main
from llmc.package.reader import open_artifact
from llmc.pipeline import compile
from llmc.targets.x86 import TARGETS
from tests.graphs import Decoder, Shape, encoder
from tests.runtime.toys import write_mlp

SHAPE = Shape(context=256)
PEAKS = {"fma": 1e11, "dot": 4e11}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("profiled")
    models = {"decoder": Decoder(SHAPE).genai(folder / "decoder.onnx"), "encoder": encoder(folder / "encoder.onnx")}
    for name, path in models.items():
        compile(path, target="x86-avx2").save(folder / f"{name}.llmc")
    return {name: folder / f"{name}.llmc" for name in models}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "SECONDS", 0.05)
    monkeypatch.setattr(ceilings, "peak", lambda target, unit: PEAKS[unit])
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda target: 1e10)


def of(artifact: Path, task: bench.Task) -> profile.Profile:
    _, profiles = profile.profile(artifact, [task])
    return profiles[task.name]


def by_template(artifact: Path, found: profile.Profile) -> dict[str, list[profile.Operator]]:
    templates = {spec.name: spec.template for spec in open_artifact(artifact).manifest.kernels}
    grouped: dict[str, list[profile.Operator]] = {}
    for operator in found.operators:
        grouped.setdefault(templates.get(operator.name, ""), []).append(operator)
    return grouped


def test_a_prompt(artifacts: dict[str, Path]) -> None:
    M = 20
    found = of(artifacts["decoder"], bench.Task("prefill 20", prefill=M))
    groups = by_template(artifacts["decoder"], found)
    assert sum(o.calls for o in groups["attention"]) == SHAPE.layers
    assert sum(o.calls for name in ("dense", "lowbit") for o in groups.get(name, [])) == 4 * SHAPE.layers + 1
    for o in groups.get("dense", []) + groups.get("lowbit", []):
        assert o.ops == 2 * M * o.workload["N"] * o.workload["K"] * o.calls
    seen = M * (M + 1) / 2  # causal
    assert groups["attention"][0].ops == 4 * SHAPE.layers * SHAPE.heads * SHAPE.head_dim * seen


def test_a_token_reads_what_the_cache_holds_not_what_it_has_room_for(artifacts: dict[str, Path]) -> None:
    found = of(artifacts["decoder"], bench.Task("decode 1", prefill=50, decode=1))
    attention = by_template(artifacts["decoder"], found)["attention"][0]
    assert attention.ops == 4 * SHAPE.layers * SHAPE.heads * SHAPE.head_dim * 51


def test_the_parts_make_the_whole(artifacts: dict[str, Path]) -> None:
    found = of(artifacts["decoder"], bench.Task("decode 1", prefill=8, decode=1))
    assert all(o.seconds > 0 and o.roofline > 0 for o in found.operators)
    assert min(found.machine, found.python, found.seconds) > 0
    times = [o.seconds for o in found.operators]
    assert times == sorted(times, reverse=True)
    parts = found.kernels + found.machine + found.python + found.waits
    assert parts >= found.seconds * 0.999
    assert found.as_json()["kernels"] == pytest.approx(sum(times))


def test_any_other_model(artifacts: dict[str, Path]) -> None:
    main = open_artifact(artifacts["encoder"]).manifest.functions["main"]
    inputs = {i.name: np.ones((2, 9), np.int64) for i in main.inputs}
    found = of(artifacts["encoder"], bench.Task("call", inputs=inputs))
    assert {"dense", "attention", "norm"} <= set(by_template(artifacts["encoder"], found))


def test_a_kernel_of_another_version_is_judged_by_its_arguments(artifacts: dict[str, Path]) -> None:
    spec = open_artifact(artifacts["decoder"]).manifest.kernels[0]
    assert profile._kernel(spec) is not None
    assert profile._kernel(type(spec)(**{**vars(spec), "version": 99})) is None
    watch = profile._Watch({})
    work = watch._work("unknown", [np.zeros((3, 4), np.float32), 7, np.zeros(2, np.int64)])
    assert work is not None and (work.ops, work.bytes) == (0, 64)
    assert watch._work("vm.builtin.reshape", []) is None


def test_roofline_is_the_harder_of_two_limits() -> None:
    from llmc.schedules.base import Work

    assert Work(ops=1e11, bytes=0).seconds(PEAKS, 1e10) == 1
    assert Work(ops=1e11, bytes=0, unit="dot").seconds(PEAKS, 1e10) == 0.25
    assert Work(ops=1, bytes=2e10).seconds(PEAKS, 1e10) == 2


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fma = ceilings.peak(TARGETS["x86-avx2"], "fma")
    assert 1e9 < fma < 1e14
    assert 1e8 < ceilings.read_bandwidth(TARGETS["x86-avx2"], pieces=4) < 1e13


# -- the command line ---------------------------------------------------------------------------------------------
def test_bench_profile(artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(artifacts["decoder"]), "--profile", "--prefill", "16", "--decode", "4"]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ceilings"] == {"peaks": PEAKS, "bandwidth": 1e10}
    assert set(data["profile"]) == {"prefill 16", "decode 4"}
    assert {"name", "calls", "seconds", "roofline"} <= set(data["profile"]["decode 4"]["operators"][0])
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "of roofline" in text and "virtual machine" in text


def test_peers_are_not_profiled(artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["bench", str(artifacts["decoder"]), "--profile", "--against", "onnxruntime", "--model", "m.onnx"])
    assert code == 2 and "--against" in capsys.readouterr().err


def test_profiling_without_the_compiler_says_what_is_missing(tmp_path: Path) -> None:
    artifact = write_mlp(tmp_path / "mlp.llmc")
    words = ["bench", str(artifact), "--profile"]
    script = f"import sys; sys.modules['tvm'] = None; from llmc.cli import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "module tvm, which is not installed" in done.stderr and "llmc[compile]" in done.stderr
