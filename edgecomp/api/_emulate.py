"""A bundle as the CPU can run it: twins stand in where ONNX Runtime has no kernels for a type."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle
from edgecomp.errors import MissingDependency

__all__ = ["Runnable", "runnable"]

_ADVICE = "install it with: pip install onnx-ir onnxscript, which bring no torch"  # as the extra would


class Runnable(NamedTuple):
    """A bundle, and what of it can be run.

    Attributes:
        source: the bundle.
        bundle: itself; or one of twins, which knows no precision but fp32.
    """

    source: Bundle
    bundle: Bundle

    @property
    def emulated(self) -> bool:
        """Whether twins run in place of the graphs."""
        return self.bundle is not self.source

    def form(self, graph: Path) -> Path:
        """Return a graph that was made of one of the bundle's, and reads its weights, as it can be run."""
        return _write_twin(graph, self.source.path, self.bundle.path) if self.emulated else graph


@contextmanager
def runnable(bundle: Bundle, runner: str, *, progress: Progress = silent) -> Iterator[Runnable]:
    """Yield the bundle; or, for bf16 and fp8 on the CPU, one of twins that compute in fp32 and round as the type would.

    Twins lie in a temporary folder.

    Raises:
        MissingDependency: a twin is needed, and what makes it is not installed.
    """
    if runner != "onnxruntime" or bundle.manifest.runs_on_cpu:
        yield Runnable(bundle, bundle)
        return
    with tempfile.TemporaryDirectory(prefix="edgecomp-twin-") as name:
        folder = Path(name)
        for graph in bundle.manifest.graphs:
            progress(f"{graph.model}: a twin that computes in fp32 and rounds as {bundle.manifest.precision} does")
            _write_twin(bundle.path / graph.model, bundle.path, folder)
        manifest = msgspec.structs.replace(bundle.manifest, precision="fp32", rest="fp32")
        yield Runnable(bundle, Bundle(folder, manifest))


def _write_twin(graph: Path, weights: Path, folder: Path) -> Path:
    """Write the twin of a graph into `folder`, with weights of its own."""
    try:
        import onnx_ir as ir

        from edgecomp.export.emulate import emulated
        from edgecomp.export.quiet import quiet_tools

        model = ir.load(graph)
        ir.external_data.set_base_dir(model.graph, weights)
        with quiet_tools():
            twin = emulated(model)
    except ImportError as error:  # onnxscript, where a merge is inlined
        needed = "the check of bf16 and fp8 on the CPU, where ONNX Runtime has no kernels for them"
        raise MissingDependency(error.name or str(error), needed_for=needed, extra="export", advice=_ADVICE) from error
    ir.save(twin, folder / graph.name, external_data=f"{graph.name}.data")
    return folder / graph.name
