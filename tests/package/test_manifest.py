"""The manifest survives a round trip, and refuses everything else by the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.errors import ArtifactError
from llmc.package.manifest import BufferSpec, CacheSpec, DecoderSpec, FunctionSpec, Manifest
from tests.package import files


def changed(*path: str | int, value: Any) -> bytes:
    """The JSON of a good manifest with one value replaced; ... removes it."""
    document = json.loads(files.manifest().to_json())
    place = document
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(document).encode()


def test_round_trip() -> None:
    manifest = files.manifest(accuracy={"cosine": 0.99}, quantization={"bits": [4, 8]})
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json()


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        (("llmc",), 1, "llmc must be string"),
        (("llmc",), ..., "llmc is missing"),
        (("surprise",), 1, "surprise is not a known field"),
        (("target", "requires"), "avx2", "target.requires must be array"),
        (("target", "requires"), [1], "target.requires[0] must be string"),
        (("functions",), {}, "functions is empty"),
        (("functions", "main", "inputs", 0, "shape", 0), 1.5, "functions.main.inputs[0].shape[0]"),
        (("functions", "main", "inputs", 0, "shape", 0), True, "functions.main.inputs[0].shape[0]"),
        (("functions", "main", "inputs", 0, "shape", 0), -1, "impossible dimension"),
        (("functions", "main", "inputs", 0, "dtype"), "float31", "functions.main.inputs[0].dtype"),
        (("functions", "main", "params", 0), "ghost", "'ghost'"),
        (("functions", "main", "symbols", "rows"), [5, 2], "symbols.rows is an empty range"),
        (("functions", "main", "symbols", "rows"), [1], "symbols.rows must hold 2 items"),
        (("params", "odd", "tensor"), "t/codes", "another dtype or shape"),
        (("kernels", 0, "calls"), "2", "kernels[0].calls must be integer"),
        (("entries",), {"lib.so": {"size": 1, "sha256": []}}, "entries.lib.so has 0 hashes"),
        (("entries",), {"lib.so": {"size": 1, "sha256": ["xyz"]}}, "entries.lib.so.sha256"),
        (("entries",), {"../x": {"size": 0, "sha256": ["0" * 64]}}, "entries.../x"),
        (("entries",), {"lib.so": {"size": 0, "sha256": ["0" * 64]}}, "weights.safetensors is missing"),
        (("decoder",), 3, "decoder must be object or null"),
    ],
)
def test_refuses_by_name(path: tuple[str | int, ...], value: Any, names: str) -> None:
    with pytest.raises(ArtifactError) as error:
        Manifest.from_json(changed(*path, value=value))
    assert names in str(error.value)
    assert "manifest.json" in str(error.value)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_named(schema: Any) -> None:
    with pytest.raises(ArtifactError, match="schema") as error:
        Manifest.from_json(changed("schema", value=schema))
    assert error.value.hint


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": 1, "schema": 1}', b'{"schema": NaN}', b"[" * 100_000],
)
def test_refuses_what_is_no_manifest(text: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_refused_with_one_error(value: Any) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json(json.dumps({"schema": 1, "functions": value}).encode())


def decoder(**changes: Any) -> Manifest:
    k, v = BufferSpec(("batch", 2, "blocks", 8, 64), "float32"), BufferSpec(("batch", 2, "capacity", 8), "float32")
    spec = {
        "vocab_size": 10,
        "n_layers": 1,
        "caches": (CacheSpec(k, v),),
        "inputs": ("input_ids", "kv_len"),
        **changes,
    }
    array = files.ArraySpec
    inputs = (
        array("input_ids", "int64", ("batch", "seq")),
        array("kv_len", "int64", ("batch",)),
        array("k0", "float32", k.shape),
        array("v0", "float32", v.shape),
    )
    step = FunctionSpec(inputs, (), ())
    return files.manifest(functions={"step": step, "step_last": step}, decoder=DecoderSpec(**spec))


def test_decoder_round_trip() -> None:
    assert Manifest.from_json(decoder().to_json()) == decoder()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"n_layers": 2}, "n_layers"),
        ({"caches": (), "n_layers": 0}, "caches"),
        ({"inputs": ("kv_len", "input_ids")}, "decoder.inputs"),
        ({"inputs": ("input_ids", "position_ids", "kv_len")}, "functions.step.inputs"),
        (
            {"caches": (CacheSpec(BufferSpec(("batch", 2), "float32"), BufferSpec(("b", 2, "c", 8), "float32")),)},
            "5 dim",
        ),
        (
            {
                "caches": (
                    CacheSpec(
                        BufferSpec(("batch", 2, "blocks", 8, 64), "float32"),
                        BufferSpec(("batch", 3, "capacity", 8), "float32"),
                    ),
                )
            },
            "differ between k and v",
        ),
    ],
)
def test_decoder_must_fit_its_functions(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ArtifactError) as error:
        decoder(**changes).to_json()
    assert names in str(error.value)


def test_tensors_come_in_order_of_use() -> None:
    first, second = files.manifest().params["odd"], files.manifest().params["codes"]
    functions = {"main": FunctionSpec((), (), ("z", "a", "z"))}
    assert list(files.manifest(functions=functions, params={"a": first, "z": second}).tensors()) == ["t/codes", "t/odd"]
