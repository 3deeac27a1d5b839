"""A bundle as the CPU can run it: twins stand in where ONNX Runtime has no kernels for a type."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle
from edgecomp.errors import MissingDependency

__all__ = ["runnable"]


@contextmanager
def runnable(bundle: Bundle, runner: str, *, progress: Progress = silent) -> Iterator[tuple[Bundle, bool]]:
    """Yield the bundle and False; or, for bf16 and fp8 on the CPU, one of twins that compute in fp32, and True.

    Twins round every number as the type would; they lie in a temporary folder, and know no precision but fp32.

    Raises:
        MissingDependency: a twin is needed, and what makes it is not installed.
    """
    if runner != "onnxruntime" or bundle.manifest.runs_on_cpu:
        yield bundle, False
        return
    try:
        import onnx_ir as ir

        from edgecomp.export.emulate import emulated
        from edgecomp.export.lower import quiet_tools
    except ImportError as error:
        needed = f"the check of {bundle.manifest.precision} on the CPU, where ONNX Runtime has no kernels for it"
        raise MissingDependency(error.name or str(error), needed_for=needed, extra="export") from error
    with tempfile.TemporaryDirectory(prefix="edgecomp-twin-") as folder:
        for graph in bundle.manifest.graphs:
            progress(f"{graph.model}: a twin that computes in fp32 and rounds")
            with quiet_tools():
                twin = emulated(ir.load(bundle.path / graph.model))
            ir.save(twin, Path(folder) / graph.model, external_data=f"{graph.model}.data")
        yield Bundle(Path(folder), msgspec.structs.replace(bundle.manifest, precision="fp32", rest="fp32")), True
