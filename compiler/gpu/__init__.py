"""Device code for NVIDIA GPUs: lowered, compiled and described without a GPU or its driver (docs/cuda.md)."""
