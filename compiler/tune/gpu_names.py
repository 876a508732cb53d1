"""Names of functions that TVM's runtime finds in the process that has the GPU."""

FLUSH = "llmc.tune.flush"  # evicts the second-level cache: TVM's evaluator calls it before each call that it times
LOAD = "llmc.tune.load"  # an uploaded library with its kernels
