"""Says whom each op of a graph serves: the model, the choice of tokens, or moving them together.

* `merge`: inside a function of edgecomp; a product of tokens with a matrix that is made of indices (a one-hot merge, an
  average over clusters); a scatter of tokens.
* `selection`: sorts and gathers by computed indices; what is made of indices, or of the counts and maps that a merge
  returns, alone; and all that is computed for these and read by nothing else: scores, similarities, norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgecomp.export.view import GraphView, NodeView
from edgecomp.specs.costs import Role

__all__ = ["roles_of"]

_PICKS = frozenset({"TopK", "ArgMax", "ArgMin", "NonZero", "OneHot", "Unique"})
_COMPARES = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor"})
_BY_INDEX = frozenset({"Gather", "GatherElements", "GatherND"})
_SCATTERS = frozenset({"ScatterElements", "ScatterND"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
# Which inputs of an op are what it moves, and not what decides.
_DATA: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_BY_INDEX, (0,)),
    **dict.fromkeys(_SCATTERS, (0, 2)),
    "Where": (1, 2),
}


def roles_of(nodes: Sequence[NodeView], view: GraphView, inside: Sequence[bool]) -> list[Role]:
    """Return the role of each node, in their order.

    Args:
        nodes: those that are not folded.
        view: their graph.
        inside: which of them stand for a call of a function of edgecomp.
    """
    tokens = _merged_tokens(nodes, inside)
    roles: list[Role] = []
    indices: set[str] = set()
    for node, called in zip(nodes, inside, strict=True):
        if called:
            roles.append("merge")
            indices |= set(node.proto.output) - tokens
        else:
            roles.append(_forward(node, view, indices))
    _backward(nodes, view, roles, inside)
    return roles


def _merged_tokens(nodes: Sequence[NodeView], inside: Sequence[bool]) -> set[str]:
    """Return what functions hand out that is as large as what they merge: the tokens, not their counts or the map."""
    read = {name for node, called in zip(nodes, inside, strict=True) if not called for name in node.proto.input if name}
    handed = [
        (node, name)
        for node, called in zip(nodes, inside, strict=True)
        if called
        for name in node.proto.output
        if name in read or name in node.graph.outputs
    ]
    return {
        name
        for node, name in handed
        if node.graph.types.get(name, "").startswith(("float", "bfloat"))
        and (node.graph.dims.get(name) or (0,))[-1] != 1
    }


def _forward(node: NodeView, view: GraphView, indices: set[str]) -> Role:
    """Follow what is made of indices from where they are picked."""
    op = node.op
    computed = [name for name in node.proto.input if name and name not in view.known_values]
    of_indices = [name for name in computed if name in indices]
    outputs = [name for name in node.proto.output if name]
    if op in _PICKS:
        indices |= set(outputs)
        return "selection"
    if op in _BY_INDEX:
        if node.input_name(1) not in indices:
            return "model"
        if node.input_name(0) in indices or node.input_name(0) in view.known_values:
            indices |= set(outputs)
        return "selection"
    if op in _SCATTERS:
        if all(name in indices for name in computed):
            indices |= set(outputs)
            return "selection"
        return "merge"
    if op in _PRODUCTS:
        return "merge" if of_indices and len(of_indices) < len(computed) else "selection" if of_indices else "model"
    if of_indices and len(of_indices) == len(computed):
        indices |= set(outputs)
        return "selection"
    if op in _COMPARES and of_indices:
        indices |= set(outputs)
        return "selection"
    return "model"


def _backward(nodes: Sequence[NodeView], view: GraphView, roles: list[Role], inside: Sequence[bool]) -> None:
    """Give to the selection what only serves it: every reader of all its outputs decides with it."""
    role_of = {name: role for node, role in zip(nodes, roles, strict=True) for name in node.proto.output if name}
    outputs = set(view.outputs)
    readers: dict[str, list[NodeView]] = {}
    within = {id(node) for node, called in zip(nodes, inside, strict=True) if called}
    for node in nodes:
        for name in node.proto.input:
            readers.setdefault(name, []).append(node)
    for place in range(len(nodes) - 1, -1, -1):
        node = nodes[place]
        if roles[place] != "model":
            continue
        names = [name for name in node.proto.output if name]
        read = [(name, reader) for name in names for reader in readers.get(name, ())]
        if not read or outputs & set(names):
            continue
        if all(_decides(name, reader, role_of, called=id(reader) in within) for name, reader in read):
            roles[place] = "selection"
            role_of.update(dict.fromkeys(names, "selection"))


def _decides(name: str, reader: NodeView, role_of: Mapping[str, Role], *, called: bool) -> bool:
    """Say whether a value is read by an op of the selection, or of a merge function, that does not move it."""
    role = next((role_of.get(out, "model") for out in reader.proto.output if out), "model")
    if role == "model" or (role == "merge" and not called):
        return False
    return all(place not in _DATA.get(reader.op, ()) for place, other in enumerate(reader.proto.input) if other == name)
