"""Every com.microsoft operator that onnxruntime's CPU provider has is here, or is refused with a reason."""

import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from llmc.errors import UnsupportedError
from llmc.ops.contrib import REFUSED, RULES

from .contrib import Random, ms
from .harness import Compiled

KNOWN = (1, 32)


def kernels() -> set[str]:
    provider = "CPUExecutionProvider"
    found = state.get_all_opkernel_def()
    return {k.op_name for k in found if k.domain == "com.microsoft" and k.provider == provider}


def test_nothing_is_forgotten():
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) > KNOWN:
        pytest.skip("a newer onnxruntime may have more")
    assert kernels() <= set(RULES)


def test_refused_operators_say_why():
    cases = [ms(op, Random().f32(2, 3)) for op in REFUSED]
    compiled = Compiled(cases)
    for c in cases:
        with pytest.raises(UnsupportedError, match=rf"com.microsoft.{c.op}"):
            compiled.run(c)
        assert REFUSED[c.op] in str(compiled.errors[id(c)])
