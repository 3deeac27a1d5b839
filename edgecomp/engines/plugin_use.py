"""Which nodes of a graph a plugin could run, which library runs them, and proof that it was so."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgecomp.engines._onnx import OnnxNode, custom_nodes, without_functions
from edgecomp.engines.adapter import Flavour, prefers_function_bodies
from edgecomp.engines.plugins import (
    PluginLibrary,
    build_library,
    cached_libraries,
    loaded_library,
    read_library,
    why_unfit,
)
from edgecomp.engines.record import EngineMerge, EnginePlugin
from edgecomp.errors import BuildError, PluginMissing, UnknownName
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.plugin import Plugin, load_plugin, plugin_names

__all__ = [
    "PluginChoice",
    "PluginNodes",
    "SizeAboveLimit",
    "choose_libraries",
    "copy_library",
    "find_plugin_nodes",
    "graph_for_plugins",
    "loaded_plugins",
    "require_plugin_layers",
    "without_libraries",
]

_WORDS = ("auto", "require", "off")


class SizeAboveLimit(BuildError):
    """A node is larger than the plugin's kernel takes."""


@dataclasses.dataclass(frozen=True)
class PluginNodes:
    """The nodes of a graph that one plugin could run."""

    plugin: Plugin
    nodes: tuple[OnnxNode, ...]


@dataclasses.dataclass(frozen=True)
class PluginChoice:
    """The library that runs a plugin's nodes, or None: their function bodies do; and why."""

    plugin: Plugin
    nodes: tuple[OnnxNode, ...]
    library: PluginLibrary | None
    reason: str

    @property
    def line(self) -> str:
        """The choice in one line."""
        count = f"{len(self.nodes)} {self.plugin.title} node{'s' if len(self.nodes) > 1 else ''}"
        by = f"by the plugin {self.library.path}" if self.library else "by their function body"
        return f"{count} {by}: {self.reason}"

    def record(self) -> EnginePlugin | None:
        """Return what the record of an engine says of the library."""
        if self.library is None:
            return None
        found = self.library.description
        return EnginePlugin(
            name=self.plugin.name,
            op=self.plugin.title,
            version=self.plugin.version,
            library=_name_beside(self.library),
            sha256=self.library.sha256,
            sm=found.sm,
            tensorrt=found.tensorrt,
            cuda=found.cuda,
        )


def find_plugin_nodes(onnx: Path) -> tuple[PluginNodes, ...]:
    """Return the nodes that the shipped plugins could run, by plugin; empty where there are none."""
    if not onnx.is_file():
        return ()
    found = []
    for name in plugin_names():
        plugin = load_plugin(name)
        nodes = tuple(node for node in custom_nodes(onnx, plugin.domain) if node.op == plugin.op)
        if nodes:
            found.append(PluginNodes(plugin, nodes))
    return tuple(found)


def choose_libraries(
    onnx: Path,
    found: Sequence[PluginNodes],
    word: str,
    *,
    sm: int,
    flavour: Flavour,
    progress: Callable[[str], None],
) -> tuple[PluginChoice, ...]:
    """Choose a library for each plugin of a graph.

    Args:
        onnx: the graph, named in errors.
        found: from `find_plugin_nodes`.
        word: "auto" takes a fitting library of the cache, "require" also compiles one, "off" takes none; the path of
            a `.so` takes that library.
        sm: compute capability of the engine.
        flavour: the TensorRT that builds.
        progress: receives a line for each choice.
    """
    if word not in _WORDS and not word.endswith(".so"):
        raise UnknownName("--plugin", word, _WORDS, hint="A path that ends in .so names a library.")
    if not found and word not in ("auto", "off"):
        titles = ", ".join(load_plugin(name).title for name in plugin_names())
        raise BuildError(
            f"{onnx.name}: --plugin {word} was asked for, and the graph has no node that a plugin runs ({titles}); "
            f"leave --plugin out, or export a method that merges tokens"
        )
    for one in found:
        _require_attributes(onnx, one)
    choices = tuple(_choose(onnx, one, word, sm, flavour, progress) for one in found)
    for choice in choices:
        progress(f"{onnx.name}: {choice.line}")
    return choices


def without_libraries(choices: Sequence[PluginChoice], reason: str) -> tuple[PluginChoice, ...]:
    """Return the choices with the function bodies in place of the libraries."""
    return tuple(dataclasses.replace(choice, library=None, reason=reason) for choice in choices)


@contextlib.contextmanager
def loaded_plugins(builder: Any, choices: Sequence[PluginChoice]) -> Iterator[None]:
    """Register the chosen libraries while a network is parsed and built, and take them out again."""
    with contextlib.ExitStack() as stack:
        for choice in choices:
            if choice.library is not None:
                plugin = choice.plugin
                creator = (plugin.op, plugin.version, plugin.domain)
                registry = builder.get_plugin_registry()
                stack.enter_context(loaded_library(registry, choice.library.path, [creator]))
        yield


def graph_for_plugins(flavour: Flavour, onnx: Path, choices: Sequence[PluginChoice]) -> bytes | None:
    """Return the graph without the functions that plugins replace, for a parser that would prefer the functions.

    Full TensorRT does so before 10.7 (JetPack 6 has 10.3). None: the file serves as it is.
    """
    if not prefers_function_bodies(flavour):
        return None
    content = None
    for choice in choices:
        if choice.library is not None:
            content = without_functions(onnx, choice.plugin.domain, choice.plugin.op)
    return content


