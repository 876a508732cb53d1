"""The fuse stage: a decoder layer becomes a handful of big operators. One rewrite a file; the order stands here.

Norms first (they are leaves of every later pattern); rope before attention, which takes it in; attention before the
linear merge, because only attention knows that three linears are one QKV; epilogues last, when every linear has its
final place.
"""

from __future__ import annotations

from llmc.fuse.activation import fuse_activations
from llmc.fuse.attention import fuse_attention
from llmc.fuse.contrib import fuse_contrib
from llmc.fuse.epilogue import fuse_epilogues
from llmc.fuse.kv_cache import Decoder, decoder_of
from llmc.fuse.merge import merge_linears
from llmc.fuse.norm import fuse_norms
from llmc.fuse.rope import fuse_rope
from llmc.graph import Graph

__all__ = ["Decoder", "decoder_of", "fuse"]

REWRITES = (fuse_norms, fuse_rope, fuse_contrib, fuse_attention, fuse_activations, merge_linears, fuse_epilogues)


def fuse(graph: Graph) -> Graph:
    """Big operators wherever a pattern matches; everything else is left to its own rule."""
    for rewrite in REWRITES:
        graph = rewrite(graph)
    return graph
