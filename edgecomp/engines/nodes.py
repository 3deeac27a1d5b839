"""The nodes of an ONNX file, the torch module and the encoder block of each, and graphs that end after a block.

Read and cut at the level of bytes, without the package onnx; weights are not touched.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edgecomp.errors import BuildError
from edgecomp.wire import field_bytes, fields

FRONT = "in front"

__all__ = ["FRONT", "GraphFile", "GraphNode", "block_labels", "cut_after", "cut_labels", "place_nodes", "read_graph"]

_MODULE_KEYS = ("edgecomp.module", "pkg.torch.onnx.name_scopes")  # edgecomp's own, and that of torch's exporter
_CONTAINERS = ("blocks", "layers", "layer", "resblocks", "block", "h")  # what vision encoders call their row of blocks
_BLOCK = re.compile(rf"^(?P<prefix>(?:.*?\.)?(?P<row>{'|'.join(_CONTAINERS)}))\.(?P<number>\d+)(?:\.|$)")

_MODEL_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN, _NODE_NOTE = 1, 2, 3, 4, 5, 7, 9
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_TENSOR_NAME, _VALUE_NAME, _VALUE_TYPE = 8, 1, 2
_TAIL = 1 << 30


class GraphNode(NamedTuple):
    """A node of a graph.

    Attributes:
        inputs: what it reads; the names that branches inside it read, too.
        module: the torch module it came from, "" where the file does not say.
        span: where it stands in the file.
    """

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: str
    span: tuple[int, int]


class GraphFile(NamedTuple):
    """An ONNX file as rows of fields.

    Attributes:
        content: all of it.
        around: spans of the model's other fields, and of the graph's that any part of it needs.
        initializers, inputs, outputs, values: spans of the graph's fields by the names of their tensors.
    """

    content: bytes
    nodes: tuple[GraphNode, ...]
    around: tuple[tuple[int, int], ...]
    inside: tuple[tuple[int, int], ...]
    initializers: Mapping[str, tuple[int, int]]
    inputs: Mapping[str, tuple[int, int]]
    outputs: Mapping[str, tuple[int, int]]
    values: Mapping[str, tuple[int, int]]


def read_graph(path: Path) -> GraphFile:
    """Read the nodes of a file.

    Raises:
        BuildError: the file cannot be read, or is no ONNX file.
    """
    try:
        content = path.read_bytes()
        return _read(content)
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}; export the model again") from None
    except IndexError:
        raise BuildError(f"{path} is truncated or no ONNX file; export the model again") from None


def block_labels(modules: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Return for modules that stand in an encoder block its rank, from 0 in the model's order, and its name.

    The name is `blocks.3`, with the modules around it in front where the model has several such rows.
    """
    found = {module: match for module in modules if (match := _BLOCK.match(module))}
    prefixes = list(dict.fromkeys(match["prefix"] for match in found.values()))
    rows = [prefix.rpartition(".")[2] for prefix in prefixes]
    keys = sorted({(prefixes.index(match["prefix"]), int(match["number"])) for match in found.values()})
    labels = {}
    for module, match in found.items():
        key = prefixes.index(match["prefix"]), int(match["number"])
        row = match["row"] if rows.count(match["row"]) == 1 else match["prefix"]
        labels[module] = keys.index(key), f"{row}.{key[1]}"
    return labels


