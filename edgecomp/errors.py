"""Errors of edgecomp: one tree, and every text says what (with the value), where, and what to do.

EdgecompError
├── SpecError            what the user asked for, or wrote in a TOML file
│   ├── UnknownName      a name that is not among the known ones
│   └── InvalidSpec      a value of the wrong type, or out of range
├── WeightsError         a checkpoint that cannot be read, or does not fit
├── ExportError          the model cannot become a static ONNX graph
│   ├── DynamicShape
│   └── OpNotAllowed
├── BundleError          a bundle that is altered, incomplete or newer than this version
├── BundleBusy           another process works in the same folder
├── BuildError           ONNX cannot become an engine
│   ├── PluginMissing
│   └── TargetMismatch
├── RunError             an engine, a session or an input that cannot run
└── MissingDependency    the verb needs a package that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BuildError",
    "BundleBusy",
    "BundleError",
    "DynamicShape",
    "EdgecompError",
    "ExportError",
    "InvalidSpec",
    "MissingDependency",
    "OpNotAllowed",
    "ParityError",
    "PluginMissing",
    "RunError",
    "SpecError",
    "TargetMismatch",
    "UnknownName",
    "WeightsError",
]


class EdgecompError(Exception):
    """Any error that edgecomp raises on purpose; the command line prints its text and exits with 2, or 1."""


class SpecError(EdgecompError):
    """A request or a TOML file asks for something that cannot be."""


class UnknownName(SpecError):
    """A name is not among the known ones; the text lists them and the nearest.

    Args:
        kind: what is named, for example "method" or "target".
        name: the name that was given.
        known: every name that would have been right.
        hint: a sentence on what else to do, or "".
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        text = f"no {kind} {name!r}"
        text += f"; did you mean {near[0]!r}? " if near else ". "
        text += f"Known: {', '.join(self.known) or 'none'}."
        super().__init__(f"{text} {hint}".rstrip())


class InvalidSpec(SpecError):
    """A value has the wrong type or lies out of range."""


class WeightsError(EdgecompError):
    """A checkpoint cannot be read, or does not fit the model."""


class ExportError(EdgecompError):
    """A model cannot become a static ONNX graph."""


class ParityError(ExportError):
    """What is about to be written does not compute what the original does; the command line exits with 1."""


class DynamicShape(ExportError):
    """A graph holds a dimension that is not a positive integer."""


class OpNotAllowed(ExportError):
    """A graph holds an op that an op allow-list refuses."""


class BundleError(EdgecompError):
    """A bundle is altered, incomplete, unsafe or newer than this version of edgecomp."""


class BundleBusy(EdgecompError):
    """Another process works in the same folder; the text names it."""


class BuildError(EdgecompError):
    """An ONNX graph cannot become an engine."""


class PluginMissing(BuildError):
    """A plugin was asked for and is not there."""


class TargetMismatch(BuildError):
    """This TensorRT cannot build for that target."""


class RunError(EdgecompError):
    """An engine, a session or an input cannot run."""


class MissingDependency(EdgecompError):
    """A verb needs a package that is not installed; the text names the extra that brings it.

    Args:
        package: what is missing.
        needed_for: the verb, or what it makes.
        extra: edgecomp's extra that brings it.
        advice: what to do where no extra brings it.
    """

    def __init__(self, package: str, *, needed_for: str, extra: str, advice: str = "") -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed here; "
            + (advice or f"install it with: pip install 'edgecomp[{extra}]'")
        )
