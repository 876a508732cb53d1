"""Every shipped configuration passes its gates; and gates do fail."""

from __future__ import annotations

import dataclasses

import pytest

from llmc.gpu.function import compile_function
from llmc.gpu.gates import GATES, failures
from llmc.schedules.base import Kernel
from llmc.targets.cuda import SM80, SM90, CudaTarget
from tests.gpu.shipped import shipped
from tests.gpu.tools import needs_compiler, points

pytestmark = needs_compiler
SHIPPED = shipped()
FAST = ("SmolLM2 w4a16 576x576", "SmolLM2 attention_cuda 0")


def failed(kernel: Kernel, target: CudaTarget) -> list[str]:
    template, workload = kernel.template, kernel.workload
    function = compile_function(template.build(workload, target, template.default(workload, target)), target)
    return failures(function, workload, points(kernel), GATES[template.name])


@pytest.mark.parametrize("name", FAST)
def test_kernels_pass_their_gates(name: str) -> None:
    assert not failed(SHIPPED[name], SM80)


@pytest.mark.slow  # several seconds each
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda target: target.name)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_kernel_passes_its_gates(name: str, target: CudaTarget) -> None:
    assert not failed(SHIPPED[name], target)


def test_gates_fail_what_they_are_for() -> None:
    kernel = SHIPPED["MiniLM norm"]
    template, workload = kernel.template, kernel.workload
    function = compile_function(template.build(workload, SM80, template.default(workload, SM80)), SM80)
    strict = dataclasses.replace(GATES["norm_cuda"], tensor_cores="hmma", wide=("weight",), occupancy=1.1, mean=0.5)
    found = "\n".join(failures(function, workload, [{"M": 4}], strict))
    assert "no kernel has HMMA" in found and "4.0 bytes of weight" in found
    assert "occupancy" in found and "bank conflicts" in found
    (name,) = function.kernels
    spilling = dataclasses.replace(function.kernels[name].resources, spill_bytes=8)
    kernels = {name: dataclasses.replace(function.kernels[name], resources=spilling)}
    spilled = dataclasses.replace(function, kernels=kernels)
    (line,) = failures(spilled, workload, [{"M": 4}], GATES["norm_cuda"])
    assert "8 bytes of registers are spilled" in line