def place_nodes(nodes: Sequence[GraphNode]) -> list[str]:
    """Return the encoder block of each node, "" in front of the first and behind the last.

    A node whose module stands in a block belongs there. Any other belongs to the latest block whose results it reads:
    attention's products and residual sums stand in no module of their own. One that reads nothing but weights belongs
    to its reader. Behind the last block is what no block depends on and whose module is of none, and what reads that.
    """
    labels = block_labels([node.module for node in nodes])
    names = dict(labels.values())
    wanted = _ancestors(nodes, [node for node in nodes if node.module in labels])
    makers: dict[str, int] = {}
    ranks: list[int | None] = []
    for place, node in enumerate(nodes):
        seen = [rank for name in node.inputs if name in makers and (rank := ranks[makers[name]]) is not None]
        rank = max(seen, default=None)
        if node.module in labels:
            rank = labels[node.module][0]
        elif rank is not None and rank >= 0 and node.module and place not in wanted:
            rank = _TAIL
        elif rank is None and node.module:
            rank = -1
        ranks.append(rank)
        makers |= dict.fromkeys(node.outputs, place)
    by_reader: set[int] = set()
    for place in range(len(nodes) - 1, -1, -1):
        reader = ranks[place]
        for maker in {makers[name] for name in nodes[place].inputs if name in makers} if reader is not None else ():
            own = ranks[maker]
            if own is None or (maker in by_reader and reader is not None and reader < own):
                ranks[maker] = reader
                by_reader.add(maker)
    return [names.get(rank, "") if rank is not None else "" for rank in ranks]


def cut_after(graph: GraphFile, label: str) -> bytes:
    """Return the file of the graph that ends after a block: what the block needs, and nothing behind it.

    `FRONT` is what stands in front of the first block. Its outputs are the tensors of it that the rest of the graph
    reads, or that are outputs anyway. Weights in other files stay there. What depends on weights alone is no output.

    Raises:
        BuildError: the graph has no such block.
    """
    placed = place_nodes(graph.nodes)
    ends = _front(graph, placed) if label == FRONT else []
    ends += [node for node, block in zip(graph.nodes, placed, strict=True) if block == label]
    if not ends:
        raise BuildError(f"no block {label!r} in this graph; it has {', '.join(cut_labels(graph))}")
    kept = _ancestors(graph.nodes, ends)
    alive = _fed(graph)
    made = [name for place in sorted(kept) for name in graph.nodes[place].outputs if name]
    read = {name for place, node in enumerate(graph.nodes) if place not in kept for name in node.inputs}
    wanted = [name for name in made if name in alive and (name in read or name in graph.outputs)]
    needed = {name for place in kept for name in graph.nodes[place].inputs}
    body = [graph.nodes[place].span for place in sorted(kept)]
    body += [span for name, span in graph.initializers.items() if name in needed]
    body += [span for name, span in graph.inputs.items() if name in needed]
    body += [span for name, span in graph.values.items() if name in needed and name not in wanted]
    content = graph.content
    inner = b"".join(content[begin:end] for begin, end in (*graph.inside, *body))
    inner += b"".join(field_bytes(_OUTPUT, _described(graph, name)) for name in wanted)
    return b"".join(content[begin:end] for begin, end in graph.around) + field_bytes(_MODEL_GRAPH, inner)


def cut_labels(graph: GraphFile) -> list[str]:
    """Return where a graph can be cut: `FRONT`, where anything stands in front of the first block, and its blocks."""
    placed = place_nodes(graph.nodes)
    ranks = dict(block_labels([node.module for node in graph.nodes]).values())
    labels = [ranks[rank] for rank in sorted(ranks) if ranks[rank] in placed]
    return [FRONT, *labels] if labels and _front(graph, placed) else labels


def _front(graph: GraphFile, placed: Sequence[str]) -> list[GraphNode]:
    """Return the nodes that blocks depend on, that stand in none, and that depend on the graph's inputs."""
    before = _ancestors(graph.nodes, [node for node, block in zip(graph.nodes, placed, strict=True) if block])
    fed = _fed(graph)
    return [
        node
        for place, node in enumerate(graph.nodes)
        if not placed[place] and place in before and any(name in fed for name in node.outputs)
    ]


def _fed(graph: GraphFile) -> set[str]:
    """Return the tensors that depend on the graph's inputs, these with them."""
    alive = set(graph.inputs)
    for node in graph.nodes:
        if any(name in alive for name in node.inputs):
            alive.update(node.outputs)
    return alive


