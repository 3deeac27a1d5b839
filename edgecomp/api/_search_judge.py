"""How far a candidate agrees with the uncompressed model: classes on the user's images, or a stated proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecomp.api._emulate import runnable
from edgecomp.api._progress import Progress
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.evaluation import Images
from edgecomp.images import to_pixels
from edgecomp.parity import read_goldens
from edgecomp.profiles.statistics import wilson
from edgecomp.runners import Array
from edgecomp.runners.chain import open_graph
from edgecomp.search.result import Agreement
from edgecomp.search.run import Made
from edgecomp.specs.manifest import Bucket, Graph, Manifest

__all__ = ["AgreementJudge"]

Vectors = npt.NDArray[np.float64]
_RUNNER = "onnxruntime"


class AgreementJudge:
    """Compares outputs, in ONNX Runtime on this machine whatever the target is.

    Args:
        reference: gives the graph that all are compared with; asked once.
        images: of the user; none: the shipped photograph and seeded numbers, the golden inputs of the reference.
        is_logits: the class counts; else the mean token, weighted with sizes where the method tells them.
        threads: of the runtime.
        keep: file of the reference's outputs, so that a search that goes on need not make them again.
    """

    def __init__(
        self,
        reference: Callable[[], Made],
        images: Images | None,
        *,
        is_logits: bool,
        threads: int,
        keep: Path,
        say: Progress,
    ) -> None:
        self._reference, self._images, self._keep, self._say = reference, images, keep, say
        self.is_logits, self._threads = is_logits, threads
        self._expected: tuple[str, Vectors] | None = None

    def __call__(self, made: Made) -> Agreement | None:
        """Return the agreement; none where outputs cannot be compared."""
        name, expected = self._get_expected()
        if made.name == name:
            return _of(expected, expected, is_logits=self.is_logits)
        self._say(f"comparing {made.name} with {name}")
        found = self._vectors(made)
        if found.shape[1:] != expected.shape[1:]:
            return None
        return _of(found, expected, is_logits=self.is_logits)

    def _get_expected(self) -> tuple[str, Vectors]:
        if self._expected is None:
            if self._keep.is_file():
                with np.load(self._keep, allow_pickle=False) as stored:
                    self._expected = str(stored["name"]), stored["vectors"]
            else:
                made = self._reference()
                self._expected = made.name, self._vectors(made)
                with self._keep.with_suffix(".tmp").open("wb") as file:
                    np.savez(file, name=np.array(made.name), vectors=self._expected[1])
                self._keep.with_suffix(".tmp").replace(self._keep)
        return self._expected

    def _vectors(self, made: Made) -> Vectors:
        """Return what each input gives: logits (I, classes), or the mean token (I, D)."""
        opened = open_bundle(made.bundle, verify=False)
        graph = next(one for one in opened.manifest.graphs if one.model == made.model)
        rows: list[Vectors] = []
        with (
            runnable(opened, _RUNNER, progress=self._say) as ready,
            open_graph(_RUNNER, ready.bundle, graph, threads=self._threads) as runner,
        ):
            for inputs, count in self._inputs(opened.path, opened.manifest, graph):
                outputs = runner.infer({name: inputs[name] for name in runner.input_names})
                rows.extend(_pooled(outputs, graph, is_logits=self.is_logits)[:count])
        return np.asarray(rows)

    def _inputs(self, folder: Path, manifest: Manifest, graph: Graph) -> Iterator[tuple[dict[str, Array], int]]:
        """Yield inputs of the graph's batch, with how many of them count."""
        batch = graph.batch
        if self._images is None:
            goldens = read_goldens(folder)
            for case in ("photo", "seeded"):
                names = {spec.name: golden_key("input", case, spec.name) for spec in graph.inputs}
                if all(key in goldens for key in names.values()):
                    yield {name: np.ascontiguousarray(goldens[key][:batch]) for name, key in names.items()}, batch
            return
        assert manifest.preprocess is not None
        indices: Sequence[int] = self._images.indices
        dtype = "uint8" if graph.inputs[0].dtype == "uint8" else "float32"
        for first in range(0, len(indices), batch):
            members = indices[first : first + batch]
            pixels = [to_pixels(self._images.image(index), manifest.preprocess, dtype) for index in members]  # type: ignore[arg-type]
            pixels += pixels[-1:] * (batch - len(members))
            yield {graph.inputs[0].name: np.concatenate(pixels)}, len(members)


def _pooled(outputs: dict[str, Array], graph: Graph, *, is_logits: bool) -> Vectors:
    """Return one vector an input: its logits, or the mean of its patch tokens."""
    first = outputs[graph.outputs[0].name].astype(np.float64)
    if is_logits:
        return first
    prefix = graph.budget.num_prefix_tokens if isinstance(graph, Bucket) else 0
    tokens = first.reshape(first.shape[0], -1, first.shape[-1])[:, prefix:]
    size = outputs.get("size")
    if size is None or size.shape[1] != tokens.shape[1] + prefix:
        mean: Vectors = tokens.mean(1)
        return mean
    weights = size.astype(np.float64).reshape(size.shape[0], -1, 1)[:, prefix:]
    weighted: Vectors = (tokens * weights).sum(1) / weights.sum(1)
    return weighted


def _of(found: Vectors, expected: Vectors, *, is_logits: bool) -> Agreement:
    count = len(expected)
    is_finite = np.isfinite(found).all(1)
    if is_logits:
        share = wilson(int(((found.argmax(1) == expected.argmax(1)) & is_finite).sum()), count)
        return Agreement(share.value, share.low, share.high, count)
    if found is expected:
        return Agreement(1.0, None, None, count)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = np.where(is_finite, (np.nan_to_num(found) * expected).sum(1) / np.maximum(lengths, 1e-30), -1.0)
    return Agreement(float(np.clip(np.nan_to_num(cosines, nan=-1.0), -1.0, 1.0).mean()), None, None, count)
