"""Calibration: how large each activation of a graph gets on given inputs, found by running it in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgecomp.errors import ExportError, InvalidSpec, MissingDependency
from edgecomp.export.modules import module_of

__all__ = [
    "FP16_LIMIT",
    "OutOfRange",
    "Range",
    "Threshold",
    "collect_largest",
    "collect_ranges",
    "float_activations",
    "nodes_out_of_range",
]

Array = npt.NDArray[np.generic]
Threshold = Literal["absmax", "percentile", "mse"]

FP16_LIMIT = 65504 / 8  # an eighth of fp16's largest: images that were not calibrated with may be larger

_BINS = 2048
_GROUP_BYTES = 256 * 2**20  # activations that one run gives back at once
_PERCENTILE = 0.9999
_EXTREMES = ("ReduceMax", "ReduceMin", "ReduceL1")  # of a value; the sum is NaN where one of its numbers is
_CANDIDATES = 64  # thresholds that "mse" tries


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How large one activation was.

    Attributes:
        absmax: its largest magnitude.
        images: how many rows of the batch axis it was seen on.
        top: the histogram's end, a power of two not below `absmax`; 0 where all values were 0.
        counts: how many values lay in each of 2048 equal steps of magnitude from 0 to `top`.
    """

    absmax: float
    images: int
    top: float
    counts: tuple[int, ...]

    def threshold(self, method: Threshold = "absmax", *, levels: int = 127) -> float:
        """Return the magnitude that the largest quantised level stands for; what is larger saturates.

        Args:
            method: "absmax" cuts nothing. "percentile" cuts the largest 0.01% of the values. "mse" takes the
                threshold whose squared error of rounding and cutting together is least.
            levels: levels above zero: 127 of int8.
        """
        if method not in ("absmax", "percentile", "mse"):
            raise InvalidSpec(f"no calibration method {method!r}; choices: absmax, percentile, mse")
        if method == "absmax" or self.absmax == 0:
            return self.absmax
        counts = np.asarray(self.counts, dtype=np.float64)
        step = self.top / _BINS
        if method == "percentile":
            inside = int(np.searchsorted(np.cumsum(counts), _PERCENTILE * counts.sum())) + 1
            return min(inside * step, self.absmax)
        centres = (np.arange(_BINS) + 0.5) * step
        choices = self.absmax * np.arange(1, _CANDIDATES + 1) / _CANDIDATES
        errors = [_squared_error(centres, counts, choice, levels) for choice in choices]
        return float(choices[int(np.argmin(errors))])


class OutOfRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value that comes too near to the largest number of a type.

    Attributes:
        tensor: the value.
        node: the node that makes it, or "" for an input of the graph.
        op: that node's op.
        module: the torch module that it came from, or "".
        absmax: the largest magnitude seen.
        readers: the nodes that read it.
        island: the nodes that must stay in fp32 to cure it: the one that makes it and those that read it.
    """

    tensor: str
    node: str
    op: str
    module: str
    absmax: float
    readers: tuple[str, ...]
    island: tuple[str, ...]


def float_activations(model: ir.Model) -> tuple[str, ...]:
    """Return the names of all fp32 values of the main graph but its weights: its inputs, and what its nodes make."""
    made = (value for node in model.graph for value in node.outputs)
    return tuple(
        value.name
        for value in (*model.graph.inputs, *made)
        if value.name and value.dtype == ir.DataType.FLOAT and (value.uses() or value.is_graph_output())
    )


def collect_ranges(
    model: ir.Model,
    batches: Iterable[Mapping[str, Array]],
    *,
    tensors: Collection[str] = (),
    threads: int = 1,
) -> dict[str, Range]:
    """Run an fp32 graph on each batch, and return how large the wanted values were.

    The result depends on the set of the inputs and not on their order. One thread is the default because a sum that
    threads share may differ in its last bit, and with it the bytes of a bundle.

    Args:
        model: the graph, its weights in memory or in a file; it is not changed.
        batches: inputs by name, a mapping for each run.
        tensors: which values; none means every fp32 input and activation.
        threads: of ONNX Runtime.

    Raises:
        InvalidSpec: there is no batch, a name is not in the graph, or a batch lacks an input.
        ExportError: a value was not finite, or ONNX Runtime does not run the graph.
    """
    batches = list(batches)
    values = _require_fed(model, batches)
    wanted = tuple(dict.fromkeys(tensors)) or float_activations(model)
    if unknown := [name for name in wanted if name not in values]:
        raise InvalidSpec(f"the graph has no value {unknown[0]!r}, whose range was asked for")
    inputs = {value.name for value in model.graph.inputs}
    seen = {name: _Histogram() for name in wanted}
    made = {name: values[name] for name in wanted if name not in inputs}
    for name in wanted:
        if name in inputs:
            for batch in batches:
                _add(seen[name], name, batch[name], values)
    for group in _groups(list(made.values())):
        for batch, outputs in _run(model, group, batches, threads):
            rows = max((len(array) for array in batch.values() if array.ndim), default=1)
            for value, array in zip(group, outputs, strict=True):
                _add(seen[value.name or ""], value.name or "", array, values, rows=rows)
    return {name: histogram.range() for name, histogram in seen.items()}


def collect_largest(model: ir.Model, batches: Iterable[Mapping[str, Array]], *, threads: int = 1) -> dict[str, float]:
    """Run an fp32 graph on each batch, and return the largest magnitude of every fp32 input and activation.

    The graph finds them itself, so that one run of each batch gives them all, and none of the values is held beyond its
    last reader: the range check of fp16 costs about as much as the inference. `collect_ranges` has histograms too.

    Args:
        model: the graph, its weights in memory or in a file; it is not changed.
        batches: inputs by name, a mapping for each run.
        threads: of ONNX Runtime.

    Raises:
        InvalidSpec: there is no batch, or a batch lacks an input.
        ExportError: a value was not finite, or ONNX Runtime does not run the graph.
    """
    batches = list(batches)
    values = _require_fed(model, batches)
    names = float_activations(model)
    measured = model.clone()
    made = {value.name: value for node in measured.graph for value in node.outputs}
    made |= {value.name: value for value in measured.graph.inputs}
    shown: list[ir.Value] = []
    for name in names:
        nodes = [ir.node(op, [made[name]], {"keepdims": 0}, name=f"{name}.{op}") for op in _EXTREMES]
        for node in nodes:
            node.outputs[0].name, node.outputs[0].shape = node.name, ir.Shape([])
            node.outputs[0].dtype = ir.DataType.FLOAT
            shown.append(node.outputs[0])
        maker = made[name].producer()
        if maker is None:
            measured.graph.insert_before(measured.graph[0], nodes)
        else:
            measured.graph.insert_after(maker, nodes)
    largest = dict.fromkeys(names, 0.0)
    for _, outputs in _run(measured, shown, batches, threads):
        for name, most, least, total in zip(names, *(outputs[place::3] for place in range(3)), strict=True):
            seen = max(abs(float(most)), abs(float(least)))
            if np.isnan(total) or not np.isfinite(seen):  # a total of Inf alone: many large numbers
                raise _not_finite(name, values)
            largest[name] = max(largest[name], seen)
    return largest


def run_graph(model: ir.Model, batches: Iterable[Mapping[str, Array]], *, threads: int = 1) -> list[dict[str, Array]]:
    """Return a graph's outputs by name for each batch: what a bundle's stem hands to the graphs behind it.

    Raises:
        ExportError: ONNX Runtime does not run the graph.
    """
    names = [value.name or "" for value in model.graph.outputs]
    results = _run(model, list(model.graph.outputs), list(batches), threads)
    return [dict(zip(names, outputs, strict=True)) for _, outputs in results]


def nodes_out_of_range(
    model: ir.Model, largest: Mapping[str, float], *, limit: float = FP16_LIMIT
) -> tuple[OutOfRange, ...]:
    """Return the values whose `largest` is above `limit`, in the graph's order, each with the island that cures it."""
    found = []
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        seen = largest.get(value.name or "", 0.0)
        if seen <= limit:
            continue
        node = value.producer()
        readers = tuple(dict.fromkeys(use.node.name or "" for use in value.uses()))
        maker = (node.name or "",) if node is not None else ()
        op, module = (node.op_type, module_of(node)) if node is not None else ("", "")
        island = tuple(dict.fromkeys((*maker, *readers)))
        found.append(OutOfRange(value.name or "", "".join(maker), op, module, seen, readers, island))
    return tuple(found)


