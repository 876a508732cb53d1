"""Builds, runs and checks kernel templates. Kernels of one target share a module: compiling many at once is cheaper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from llmc.schedules.base import Arrays, Config, Template, Workload, bind_dims
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.targets.x86 import AVX2, AVX512, AVX_VNNI
from llmc.tir_pipeline import build_kernels
from llmc.tvm_shim import TvmTarget, tvm


def _param(target: Target) -> Any:
    missing = machine().missing(target)
    return pytest.param(target, id=target.name, marks=pytest.mark.skipif(bool(missing), reason=f"CPU lacks {missing}"))


X86 = [_param(AVX2), _param(AVX512)]
BYTES = [*X86, _param(AVX_VNNI)]  # for kernels that multiply bytes: the others are those of AVX2


@dataclass(frozen=True)
class Kernel:
    """A compiled member of a template's family."""

    template: Template
    workload: Any
    target: Target
    config: Config
    call: Any

    def run(self, inputs: Mapping[str, np.ndarray], packed: Arrays, dims: Mapping[str, int] | None = None) -> Arrays:
        """The outputs; they start as NaN, so that an element which is not written shows. `dims`: sizes that no input
        tells."""
        known = bind_dims(self.workload.inputs(), inputs) | dict(dims or {})
        outputs_ = self.workload.outputs()
        shapes = {a.name: tuple(known[s] if isinstance(s, str) else s for s in a.shape) for a in outputs_}
        outputs = {name: tvm.runtime.tensor(np.full(shape, np.nan, np.float32)) for name, shape in shapes.items()}
        arguments = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*inputs.values(), *packed.values())]
        self.call(*arguments, *outputs.values())
        return {name: array.numpy() for name, array in outputs.items()}

    def check(
        self,
        inputs: Mapping[str, np.ndarray],
        weights: Mapping[str, Any],
        tolerance: float,
        dims: Mapping[str, int] | None = None,
    ) -> None:
        """Every output is within `tolerance` of the reference, relative to the larger of 1 and its largest element."""
        got = self.run(inputs, self.template.prepack(weights, self.workload, self.config, self.target), dims)
        for name, want in self.template.reference(self.workload, inputs, weights).items():
            bound = tolerance * max(1.0, float(np.abs(want).max()))
            np.testing.assert_allclose(got[name], want, rtol=0, atol=bound, err_msg=f"{name} of {self.workload}")


def compile_kernels(
    template: Template, cases: Sequence[tuple[Workload, Config | None]], target: Target
) -> list[Kernel]:
    """One kernel for each workload and configuration (None: the default)."""
    configs = [config or template.default(workload, target) for workload, config in cases]
    functions = {
        f"kernel{i}": template.build(workload, target, config)
        for i, ((workload, _), config) in enumerate(zip(cases, configs, strict=True))
    }
    library = build_kernels(functions, TvmTarget(target.tvm()))
    return [
        Kernel(template, workload, target, config, library[f"kernel{i}"])
        for i, ((workload, _), config) in enumerate(zip(cases, configs, strict=True))
    ]
