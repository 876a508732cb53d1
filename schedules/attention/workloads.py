"""What the attention kernels compute: the tuning keys, and the signatures."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.errors import KernelError
from llmc.schedules.attention.kv_format import FORMATS, KVCache
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.base import Arg, Workload

F32 = "float32"
MOST_DRAFTED = 64  # tokens of a tree: bits of its masks
# Fields that came later than the first records, and their defaults.
_YOUNGER = {
    "kv_cache": "float32",
    "paged": False,
    "alibi": False,
    "sinks": 0,
    "prefix": False,
    "documents": False,
    "tree": False,
    "bf16": False,
    "f16": False,
}


@dataclass(frozen=True)
class _OnCache(Workload):
    """What works on a cache, of float32 or rounded (`kv_format`)."""

    def key(self) -> str:
        """Without the fields of `_YOUNGER` that have their default: so it stood in records before there were such."""
        fields = ",".join(f"{k}={v}" for k, v in sorted(vars(self).items()) if k not in _YOUNGER or v != _YOUNGER[k])
        return f"{type(self).__name__}({fields})"


def cache_arguments(
    kv_cache: KVCache, KV: int, D: int, blocks: str, length: str, paged: bool = False
) -> tuple[Arg, ...]:
    """The buffers of a cache of KV heads of D dimensions; `blocks` and `length` name its symbolic dimensions.

    A paged one has pages, of a block each, in place of sequences and their blocks: kp [pages, KV, D, 64] and so on.
    """
    if paged:
        rows = cache_arguments(kv_cache, KV, D, blocks, length)
        values = rows[1].shape[2:] if kv_cache != "float32" else (blocks, BLOCK, D)
        pages = [("pages", KV, *shape[1:]) for shape in (rows[0].shape[2:], values, *(a.shape[2:] for a in rows[2:]))]
        return tuple(Arg(a.name, shape, a.dtype, cold=True) for a, shape in zip(rows, pages, strict=True))
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
    written. So does a `paged` cache: table [B, CB] int32 names the page that holds each block of a sequence.
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
    paged: bool = False

    def __post_init__(self) -> None:
        if self.kv_cache != "float32" and not self.in_place:
            raise KernelError(f"a cache in {self.kv_cache} is appended to in place only")
        if self.paged and not self.in_place:
            raise KernelError("a paged cache is appended to in place only")
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
        args = list(cache_arguments(self.kv_cache, KV, D, "CB", "C", self.paged)) if self.in_place else []
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
        if self.paged:
            args.append(Arg("table", ("B", "CB"), "int32"))
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
    [B|1, H|1, S|1, T], full where `bias_batch`, `bias_heads`, `bias_rows`; with `alibi` slopes [H]; with `prefix`
    prefix_len [B] int64; with `documents` documents [B, T] int64; with `tree` tree [B, S] uint64. Output:
    out [B, S, H*D].

    Query row i of batch b stands at position kv_len[b]-S+i. It sees keys j < kv_len[b]; if `causal` only those up to
    its position, and with `prefix` also those before prefix_len[b]; with `window` w only those after position - w, and
    the first `sinks` ones; with `documents` only those whose number in documents is that of its own position. Keys at T
    and beyond are not seen. softcap c turns a scaled score x into c*tanh(x/c) before biases are added. `alibi` adds
    slopes[h] * (j - position) to the score of key j. A row that sees no key, or only keys whose score is below -1e30
    (a bias of -inf, or of the lowest float), gives zeros.

    With `bf16` both products may round their operands to bfloat16, with `f16` to float16: for models that round
    activations anyway.

    With `tree` the S <= 64 new keys are nodes of a tree of drafts: row i sees all older keys, and of the new ones the
    j-th where bit j of tree[b, i] is set. Positions are those of a line, which the nodes of a tree are not: what
    depends on them (window, prefix, alibi) does not go with it.

    With `paged` table [B, CB] int32 follows kv_len: the page of each block, in caches as `cache_arguments` has them;
    and shared [1] int64: how many leading blocks of all sequences are the same pages, all of whose keys every query
    sees. Decoding may read those once for all.

    Raises KernelError where the fields contradict each other.
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
    alibi: bool = False
    sinks: int = 0
    prefix: bool = False
    documents: bool = False
    tree: bool = False
    paged: bool = False
    bf16: bool = False
    f16: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise KernelError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads equally")
        if self.sinks and not self.window:
            raise KernelError("without a window all keys are seen, sinks or not", hint="give the window's size, too")
        if self.prefix and (self.window or not self.causal):
            raise KernelError("a prefix is what a causal mask without a window leaves visible")
        if self.bf16 and self.f16:
            raise KernelError("products round to bfloat16 or to float16, not to both")
        if self.tree and (self.window or self.prefix or self.alibi or self.documents or not self.causal):
            raise KernelError(
                "a tree takes the place of the causal mask; window, prefix, alibi and documents go by positions",
                hint="leave them out, or causal as it is",
            )

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.n_heads // self.n_kv_heads

    @property
    def rounds(self) -> bool:
        """May products round their operands to 16 bits?"""
        return self.bf16 or self.f16

    @property
    def sharable(self) -> bool:
        """May all sequences attend leading blocks at once? Scores must not depend on who asks, or from where."""
        by_place = self.window or self.alibi or self.documents or self.key_bias or self.bias
        return self.paged and not by_place

    @property
    def ordered(self) -> bool:
        """Does a query see no key beyond its position, but for a prefix?"""
        return self.causal and not self.tree

    def inputs(self) -> tuple[Arg, ...]:
        H, KV, D = self.n_heads, self.n_kv_heads, self.head_dim
        args = [
            Arg("q", ("B", "S", (H + 2 * KV) * D if self.q_packed else H * D), F32),
            *cache_arguments(self.kv_cache, KV, D, "CB", "C", self.paged),
            Arg("kv_len", ("B",), "int64"),
        ]
        if self.paged:
            args += [Arg("table", ("B", "CB"), "int32"), Arg("shared", (1,), "int64")]
        if self.key_bias:
            args.append(Arg("key_bias", ("B", "T"), F32))
        if self.bias:
            dims: tuple[int | str, ...] = ("B", H, "S")
            full = (self.bias_batch, self.bias_heads, self.bias_rows)
            lead = [dim if f else 1 for dim, f in zip(dims, full, strict=True)]
            args.append(Arg("bias", (*lead, "T"), F32))
        if self.alibi:
            args.append(Arg("slopes", (H,), F32))
        if self.prefix:
            args.append(Arg("prefix_len", ("B",), "int64"))
        if self.documents:
            args.append(Arg("documents", ("B", "T"), "int64"))
        if self.tree:
            args.append(Arg("tree", ("B", "S"), "uint64"))
        return tuple(args)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("out", ("B", "S", self.n_heads * self.head_dim), F32),)
