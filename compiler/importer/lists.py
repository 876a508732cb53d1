"""Lists that a loop of unknown length appends to: what is appended is collected, as what a Loop stacks itself is.

The list behind the loop is then one tensor, of whose elements only the number is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.graph import Node
from llmc.importer.bodies import Iteration, Visit, run_loop
from llmc.importer.opening import Group, Refused, Tracer, prefix_of


def run_with_lists(
    tracer: Tracer, node: Node, limit: str, condition: str, states: Sequence[str], visit: Visit
) -> tuple[list[str], list[str]] | None:
    """As `run_loop`, where some of the states are sequences. Raises Refused for one that the loop does not append to,
    one element in an iteration, or that is not empty when it begins."""
    lists = [n for n, name in enumerate(states) if name in tracer.groups]
    for n in lists:
        if tracer.groups[states[n]] != Group(()):
            raise Refused(f"'{states[n]}' is no empty sequence where the loop begins")
    appended: list[int] = []  # those of the lists that the body's last visit appended to

    def visit_tensors(iteration: str, tensors: Sequence[str], prefix: str) -> Iteration:
        rest, given = iter(tensors), []
        for n in range(len(states)):
            given.append(f"{prefix}<list {n}>" if n in lists else next(rest))
            if n in lists:
                tracer.groups[given[n]] = Group((), stacked=given[n])
        made = visit(iteration, given, prefix)
        if tracer.lost.intersection(made.names):
            return made
        appended[:] = [n for n in lists if tracer.groups.get(made.states[n]) != tracer.groups[given[n]]]
        elements: list[str] = []
        for n in appended:
            group = tracer.groups.get(made.states[n])
            if group is None or group.stacked != given[n] or len(group.names) != 1:
                raise Refused(
                    "its number of iterations is not known at import, and each does more to a list than append"
                )
            elements += group.names
        kept = [name for n, name in enumerate(made.states) if n not in lists]
        return Iteration(made.going, kept, [*made.elements, *elements])

    tensors = [name for n, name in enumerate(states) if n not in lists]
    made = run_loop(tracer, node, limit, condition, tensors, visit_tensors)
    if made is None:
        return None
    results, collected = iter(made[0]), made[1]
    own = len(collected) - len(appended)
    stacked = dict(zip(appended, collected[own:], strict=True))
    last = []
    for n, name in enumerate(states):
        last.append(next(results) if n not in lists else f"{prefix_of(node)}<list {n}>")
        if n in lists:
            tracer.groups[last[n]] = Group((), stacked=stacked[n]) if n in stacked else tracer.groups[name]
    return last, collected[:own]
