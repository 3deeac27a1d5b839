"""Graphs that run in a row, as one: a bundle's stem and the rest of a bucket."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from edgecomp.errors import InvalidSpec
from edgecomp.specs.costs import GraphCosts

__all__ = ["in_a_row"]


def in_a_row(first: GraphCosts, second: GraphCosts, *, taken: Collection[str] = ()) -> GraphCosts:
    """Return the costs of two graphs of which the second reads what the first makes.

    Args:
        taken: inputs of both in a row, where the second has some of its own.

    Weights that bear one name are one: graphs of a bundle share their weights file. What the first hands on that is
    constant, the scores of a stem that chooses nothing for example, the second reads as a weight.

    Raises:
        InvalidSpec: the second reads what the first neither makes nor takes.
    """
    handed = {*first.outputs, *first.inputs, *taken}
    constants = {name for name in second.inputs if name not in handed and name in first.weights}
    if missing := [name for name in second.inputs if name not in handed and name not in constants]:
        raise InvalidSpec(f"{second.file} reads {', '.join(missing)}, which {first.file} does not make")
    second = _with_constants(second, constants)
    made = {*first.values}
    names = {name: name if name in second.inputs or name not in made else f"2/{name}" for name in second.values}
    weights = {
        name: name if name not in first.weights or first.weights[name] == weight else f"2/{name}"
        for name, weight in second.weights.items()
    }
    ops = tuple(
        replace(
            op,
            reads=tuple(names[name] for name in op.reads),
            writes=tuple(names[name] for name in op.writes),
            weights=tuple(weights[name] for name in op.weights),
        )
        for op in second.ops
    )
    return GraphCosts(
        file=second.file,
        batch=first.batch if first.batch == second.batch else 0,
        tokens=first.tokens or second.tokens,
        inputs=(*first.inputs, *(name for name in second.inputs if name not in (*first.outputs, *first.inputs))),
        outputs=tuple(names[name] for name in second.outputs),
        ops=(*first.ops, *ops),
        values={**first.values, **{names[name]: value for name, value in second.values.items()}},
        weights={**first.weights, **{weights[name]: value for name, value in second.weights.items()}},
        notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
    )


def _with_constants(costs: GraphCosts, names: set[str]) -> GraphCosts:
    """Return a graph with some of its inputs as weights."""
    if not names:
        return costs
    ops = []
    for op in costs.ops:
        read = tuple(name for name in op.reads if name in names)
        taken = sum(costs.values[name].size for name in read)
        ops.append(
            replace(
                op,
                reads=tuple(name for name in op.reads if name not in names),
                weights=op.weights if op.kind == "view" else (*op.weights, *read),
                bytes_read=op.bytes_read - taken,
                weight_bytes=op.weight_bytes + taken,
            )
        )
    return replace(
        costs,
        inputs=tuple(name for name in costs.inputs if name not in names),
        ops=tuple(ops),
        values={name: value for name, value in costs.values.items() if name not in names},
        weights={**costs.weights, **{name: replace(costs.values[name], moves=False) for name in names}},
    )
