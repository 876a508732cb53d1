"""Numbers and names on which the writer and the reader of an artifact agree."""

from __future__ import annotations

import math

MANIFEST = "manifest.json"
LIBRARY = "lib.so"
WEIGHTS = "weights.safetensors"
DEVICE = "cuda"  # NAME.cu and NAME.bin of every kernel for a GPU: CUDA C, and the module that the runtime loads
DEVICE_KERNELS = f"{DEVICE}/kernels.json"  # what is known of them
RUNTIME = ("runtime/libtvm_ffi.so", "runtime/libtvm_runtime.so")
RUNTIME_CUDA = "runtime/libtvm_runtime_cuda.so"  # beside them, in an artifact for a GPU

ENTRY_ALIGN = 4096  # a page: entries can be mapped on their own
TENSOR_ALIGN = 64  # a cache line and the widest vector: kernels read weights with aligned loads
PIECE = 16 << 20  # hashes are taken over pieces of this many bytes, so that all cores can verify one large entry
MAX_JSON = 8 << 20  # bytes of the manifest and of the weights' header; parsed they take up to 20 times as much
MAX_RANK = 32
MAX_BYTES = 1 << 40  # of one tensor, and of one function's working memory

# dtype as NumPy and TVM spell it → (safetensors' code, bytes of one element)
DTYPES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "float32": ("F32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float64": ("F64", 8),
}

# Inputs and outputs may have these too, of which compiled code knows the bits alone: a uint8 for each element.
CARRIED = frozenset(
    {
        *("int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    }
)


def array_bytes(shape: tuple[int, ...], dtype: str) -> int | None:
    """Bytes of an array; None where no array has that shape, a zero among its dimensions or not."""
    if len(shape) > MAX_RANK or any(not 0 <= dim <= MAX_BYTES for dim in shape):
        return None
    itemsize = DTYPES[dtype][1]
    possible = math.prod(max(dim, 1) for dim in shape) * itemsize <= MAX_BYTES
    return math.prod(shape) * itemsize if possible else None


def up_to(position: int, alignment: int) -> int:
    """Bytes from `position` to the next multiple of `alignment`."""
    return -position % alignment


def safe_name(name: str) -> bool:
    """Is `name` a plain relative path, which cannot leave the folder that it is unpacked into on any system?"""
    parts = name.split("/")
    plain = name.isascii() and name.isprintable() and not set(name) & set('\\:*?"<>|')
    return plain and len(name) < 256 and all(part not in ("", ".", "..") for part in parts)
