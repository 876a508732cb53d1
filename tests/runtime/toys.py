"""Small artifacts for the tests of the runtime: written with TVM alone, so that they test nothing but the runtime."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmc.package.archive import write_artifact
from llmc.package.manifest import (
    ArraySpec,
    BufferSpec,
    CacheSpec,
    DecoderSpec,
    FunctionSpec,
    Manifest,
    ParamSpec,
    TargetSpec,
)

HIDDEN = 40  # rows of 160 bytes: the second weight needs padding to be aligned
V, KV, D, BLOCK = 50, 2, 8, 64
MAX_LENGTH = 3000


@functools.cache
def mlp_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "bias": rng.standard_normal(7, "float32"),
        "up": rng.standard_normal((HIDDEN, 7), "float32"),
        "down": rng.standard_normal((7, 3), "float32"),
    }


def mlp_reference(x: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w = {name: array.astype("float64") for name, array in mlp_weights().items()}
    hidden = np.maximum(x @ w["up"] + w["bias"], 0)
    return hidden, hidden @ w["down"] + shift


def _library(module: object) -> bytes:
    import llmc.tvm_shim as shim

    executable = shim.tvm.compile(module, target=shim.TvmTarget({"kind": "llvm", "mcpu": "x86-64"}))
    with tempfile.TemporaryDirectory() as folder:
        executable.export_library(f"{folder}/lib.so")
        return Path(folder, "lib.so").read_bytes()


def _manifest(functions: dict[str, FunctionSpec], weights: Mapping[str, np.ndarray]) -> Manifest:
    import tvm_ffi

    return Manifest(
        llmc="0",
        tvm="0.27.0.post1",
        tvm_ffi=tvm_ffi.__version__,
        target=TargetSpec("test", "x86-64", ()),
        functions=functions,
        params={name: ParamSpec(f"t.{name}", w.dtype.name, w.shape) for name, w in weights.items()},
    )


@functools.cache
def mlp_library() -> bytes:
    """hidden = relu(x·up + bias), out = hidden·down + shift, for any number of rows."""
    from llmc.tvm_shim import relax, tirx

    op, rows, bb = relax.op, tirx.Var("rows", "int64"), relax.BlockBuilder()

    def array(name: str, *shape: object) -> object:
        return relax.Var(name, relax.TensorType(shape, "float32"))

    x, shift = array("x", rows, HIDDEN), array("shift", rows, 3)
    bias, up, down = array("bias", 7), array("up", HIDDEN, 7), array("down", 7, 3)
    with bb.function("main", [x, shift, bias, up, down], attrs={"num_input": 2}):
        with bb.dataflow():
            hidden = bb.emit(op.nn.relu(op.add(op.matmul(x, up), bias)))
            out = bb.emit_output(relax.Tuple([hidden, op.add(op.matmul(hidden, down), shift)]))
        bb.emit_func_output(out)
    return _library(bb.get())


def mlp_manifest(**more: object) -> Manifest:
    main = FunctionSpec(
        inputs=(ArraySpec("x", "float32", ("rows", HIDDEN)), ArraySpec("shift", "float32", ("rows", 3))),
        outputs=(ArraySpec("hidden", "float32", ("rows", 7)), ArraySpec("out", "float32", ("rows", 3))),
        params=("bias", "up", "down"),
        symbols={"rows": (1, 64)},
    )
    return dataclasses.replace(_manifest({"main": main}, mlp_weights()), **more)  # type: ignore[arg-type]


def write_mlp(path: Path, **more: object) -> Path:
    tensors = {f"t.{name}": w for name, w in mlp_weights().items()}
    write_artifact(path, mlp_manifest(**more), lib=mlp_library(), tensors=tensors)
    return path


@functools.cache
def table() -> np.ndarray:
    """The toy decoder's only weight [V, D]."""
    return np.random.default_rng(1).standard_normal((V, D), "float32")