def _described(graph: GraphFile, name: str) -> bytes:
    """Return what the file says of a tensor; its name alone where it says nothing."""
    span = graph.values.get(name) or graph.outputs.get(name)
    if span is None:
        return field_bytes(_VALUE_NAME, name.encode())
    return next(graph.content[begin:end] for _, _, begin, end in fields(graph.content, *span))


def _ancestors(nodes: Sequence[GraphNode], ends: Sequence[GraphNode]) -> set[int]:
    """Return the places of nodes and of all that they depend on."""
    makers = {name: place for place, node in enumerate(nodes) for name in node.outputs if name}
    places = {id(node): place for place, node in enumerate(nodes)}
    pending, seen = [places[id(node)] for node in ends], set()
    while pending:
        place = pending.pop()
        if place not in seen:
            seen.add(place)
            pending += [makers[name] for name in nodes[place].inputs if name in makers]
    return seen


def _read(content: bytes) -> GraphFile:
    nodes: list[GraphNode] = []
    around, inside = [], []
    named: dict[int, dict[str, tuple[int, int]]] = {_INITIALIZER: {}, _INPUT: {}, _OUTPUT: {}, _VALUE: {}}
    for number, start, begin, end in fields(content, 0, len(content)):
        if number != _MODEL_GRAPH:
            around.append((start, end))
            continue
        for inner, at, value, to in fields(content, begin, end):
            if inner == _NODE:
                nodes.append(_read_node(content, at, value, to))
            elif inner in named:
                key = _TENSOR_NAME if inner == _INITIALIZER else _VALUE_NAME
                named[inner][_first(content, value, to, key)] = (at, to)
            else:
                inside.append((at, to))
    real = {name: span for name, span in named[_INPUT].items() if name not in named[_INITIALIZER]}
    return GraphFile(
        content, tuple(nodes), tuple(around), tuple(inside), named[_INITIALIZER], real, named[_OUTPUT], named[_VALUE]
    )


def _read_node(content: bytes, start: int, begin: int, end: int) -> GraphNode:
    texts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_NAME: [], _NODE_OP: [], _NODE_DOMAIN: []}
    notes: dict[str, str] = {}
    inner: list[str] = []
    for number, _, at, to in fields(content, begin, end):
        if number in texts:
            texts[number].append(content[at:to].decode(errors="replace"))
        elif number == _NODE_NOTE:
            notes[_first(content, at, to, 1)] = _first(content, at, to, 2)
        elif number == _NODE_ATTRIBUTE:
            inner += _read_by_branches(content, at, to)
    name, op, domain = (next(iter(texts[key]), "") for key in (_NODE_NAME, _NODE_OP, _NODE_DOMAIN))
    module = notes.get(_MODULE_KEYS[0], "") or _deepest(notes.get(_MODULE_KEYS[1], ""))
    inputs = tuple(filter(None, (*texts[_NODE_INPUT], *inner)))
    return GraphNode(name, op, domain, inputs, tuple(texts[_NODE_OUTPUT]), module, (start, end))


def _read_by_branches(content: bytes, begin: int, end: int) -> list[str]:
    """Return the names that the graphs in an attribute read."""
    found: list[str] = []
    for number, _, at, to in fields(content, begin, end):
        if number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            for inner, start, value, stop in fields(content, at, to):
                if inner == _NODE:
                    found += _read_node(content, start, value, stop).inputs
    return found


def _first(content: bytes, begin: int, end: int, wanted: int) -> str:
    """Return the text of a field; "" without one."""
    for number, _, at, to in fields(content, begin, end):
        if number == wanted:
            return content[at:to].decode(errors="replace")
    return ""


def _deepest(scopes: str) -> str:
    """Return the last module in torch's list of scopes, whose final entry is the op's own name."""
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    return str(names[-2]) if isinstance(names, list) and len(names) >= 2 else ""
