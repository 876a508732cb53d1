"""Round to nearest, and which format each weight gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import OptionError
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.quantize import quantize
from llmc.quantize.formats import FORMATS, resolve_format
from llmc.quantize.rtn import round_to_nearest, round_to_range, round_to_table
from llmc.schedules.formats import TABLES, QuantizedWeight
from llmc.schedules.gemm.packing import smallest_scale_dtype, smallest_zero_dtype
from tests.graphs import Decoder, Shape


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 130),
    st.sampled_from([3, 4, 8]),
    st.sampled_from([0, 32, 64]),
    st.integers(0, 2**32 - 1),
)
def test_error_is_at_most_half_a_step(N: int, K: int, bits: int, group: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)
    weight[0, :] *= 0  # a group of zeros must stay zeros
    rounded = round_to_nearest(weight, bits, group)
    step = np.abs(np.repeat(rounded.scale, rounded.group_size, axis=1)[:, :K])
    error = np.abs(rounded.dequantize() - weight)
    # 4 bits and fewer: the code +8 does not exist, so the value opposite to the largest one may be a whole step away.
    assert np.all(error <= step * (1.0 if bits < 8 else 0.5) * 1.001 + 1e-7)
    assert np.all(rounded.dequantize()[0] == 0)
    assert rounded.q.max(initial=0) < 2**bits


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 130),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([0, 32, 64]),
    st.integers(0, 2**32 - 1),
)
def test_asymmetric_codes_are_within_half_a_step(N: int, K: int, bits: int, group: int, seed: int) -> None:
    """Of a range that is exact up to float16: where the whole group lies far from zero, too."""
    weight = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)
    weight[0, :] = 0
    weight[-1, :] += 3
    rounded = round_to_range(weight, bits, group)
    step, least = (np.repeat(v, rounded.group_size, axis=1)[:, :K] for v in (rounded.scale, rounded.zero))
    half_digits = 2**-11 * (np.abs(least * step) + step * 2**bits)  # of the minimum and of the largest code's value
    assert np.all(np.abs(rounded.dequantize() - weight) <= 0.5 * step * 1.001 + half_digits + 1e-7)
    assert rounded.q.max(initial=0) < 2**bits
    assert smallest_scale_dtype(rounded.scale) == smallest_zero_dtype(rounded) == "float16"


def test_a_group_of_one_value_is_that_value() -> None:
    weight = np.full((4, 64), [[-0.375], [0], [2.5], [1]], np.float32)
    np.testing.assert_array_equal(round_to_range(weight, 4, 32).dequantize(), weight)


def test_largest_value_is_exact_in_four_bits_up_to_the_scale() -> None:
    """The scale is a float16: half a unit in its last place is 2**-11."""
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    rounded = round_to_nearest(weight, 4, 32)
    largest = np.abs(weight).reshape(8, 2, 32).argmax(-1)
    groups = rounded.dequantize().reshape(8, 2, 32)
    picked = np.take_along_axis(groups, largest[..., None], -1)
    expected = np.take_along_axis(weight.reshape(8, 2, 32), largest[..., None], -1)
    np.testing.assert_allclose(picked, expected, rtol=2**-11)


def test_scales_are_float16_where_they_fit_one() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    for factor, half in ((1, True), (1e-7, False), (1e4, True)):
        scale = round_to_nearest(weight * np.float32(factor), 4, 32).scale
        assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale) == half


@pytest.mark.parametrize("table", TABLES)
def test_codes_of_tables_are_the_nearest(table: str) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    weight[2, 32:64] = 0
    rounded = round_to_table(weight, table, 32)
    values = np.array(TABLES[table], np.float32)
    scale = np.repeat(rounded.scale, 32, axis=1)[:, :70]
    best = np.abs(values[:, None, None] * scale - weight).min(0)
    np.testing.assert_allclose(np.abs(rounded.dequantize() - weight), best, atol=1e-6)


def test_mx_scales_are_powers_of_two() -> None:
    """As the OCP's specification has it: the largest element is in [4, 8) steps, of which 6 is the last."""
    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    rounded = round_to_table(weight, "fp4", 32, powers=True)
    assert np.array_equal(np.exp2(np.round(np.log2(rounded.scale))), rounded.scale)
    largest = np.abs(weight).reshape(16, 2, 32).max(-1) / rounded.scale
    assert largest.min() >= 4 and largest.max() < 8
    assert np.abs(rounded.dequantize() - weight).max() <= 2 * rounded.scale.max()


def weights(graph: Graph) -> dict[str, QuantizedWeight]:
    return {k: v for k, v in graph.constants.items() if isinstance(v, QuantizedWeight)}


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.bits < 16])
def test_the_output_layer_stays_eight_bit(tmp_path: Path, name: str) -> None:
    path = Decoder(Shape(hidden=64, inner=128, vocab=300)).plain(tmp_path / "m.onnx")
    format = resolve_format(name)
    assert format is not None
    graph = quantize(import_model(path), format)
    head = next(n for n in graph.nodes if n.outputs[0] == "logits")
    assert graph.constants[head.inputs[1]].bits == 8
    lookup = next(n for n in graph.nodes if n.op == "Embedding")
    assert lookup.inputs[0] == head.inputs[1], "a tied table is stored once"
    others = [w for k, w in weights(graph).items() if k != head.inputs[1]]
    assert others and all(w.bits == format.bits for w in others)
    assert all(w.group_size == (format.group_size or w.K) for w in others)


def test_the_output_layer_has_four_bits_when_asked(tmp_path: Path) -> None:
    path = Decoder(Shape(hidden=64, inner=128, vocab=300)).plain(tmp_path / "m.onnx")
    graph = quantize(import_model(path), resolve_format("w4a8-g32-head4"))
    assert {w.bits for w in weights(graph).values()} == {4}


def test_formats_of_rows_and_ranges(tmp_path: Path) -> None:
    path = Decoder(Shape(hidden=64, inner=128, vocab=300)).plain(tmp_path / "m.onnx")
    rows = weights(quantize(import_model(path), resolve_format("w4a8-row")))
    assert all(w.scale.shape == (w.N, 1) for w in rows.values())
    ranges = weights(quantize(import_model(path), resolve_format("w3a8-asym-head4")))
    assert {(w.bits, w.symmetric) for w in ranges.values()} == {(3, False), (4, False)}
    plain_head = weights(quantize(import_model(path), resolve_format("w4a16-g64-asym")))
    assert {(w.bits, w.symmetric) for w in plain_head.values()} == {(4, False), (8, True)}
    with pytest.raises(OptionError, match="can be asymmetric"):
        resolve_format("w8a8-asym")


def test_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match="w4a8-g32"):
        resolve_format("w5a5")
