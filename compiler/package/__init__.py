"""The `.llmc` file: what it says about itself (manifest), how it is written (archive) and how it is trusted (reader).

The reader needs the standard library alone: inspecting an artifact loads no code, no numpy and no TVM.
"""
