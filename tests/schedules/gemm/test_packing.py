"""The packed layout of low-bit weights: where each code lies, and that nothing is lost."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import KernelError
from llmc.schedules.gemm.packing import (
    LowBitLayout,
    common_zero,
    pack_codes,
    pack_plane,
    pack_weight,
    smallest_scale_dtype,
    smallest_zero_dtype,
    unpack_codes,
    unpack_plane,
)
from tests.schedules.weights import random_weight


@st.composite
def layouts(draw: st.DrawFn) -> LowBitLayout:
    halves = draw(st.sampled_from([1, 2]))
    N = halves * draw(st.integers(1, 70))
    bits = draw(st.sampled_from([1, 2, 3, 4, 8]))
    shortest = [16] if bits in (2, 4, 8) else []
    K, group_size = draw(st.integers(1, 200)), draw(st.sampled_from([*shortest, 32, 64, 128, 1000]))
    return LowBitLayout(N, K, bits, group_size, draw(st.sampled_from([8, 16])), halves)


@settings(max_examples=80, deadline=None)
@given(layouts(), st.integers(0, 2**32 - 1))
def test_codes_and_planes_come_back(layout: LowBitLayout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert layout.representable()
    codes = rng.integers(0, 2**layout.bits, (layout.N, layout.K), np.uint8)
    q = pack_codes(layout, codes)
    assert q.shape == layout.q_shape and q.dtype == np.uint8 and q.nbytes % 64 == 0 and q.flags.c_contiguous
    np.testing.assert_array_equal(unpack_codes(layout, q), codes)

    values = rng.standard_normal((layout.N, layout.groups), np.float32)
    plane = pack_plane(layout, values)
    assert plane.shape == layout.plane_shape and plane.nbytes % 64 == 0
    np.testing.assert_array_equal(unpack_plane(layout, plane), values)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 2**32 - 1), st.data())
def test_each_code_lies_where_the_layout_says(layout: LowBitLayout, seed: int, data: st.DataObject) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**layout.bits, (layout.N, layout.K), np.uint8)
    q = pack_codes(layout, codes)
    n, k = data.draw(st.integers(0, layout.N - 1)), data.draw(st.integers(0, layout.K - 1))
    half, row = divmod(n, layout.N // layout.halves)
    block = row // layout.lanes * layout.halves + half
    g, quad = k // layout.group, k % layout.group // 4
    unit, p = divmod(quad, layout.unit_quads)
    lines = q[block, g, unit * layout.unit_lines :, row % layout.lanes * 4 + k % 4]
    if layout.bits == 3:  # two codes in each of three bytes, and two more in the bits that are left
        A, B, C = (int(line) for line in lines[:3])
        unpacked = [A >> 2, A >> 5, B >> 2, B >> 5, C, C >> 3, A % 4 + C // 64 % 2 * 4, B % 4 + C // 128 * 4]
        assert unpacked[p] % 8 == codes[n, k]
    else:
        assert lines[0] >> layout.bits * p & 2**layout.bits - 1 == codes[n, k]


def test_padding_is_zero() -> None:
    layout = LowBitLayout(17, 33, 4, 32, 16)
    q = pack_codes(layout, np.full((17, 33), 15, np.uint8))
    assert int(np.unpackbits(q).sum()) == 17 * 33 * 4
    assert np.count_nonzero(pack_plane(layout, np.ones((17, 2), np.float32))) == 17 * 2


def test_zero_plane_only_where_groups_differ() -> None:
    rng = np.random.default_rng(0)
    layout = LowBitLayout(40, 64, 4, 32, 16)
    for zero, whole in ((8.0, 8.0), (7.5, None), ("whole", None), ("fractional", None)):
        weight = random_weight(rng, 40, 64, 4, 32, zero)
        assert common_zero(weight) == whole
        planes = pack_weight(layout, weight, "float32", whole is not None)
        assert list(planes) == (["q", "scale"] if whole is not None else ["q", "scale", "zero"])
        if whole is None:
            np.testing.assert_allclose(unpack_plane(layout, planes["zero"]), -weight.zero * weight.scale, rtol=1e-6)


def test_half_scales_only_where_exact() -> None:
    exact = np.array([[0.5, 0.25]], np.float32)
    assert smallest_scale_dtype(exact) == "float16"
    assert smallest_scale_dtype(exact + np.float32(1e-5)) == "float32"
    assert smallest_scale_dtype(np.array([[1e9]], np.float32)) == "float32"
    assert smallest_scale_dtype(np.array([[2.0**40, 1.5 * 2.0**-40]], np.float32)) == "bfloat16"
    layout = LowBitLayout(1, 64, 4, 32, 16)
    assert pack_plane(layout, exact, "float16").dtype == np.float16
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(KernelError, match=f"not exactly representable as {dtype}"):
            pack_plane(layout, exact + np.float32(1e-5), dtype)


def test_half_zeros_only_within_the_rounding_of_their_product() -> None:
    rng = np.random.default_rng(1)
    minimum, whole = (random_weight(rng, 40, 64, 4, 32, zero) for zero in ("minimum", "fractional"))
    assert (smallest_zero_dtype(minimum), smallest_zero_dtype(whole)) == ("float16", "float32")
    layout = LowBitLayout(40, 64, 4, 32, 16)
    plane = unpack_plane(layout, pack_weight(layout, minimum, "float32", False, "float16")["zero"])
    np.testing.assert_allclose(plane.astype(np.float32), -minimum.zero * minimum.scale, rtol=2.0**-22)
    with pytest.raises(KernelError, match="not exactly representable"):
        pack_weight(layout, whole, "float32", False, "float16")


def test_refuses_what_it_cannot_hold() -> None:
    assert not LowBitLayout(16, 64, 5, 32, 16).representable()
    assert not LowBitLayout(16, 64, 3, 48, 16).representable()
    assert not LowBitLayout(16, 64, 4, 20, 16).representable()
    assert not LowBitLayout(15, 64, 4, 32, 16, halves=2).representable()
    with pytest.raises(KernelError, match="do not fit"):
        pack_codes(LowBitLayout(16, 64, 4, 32, 16), np.zeros((16, 63), np.uint8))


def test_packing_is_fast() -> None:
    """A 135 million weight model packs in about two seconds: here a fiftieth of it, with room for a busy machine."""
    weight = random_weight(np.random.default_rng(0), 4608, 576, 4, 32, 8.0)
    layout = LowBitLayout(weight.N, weight.K, 4, 32, 16)
    start = time.process_time()
    pack_weight(layout, weight, "float32", symmetric=True)
    assert time.process_time() - start < 0.4