def require_plugin_layers(
    flavour: Flavour, network: Any, onnx: Path, choices: Sequence[PluginChoice]
) -> tuple[EngineMerge, ...]:
    """Raise unless each node became a plugin layer where a library was chosen, and none did where it was not."""
    if not choices:
        return ()
    kind = flavour.module.LayerType.PLUGIN_V3
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    plugin_layers = {layer.name: layer for layer in layers if layer.type == kind}
    merges = []
    for choice in choices:
        for node in choice.nodes:
            layer = plugin_layers.get(node.name)
            if choice.library is None and layer is not None:
                raise BuildError(
                    f"{onnx.name}: node {node.name!r} became a plugin layer, and no plugin was wanted; another library "
                    f"of this process has registered {choice.plugin.title}: build in a process of its own"
                )
            if choice.library is not None and layer is None:
                raise PluginMissing(
                    f"{onnx.name}: node {node.name!r} was to run in the plugin {choice.library.path}, and "
                    f"{flavour.name} {flavour.version} took its function body; build with --plugin off, or another "
                    f"TensorRT"
                )
            if layer is not None:
                shapes = [tuple(layer.get_input(index).shape) for index in range(layer.num_inputs)]
                too_large = choice.plugin.why_too_large(shapes)
                if too_large:
                    raise SizeAboveLimit(
                        f"{onnx.name}: node {node.name!r} is too large for the kernel of {choice.plugin.name}: "
                        f"{too_large}; build with --plugin off"
                    )
            merges.append(EngineMerge(node.name, "plugin" if layer is not None else "function"))
    return tuple(merges)


def copy_library(choice: PluginChoice, folder: Path) -> Path | None:
    """Put the chosen library beside the plan, under a name with its hash; None where none was chosen."""
    if choice.library is None:
        return None
    place = folder / _name_beside(choice.library)
    if place.is_file() and file_sha256(place) == choice.library.sha256:
        return place
    fresh = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(choice.library.path.read_bytes())
        if file_sha256(fresh) != choice.library.sha256:
            raise BuildError(f"{choice.library.path} was changed while it was in use; build again")
        os.replace(fresh, place)
    except OSError as error:
        raise BuildError(
            f"{place} cannot be written: {error.strerror}; free space, or choose another folder"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
    return place


def _choose(
    onnx: Path, found: PluginNodes, word: str, sm: int, flavour: Flavour, progress: Callable[[str], None]
) -> PluginChoice:
    plugin = found.plugin
    if word == "off":
        return PluginChoice(plugin, found.nodes, None, "--plugin off")
    problem = _why_unbound(found)
    if problem and word != "auto":
        raise PluginMissing(f"{onnx.name}: --plugin {word} was asked for, and {problem}")
    if problem:
        return PluginChoice(plugin, found.nodes, None, problem)
    if word.endswith(".so"):
        library = read_library(Path(word))
        refusal = why_unfit(library, plugin, sm, flavour)
        if refusal:
            raise PluginMissing(f"--plugin {word}: {refusal}")
        return PluginChoice(plugin, found.nodes, library, "it was named")
    for library in cached_libraries(plugin):
        if not why_unfit(library, plugin, sm, flavour):
            return PluginChoice(plugin, found.nodes, library, f"compiled for SM{sm}, of this edgecomp's sources")
    if word == "auto":
        remedy = f"edgecomp plugin build {plugin.name} --sm {sm}"
        return PluginChoice(plugin, found.nodes, None, f"no fitting library for SM{sm} is compiled ({remedy})")
    library, _ = build_library(plugin, sm=[sm], progress=progress)
    refusal = why_unfit(library, plugin, sm, flavour)
    if refusal:
        raise PluginMissing(f"--plugin {word}: {library.path} does not fit: {refusal}")
    return PluginChoice(plugin, found.nodes, library, f"compiled for SM{sm} just now")


def _require_attributes(onnx: Path, found: PluginNodes) -> None:
    """Raise unless each node has all attributes of the op, with words that it knows; those that bind it come later."""
    for node in found.nodes:
        for attribute in found.plugin.attributes:
            if attribute.name.startswith("plugin_"):
                continue
            what = f"{onnx.name}: node {node.name!r} ({found.plugin.title})"
            if attribute.name not in node.attributes:
                raise BuildError(f"{what} has no attribute {attribute.name!r}; export the model again")
            word = node.texts.get(attribute.name, "")
            if attribute.values and word not in attribute.values:
                raise BuildError(
                    f"{what} has {attribute.name}={word!r}, which is none of {', '.join(attribute.values)}; export the "
                    "model again"
                )


def _why_unbound(found: PluginNodes) -> str:
    """Return why TensorRT would pass a plugin over in silence, or ""."""
    plugin = found.plugin
    for node in found.nodes:
        namespace, version = node.texts.get("plugin_namespace"), node.texts.get("plugin_version")
        if namespace != plugin.domain or version is None:
            return (
                f"node {node.name!r} has plugin_namespace={namespace!r} and plugin_version={version!r}, with which "
                f"TensorRT ignores the plugin in silence; export the model again"
            )
        if version != plugin.version:
            return (
                f"node {node.name!r} asks for version {version} of {plugin.title}, and this edgecomp has version "
                f"{plugin.version}; export the model again"
            )
    names = [node.name for node in found.nodes]
    if "" in names or len(set(names)) < len(names):
        return f"its {plugin.title} nodes have no names of their own ({', '.join(map(repr, names))}); export it again"
    return ""


def _name_beside(library: PluginLibrary) -> str:
    return f"{library.path.stem.split('.')[0]}.{library.sha256[:12]}.so"
