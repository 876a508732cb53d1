"""The fuse stage: a decoder layer becomes a handful of big operators. One rewrite a file; the order stands here.

What changes nothing is dropped before all. Norms first (they are leaves of every later pattern); rope before attention,
which takes it in; attention before the linear merge, because only attention knows that three linears are one QKV;
channels go last when activations have names and batch norms are gone; epilogues at the end, when every layer has its
final place.
"""

from __future__ import annotations

from llmc.fuse.activation import fuse_activations
from llmc.fuse.attention import fuse_attention
from llmc.fuse.batch_norm import fuse_batch_norms
from llmc.fuse.channels_last import fuse_channels_last
from llmc.fuse.contrib import fuse_contrib
from llmc.fuse.epilogue import fuse_epilogues
from llmc.fuse.kv_cache import Decoder, decoder_of
from llmc.fuse.merge import merge_linears
from llmc.fuse.no_ops import drop_no_ops
from llmc.fuse.norm import fuse_norms
from llmc.fuse.recurrent import fuse_recurrent
from llmc.fuse.rope import fuse_rope
from llmc.fuse.sampler import sampler_of
from llmc.graph import Graph, with_bodies

__all__ = ["Decoder", "decoder_of", "fuse", "sampler_of"]

REWRITES = (
    drop_no_ops,
    *(fuse_recurrent, fuse_norms, fuse_rope, fuse_contrib, fuse_attention, fuse_activations, merge_linears),
    *(fuse_batch_norms, fuse_channels_last, fuse_epilogues),
)


def fuse(graph: Graph, channels_last: bool = True) -> Graph:
    """Big operators wherever a pattern matches; everything else is left to its own rule.

    `channels_last` is for targets whose kernels take images so; a rule would turn them back for each convolution.
    """
    for rewrite in REWRITES:
        if channels_last or rewrite is not fuse_channels_last:
            graph = rewrite(graph)
    return with_bodies(graph, lambda body: fuse(body, channels_last))
