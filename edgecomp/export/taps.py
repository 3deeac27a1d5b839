"""Shows what each torch module of a graph reads and gives, as outputs of the graph. Nothing here needs torch."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from edgecomp.export.modules import MODULE_KEY

__all__ = ["Tap", "tap_modules"]


class Tap(NamedTuple):
    """A module, and the names of the outputs that show what it reads and gives."""

    module: str
    read: str
    gave: str


def tap_modules(model: ir.Model, *, prefix: str = "") -> tuple[Tap, ...]:
    """Add two outputs for each module of a flat graph, in place, and return them in the graph's order.

    Args:
        prefix: what the graph's names of modules begin with, and the model's do not.
    """
    groups: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if module := node.metadata_props.get(MODULE_KEY, ""):
            groups.setdefault(module.removeprefix(prefix), []).append(node)
    taps = []
    for module, nodes in groups.items():
        members = set(nodes)
        read = next((value for node in nodes for value in node.inputs if _is_read(value, members)), None)
        given = [value for node in nodes for value in node.outputs if _is_given(value, members)]
        if read is None or not given:
            continue
        tap = Tap(module, f"read.{module}", f"gave.{module}")
        for name, value in ((tap.read, read), (tap.gave, given[-1])):
            shown = ir.node("Identity", [value])
            shown.outputs[0].name = name
            shown.outputs[0].shape, shown.outputs[0].type = value.shape, value.type
            model.graph.append(shown)
            model.graph.outputs.append(shown.outputs[0])
        taps.append(tap)
    return tuple(taps)


def _is_read(value: ir.Value | None, members: set[ir.Node]) -> bool:
    """Whether a value comes from outside, and is computed."""
    if value is None or value.const_value is not None:
        return False
    return value.producer() not in members


def _is_given(value: ir.Value, members: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in members for use in value.uses())
