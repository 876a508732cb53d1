"""Numbers and names on which the writer and the reader of an artifact agree."""

from __future__ import annotations

MANIFEST = "manifest.json"
LIBRARY = "lib.so"
WEIGHTS = "weights.safetensors"
RUNTIME = ("runtime/libtvm_ffi.so", "runtime/libtvm_runtime.so")

ENTRY_ALIGN = 4096  # a page: entries can be mapped on their own
TENSOR_ALIGN = 64  # a cache line and the widest vector: kernels read weights with aligned loads
PIECE = 16 << 20  # hashes are taken over pieces of this many bytes, so that all cores can verify one large entry
MAX_MANIFEST = 64 << 20  # a hostile file must not make the reader allocate more than this for JSON
MAX_HEADER = 64 << 20

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


def up_to(position: int, alignment: int) -> int:
    """Bytes from `position` to the next multiple of `alignment`."""
    return -position % alignment


def safe_name(name: str) -> bool:
    """Is `name` a plain relative path, which cannot leave the folder that it is unpacked into on any system?"""
    parts = name.split("/")
    plain = name.isascii() and name.isprintable() and not set(name) & set('\\:*?"<>|')
    return plain and len(name) < 256 and all(part not in ("", ".", "..") for part in parts)
