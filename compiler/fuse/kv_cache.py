"""The session's forms of a decoder: past/present pairs become caches that the session owns and kernels write in place.

`step` computes the logits of every position, `step_last` of the last one only, `decode` of a single token of
one sequence. All take kv_len [B]: how many tokens each cache holds after the step. A session never pads, so the padding
mask is gone, and with it the mask input. Caches are float32, or rounded (`schedules.attention.kv_format`). Paged, they
are pools of pages of a block each: the functions then take block_table [B, blocks], the page of each block, and
shared_blocks [1], how many leading ones all sequences share.

`verify`, which exists where it is asked for, is `step` for new tokens that are nodes of a tree of drafts: it takes
tree [B, S], of each the bits of the new ones that it sees ("SpecInfer", Miao et al., 2024; "Medusa", Cai et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmc.errors import OptionError
from llmc.fuse.build import MASK_INPUTS
from llmc.fuse.ends import wide_ends
from llmc.graph import LLMC, Dim, Editor, Graph, Node, TensorType, as_dim, graphs, prune, same_dim
from llmc.schedules.attention.kv_format import KVCache
from llmc.schedules.attention.workloads import cache_arguments
from llmc.tvm_shim import Analyzer, substitute, tirx

POSITIONS, KV_LEN = "position_ids", "kv_len"
TABLE, SHARED = "block_table", "shared_blocks"
TREE = "tree"
_KINDS = ("k_cache", "v_cache", "kv_planes")


@dataclass(frozen=True)
class Decoder:
    """The session functions of a decoder, and what the session must know of them."""

    functions: Mapping[str, Graph]
    caches: tuple[tuple[str, ...], ...]  # names of each layer's key and value cache, and of its scales where rounded
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    kv_cache: KVCache
    paged: bool

    def __str__(self) -> str:
        return "\n".join(map(str, self.functions.values()))


def decoder_of(
    graph: Graph, kv_cache: KVCache = "float32", paged: bool = False, draft_trees: bool = False
) -> Decoder | None:
    """Session functions of a fused decoder, whose caches hold `kv_cache`; None where the graph is none.

    Raises OptionError where the decoder cannot read the trees that `draft_trees` asks for.
    """
    graph = wide_ends(graph)
    layers = [n for n in graph.nodes if n.op == "Attention" and n.domain == LLMC]
    pasts = {name for n in layers for name in n.inputs[3:5]}
    logits = [o for o in graph.outputs if o not in {p for n in layers for p in n.outputs[1:]}]
    ids = [i for i in graph.inputs if i not in pasts and graph.types[i].dtype == "int64"]
    if len(list(graphs(graph))) > 1:  # what a single token fixes is not fixed in the bodies of control flow
        return None
    if not layers or not pasts <= set(graph.inputs) or len(logits) != 1 or "input_ids" not in ids:
        return None
    step, caches = _with_caches(graph, layers, logits[0], kv_cache, paged)
    known = {"input_ids", POSITIONS, KV_LEN, TABLE, SHARED, *(name for pair in caches for name in pair)}
    if not set(step.inputs) <= known:
        return None
    vocab = graph.types[logits[0]].shape[-1]
    attrs = layers[0].attrs
    functions = {"step": step, "step_last": _last_only(step, logits[0]), "decode": _single(step)}
    if draft_trees:
        functions["verify"] = _of_trees(step, caches)
    return Decoder(functions, caches, attrs["n_kv_heads"], attrs["head_dim"], int(vocab), kv_cache, paged)


def _with_caches(
    graph: Graph, layers: list[Node], logits: str, kv_cache: KVCache, paged: bool
) -> tuple[Graph, tuple[tuple[str, ...], ...]]:
    B, S = graph.types["input_ids"].shape
    symbols = {"B": B} | {name: tirx.Var(name, "int64") for name in ("blocks", "capacity", "pages")}
    edit = Editor(replace(graph, outputs=(logits,)))
    edit.types[KV_LEN] = TensorType((B,), "int64")
    table = (TABLE, SHARED) if paged else ()
    if paged:
        edit.types[TABLE] = TensorType((B, symbols["blocks"]), "int32")
        edit.types[SHARED] = TensorType((1,), "int64")
    caches = []
    for i, node in enumerate(layers):
        KV, D = node.attrs["n_kv_heads"], node.attrs["head_dim"]
        names = []
        for kind, arg in zip(_KINDS, cache_arguments(kv_cache, KV, D, "blocks", "capacity", paged), strict=False):
            names.append(f"{kind}.{i}")
            shape = tuple(symbols[d] if isinstance(d, str) else d for d in arg.shape)
            edit.types[names[-1]] = TensorType(shape, arg.dtype)
        caches.append(tuple(names))
        scales = names[2:] or [""]
        inputs = (*node.inputs[:3], *names[:2], *node.inputs[5:7], KV_LEN, "", node.inputs[9], *scales, *table)
        if any(node.inputs[MASK_INPUTS]):
            inputs += (*[""] * (MASK_INPUTS.start - len(inputs)), *node.inputs[MASK_INPUTS])
        edit.remove(node)
        attrs = {**node.attrs, "in_place": True, "kv_cache": kv_cache, "paged": paged}
        edit.add(replace(node, inputs=inputs, outputs=(node.outputs[0], "", ""), attrs=attrs))
    for node in list(edit.nodes.values()):
        if node.op == "Positions" and node.domain == LLMC and same_dim(node.attrs["length"], S):
            edit.types[POSITIONS] = TensorType((B, S), "int64")
            edit.replace_uses(node.outputs[0], POSITIONS)
    step = edit.finish()
    read = {i for n in step.nodes for i in n.inputs}
    kept = [i for i in ("input_ids", POSITIONS) if i in read]
    flat = [name for pair in caches for name in pair]
    step = replace(step, name="step", inputs=(*kept, KV_LEN, *table, *flat))
    extra = [i for i in graph.inputs if i in read and i not in step.inputs]
    return replace(step, inputs=(*step.inputs, *extra)), tuple(caches)


def _last_only(step: Graph, logits: str) -> Graph:
    """The same, but the output layer and the norm before it see only the last position."""
    edit = Editor(step)
    head = edit.producer[logits]
    S: Dim = step.types["input_ids"].shape[1]
    if head.op != "Linear" or head.domain != LLMC or not same_dim(step.types[head.inputs[0]].shape[1], S):
        return replace(step, name="step_last")
    norm = edit.producer.get(head.inputs[0])
    chain = [head]
    if norm is not None and norm.op == "Norm" and norm.domain == LLMC and not norm.inputs[3]:
        chain.append(norm)
    source = chain[-1].inputs[0]
    last = edit.fresh(f"{source}.last")
    values = {"starts": [-1], "ends": [np.iinfo(np.int64).max], "axes": [1]}
    operands = [edit.constant(f"{last}.{k}", np.array(v, np.int64)) for k, v in values.items()]
    B, _, width = edit.types[source].shape
    edit.add(Node("Slice", (source, *operands), (last,), version=13), [TensorType((B, 1, width), "float32")])
    for node in chain[::-1]:
        edit.remove(node)
        name = node.outputs[0] if node is head else edit.fresh(f"{node.outputs[0]}.last")
        width = edit.types[node.outputs[0]].shape[-1]
        edit.add(replace(node, inputs=(last, *node.inputs[1:]), outputs=(name, *node.outputs[1:])))
        edit.types[name] = TensorType((B, 1, width), "float32")
        last = name
    return prune(replace(edit.finish(), name="step_last"))


def _of_trees(step: Graph, caches: tuple[tuple[str, ...], ...]) -> Graph:
    """The same for nodes of a tree. A node's place among the keys says nothing of its position, so that what goes by
    places cannot stay: windows, and whatever biases and masks a model adds to the causal one."""
    for node in (n for n in step.nodes if n.op == "Attention" and n.domain == LLMC):
        if not node.attrs["causal"] or node.attrs["window"] or any((*node.inputs[8:10], *node.inputs[MASK_INPUTS])):
            raise OptionError(
                f"attention {node.name or node.outputs[0]!r} is masked or biased by where keys stand, "
                "and nodes of a tree stand in no order",
                where="--draft-trees",
                hint="leave the option out: plain causal attention alone can read trees",
            )

    def on_tree(node: Node) -> Node:
        if node.op != "Attention" or node.domain != LLMC:
            return node
        return replace(node, inputs=(*node.inputs, *[""] * (MASK_INPUTS.stop - 1 - len(node.inputs)), TREE))

    B, S = step.types["input_ids"].shape
    first = step.inputs.index(caches[0][0])
    inputs = (*step.inputs[:first], TREE, *step.inputs[first:])
    types = {**step.types, TREE: TensorType((B, S), "uint64")}
    return replace(step, name="verify", inputs=inputs, nodes=tuple(map(on_tree, step.nodes)), types=types)


def _single(step: Graph) -> Graph:
    """The same for one token of one sequence. With every size but the cache's known, no shape is computed at run time,
    and intermediate values can live in memory that the session owns."""
    batch, seq = step.types["input_ids"].shape
    ones = {dim: 1 for dim in (batch, seq) if not isinstance(dim, int)}

    def fixed(dim: Dim) -> Dim:
        return dim if isinstance(dim, int) else as_dim(Analyzer().simplify(substitute(dim, ones)))

    def fixed_node(node: Node) -> Node:
        if node.op == "Lengths" and node.domain == LLMC:
            return replace(node, attrs={name: fixed(d) for name, d in node.attrs.items()})
        if node.op != "ShapeValue":
            return node
        value = np.empty_like(node.attrs["value"])
        value.reshape(-1)[:] = [fixed(d) for d in node.attrs["value"].reshape(-1)]
        return replace(node, attrs={"value": value})

    types = {name: TensorType(tuple(map(fixed, t.shape)), t.dtype) for name, t in step.types.items()}
    return replace(step, name="decode", nodes=tuple(map(fixed_node, step.nodes)), types=types)
