"""Memory for the intermediate values of a function whose sizes are all known, handed in by the caller.

Allocating a tensor, making its shape and dropping it again costs the virtual machine three instructions for every
kernel, a third of a small model's time per token. In a function with fixed sizes they always come out the same: so the
memory that Relax planned becomes further parameters, which a session allocates once. Nothing but kernel calls is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.tvm_shim import IRModule, relax, tirx


@dataclass(frozen=True)
class Workspace:
    """A parameter after the weights: a tensor of this shape and dtype, `offset` bytes into storage number `storage`.

    Tensors of one storage share its memory: values that are never alive together.
    """

    storage: int
    offset: int
    shape: tuple[int, ...]
    dtype: str


def hoist(module: IRModule, name: str) -> tuple[Workspace, ...]:
    """Makes the function `name` of `module` take its memory as parameters, and return only its first result.

    Expects explicit allocations of constant size, as LowerAllocTensor leaves them.
    """
    function = module[name]
    hoisted = _Hoist()
    bindings = [
        new for block in function.body.blocks for b in block.bindings if (new := hoisted.binding(b)) is not None
    ]
    result = hoisted.tuples[function.body.body][0]
    body = relax.SeqExpr([relax.BindingBlock(bindings)], result)
    params = [*function.params, *hoisted.parameters.values()]
    module[name] = relax.Function(params, body, result.ty, is_pure=False).with_attrs(dict(function.attrs))
    return tuple(hoisted.parameters)


class _Hoist:
    """Walks the bindings of one function, in order."""

    def __init__(self) -> None:
        self.storages: dict[Any, int] = {}
        self.parameters: dict[Workspace, Any] = {}
        self.places: dict[Any, Workspace] = {}  # variable -> the workspace that holds it
        self.names: dict[Any, Any] = {}  # variable -> what stands for it now
        self.tuples: dict[Any, list[Any]] = {}

    def binding(self, binding: Any) -> Any:
        """The binding as it is from now on; None where nothing is left of it."""
        var, value = binding.var, binding.value
        if isinstance(value, relax.Var):
            self.names[var] = self.use(value)
        elif isinstance(value, relax.Tuple):
            self.tuples[var] = [self.use(field) for field in value.fields]
        elif isinstance(value, relax.TupleGetItem):
            self.names[var] = self.tuples[value.tuple_value][value.index]
        elif _is(value, "relax.memory.alloc_storage"):
            self.storages[var] = len(self.storages)
        elif _is(value, "relax.memory.alloc_tensor"):
            storage, offset, shape, dtype = value.args[:4]
            place = Workspace(self.storages[storage], _int(offset), _ints(shape), str(dtype.value))
            self.names[var] = self.parameter(place)
        elif _is(value, "relax.reshape") and self.use(value.args[0]) in self.places:
            place = self.places[self.use(value.args[0])]
            reshaped = Workspace(place.storage, place.offset, _ints(value.args[1]), place.dtype)
            self.names[var] = self.parameter(reshaped)
        else:
            return relax.VarBinding(var, self.call(value))
        return None

    def parameter(self, place: Workspace) -> Any:
        if place not in self.parameters:
            var = relax.Var(f"w{len(self.parameters)}", relax.TensorType(place.shape, place.dtype))
            self.parameters[place] = var
            self.places[var] = place
        return self.parameters[place]

    def use(self, value: Any) -> Any:
        return self.names.get(value, value)

    def call(self, value: Any) -> Any:
        if not isinstance(value, relax.Call):
            return value
        return relax.Call(value.op, [self.use(a) for a in value.args], value.attrs, value.ty_args)


def _is(value: Any, op: str) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", None) == op


def _int(value: Any) -> int:
    return int(getattr(value, "value", value))


def _ints(shape: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in shape.values if isinstance(d, tirx.IntImm))
