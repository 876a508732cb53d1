"""x86-64 CPUs. Cache sizes are those of common server and laptop cores; `native` replaces them with this machine's."""

from __future__ import annotations

import dataclasses

from llmc.targets.base import Target

AVX2 = Target(
    name="x86-avx2",
    kind="llvm",
    mcpu="x86-64-v3",
    mattr=(),
    lanes=8,
    vector_registers=16,
    dot="maddubs",
    requires=("avx2", "fma", "f16c"),
    l1_bytes=32 << 10,
    l2_bytes=512 << 10,
    l3_bytes=16 << 20,
    description="AVX2 and FMA: Intel since Haswell, AMD since Zen",
)

AVX_VNNI = dataclasses.replace(
    AVX2,
    name="x86-avxvnni",
    mattr=("+avxvnni",),
    dot="vnni",
    requires=(*AVX2.requires, "avx_vnni"),
    l1_bytes=48 << 10,
    l2_bytes=1280 << 10,
    description="AVX2 with VNNI: Intel's laptops and desktops since Alder Lake, AMD since Zen 5",
)

AVX512 = Target(
    name="x86-avx512",
    kind="llvm",
    mcpu="cascadelake",
    mattr=(),
    lanes=16,
    vector_registers=32,
    dot="vnni",
    requires=("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni"),
    l1_bytes=32 << 10,
    l2_bytes=1 << 20,
    l3_bytes=32 << 20,
    description="AVX-512 with VNNI: Intel since Cascade Lake, AMD since Zen 4",
)

AMX = dataclasses.replace(
    AVX512,
    name="x86-amx",
    mattr=("+amx-tile", "+amx-int8", "+amx-bf16"),
    requires=(*AVX512.requires, "amx_tile", "amx_int8", "amx_bf16"),
    l1_bytes=48 << 10,
    l2_bytes=2 << 20,
    description="AVX-512 with VNNI and AMX: Intel since Sapphire Rapids",
    tiles=True,
)

TARGETS = {t.name: t for t in (AVX2, AVX_VNNI, AVX512, AMX)}
