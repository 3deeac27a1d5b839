"""How far a candidate agrees with the uncompressed model: classes on the user's images, or a stated proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecomp.api._emulate import runnable
from edgecomp.api._progress import Progress
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.evaluation import Images
from edgecomp.evaluation.reconstruction import fill_error, unmerge_error
from edgecomp.images import to_pixels
from edgecomp.parity import read_goldens
from edgecomp.profiles.statistics import wilson
from edgecomp.runners import Array
from edgecomp.runners.chain import open_graph
from edgecomp.search.result import Agreement
from edgecomp.search.run import Failed, Made
from edgecomp.specs.manifest import Bucket, Graph, Manifest

__all__ = ["AgreementJudge", "Way"]

Vectors = npt.NDArray[np.float64]
Way = Literal["classes", "tokens", "mean token"]
_RUNNER = "onnxruntime"


class AgreementJudge:
    """Compares outputs, in ONNX Runtime on this machine whatever the target is.

    Args:
        reference: gives the graph that all are compared with; asked once.
        images: of the user; none: the shipped photograph and seeded numbers, the golden inputs of the reference.
        way: what is compared. `classes`: the class. `tokens`: each token of the reference with the one that stands for
            it, by the method's map, or the kept one that lies nearest; the mean of their cosines. `mean token`: the
            cosine of the mean tokens, where no map leads from one model's tokens to the other's.
        threads: of the runtime.
        keep: file of the reference's outputs, so that a search that goes on need not make them again.
    """

    def __init__(
        self,
        reference: Callable[[], Made],
        images: Images | None,
        *,
        way: Way,
        threads: int,
        keep: Path,
        say: Progress,
    ) -> None:
        self._reference, self._images, self._keep, self._say = reference, images, keep, say
        self._way, self._threads = way, threads
        self._expected: tuple[str, Vectors] | None = None

    def __call__(self, made: Made) -> Agreement | Failed | None:
        """Return the agreement; none where outputs cannot be compared."""
        name, expected = self._get_expected()
        self._say(f"comparing {made.name} with {name}")
        if made.name == name:
            found = expected
        else:
            try:
                found = self._look(made, expected)
            except InvalidSpec as error:  # NaN, other widths, or no place at all
                self._say(f"{made.name} is not compared: {error}")
                return None
            except RunError as error:
                return Failed(str(error))
        if self._way == "classes":
            share = wilson(int(found.sum() if made.name != name else len(expected)), len(expected))
            return Agreement(share.value, share.low, share.high, len(expected))
        value = float(found.mean()) if made.name != name else 1.0
        return Agreement(min(1.0, max(-1.0, value)), None, None, len(expected))

    def _get_expected(self) -> tuple[str, Vectors]:
        if self._expected is None:
            if self._keep.is_file():
                with np.load(self._keep, allow_pickle=False) as stored:
                    self._expected = str(stored["name"]), stored["vectors"]
            else:
                made = self._reference()
                self._expected = made.name, self._look(made, None)
                with self._keep.with_suffix(".tmp").open("wb") as file:
                    np.savez(file, name=np.array(made.name), vectors=self._expected[1])
                self._keep.with_suffix(".tmp").replace(self._keep)
        return self._expected

    def _look(self, made: Made, expected: Vectors | None) -> Vectors:
        """Return what each input gives, to be compared with; or, with that, how each agrees (I,)."""
        opened = open_bundle(made.bundle, verify=False)
        graph = next(one for one in opened.manifest.graphs if one.model == made.model)
        rows: list[Vectors | float] = []
        with (
            runnable(opened, _RUNNER, progress=self._say) as ready,
            open_graph(_RUNNER, ready.bundle, graph, threads=self._threads) as runner,
        ):
            for inputs, count in self._inputs(opened.path, opened.manifest, graph):
                outputs = runner.infer({name: inputs[name] for name in runner.input_names})
                for place in range(count):
                    own = {name: value[place] for name, value in outputs.items()}
                    given = _given(own, graph, self._way)
                    rows.append(
                        given if expected is None else _agree(own, given, expected[len(rows)], graph, self._way)
                    )
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


def _given(outputs: dict[str, Array], graph: Graph, way: Way) -> Vectors:
    """Return what one input gives: logits (classes,), patch tokens (M, D), or their mean (D,)."""
    first = outputs[graph.outputs[0].name].astype(np.float64)
    if way == "classes":
        return first
    tokens = first.reshape(-1, first.shape[-1])
    if way == "tokens":
        return tokens
    prefix = _prefix(graph)
    mean: Vectors = tokens[prefix:].mean(0)
    return mean


def _agree(outputs: dict[str, Array], given: Vectors, expected: Vectors, graph: Graph, way: Way) -> float:
    """Return 1 or 0 for a class, or a cosine."""
    if given.shape[-1] != expected.shape[-1]:
        raise InvalidSpec(f"{graph.model} gives {given.shape[-1]} numbers, and the reference {expected.shape[-1]}")
    if way == "classes":
        return float(bool(np.isfinite(given).all()) and given.argmax() == expected.argmax())
    if way == "mean token":
        if not np.isfinite(given).all():
            raise InvalidSpec(f"{graph.model} gives NaN or Inf")
        lengths = np.linalg.norm(given) * np.linalg.norm(expected)
        return float(given @ expected / max(float(lengths), 1e-30))
    prefix = _prefix(graph)
    if "source_map" in outputs:
        return unmerge_error(expected, given, outputs["source_map"][prefix:]).cosine
    if "index" in outputs:
        index, rows = outputs["index"][prefix:].astype(np.int64), given[prefix:]
        real = outputs["mask"][prefix:].astype(bool) if "mask" in outputs else np.ones(len(index), bool)
        places = np.where(index < 0, index, index - prefix)[real]
        return fill_error(expected, rows[real], places, fill="nearest").cosine
    return unmerge_error(expected, given, np.arange(len(expected))).cosine  # the plain model itself


def _prefix(graph: Graph) -> int:
    return graph.budget.num_prefix_tokens if isinstance(graph, Bucket) else 0