class _Histogram:
    """Counts of magnitudes in steps whose width is a power of two.

    When a value is larger than the end, neighbouring steps are joined until it fits. Joining and counting commute,
    so that the order of the batches changes nothing.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, dtype=np.int64)
        self._top = 0.0
        self._absmax = 0.0
        self._zeros = 0
        self._images = 0

    def add(self, magnitudes: npt.NDArray[np.float32], rows: int) -> None:
        self._images += rows
        largest = float(magnitudes.max(initial=0.0))
        if largest == 0:
            self._zeros += magnitudes.size
            return
        self._absmax = max(self._absmax, largest)
        top = float(2.0 ** np.ceil(np.log2(largest)))
        if top < largest:
            top *= 2
        if self._top == 0:
            self._top = top
        while self._top < top:
            joined = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.concatenate([joined, np.zeros_like(joined)])
            self._top *= 2
        steps = np.minimum((magnitudes.astype(np.float64).ravel() * (_BINS / self._top)).astype(np.int64), _BINS - 1)
        self._counts += np.bincount(steps, minlength=_BINS)

    def range(self) -> Range:
        counts = self._counts.copy()
        counts[0] += self._zeros
        return Range(self._absmax, self._images, self._top, tuple(int(count) for count in counts))


def _add(histogram: _Histogram, name: str, array: Array, values: Mapping[str, ir.Value], *, rows: int = 0) -> None:
    """Count one array, or say which node made a number that is none."""
    magnitudes = np.abs(array.astype(np.float32, copy=False))
    if not np.isfinite(magnitudes).all():
        raise _not_finite(name, values)
    histogram.add(magnitudes, rows or (len(array) if array.ndim else 1))


def _not_finite(name: str, values: Mapping[str, ir.Value]) -> ExportError:
    node = values[name].producer()
    where = f"node {node.name!r} ({node.op_type})" if node is not None else "a calibration input"
    return ExportError(
        f"{where} gives NaN or Inf in {name!r} while calibrating in fp32; no precision can hold that. "
        "Check the weights and the calibration inputs"
    )


def _require_fed(model: ir.Model, batches: Sequence[Mapping[str, Array]]) -> dict[str, ir.Value]:
    """Refuse batches that lack an input, or none at all; return the graph's inputs and activations by name."""
    if not batches:
        raise InvalidSpec("calibration needs at least one input, and there is none; give a folder of images")
    inputs = {value.name for value in model.graph.inputs}
    for number, batch in enumerate(batches):
        if missing := sorted(str(name) for name in inputs - batch.keys()):
            raise InvalidSpec(f"calibration input {number} lacks {', '.join(missing)}; it has {', '.join(batch)}")
    made = (value for node in model.graph for value in node.outputs)
    return {value.name: value for value in (*model.graph.inputs, *made) if value.name}


def _squared_error(centres: npt.NDArray[Any], counts: npt.NDArray[Any], threshold: float, levels: int) -> float:
    """Return the squared error that `levels` steps up to `threshold` would leave, from a histogram."""
    step = threshold / levels
    kept = np.clip(np.rint(centres / step), 0, levels) * step
    return float((counts * (centres - kept) ** 2).sum())


def _groups(values: Sequence[ir.Value]) -> Iterator[list[ir.Value]]:
    """Yield runs of values that together stay below the memory that one run may give back."""
    group: list[ir.Value] = []
    used = 0
    for value in values:
        size = 4 * int(np.prod([int(dim) for dim in value.shape or () if isinstance(dim, int)], dtype=np.int64))
        if group and used + size > _GROUP_BYTES:
            yield group
            group, used = [], 0
        group.append(value)
        used += size
    if group:
        yield group


def _run(
    model: ir.Model, group: Sequence[ir.Value], batches: Sequence[Mapping[str, Array]], threads: int
) -> Iterator[tuple[Mapping[str, Array], list[Array]]]:
    """Yield each batch with the values of `group` that the graph computes on it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("onnxruntime", needed_for="calibration", extra="ort") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # in the order of the file: else what only measures a value would run last, and all values would live until then
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    names = [value.name for value in group]
    with tempfile.TemporaryDirectory(prefix="edgecomp-calibrate-") as folder:
        path = Path(folder) / "model.onnx"
        _save_with_outputs(model, names, path)
        try:
            session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _cannot_run(error) from error
        for batch in batches:
            needed = {item.name: batch[item.name] for item in session.get_inputs()}
            try:
                outputs = session.run(names, needed)
            except Exception as error:
                raise _cannot_run(error) from error
            yield batch, outputs


def _cannot_run(error: Exception) -> ExportError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportError(f"ONNX Runtime cannot run the graph to calibrate it: {first}")


def _save_with_outputs(model: ir.Model, names: Sequence[str | None], path: Path) -> None:
    """Write a copy of the graph that gives these values."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    outputs = [values[name] for name in names]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(outputs)
    ir.save(copy, path, external_data="weights.data")
