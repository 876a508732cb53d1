"""The low-bit linear layer, y = act(x W^T + bias) + residual with W kept as codes of 1, 2, 3, 4 or 8 bits.

Two compute types over one packed layout (`packing`): "a8" quantises x to int8 by row and group inside the kernel and
multiplies integers (the Q4_0 x Q8_0 scheme of llama.cpp); "a32" makes the weights float32. One kernel serves every
M: `lowbit_kernel` says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules import epilogue
from llmc.schedules.base import Arg, Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.formats import STEPS, TABLES, QuantizedWeight, random_weight, whole_table
from llmc.schedules.gemm.activations import quantize_reference
from llmc.schedules.gemm.lookup import lookup_reference, pack_lookup, representable
from llmc.schedules.gemm.lowbit_a8 import Int8Kernel
from llmc.schedules.gemm.lowbit_a32 import Float32Kernel
from llmc.schedules.gemm.lowbit_kernel import LowBitKernel, knobs
from llmc.schedules.gemm.lowbit_lookup import LookupKernel
from llmc.schedules.gemm.lowbit_tiles import Int8TileKernel
from llmc.schedules.gemm.packing import (
    LowBitLayout,
    common_zero,
    pack_codes,
    pack_weight,
    smallest_scale_dtype,
    smallest_zero_dtype,
    stored_dtype,
)
from llmc.targets.base import Target
from llmc.targets.dot import ByteDot


@dataclass(frozen=True)
class LowBitLinearWorkload(Workload):
    """x [M, K] float32 times a `QuantizedWeight` [N, K], M left to run time.

    `symmetric`: one whole zero point, `zero`, for the whole weight; else the kernel reads one for each row and group.
    group_size >= K is one scale a row. With activation silu_mul the weight's first N/2 rows are the gate, the others
    the up projection, and y has N/2 columns; else N. bias [N] is added before the activation, residual (shaped like
    y) after it. Raises KernelError for an unknown activation or compute type, and an odd N of silu_mul.
    """

    N: int
    K: int
    bits: int
    group_size: int
    symmetric: bool = True
    zero: float = 0.0
    scale_dtype: str = "float32"
    activations: str = "a8"
    bias: bool = False
    activation: str = "none"
    residual: bool = False
    zero_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.activation not in epilogue.ACTIVATIONS:
            raise KernelError(
                f"activation {self.activation!r} is unknown", hint=f"one of {', '.join(epilogue.ACTIVATIONS)}"
            )
        if self.activations not in ("a8", "a32"):
            raise KernelError(f"activations {self.activations!r} are unknown", hint="a8 or a32")
        if self.N % self.halves:
            raise KernelError(f"silu_mul needs gate and up of one size: N = {self.N} is odd")

    @classmethod
    def of(
        cls,
        weight: QuantizedWeight,
        *,
        activations: str = "a8",
        bias: bool = False,
        activation: str = "none",
        residual: bool = False,
    ) -> LowBitLinearWorkload:
        """The workload that multiplies with `weight`."""
        zero = common_zero(weight)
        return cls(
            weight.N,
            weight.K,
            weight.bits,
            weight.group_size,
            zero is not None,
            zero or 0.0,
            smallest_scale_dtype(weight.scale),
            activations,
            bias,
            activation,
            residual,
            "float32" if zero is not None else smallest_zero_dtype(weight),
        )

    @property
    def halves(self) -> int:
        """How many rows of the weight make one column of y."""
        return 2 if self.activation == "silu_mul" else 1

    @property
    def columns(self) -> int:
        """Columns of y."""
        return self.N // self.halves

    @property
    def kernel_name(self) -> str:
        return f"linear_w{self.bits}{self.activations}"

    @property
    def table(self) -> str:
        """What codes stand for, a name of TABLES; "" where they are integers."""
        return ""

    def layout(self, lanes: int) -> LowBitLayout:
        return LowBitLayout(self.N, self.K, self.bits, self.group_size, lanes, self.halves)

    def inputs(self) -> tuple[Arg, ...]:
        x, residual = Arg("x", ("M", self.K), "float32"), Arg("residual", ("M", self.columns), "float32")
        return (x, residual) if self.residual else (x,)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("y", ("M", self.columns), "float32"),)


class LowBitLinear(Template):
    """Template "lowbit". Weights in: weight, a `QuantizedWeight`; bias [N]. Packed: q, scale, (zero), (bias
    [blocks, lanes], in the order of the weight's rows).

    Knobs: rows M up to `skinny` take one pass over the packed weights with `blocks` row blocks in flight, prefetched
    `ahead_one` (M = 1) or `ahead_many` bytes before their use (0: left to the hardware). More rows use register
    blocks of MR rows by NV row blocks (with a8 on AMX, tiles: MR is 16 or 32), and threads share a panel's rows in
    spans of about `task_rows`. KU unrolls k: in quads of four for a8, in single steps of the expanded panel for a32.
    Where weights have fewer than 4 bits, `body` "lut" makes few rows look sums of activations up (`lookup`): it packs
    and rounds otherwise than "dot".
    """

    name = "lowbit"
    serves: type[LowBitLinearWorkload] = LowBitLinearWorkload

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(workload, LowBitLinearWorkload) or target.kind != "llvm":
            return False
        if type(workload) is not self.serves:
            return False
        layout = workload.layout(target.lanes)
        largest = 255 if workload.table else 2**workload.bits - 1  # of what is multiplied, as an unsigned byte
        sums_fit = workload.activations == "a32" or layout.group * 127 * largest < 2**31
        whole_zero = workload.activations == "a32" or float(workload.zero).is_integer()
        return layout.representable() and sums_fit and whole_zero

    def space(self, workload: LowBitLinearWorkload, target: Target) -> Space:
        layout = workload.layout(target.lanes)
        longest = ByteDot.longest(target, 8 if workload.table else workload.bits)
        a8 = workload.activations == "a8"
        tiles = a8 and target.tiles

        def valid(config: Config) -> bool:
            MR, NV, KU, skinny = (int(config[k]) for k in ("MR", "NV", "KU", "skinny"))
            sums = MR * NV * (2 if a8 and layout.groups > 1 else 1)
            return (
                (tiles or (sums + NV < target.vector_registers and skinny + 1 >= MR))
                and (a8 or NV % workload.halves == 0)  # an expanded panel is multiplied as a whole
                and layout.blocks % max(NV, workload.halves) == 0
                and layout.blocks % max(int(config["blocks"]), workload.halves) == 0
                and (not a8 or (KU % layout.unit_quads == 0 and longest >= KU))
            )

        known = knobs((2, 3, 4, 5, 6, 7, 8, 9), tiles)
        if workload.bits < 4 and _looks_up(workload, target):  # with 4 bits products take fewer instructions everywhere
            known |= {"body": ("dot", "lut")}
        return Space(known, valid)

    def default(self, workload: LowBitLinearWorkload, target: Target) -> dict[str, int | str]:
        layout, wide = workload.layout(target.lanes), target.vector_registers >= 32
        if workload.activations == "a32":
            MR, NV = (8, 2) if wide else (6, 2)
        elif target.tiles:
            MR, NV = 32, 2
        elif not wide:
            MR, NV = 4, 1
        elif layout.groups == 1:
            MR, NV = 8, 2
        else:  # 7 rows fit as well, with float sums across groups; but rows of a vocabulary's logits share cache sets
            MR, NV = 6, 2
        bytes_on_vnni = workload.bits == 8 and workload.activations == "a8" and target.dot == "vnni"
        default: dict[str, int | str] = {
            "MR": MR,
            "NV": NV,
            "KU": 8,
            # 8-bit codes come faster than one stream is fetched: four streams gain 15 to 20 % of a token's time.
            "blocks": 4 if bytes_on_vnni and layout.used_blocks >= 32 else 1,
            "skinny": 8,
            "ahead_one": 2048 if workload.bits == 8 else 8192,
            "ahead_many": 8192,
            "task_rows": 96,
        }
        if workload.bits < 4 and _looks_up(workload, target):
            # Measured (docs/performance.md): fewer instructions pay for the tables where many rows use them.
            narrow = workload.bits <= (1 if target.dot == "vnni" else 2)
            default["body"] = "lut" if narrow and workload.N >= 2 * workload.K else "dot"
        return default

    def prepack(
        self, weights: Mapping[str, Any], workload: LowBitLinearWorkload, config: Config, target: Target
    ) -> Arrays:
        layout = workload.layout(target.lanes)
        pack = pack_lookup if config.get("body") == "lut" else pack_codes
        dtypes = workload.scale_dtype, workload.symmetric, workload.zero_dtype
        packed = pack_weight(layout, weights["weight"], *dtypes, pack)
        if workload.bias:
            bias = layout.arrange_rows(np.asarray(weights["bias"], np.float32).reshape(-1))
            packed["bias"] = bias.reshape(layout.blocks, layout.lanes)
        return packed

    def layout(self, workload: LowBitLinearWorkload, config: Config, target: Target) -> str:
        planes = f"{workload.scale_dtype}.{workload.symmetric}.{workload.zero_dtype}"
        suffix = ".lut" if config.get("body") == "lut" else ""
        return f"{workload.layout(target.lanes).label}.{planes}{suffix}"

    def build(self, workload: LowBitLinearWorkload, target: Target, config: Config) -> Any:
        if not self.accepts(workload, target):
            raise KernelError(f"{workload.key()} is outside what the low-bit linear computes", where=target.name)
        kernel: type[LowBitKernel] = Float32Kernel
        if workload.activations == "a8":
            kernel = Int8TileKernel if target.tiles else Int8Kernel
        if config.get("body") == "lut":
            if not _looks_up(workload, target):
                raise KernelError(
                    f"{workload.key()} cannot look sums up",
                    where=target.name,
                    hint="body=lut takes int8 activations, up to 4 bits, and groups of whole 32s that divide K",
                )
            kernel = LookupKernel
        return kernel(workload, target, config).build()

    def reference(
        self, workload: LowBitLinearWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        """With a8, x is quantised as the kernel does it; all sums are float64."""
        return self._finished(workload, self._products(workload, inputs, weights["weight"]), inputs, weights)

    def arithmetic(self, workload: LowBitLinearWorkload, config: Config) -> str:
        return f"lut up to {config['skinny']} rows" if config.get("body") == "lut" else ""

    def expected(
        self,
        workload: LowBitLinearWorkload,
        config: Config,
        inputs: Mapping[str, np.ndarray],
        weights: Mapping[str, Any],
    ) -> Arrays:
        if config.get("body") != "lut" or len(inputs["x"]) > int(config["skinny"]):
            return self.reference(workload, inputs, weights)
        return self._finished(workload, lookup_reference(inputs["x"], weights["weight"]), inputs, weights)

    def _products(
        self, workload: LowBitLinearWorkload, inputs: Mapping[str, np.ndarray], weight: QuantizedWeight
    ) -> np.ndarray:
        """[M, N] float64."""
        x = inputs["x"].astype(np.float64)
        if workload.activations == "a8":
            group = workload.layout(1).group
            codes, scale = quantize_reference(inputs["x"], group)
            x = (codes * scale[..., None].astype(np.float64)).reshape(len(x), -1)[:, : workload.K]
        expand = np.ones(weight.group_size)
        scale64, zero64 = (
            np.kron(np.broadcast_to(np.asarray(v, np.float64), weight.scale.shape), expand)[:, : workload.K]
            for v in (weight.scale, weight.zero)
        )
        codes64 = np.asarray(weight.q) - zero64
        if workload.table and workload.activations == "a8":
            codes64 = (whole_table(workload.table) / STEPS[workload.table])[weight.q]
        elif workload.table:
            codes64 = np.array(TABLES[workload.table])[weight.q]
        return x @ (codes64 * scale64).T

    def _finished(
        self,
        workload: LowBitLinearWorkload,
        y: np.ndarray,
        inputs: Mapping[str, np.ndarray],
        weights: Mapping[str, Any],
    ) -> Arrays:
        if workload.bias:
            y = y + weights["bias"]
        y = epilogue.reference(workload.activation, y)
        return {"y": y + inputs["residual"] if workload.residual else y}

    def work(self, workload: LowBitLinearWorkload, dims: Mapping[str, int]) -> Work:
        M, N, K = dims["M"], workload.N, workload.K
        groups = N * -(-K // workload.group_size)
        zeros = 0 if workload.symmetric else np.dtype(workload.zero_dtype).itemsize
        planes = groups * (np.dtype(stored_dtype(workload.scale_dtype)).itemsize + zeros)
        outputs = 4 * M * workload.columns * (2 if workload.residual else 1)
        moved = N * K * workload.bits / 8 + planes + 4 * M * K + outputs
        return Work(ops=2 * M * N * K, bytes=moved, unit="dot" if workload.activations == "a8" else "fma")

    def example_weights(self, workload: LowBitLinearWorkload, rng: np.random.Generator) -> dict[str, Any]:
        w = workload
        zero = w.zero if w.symmetric else None
        weight = random_weight(rng, (w.N, w.K), w.bits, w.group_size, zero, w.scale_dtype, w.zero_dtype)
        return {"weight": weight, "bias": rng.standard_normal(w.N, np.float32)}


@dataclass(frozen=True)
class TableLinearWorkload(LowBitLinearWorkload):
    """A linear whose 4-bit codes stand for the values of a table: `values` is its name in TABLES.

    A class of its own, so that the keys of all other low-bit workloads stay what they were.
    """

    values: str = "nf4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values not in TABLES:
            raise KernelError(f"there is no table '{self.values}'", hint=f"one of {', '.join(TABLES)}")
        if self.bits != 4 or not self.symmetric or self.zero:
            raise KernelError("codes that stand for a table's values have 4 bits and no zero point")

    @classmethod
    def of(cls, weight: QuantizedWeight, **epilogue_: Any) -> TableLinearWorkload:
        scale_dtype = smallest_scale_dtype(weight.scale)
        return cls(weight.N, weight.K, 4, weight.group_size, scale_dtype=scale_dtype, values=weight.table, **epilogue_)

    @property
    def table(self) -> str:
        return self.values

    @property
    def kernel_name(self) -> str:
        return f"linear_{self.values}{self.activations}"


class TableLinear(LowBitLinear):
    """Template "table": `LowBitLinear` for codes that stand for the values of a table (METHODS of FLUTE and Ladder:
    storage and compute types are separate). One shuffle in a register looks up all codes of a line."""

    name = "table"
    serves = TableLinearWorkload

    def example_weights(self, workload: Any, rng: np.random.Generator) -> dict[str, Any]:
        weights = super().example_weights(workload, rng)
        return weights | {"weight": replace(weights["weight"], table=workload.values)}


def _looks_up(workload: LowBitLinearWorkload, target: Target) -> bool:
    """Can few rows be multiplied by tables of sums?"""
    plain = type(workload) is LowBitLinearWorkload and workload.activations == "a8" and not target.tiles
    return plain and representable(workload.layout(target.lanes))


LOWBIT, TABLE = LowBitLinear(), TableLinear()
