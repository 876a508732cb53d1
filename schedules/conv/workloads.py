"""What convolutions compute, on images [B, H, W, C]: neighbouring channels are neighbours in memory."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.errors import KernelError
from llmc.schedules import epilogue
from llmc.schedules.base import Arg, Workload

KINDS = ("depthwise", "max", "average")


@dataclass(frozen=True)
class ConvWorkload(Workload):
    """y = activation(conv(x) + bias + residual), float32, no padding: x [B, H, W, C] is padded already.

    The weight is [N, C / groups, KH, KW] as ONNX has it; y is [B, OH, OW, N] with OH = (H - DH (KH - 1) - 1) / SH + 1,
    rounded down. H and W are 0 where they are left to run time, as B always is. Strides S, dilations D. residual has
    the shape of y.
    """

    C: int
    N: int
    KH: int = 1
    KW: int = 1
    SH: int = 1
    SW: int = 1
    DH: int = 1
    DW: int = 1
    groups: int = 1
    H: int = 0
    W: int = 0
    bias: bool = False
    activation: str = "none"
    residual: bool = False

    def __post_init__(self) -> None:
        _known(self)
        if self.groups < 1 or self.C % self.groups or self.N % self.groups:
            raise KernelError(f"{self.C} channels and {self.N} outputs do not divide into {self.groups} groups")
        if (self.H and self.OH < 1) or (self.W and self.OW < 1):
            raise KernelError(f"no window fits into an image of {self.H} x {self.W}")

    @property
    def K(self) -> int:
        """Terms of one sum."""
        return self.C // self.groups * self.KH * self.KW

    @property
    def OH(self) -> int:
        """Rows of the output; 0 where they are left to run time."""
        return _out(self.H, self.KH, self.SH, self.DH)

    @property
    def OW(self) -> int:
        """Columns of the output; 0 where they are left to run time."""
        return _out(self.W, self.KW, self.SW, self.DW)

    def inputs(self) -> tuple[Arg, ...]:
        x = Arg("x", ("B", self.H or "H", self.W or "W", self.C), "float32")
        return (x, Arg("residual", self._out_shape(), "float32")) if self.residual else (x,)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("y", self._out_shape(), "float32"),)

    def sizes(self, B: int, OH: int, OW: int) -> dict[str, int]:
        """The symbols of this workload, for B images of OH x OW pixels of output where that is left to run time."""
        H, W = ((out - 1) * s + span for out, s, span in zip((OH, OW), (self.SH, self.SW), _spans(self), strict=True))
        return _symbols(self, {"B": B, "H": H, "W": W, "OH": OH, "OW": OW})

    def _out_shape(self) -> tuple[int | str, ...]:
        return "B", self.OH or "OH", self.OW or "OW", self.N


@dataclass(frozen=True)
class WindowWorkload(Workload):
    """Each channel for itself, float32: a depthwise convolution, or the maximum or mean of each window.

    x [B, H, W, C], y [B, OH, OW, C]; 0 where a size is left to run time. Windows may hang over the edges: `top` and
    `left` are the padding before x, and what lies behind it follows from OH and OW. Places outside count as 0; for max
    and average they do not count, unless `count_pad`, which divides by KH KW always. The depthwise weight is
    [C, 1, KH, KW]; bias and activation come after the window.
    """

    C: int
    KH: int
    KW: int
    kind: str = "depthwise"
    SH: int = 1
    SW: int = 1
    DH: int = 1
    DW: int = 1
    top: int = 0
    left: int = 0
    H: int = 0
    W: int = 0
    OH: int = 0
    OW: int = 0
    bias: bool = False
    activation: str = "none"
    count_pad: bool = False

    def __post_init__(self) -> None:
        _known(self)
        if self.kind not in KINDS:
            raise KernelError(f"window {self.kind!r} is unknown", hint=f"one of {', '.join(KINDS)}")

    def inputs(self) -> tuple[Arg, ...]:
        return (Arg("x", ("B", self.H or "H", self.W or "W", self.C), "float32"),)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("y", ("B", self.OH or "OH", self.OW or "OW", self.C), "float32"),)

    def sizes(self, B: int, OH: int, OW: int) -> dict[str, int]:
        """The symbols of this workload, for B images of about OH x OW pixels of output where that is left to run time,
        and as much padding behind x as before it."""
        spans, pads, strides = _spans(self), (self.top, self.left), (self.SH, self.SW)
        H, W = (max(1, (out - 1) * s + k - 2 * p) for out, s, k, p in zip((OH, OW), strides, spans, pads, strict=True))
        OH, OW = self.out(self.H or H, self.W or W)
        return _symbols(self, {"B": B, "H": H, "W": W, "OH": OH, "OW": OW})

    def out(self, H: int, W: int) -> tuple[int, int]:
        """Rows and columns of y for x [B, H, W, C]: where they are left to run time, with as much padding behind x as
        before it."""
        parts = zip((H, W), _spans(self), (self.top, self.left), (self.SH, self.SW), strict=True)
        OH, OW = ((size + 2 * pad - span) // stride + 1 for size, span, pad, stride in parts)
        return self.OH or OH, self.OW or OW


def _known(w: ConvWorkload | WindowWorkload) -> None:
    if w.activation not in epilogue.SINGLE:
        raise KernelError(f"activation {w.activation!r} is unknown", hint=f"one of {', '.join(epilogue.SINGLE)}")
    if min(w.KH, w.KW, w.SH, w.SW, w.DH, w.DW) < 1:
        raise KernelError("taps, strides and dilations are at least 1")


def _spans(w: ConvWorkload | WindowWorkload) -> tuple[int, int]:
    """Rows and columns from a window's first tap to its last."""
    return (w.KH - 1) * w.DH + 1, (w.KW - 1) * w.DW + 1


def _symbols(w: ConvWorkload | WindowWorkload, values: dict[str, int]) -> dict[str, int]:
    names = {d for arg in (*w.inputs(), *w.outputs()) for d in arg.shape if isinstance(d, str)}
    return {name: value for name, value in values.items() if name in names}


def _out(size: int, taps: int, stride: int, dilation: int) -> int:
    return (size - (taps - 1) * dilation - 1) // stride + 1 if size else 0
