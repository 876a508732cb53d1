"""What the attention kernels compute: the tuning keys, and the signatures."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.errors import KernelError
from llmc.schedules.attention.kv_format import FORMATS, KVCache
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.base import Arg, Workload

F32 = "float32"


@dataclass(frozen=True)
class _OnCache(Workload):
    """What works on a cache, of float32 or rounded (`kv_format`)."""

    def key(self) -> str:
        """Without the cache's format where that is float32: so it stood in records before there were others."""
        return super().key().replace("kv_cache=float32,", "")


def cache_arguments(kv_cache: KVCache, KV: int, D: int, blocks: str, length: str) -> tuple[Arg, ...]:
    """The buffers of a cache of KV heads of D dimensions; `blocks` and `length` name its symbolic dimensions."""
    if kv_cache == "float32":
        return Arg("kp", ("B", KV, blocks, D, BLOCK), F32, cold=True), Arg("v", ("B", KV, length, D), F32, cold=True)
    format = FORMATS[kv_cache]
    shapes = format.shapes(D)
    dtypes = {"kp": format.dtype, "v": format.dtype, "planes": format.planes}
    return tuple(Arg(name, ("B", KV, blocks, *shape), dtypes[name], cold=True) for name, shape in shapes.items())


@dataclass(frozen=True)
class KVAppendWorkload(_OnCache):
    """Rotate queries and keys, and put keys and values where attention reads them.

    Inputs: qkv [B, S, (H+2KV)*D] if `packed_qkv`, else q [B, S, H*D] (only with rope), k and v [B, S, KV*D]; with
    `rope` cos and sin [B, S, rotary_dim/2]. Functional form: with `past`, past_k and past_v [B, KV, P, D]; outputs
    kp [B, KV, blocks = ceil((P+S)/64), D, 64] zero-padded, v [B, KV, total = P+S, D] (which is also present_v), with
    `present` also present_k [B, KV, total, D]. In place: kp [B, KV, CB, D, 64] and v [B, KV, CB*64, D] come first
    among the inputs and are written; kv_len [B] int64 counts the tokens after this append, token i goes to position
    kv_len[b]-S+i, tokens whose position is negative (left padding) are dropped.

    Output q [B, S, H*D] exists with `rope` only: without it queries stay as they are, and attention reads them where
    they lie (AttentionWorkload.q_packed). `rotary_dim` is how many leading dimensions of a head rotate, 0 for all;
    `interleaved` rotates pairs (2i, 2i+1) instead of (i, i + rotary_dim/2).

    Another `kv_cache` than float32 exists in place only: kp, v and planes as `kv_format` says come first and are
    written.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    packed_qkv: bool = True
    rope: bool = True
    interleaved: bool = False
    past: bool = False
    in_place: bool = False
    present: bool = False
    rotary_dim: int = 0
    kv_cache: KVCache = "float32"

    def __post_init__(self) -> None:
        if self.kv_cache != "float32" and not self.in_place:
            raise KernelError(f"a cache in {self.kv_cache} is appended to in place only")
        if self.in_place and (self.past or self.present):
            raise KernelError("an in-place append has no past and no present: the cache is both")
        if self.rotary % 2 or self.rotary > self.head_dim:
            raise KernelError(f"rotary_dim {self.rotary} must be even and at most head_dim {self.head_dim}")

    @property
    def rotary(self) -> int:
        """Dimensions of a head that rotate."""
        return (self.rotary_dim or self.head_dim) if self.rope else 0

    def inputs(self) -> tuple[Arg, ...]:
        H, KV, D = self.n_heads, self.n_kv_heads, self.head_dim
        args = list(cache_arguments(self.kv_cache, KV, D, "CB", "C")) if self.in_place else []
        if self.packed_qkv:
            args.append(Arg("qkv", ("B", "S", (H + 2 * KV) * D), F32))
        else:
            args += [Arg("q_in", ("B", "S", H * D), F32)] if self.rope else []
            args += [Arg(name, ("B", "S", KV * D), F32) for name in ("k_in", "v_in")]
        if self.rope:
            args += [Arg(name, ("B", "S", self.rotary // 2), F32) for name in ("cos", "sin")]
        if self.past:
            args += [Arg(name, ("B", KV, "P", D), F32) for name in ("past_k", "past_v")]
        if self.in_place:
            args.append(Arg("kv_len", ("B",), "int64"))
        return tuple(args)

    def outputs(self) -> tuple[Arg, ...]:
        args = [Arg("q", ("B", "S", self.n_heads * self.head_dim), F32)] if self.rope else []
        if not self.in_place:
            args += cache_arguments(self.kv_cache, self.n_kv_heads, self.head_dim, "blocks", "total")
        if self.present:
            args.append(Arg("present_k", ("B", self.n_kv_heads, "total", self.head_dim), F32))
        return tuple(args)


@dataclass(frozen=True)
class AttentionWorkload(_OnCache):
    """out = softmax(scale * q k^T, softcapped, + biases, masked) v, over a packed key cache.

    Inputs: q [B, S, H*D], or with `q_packed` qkv [B, S, (H+2KV)*D] of which the first H*D columns are read;
    kp [B, KV, CB, D, 64] and v [B, KV, C, D], or kp, v and planes as `kv_format` says for another `kv_cache` than
    float32; kv_len [B] int64; with `key_bias` key_bias [B, T]; with `bias` bias
    [B|1, H|1, S|1, T], full where `bias_batch`, `bias_heads`, `bias_rows`. Output: out [B, S, H*D].

    Query row i of batch b stands at position kv_len[b]-S+i. It sees keys j < kv_len[b]; if `causal` only those up to
    its position; with `window` w only those after position - w. Keys at T and beyond are not seen. softcap c turns a
    scaled score x into c*tanh(x/c) before biases are added. A row that sees no key, or only keys whose score is below
    -1e30 (a bias of -inf, or of the lowest float), gives zeros.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    key_bias: bool = False
    bias: bool = False
    bias_batch: bool = False
    bias_heads: bool = False
    bias_rows: bool = False
    q_packed: bool = False
    kv_cache: KVCache = "float32"

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise KernelError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads equally")

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.n_heads // self.n_kv_heads

    def inputs(self) -> tuple[Arg, ...]:
        H, KV, D = self.n_heads, self.n_kv_heads, self.head_dim
        args = [
            Arg("q", ("B", "S", (H + 2 * KV) * D if self.q_packed else H * D), F32),
            *cache_arguments(self.kv_cache, KV, D, "CB", "C"),
            Arg("kv_len", ("B",), "int64"),
        ]
        if self.key_bias:
            args.append(Arg("key_bias", ("B", "T"), F32))
        if self.bias:
            dims: tuple[int | str, ...] = ("B", H, "S")
            full = (self.bias_batch, self.bias_heads, self.bias_rows)
            lead = [dim if f else 1 for dim, f in zip(dims, full, strict=True)]
            args.append(Arg("bias", (*lead, "T"), F32))
        return tuple(args)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("out", ("B", "S", self.n_heads * self.head_dim), F32),)
