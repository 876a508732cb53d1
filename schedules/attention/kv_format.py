"""How a session's cache stores keys and values: the formats behind `--kv-cache`, and the layout of rounded ones.

A token's key of one head, and its value, are codes: x ≈ code * scale + low, low being 0 in symmetric formats. Scales
belong to a token: it is rounded once, when it enters, and never again, so that going back, and any way of cutting a
text into calls, give the same cache.

Keys could also be rounded by channel over a block of 64 tokens (KIVI, Liu et al., 2024), with the newest tokens kept in
float32 until their block is full. In 8 bits that gains nothing: SmolLM2-135M's perplexity on 1,024 tokens is 46.39 with
a float32 cache, 46.55 with keys by token and 46.35 with keys by channel, which its own rounding of activations drowns.
In 4 bits it would: 48.77 with groups of 32 dimensions as here (48.16 with 16, 50.14 with whole heads), 46.80 by
channel. Where 4 bits cost too much, take 8.

E4M3 loses more than int8 in the same bytes: of SmolLM2-135M's keys and values on 512 tokens it leaves 33.6 and 32.4 dB,
int8 39.4 and 42.9 dB; E4M3 without scales, which could overflow, would leave 31.7 and 31.5 dB. It is there for models
and tools that expect it.

Rounded caches lie in blocks of 64 tokens: keys [B, KV, CB, D, 64/n], values [B, KV, CB, 64/n, D] with n codes a byte,
token j of a block in the low half and token j + 32 in the high half; and planes [B, KV, CB, rows, 64], of each token
the scales (and lows) of its key and its value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from llmc.errors import OptionError
from llmc.schedules.attention import e4m3
from llmc.schedules.attention.layout import BLOCK

KVCache = Literal["float32", "int8", "fp8", "int4"]


@dataclass(frozen=True)
class KVFormat:
    """A rounded cache. `group` dimensions of a head share a scale, 0: all of them; `planes` is the scales' dtype; with
    `floats` codes are numbers of `e4m3`, otherwise integers."""

    name: KVCache
    bits: int
    group: int
    symmetric: bool
    planes: str
    description: str
    floats: bool = False

    @property
    def dtype(self) -> str:
        return "int8" if self.symmetric else "uint8"

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def lowest(self) -> int:
        return -self.highest if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest that a code stands for, before it is scaled."""
        if self.floats:
            return e4m3.LARGEST
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def groups(self, head_dim: int) -> list[range]:
        """The dimensions of each group; the last may be shorter."""
        size = self.group or head_dim
        return [range(c, min(c + size, head_dim)) for c in range(0, head_dim, size)]

    def rows(self, head_dim: int) -> int:
        """Rows of planes: of the keys' groups the scales (each followed by the lows), then of the values'."""
        return 2 * len(self.groups(head_dim)) * (1 if self.symmetric else 2)

    def plane_rows(self, head_dim: int, values: bool) -> Iterator[tuple[range, int, int]]:
        """(dimensions, row of the scale, row of the low or -1) of each group of the keys, or of the values."""
        each = 1 if self.symmetric else 2
        first = self.rows(head_dim) // 2 if values else 0
        for g, dims in enumerate(self.groups(head_dim)):
            row = first + g * each
            yield dims, row, -1 if self.symmetric else row + 1

    def shapes(self, head_dim: int) -> dict[str, tuple[int, ...]]:
        """What follows [B, KV, CB] in the shapes of keys, values and planes."""
        narrow = BLOCK // self.per_byte
        return {"kp": (head_dim, narrow), "v": (narrow, head_dim), "planes": (self.rows(head_dim), BLOCK)}


FORMATS: dict[str, KVFormat] = {
    f.name: f
    for f in (
        KVFormat("int8", 8, 0, True, "float32", "8 bits, symmetric, a scale for each token and head"),
        KVFormat("fp8", 8, 0, True, "float32", "8 bits, E4M3, a scale for each token and head", floats=True),
        KVFormat("int4", 4, 32, False, "float16", "4 bits, a scale and a minimum for each token and 32 dimensions"),
    )
}


def resolve_cache(text: str) -> tuple[KVCache, bool]:
    """What `--kv-cache` says: a format, `paged`, or both with a comma; without a format float32. Raises OptionError."""
    format, *rest = [word for word in text.split(",") if word != "paged"] or ["float32"]
    paged = text.split(",").count("paged")
    if rest or paged > 1:
        raise OptionError(f"'{text}' says too much", where="--kv-cache", hint="a format, paged, or both: int8,paged")
    return resolve_kv_cache(format), paged == 1


def resolve_kv_cache(name: str) -> KVCache:
    """The format of that name. Raises OptionError if there is none."""
    for known in get_args(KVCache):
        if name == known:
            return known  # type: ignore[no-any-return]
    known = ", ".join(get_args(KVCache))
    raise OptionError(f"there is no cache format '{name}'", where="--kv-cache", hint=f"one of: {known}, paged")


def quantise(x: np.ndarray, format: KVFormat) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., D] of float32 x [..., D], and their planes [..., rows / 2].

    In float32 and in the kernel's order of operations, so that codes are equal and not merely near.
    """
    x = x.astype(np.float32)
    codes = np.zeros(x.shape, format.dtype)
    planes = np.zeros((*x.shape[:-1], format.rows(x.shape[-1]) // 2), format.planes)
    for dims, scale_row, low_row in format.plane_rows(x.shape[-1], values=False):
        part = x[..., dims.start : dims.stop]
        low = np.zeros(part.shape[:-1], np.float32)
        if format.symmetric:
            reach = np.abs(part).max(-1)
        else:
            planes[..., low_row] = part.min(-1)
            low = planes[..., low_row].astype(np.float32)
            reach = part.max(-1) - low
        planes[..., scale_row] = reach / np.float32(format.highest)
        scale = planes[..., scale_row].astype(np.float32)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        scaled = (part - low[..., None]) * inverse[..., None]
        scaled = np.clip(scaled if format.floats else np.rint(scaled), format.lowest, format.highest)
        codes[..., dims.start : dims.stop] = e4m3.rounded_array(scaled) if format.floats else scaled
    return codes, planes


def dequantise(codes: np.ndarray, planes: np.ndarray, format: KVFormat) -> np.ndarray:
    """float64 [..., D] of codes [..., D] and planes [..., rows / 2]."""
    x = (e4m3.widened_array(codes) if format.floats else codes).astype(np.float64)
    for dims, scale_row, low_row in format.plane_rows(codes.shape[-1], values=False):
        part = x[..., dims.start : dims.stop]
        part *= planes[..., scale_row, None].astype(np.float64)
        if not format.symmetric:
            part += planes[..., low_row, None].astype(np.float64)
    return x


def pack(codes: np.ndarray, format: KVFormat) -> np.ndarray:
    """[..., 64, D] codes of a block, one a byte -> [..., 64/n, D], n a byte."""
    if format.per_byte == 1:
        return codes
    low, high = np.split(codes, 2, axis=-2)
    return np.asarray(low | high << 4)


def unpack(packed: np.ndarray, format: KVFormat) -> np.ndarray:
    """The inverse of `pack`."""
    return packed if format.per_byte == 1 else np.concatenate([packed & 15, packed >> 4], axis=-2)
