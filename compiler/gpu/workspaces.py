"""What a PrimFunc's launches hand on to one another becomes an argument, which the virtual machine allocates as any
other tensor.

Host functions would take such memory from a pool of the thread's, which frees what is too small for the next one that
asks. Launches that are captured to be replayed need memory that stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.tvm_shim import Analyzer, IRModule, PrimFunc, relax, substitute, tirx, tvm, tvm_ffi


def lift(module: IRModule) -> IRModule:
    """The module with PrimFuncs that allocate no memory of the device outside of their kernels.

    Expects calls with explicit outputs, as CallTIRRewrite leaves them. What is called with sizes that are unknown there
    stays as it is.
    """
    functions = [func for _, func in module.functions_items() if isinstance(func, relax.Function)]
    lifted = {
        name: found
        for name, func in module.functions_items()
        if isinstance(func, PrimFunc) and (found := _Lifted.of(func)).buffers
    }
    calls: list[Any] = []
    for function in functions:
        tvm_ffi.structural_walk(function.body, (relax.Call, calls.append), order="pre")
    for call in calls:
        if call.op in lifted and lifted[call.op].shapes(call) is None:
            del lifted[call.op]
    # A global variable's type is that of its function: what takes more gets a new one.
    names = {name: relax.BlockBuilder().add_func(found.func, name.name_hint) for name, found in lifted.items()}
    caller = _Caller(lifted, names)
    changed = {}
    for name, func in module.functions_items():
        if isinstance(func, relax.Function):
            func = caller.function(func)
        changed[names.get(name, name)] = lifted[name].func if name in lifted else func
    return IRModule(changed, attrs=module.attrs, global_infos=module.global_infos)


@dataclass(frozen=True)
class _Lifted:
    """`func` takes `buffers` behind the `outer` parameters that it had, and before `scalars` integers."""

    func: PrimFunc
    outer: Sequence[Any]
    buffers: Sequence[Any]
    scalars: int

    @staticmethod
    def of(func: PrimFunc) -> _Lifted:
        buffers: list[Any] = []

        def of_statement(allocation: Any) -> Any:
            if allocation.buffer.scope() != "global":
                return allocation
            buffers.append(allocation.buffer)
            return tirx.Evaluate(0)

        def of_block(block: Any) -> Any:
            mine = [buffer for buffer in block.alloc_buffers if buffer.scope() == "global"]
            if not mine:
                return block
            buffers.extend(mine)
            rest = [buffer for buffer in block.alloc_buffers if buffer.scope() != "global"]
            kept = (block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init)
            return tvm.s_tir.SBlock(*kept, rest, block.match_buffers, block.annotations)

        names: dict[Any, Any] = {}
        tvm_ffi.structural_walk(func.body, (tirx.Bind, lambda bind: names.update({bind.var: bind.value})), order="pre")
        visits = [(tirx.AllocBuffer, of_statement), (tvm.s_tir.SBlock, of_block)]
        body = tvm_ffi.structural_map(func.body, visits, order="post")
        # A parameter's shape knows parameters alone.
        own = {b: tirx.decl_buffer([_named(d, names) for d in b.shape], b.dtype, b.name) for b in buffers}
        body = tvm_ffi.structural_map(body, (tvm.ir.Var, lambda var: own.get(var, var)), order="post")
        outer = [param for param in func.params if isinstance(param.ty, tirx.BufferType)]
        rest, found = list(func.params)[len(outer) :], list(own.values())
        return _Lifted(PrimFunc([*outer, *found, *rest], body, func.ret_type, func.attrs), outer, found, len(rest))

    def shapes(self, call: Any) -> list[list[Any]] | None:
        """Of the buffers, in the caller's terms; None where it does not know them."""
        sizes: dict[Any, Any] = {}
        for param, argument in zip(self.outer, call.args, strict=False):
            shape = getattr(argument.ty, "shape", None)
            if isinstance(shape, relax.ShapeExpr):
                sizes.update(zip(param.shape, shape.values, strict=True))
        found = [[Analyzer().simplify(substitute(d, sizes)) for d in buffer.shape] for buffer in self.buffers]
        left: list[Any] = []
        for dim in (dim for shape in found for dim in shape):
            tvm_ffi.structural_walk(dim, (tvm.ir.Var, left.append), order="pre")
        own = {dim for param in self.outer for dim in param.shape if isinstance(dim, tvm.ir.Var)}
        return None if own & set(left) else found


def _named(dim: Any, names: Mapping[Any, Any]) -> Any:
    """A dimension with the expressions that names of the body stand for in their places."""
    while True:
        used: list[Any] = []
        tvm_ffi.structural_walk(dim, (tvm.ir.Var, used.append), order="pre")
        values = {var: names[var] for var in used if var in names}
        if not values:
            return dim
        dim = substitute(dim, values)


class _Caller:
    """Rewrites functions that call lifted ones."""

    def __init__(self, lifted: Mapping[Any, _Lifted], names: Mapping[Any, Any]) -> None:
        self.lifted, self.names, self.count = lifted, names, 0
        self.builder = relax.BlockBuilder()

    def function(self, func: Any) -> Any:
        return relax.Function(func.params, self.sequence(func.body), func.ret_ty, func.is_pure, func.attrs)

    def sequence(self, body: Any) -> Any:
        blocks = [relax.BindingBlock([new for b in block.bindings for new in self.binding(b)]) for block in body.blocks]
        return relax.SeqExpr(blocks, body.body)

    def binding(self, binding: Any) -> list[Any]:
        value = binding.value
        if isinstance(value, relax.If):
            branches = map(self.sequence, (value.true_branch, value.false_branch))
            return [relax.VarBinding(binding.var, relax.If(value.cond, *branches))]
        if not (isinstance(value, relax.Call) and value.op in self.lifted):
            return [binding]
        found = self.lifted[value.op]
        allocations = [self.allocation(*pair) for pair in zip(found.shapes(value) or (), found.buffers, strict=True)]
        split = len(value.args) - (found.scalars > 0)  # integers are passed together
        arguments = [*value.args[:split], *(a.var for a in allocations), *value.args[split:]]
        call = relax.Call(self.names[value.op], arguments, value.attrs, value.ty_args)
        return [*allocations, relax.VarBinding(binding.var, call)]

    def allocation(self, shape: list[Any], buffer: Any) -> Any:
        self.count += 1
        type_ = relax.TensorType(shape, str(buffer.dtype))
        memory = relax.op.builtin.alloc_tensor(relax.ShapeExpr(shape), str(buffer.dtype), 0, "global")
        return relax.VarBinding(relax.Var(f"workspace{self.count}", type_), self.builder.normalize(memory))
