"""The formats of a rounded cache, in numpy: what rounding loses, and how codes lie in memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llmc.errors import KernelError, OptionError
from llmc.schedules.attention import e4m3
from llmc.schedules.attention.kv_format import FORMATS, dequantise, pack, quantise, resolve_kv_cache, unpack
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.attention.reference import pack_cache, unpack_cache
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload

HEAD_DIMS = (1, 2, 7, 31, 32, 33, 40, 64, 80, 128)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_an_error_is_at_most_half_a_step(name: str, head_dim: int, size: float) -> None:
    format = FORMATS[name]
    rng = np.random.default_rng(head_dim)
    x = (rng.standard_normal((50, head_dim)) * size + 0.3 * size).astype(np.float32)
    codes, planes = quantise(x, format)
    assert codes.min() >= format.lowest and codes.max() <= format.highest
    errors = np.abs(dequantise(codes, planes, format) - x)
    for dims, scale, low in format.plane_rows(head_dim, values=False):
        step = planes[:, scale, None].astype(np.float64)
        # float16 holds a minimum, and with it the range, to 11 bits, and no finer than 6e-8.
        coarse = 0 if low < 0 else np.abs(planes[:, low, None].astype(np.float64)) * 2.0**-10 + 1e-7
        if format.floats:  # steps are an eighth of a number's power of two, and 2**-9 at least
            step = np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(x), 1e-30) / step) - 3), 2.0**-9) * step
        assert (errors[:, dims.start : dims.stop] <= 0.5001 * step + coarse).all()


def test_codes_of_e4m3() -> None:
    """All of them, and the middles between them: as ml_dtypes has them."""
    codes = np.delete(np.arange(256, dtype=np.uint8), (127, 255))  # which are no numbers
    numbers = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(e4m3.widened_array(codes.view(np.int8)), numbers)
    up = np.sort(numbers)
    for x in (up, (up[1:] + up[:-1]) / 2, np.nextafter(up, np.float32(0)) * np.float32(1.01)):
        x = np.clip(x, -448, 448)
        expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(e4m3.widened_array(e4m3.rounded_array(x)), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
def test_constant_vectors_are_exact(name: str, value: float) -> None:
    x = np.full((3, 40), value, np.float32)
    np.testing.assert_allclose(dequantise(*quantise(x, FORMATS[name]), FORMATS[name]), x, rtol=1e-7)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("values", [False, True])
def test_packed_and_unpacked(name: str, values: bool) -> None:
    format, rng = FORMATS[name], np.random.default_rng(0)
    codes, planes = quantise(rng.standard_normal((2, 3, 2 * BLOCK, 7), np.float32), format)
    packed, half = pack_cache(codes, planes, format, values)
    narrow = BLOCK // format.per_byte
    assert packed.shape == (2, 3, 2, *((narrow, 7) if values else (7, narrow)))
    both = np.concatenate([half, half], axis=3)
    for got, want in zip(unpack_cache(packed, both, format, values), (codes, planes), strict=True):
        np.testing.assert_array_equal(got, want)


def test_two_tokens_share_a_byte() -> None:
    """Token j lies in the low half, token j + 32 in the high one."""
    codes = np.arange(64, dtype=np.uint8)[:, None] % 16
    codes[32:] = 15 - codes[32:]
    packed = pack(codes, FORMATS["int4"])
    np.testing.assert_array_equal(packed[:, 0], [j % 16 | (15 - j % 16) << 4 for j in range(32)])
    np.testing.assert_array_equal(unpack(packed, FORMATS["int4"]), codes)


@pytest.mark.parametrize(("name", "head_dim", "bits"), [("int8", 64, 8.5), ("int4", 64, 5), ("int4", 128, 5)])
def test_bits_of_a_number(name: str, head_dim: int, bits: float) -> None:
    """With scales; as docs say them."""
    inputs = AttentionWorkload(1, 1, head_dim, 1.0, kv_cache=FORMATS[name].name).inputs()
    sizes = [np.prod(a.shape[3:]) * np.dtype(a.dtype).itemsize for a in inputs if a.name in ("kp", "v", "planes")]
    assert 8 * sum(sizes) / (2 * BLOCK * head_dim) == bits


def test_records_of_float32_caches_keep_their_keys() -> None:
    """They were written before caches had formats."""
    assert "kv_cache" not in AttentionWorkload(4, 2, 32, 0.25).key() + KVAppendWorkload(4, 2, 32).key()
    assert ",kv_cache=int8," in AttentionWorkload(4, 2, 32, 0.25, kv_cache="int8").key()


def test_refusals() -> None:
    assert resolve_kv_cache("int8") == "int8"
    with pytest.raises(OptionError, match="no cache format 'fp9'") as error:
        resolve_kv_cache("fp9")
    assert error.value.hint and "float32, int8, fp8, int4" in error.value.hint
    with pytest.raises(KernelError, match="in place only"):
        KVAppendWorkload(4, 2, 32, kv_cache="int8", past=True)
