"""How kernels are launched, and the bytes from which TVM's runtime loads them."""

from __future__ import annotations

import dataclasses

import pytest

from llmc.errors import KernelError
from llmc.gpu.image import module_bytes
from llmc.gpu.launch import Argument, Launch
from llmc.gpu.passes import lower
from llmc.gpu.sources import template_sources
from llmc.targets.cuda import SM80
from llmc.tir_pipeline import mark_kernel
from llmc.tvm_shim import IRModule, TvmTarget, tvm
from tests.gpu.tools import reversal


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_are_expressions_of_the_arguments(dynamic: bool) -> None:
    (kernel,) = template_sources(reversal(dynamic), SM80).values()
    launch = kernel.launch
    assert launch.arguments[2:] == (Argument("a2", "int64", False),)
    assert [(a.dtype, a.pointer) for a in launch.arguments[:2]] == [("float32", True)] * 2
    for M, blocks in ((1, 1), (4, 1), (5, 2), (0, 0)):
        assert launch.sizes({"a2": M}) == ((blocks, 1, 1), (64, 1, 1), 256 if dynamic else 0)
    assert launch.threads == 64
    tags = ("blockIdx.x", "threadIdx.x")
    assert launch.tags == ((*tags, "tirx.use_dyn_shared_memory") if dynamic else tags)


def test_sizes_of_a_file_are_no_programs() -> None:
    launch = Launch((), ("min(a0, 7) if a0 > 2 and a1 != 3 else (a1 + 3) // 2 % 5", "1", "1"), ("1", "1", "1"), "0", ())
    assert launch.sizes({"a0": 9, "a1": 4})[0][0] == 7 and launch.sizes({"a0": 9, "a1": 3})[0][0] == 3
    for text in ("__import__('os')", "a0.bit_length()", "a9", "[1][0]"):
        with pytest.raises(KernelError, match="no expression of the arguments"):
            dataclasses.replace(launch, shared=text).sizes({"a0": 1, "a1": 1})


def test_barriers_stand_where_the_template_put_them() -> None:
    (kernel,) = template_sources(reversal(), SM80).values()
    assert kernel.source.count("__syncthreads();") == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_module_is_what_tvm_itself_writes(dynamic: bool) -> None:
    """TVM's module of the same kernel, which holds only source, is byte for byte ours with that source."""
    ((name, kernel),) = template_sources(reversal(dynamic), SM80).items()
    target = TvmTarget(SM80.tvm())
    function = mark_kernel(reversal(dynamic))
    host, device = lower(IRModule({"reversal": function}), target)
    library = tvm.get_global_func("target.build.llvm")(host, target.host)
    library.import_module(tvm.get_global_func("target.build.cuda")(IRModule({name: device[name][0]}), target))
    pack = tvm.get_global_func("runtime.ModulePackImportsToTensor")
    packed = pack(library).numpy().tobytes()
    ours = module_bytes(name, kernel.launch, kernel.source.encode(), "cuda")
    assert len(ours) > 1000 and packed.endswith(ours)


def test_a_host_function_launches_nothing_for_nothing() -> None:
    """A size of 0 makes a grid that the driver refuses."""
    host, _ = lower(IRModule({"reversal": mark_kernel(reversal())}), TvmTarget(SM80.tvm()))
    text = host.script(show_meta=False)
    call = text.index('call_packed_lowered("reversal_kernel"')
    assert "> T.int64(0)" in text[:call]
