"""Puts the ops of a graph into the kernels that a runtime would launch.

The rule, for any graph, in this order:

1. A *view* (Reshape, Squeeze, DequantizeLinear) is no kernel: its reader reads what it was made of.
2. Matrix product, pointwise ops and moves, softmax, pointwise ops, matrix product is one kernel of *attention*, whose
   scores never leave the chip: where nobody else reads what is between. A method that takes the scores out of the
   attention breaks this, and pays.
3. A pointwise op or a move (Add, Gelu, Transpose, Slice) joins the kernel of the last of its inputs to be made, where
   that is a product, convolution, attention, norm, softmax, or pointwise itself.
4. Everything else is a kernel of its own: products, convolutions, norms, softmax, reductions, sorts, gathers, scatters.
5. All ops of a call of an edgecomp function are one kernel where the plugin runs it; else the rules above hold for
   its body.

A kernel reads what it did not make and writes what others read. An op joins the latest kernel among its inputs, and an
attention stands where its last op does, so that no kernel waits for a later one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from edgecomp.specs.costs import GraphCosts, Kind, OpCost, Role

__all__ = ["Kernel", "fuse"]

_POINTWISE = ("elementwise", "move")
_TAKES = frozenset({"matmul", "conv", "attention", "norm", "softmax", "elementwise", "move"})
_BACK = 12  # pointwise ops between a product and its softmax


class Kernel(msgspec.Struct, frozen=True, gc=False):
    """Ops that run as one.

    Attributes:
        name, block, kind, role: of the op that leads it; `attention` also of a fused one.
        ops: how many.
        products: (FLOPs, type, of weights, elements of the result) of each product inside.
        reads, writes: values that cross its border, views resolved.
        weights: constants that it reads whole.
    """

    name: str
    block: str
    kind: Kind
    role: Role
    ops: int
    products: tuple[tuple[int, str, bool, int], ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Of its products."""
        return sum(product[0] for product in self.products)


def fuse(costs: GraphCosts, *, plugin: bool) -> tuple[Kernel, ...]:
    """Return the kernels of a graph, in an order they can run in.

    Args:
        plugin: calls of edgecomp functions run in their plugin, one kernel each.
    """
    base = _views(costs)
    ops = [op for op in costs.ops if op.kind != "view" or (plugin and op.call)]
    reads = [tuple(dict.fromkeys(base.get(name, name) for name in op.reads)) for op in ops]
    made = {name: place for place, op in enumerate(ops) for name in op.writes}
    readers: dict[str, list[int]] = {}
    for place, names in enumerate(reads):
        for name in names:
            readers.setdefault(name, []).append(place)
    ends = {base.get(name, name) for name in costs.outputs}
    group = [-1] * len(ops)
    attentions = _attentions(ops, reads, made, readers, ends)
    leads: list[int] = []
    calls: dict[str, int] = {}
    ends_of = {
        lead: max(place for place, one in attentions.items() if one == lead) for lead in set(attentions.values())
    }
    for place, op in enumerate(ops):
        if plugin and op.call:
            if op.call not in calls:
                calls[op.call] = len(leads)
                leads.append(place)
            group[place] = calls[op.call]
            continue
        if place in attentions:
            lead = attentions[place]
            if place == ends_of[lead]:  # what a mask is made of may stand between its products
                group = [len(leads) if attentions.get(one) == lead else old for one, old in enumerate(group)]
                leads.append(lead)
            continue
        latest = max((group[made[name]] for name in reads[place] if name in made), default=-1)
        leader = ops[leads[latest]] if latest >= 0 else None
        joins = leader is not None and leader.kind in _TAKES and not (plugin and leader.call)
        if op.kind in _POINTWISE and joins:
            group[place] = latest
        else:
            group[place] = len(leads)
            leads.append(place)
    members: list[list[int]] = [[] for _ in leads]
    for place, number in enumerate(group):
        members[number].append(place)
    fused = set(attentions.values())
    return tuple(
        _kernel(costs, ops, reads, inside, lead, readers, ends, fused=lead in fused, plugin=plugin)
        for lead, inside in zip(leads, members, strict=True)
    )


def _views(costs: GraphCosts) -> dict[str, str]:
    """Return for each view what it is made of."""
    base: dict[str, str] = {}
    for op in costs.ops:
        if op.kind == "view" and op.reads:
            source = base.get(op.reads[0], op.reads[0])
            base.update(dict.fromkeys(op.writes, source))
    return base


def _attentions(
    ops: Sequence[OpCost],
    reads: Sequence[tuple[str, ...]],
    made: Mapping[str, int],
    readers: Mapping[str, list[int]],
    ends: set[str],
) -> dict[int, int]:
    """Return for each op of a fused attention its softmax."""
    found: dict[int, int] = {}
    for place, op in enumerate(ops):
        if op.kind != "softmax":
            continue
        before = _chain(place, ops, reads, made, readers, ends, back=True)
        after = _chain(place, ops, reads, made, readers, ends, back=False)
        if before and after and not any(ops[one].of_weights for one in (before[-1], after[-1])):
            found.update(dict.fromkeys((*before, place, *after), place))
    return found


def _chain(
    place: int,
    ops: Sequence[OpCost],
    reads: Sequence[tuple[str, ...]],
    made: Mapping[str, int],
    readers: Mapping[str, list[int]],
    ends: set[str],
    *,
    back: bool,
) -> list[int]:
    """Return the ops from a softmax to the product before or behind it, or none where somebody else reads them."""
    steps: list[int] = []
    for _ in range(_BACK):
        if back:
            largest = max(
                (name for name in reads[place] if name in made),
                key=lambda name: (ops[made[name]].bytes_written, made[name]),
                default="",
            )
            if not largest or len(readers[largest]) != 1 or largest in ends:
                return []
            place = made[largest]
        else:
            follow = [reader for name in ops[place].writes for reader in readers.get(name, ())]
            if len(follow) != 1 or ends & set(ops[place].writes):
                return []
            place = follow[0]
        steps.append(place)
        if ops[place].kind == "matmul":
            return steps
        if ops[place].kind not in _POINTWISE:
            return []
    return []


def _kernel(
    costs: GraphCosts,
    ops: Sequence[OpCost],
    reads: Sequence[tuple[str, ...]],
    inside: Sequence[int],
    lead: int,
    readers: Mapping[str, list[int]],
    ends: set[str],
    *,
    fused: bool,
    plugin: bool,
) -> Kernel:
    own = set(inside)
    written = {name for place in inside for name in ops[place].writes}
    leader = ops[lead]
    called = leader.call if len(own) > 1 and all(ops[place].call == leader.call for place in inside) else ""
    return Kernel(
        name=called or leader.name,
        block=leader.block,
        kind="attention" if fused else "other" if called and plugin else leader.kind,
        role=leader.role,
        ops=len(inside),
        products=tuple(
            (op.flops, op.dtype, op.of_weights, costs.values[op.writes[0]].elements)
            for op in (ops[place] for place in inside)
            if op.flops
        ),
        reads=tuple(dict.fromkeys(name for place in inside for name in reads[place] if name not in written)),
        writes=tuple(
            name
            for name in dict.fromkeys(name for place in inside for name in ops[place].writes)
            if name in ends or any(reader not in own for reader in readers.get(name, ()))
        ),
        weights=tuple(
            dict.fromkeys(name for place in inside if ops[place].kind != "gather" for name in ops[place].weights)
        ),
    )
