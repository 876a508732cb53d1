"""NVIDIA's runtime compiler as a function: CUDA C in, a cubin and PTX out. It runs on any machine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

# TVM's sources include these two headers of libcu++, 10 MB more to install, for the names below.
_HEADERS = {
    "cuda/std/cstdint": """#pragma once
namespace cuda { namespace std {
using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long;
using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned int;
using uint64_t = unsigned long;
} }
""",
    "cuda/std/type_traits": """#pragma once
namespace cuda { namespace std {
template <bool B> struct bool_constant { static constexpr bool value = B; };
template <class T> struct remove_cv { using type = T; };
template <class T> struct remove_cv<const T> { using type = T; };
template <class A, class B> inline constexpr bool is_same_v = false;
template <class A> inline constexpr bool is_same_v<A, A> = true;
template <class A, class B> struct is_same : bool_constant<is_same_v<A, B>> {};
template <class T> struct is_floating_point : bool_constant<is_same_v<T, float> || is_same_v<T, double>> {};
template <class T> struct is_signed : bool_constant<(T(-1) < T(0))> {};
template <class T> struct is_unsigned : bool_constant<!is_signed<T>::value> {};
template <class T> struct is_integral : bool_constant<!is_floating_point<T>::value> {};
template <bool, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
} }
""",
}


class CompileError(Exception):
    """The compiler's own message."""


@cache
def version(library: Path) -> str:
    """The compiler's, as 13.5."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _load(library).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile(library: Path, source: str, options: Sequence[str]) -> tuple[bytes, bytes, str]:
    """(cubin, PTX, log) of `source`, compiled by the libnvrtc at `library`. Raises CompileError."""
    nvrtc = _load(library)
    program = ctypes.c_void_p()
    names, bodies = ([text.encode() for text in texts] for texts in (_HEADERS.keys(), _HEADERS.values()))
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernel.cu", len(names), _strings(bodies), _strings(names)
    )
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), _strings([option.encode() for option in options]))
        log = _output(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise CompileError(log.strip() or f"nvrtc's error {failed}")
        return _output(nvrtc, program, "CUBIN"), _output(nvrtc, program, "PTX"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _load(library: Path) -> Any:
    return ctypes.CDLL(str(library))


def _strings(texts: Sequence[bytes]) -> Any:
    return (ctypes.c_char_p * len(texts))(*texts)


def _output(nvrtc: Any, program: ctypes.c_void_p, kind: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
    return buffer.raw
