"""Running an artifact: needs numpy, tvm_ffi and TVM's small runtime library, never the compiler."""

from llmc.runtime.generate import Generation, generate
from llmc.runtime.generations import Generations, generate_all
from llmc.runtime.load import load
from llmc.runtime.model import Model
from llmc.runtime.session import Session

__all__ = ["Generation", "Generations", "Model", "Session", "generate", "generate_all", "load"]