def decoder_reference(ids: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of the toy decoder: token i sees the sum over j <= i of (j + 1) · row(id j).

    The keys hold the first half of the positions' weight (row), the values the second (j · row).
    """
    rows = table().astype("float64")[ids]
    position = np.arange(ids.shape[1])[None, :, None]
    return np.cumsum(rows * (position + 1), axis=1) @ table().astype("float64").T


def _append_kernel() -> object:
    """Writes row(id) into every head of k [B, KV, blocks, D, BLOCK] and position · row into v [B, KV, C, D]."""
    from llmc.tvm_shim import IRBuilder, T

    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, private=True):
            T.func_name("append")
            T.func_attr({"tirx.noalias": True})
            handles = [T.arg(name, T.handle()) for name in ("k", "v", "ids", "position_ids", "kv_len")]
            weights = T.arg("table", T.Buffer((V, D), "float32"))
            batch, seq, blocks, capacity = T.int64(), T.int64(), T.int64(), T.int64()
            k = T.match_buffer(handles[0], (batch, KV, blocks, D, BLOCK), "float32")
            v = T.match_buffer(handles[1], (batch, KV, capacity, D), "float32")
            ids = T.match_buffer(handles[2], (batch, seq), "int64")
            position_ids = T.match_buffer(handles[3], (batch, seq), "int64")
            kv_len = T.match_buffer(handles[4], (batch,), "int64")
            with T.serial(0, batch) as b, T.serial(0, KV) as h, T.serial(0, seq) as s, T.serial(0, D) as d:
                at = T.bind(kv_len[b] - seq + s)
                with T.If(at >= 0), T.Then():
                    T.buffer_store(k, weights[ids[b, s], d], [b, h, at // BLOCK, d, at % BLOCK])
                    T.buffer_store(v, weights[ids[b, s], d] * T.Cast("float32", position_ids[b, s]), [b, h, at, d])
    return builder.get()


def _read_kernel(last: bool) -> object:
    """out [B, S or 1, V]: the sum of all that a position sees in the last head, times the table."""
    from llmc.tvm_shim import IRBuilder, T

    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, private=True):
            T.func_name("read_last" if last else "read")
            T.func_attr({"tirx.noalias": True})
            handles = [T.arg(name, T.handle()) for name in ("k", "v", "ids", "kv_len")]
            weights = T.arg("table", T.Buffer((V, D), "float32"))
            out_handle = T.arg("out", T.handle())
            batch, seq, blocks, capacity = T.int64(), T.int64(), T.int64(), T.int64()
            rows = 1 if last else seq
            k = T.match_buffer(handles[0], (batch, KV, blocks, D, BLOCK), "float32")
            v = T.match_buffer(handles[1], (batch, KV, capacity, D), "float32")
            T.match_buffer(handles[2], (batch, seq), "int64")
            kv_len = T.match_buffer(handles[3], (batch,), "int64")
            out = T.match_buffer(out_handle, (batch, rows, V), "float32")
            with T.serial(0, batch) as b, T.serial(0, rows) as s, T.serial(0, V) as t:
                T.buffer_store(out, T.float32(0), [b, s, t])
                with T.serial(0, kv_len[b] - rows + s + 1) as j, T.serial(0, D) as d:
                    seen = k[b, KV - 1, j // BLOCK, d, j % BLOCK] + v[b, KV - 1, j, d]
                    T.buffer_store(out, out[b, s, t] + seen * weights[t, d], [b, s, t])
    return builder.get()


@functools.cache
def decoder_library() -> bytes:
    from llmc.tvm_shim import relax, tirx

    bb = relax.BlockBuilder()
    for name, last in (("step", False), ("step_last", True)):
        batch, seq, blocks, capacity = (tirx.Var(n, "int64") for n in ("batch", "seq", "blocks", "capacity"))
        k_type = relax.TensorType((batch, KV, blocks, D, BLOCK), "float32")
        v_type = relax.TensorType((batch, KV, capacity, D), "float32")
        ids, positions = (relax.Var(n, relax.TensorType((batch, seq), "int64")) for n in ("ids", "position_ids"))
        kv_len = relax.Var("kv_len", relax.TensorType((batch,), "int64"))
        k, v = relax.Var("k", k_type), relax.Var("v", v_type)
        weights = relax.Var("table", relax.TensorType((V, D), "float32"))
        append, read = bb.add_func(_append_kernel(), "append"), bb.add_func(_read_kernel(last), f"read_{name}")
        with bb.function(name, [ids, positions, kv_len, k, v, weights], attrs={"num_input": 5}):
            with bb.dataflow():
                args = [k, v, ids, positions, kv_len, weights]
                pair = bb.emit(relax.op.call_tir_inplace(append, args, [0, 1], [k_type, v_type]))
                new_k, new_v = bb.emit(relax.TupleGetItem(pair, 0)), bb.emit(relax.TupleGetItem(pair, 1))
                logits = relax.TensorType((batch, 1 if last else seq, V), "float32")
                out = bb.emit(relax.op.call_tir(read, [new_k, new_v, ids, kv_len, weights], logits))
                result = bb.emit_output(relax.Tuple([out, new_k, new_v]))
            bb.emit_func_output(result)
    return _library(bb.get())


def write_decoder(path: Path, eos: tuple[int, ...] = (), **extras: bytes) -> Path:
    k = BufferSpec(("batch", KV, "blocks", D, BLOCK), "float32")
    v = BufferSpec(("batch", KV, "capacity", D), "float32")
    inputs = (
        ArraySpec("input_ids", "int64", ("batch", "seq")),
        ArraySpec("position_ids", "int64", ("batch", "seq")),
        ArraySpec("kv_len", "int64", ("batch",)),
        ArraySpec("k_cache.0", k.dtype, k.shape),
        ArraySpec("v_cache.0", v.dtype, v.shape),
    )
    functions = {
        name: FunctionSpec(inputs, (ArraySpec("logits", "float32", ("batch", seq, V)), *inputs[3:]), ("table",))
        for name, seq in (("step", "seq"), ("step_last", 1))
    }
    decoder = DecoderSpec(V, 1, (CacheSpec(k, v),), ("input_ids", "position_ids", "kv_len"), eos, MAX_LENGTH)
    manifest = dataclasses.replace(_manifest(functions, {"table": table()}), decoder=decoder)
    files = {name.replace("__", "."): content for name, content in extras.items()}
    write_artifact(path, manifest, lib=decoder_library(), tensors={"t.table": table()}, extras=files)
    return path
