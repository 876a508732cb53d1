"""All templates by name, each with the class of its workloads: for what reads kernels back from files."""

from __future__ import annotations

from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.cuda_append import CUDA_KV_APPEND
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Template, Workload
from llmc.schedules.conv.conv import CONV
from llmc.schedules.conv.integer import INTEGER_CONV, IntegerConvWorkload
from llmc.schedules.conv.window import WINDOW
from llmc.schedules.conv.workloads import ConvWorkload, WindowWorkload
from llmc.schedules.embedding.cuda import CUDA_EMBEDDING, CUDA_LOWBIT_EMBEDDING
from llmc.schedules.embedding.dense import EMBEDDING_DENSE, EmbeddingDenseWorkload
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING, LowBitEmbeddingWorkload
from llmc.schedules.gemm.bf16 import BF16, Bf16LinearWorkload
from llmc.schedules.gemm.cuda import CUDA_LINEAR, CUDA_LOWBIT, CUDA_TABLE
from llmc.schedules.gemm.cuda_f16 import MMA_F16
from llmc.schedules.gemm.cuda_fp8 import MMA_FP8, MMA_FP8_F16
from llmc.schedules.gemm.cuda_mma import MMA_BF16, MMA_INT8, MMA_LOWBIT, HalfLinearWorkload
from llmc.schedules.gemm.cuda_outliers import MMA_OUTLIERS, HalfOutlierLinearWorkload
from llmc.schedules.gemm.cuda_tables import MMA_INT8_TABLE, MMA_TABLE, HalfTableLinearWorkload
from llmc.schedules.gemm.cuda_wgmma import WGMMA_BF16, WGMMA_F16, WGMMA_FP8, WGMMA_LOWBIT
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.f16 import F16, F16LinearWorkload
from llmc.schedules.gemm.fp8 import Fp8LinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, TABLE, LowBitLinearWorkload, TableLinearWorkload
from llmc.schedules.gemm.outliers import OUTLIERS, OutlierLinearWorkload
from llmc.schedules.norm.cuda import CUDA_NORM
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.schedules.recurrent.cuda import CUDA_RECURRENT
from llmc.schedules.recurrent.recurrent import RECURRENT
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.schedules.sampling.cuda import CUDA_SAMPLE
from llmc.schedules.sampling.sample import SampleWorkload

FAMILIES: dict[str, tuple[Template, type[Workload]]] = {
    template.name: (template, workload)
    for template, workload in (
        (ATTENTION, AttentionWorkload),
        (KV_APPEND, KVAppendWorkload),
        (CONV, ConvWorkload),
        (INTEGER_CONV, IntegerConvWorkload),
        (WINDOW, WindowWorkload),
        (EMBEDDING_DENSE, EmbeddingDenseWorkload),
        (LOWBIT_EMBEDDING, LowBitEmbeddingWorkload),
        (DENSE, DenseLinearWorkload),
        (BF16, Bf16LinearWorkload),
        (F16, F16LinearWorkload),
        (LOWBIT, LowBitLinearWorkload),
        (TABLE, TableLinearWorkload),
        (OUTLIERS, OutlierLinearWorkload),
        (NORM, NormWorkload),
        (RECURRENT, RecurrentWorkload),
        (CUDA_ATTENTION, AttentionWorkload),
        (CUDA_KV_APPEND, KVAppendWorkload),
        (CUDA_EMBEDDING, EmbeddingDenseWorkload),
        (CUDA_LOWBIT_EMBEDDING, LowBitEmbeddingWorkload),
        (CUDA_LINEAR, DenseLinearWorkload),
        (CUDA_LOWBIT, LowBitLinearWorkload),
        (CUDA_TABLE, TableLinearWorkload),
        (MMA_LOWBIT, HalfLinearWorkload),
        (MMA_INT8, LowBitLinearWorkload),
        (MMA_BF16, Bf16LinearWorkload),
        (MMA_TABLE, HalfTableLinearWorkload),
        (MMA_INT8_TABLE, TableLinearWorkload),
        (MMA_OUTLIERS, HalfOutlierLinearWorkload),
        (MMA_F16, F16LinearWorkload),
        (WGMMA_LOWBIT, HalfLinearWorkload),
        (WGMMA_BF16, Bf16LinearWorkload),
        (WGMMA_F16, F16LinearWorkload),
        (WGMMA_FP8, Fp8LinearWorkload),
        (MMA_FP8, Fp8LinearWorkload),
        (MMA_FP8_F16, Fp8LinearWorkload),
        (CUDA_NORM, NormWorkload),
        (CUDA_SAMPLE, SampleWorkload),
        (CUDA_RECURRENT, RecurrentWorkload),
    )
}
