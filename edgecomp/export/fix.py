"""Rewrites of a user's graph that are provably equal, and the proof that they are, in ONNX Runtime.

Each rewrite is one function in `_REWRITES`: it changes the model in place, yields what it did and why that is equal,
and touches nothing else. Nothing is written before the proof; a rewrite that is right on paper and not in numbers is
refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgecomp.errors import InvalidSpec, MissingDependency, ParityError, RunError
from edgecomp.export.check import infer_shapes
from edgecomp.export.light import LARGEST_PROTOBUF, read_light
from edgecomp.export.view import GraphView
from edgecomp.specs.verdict import GraphCheck, Proof, Rewrite

__all__ = ["fix_graph"]

_SEEDS = (0, 1, 2)
_OTHER_SIZE = 16  # of an open dimension that is not the batch, in the proof
_LARGEST_BIAS = 16 << 20  # bytes
_ROUNDING = 1e-6  # over the largest value: the same sums in another order


@dataclasses.dataclass(frozen=True)
class _Work:
    """A model that is being rewritten, what is known of it, and what was found in it."""

    model: Any
    view: GraphView
    found: frozenset[tuple[str, str]]  # rule id, node name
    batch: int


def fix_graph(
    path: Path, out: Path, checked: GraphCheck, *, batch: int = 0
) -> tuple[tuple[Rewrite, ...], Proof | None]:
    """Write a rewritten copy of a model to `out`, after proving that both compute the same; nothing where nothing fits.

    External data stays where it is, so `out` lies in the model's folder where there is any. The file appears at once
    and whole.

    Args:
        path: the model. out: a file that is not there yet.
        checked: what `check_graph` found in it.
        batch: binds an open first dimension of the inputs; 0 binds none.

    Raises:
        InvalidSpec: `out` is there, or elsewhere than the external data. RunError: the model is above 2 GiB.
        MissingDependency: the proof needs onnxruntime.
        ParityError: the outputs differ, or ONNX Runtime cannot run one of the two; nothing is written.
    """
    light = read_light(path)
    _require_free(path, out, has_external=bool(light.externals))
    if light.size > LARGEST_PROTOBUF:
        raise RunError(f"{path} has {light.size} bytes, more than protobuf can write; save its weights beside it first")
    model = onnx.load(str(path), load_external_data=False)
    found = frozenset((finding.rule, finding.node) for finding in checked.findings)
    work = _Work(model, GraphView(light, infer_shapes(light.proto)), found, batch)
    done = tuple(rewrite for apply in _REWRITES for rewrite in apply(work))
    if not done:
        return (), None
    temporary = out.with_name(f".{out.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp.onnx")
    try:
        temporary.write_bytes(model.SerializeToString())
        proof = _prove(path, temporary, max(rewrite.tolerance for rewrite in done), batch=batch)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except OSError as error:
        raise RunError(
            f"--out {out} cannot be written: {error.strerror or error}; free space there, or name a file elsewhere"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return done, proof


def _require_free(path: Path, out: Path, *, has_external: bool) -> None:
    if out.exists() or out.is_symlink():
        raise InvalidSpec(f"--out {out} is there already; remove it, or name another file")
    if has_external and out.parent.resolve() != path.parent.resolve():
        raise InvalidSpec(
            f"--out {out}: {path.name} has external data, which must lie beside it: name a file in {path.parent}"
        )
    if not out.parent.is_dir():
        raise InvalidSpec(f"--out {out}: there is no folder {out.parent}; make it first")


# -- rewrites -------------------------------------------------------------------------------------------------


def _without_default(work: _Work, rule: str, default: Callable[[Any], str]) -> Iterator[Rewrite]:
    """Remove an attribute that states its default, from the nodes of a model with a finding of that rule.

    Args:
        default: returns `name=value` where a node states a default that is to go, else "".
    """
    if not any(found == rule for found, _ in work.found):
        return
    for node in _nodes(work.model):
        if text := default(node):
            name = text.partition("=")[0]
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend(kept)
            where = node.name or next(iter(node.output), "")
            yield Rewrite(rule, where, f"{text} removed", "ONNX gives an absent attribute this value", 0.0)


def _scatter_default(work: _Work) -> Iterator[Rewrite]:
    def default(node: Any) -> str:
        is_scatter = node.op_type in ("ScatterND", "ScatterElements") and _is_onnx(node)
        return "reduction=none" if is_scatter and _text(node, "reduction") == "none" else ""

    yield from _without_default(work, "EC103", default)


def _grid_sample_default(work: _Work) -> Iterator[Rewrite]:
    linear = "linear" if work.view.opset >= 20 else "bilinear"  # the name changed with opset 20, the meaning did not

    def default(node: Any) -> str:
        is_sample = node.op_type == "GridSample" and _is_onnx(node)
        return f"mode={linear}" if is_sample and _text(node, "mode") == linear else ""

    if any(node.op == "GridSample" and ("EC108", node.name) in work.found for node in work.view.nodes):
        yield from _without_default(work, "EC108", default)


def _float_bias(work: _Work) -> Iterator[Rewrite]:
    """Compute DequantizeLinear of an int32 constant: (x - 0) * scale in float32, as the op is defined."""
    graph, view = work.model.graph, work.view
    outputs = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear" and _is_onnx(node)]:
        where = node.name or next(iter(node.output), "")
        if ("EC302", where) not in work.found or node.output[0] in outputs:
            continue
        read: list[Any] = [view.constant(name, largest=_LARGEST_BIAS) for name in node.input if name]
        arrays = [array for array in read if array is not None]
        if len(arrays) < len(read) or (len(arrays) > 2 and arrays[2].any()):
            continue
        values, scale = arrays[0], arrays[1]
        if values.dtype != np.int32 or scale.dtype != np.float32:
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [1] * values.ndim
        if scale.size > 1:
            if not -values.ndim <= axis < values.ndim or scale.size != values.shape[axis]:
                continue  # quantised in blocks
            shape[axis] = -1
        floats = values.astype(np.float32) * scale.reshape(shape)
        graph.initializer.append(onnx.numpy_helper.from_array(floats, node.output[0]))
        graph.node.remove(node)
        _drop_unread(graph, node.input)
        what = f"its {floats.size} values are stored as float32"
        yield Rewrite("EC302", where, what, "the op is x * scale, and both are constants", 0.0)


def _antialias_of_enlarging(work: _Work) -> Iterator[Rewrite]:
    """Remove antialias from a linear Resize that makes nothing smaller; ONNX defines it for downscaling alone."""
    views = {node.name: node for node in work.view.nodes}
    for node in _nodes(work.model):
        where = node.name or next(iter(node.output), "")
        if node.op_type != "Resize" or not _is_onnx(node) or ("EC105", where) not in work.found:
            continue
        seen = views[where]
        before, after = (work.view.dims.get(name) for name in (seen.input_name(0), node.output[0]))
        if _text(node, "mode") != "linear" or before is None or after is None or None in (*before, *after):
            continue
        if _text(node, "coordinate_transformation_mode") == "tf_crop_and_resize" or seen.attribute("axes"):
            continue
        if all(new >= old for old, new in zip(before, after, strict=True)):  # type: ignore[operator]
            kept = [attribute for attribute in node.attribute if attribute.name != "antialias"]
            del node.attribute[:]
            node.attribute.extend(kept)
            what = f"antialias=1 removed from {list(before)} to {list(after)}"
            yield Rewrite("EC105", where, what, "nothing becomes smaller, and it filters downscaling alone", _ROUNDING)


def _bound_batch(work: _Work) -> Iterator[Rewrite]:
    """Bind the open first dimension of the inputs, and all that bear its name."""
    if not work.batch or not work.view.dynamic_inputs:
        return
    bound, names = [], set()
    for value in work.model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in work.view.dynamic_inputs and len(dims) and not dims[0].HasField("dim_value"):
            names |= {dims[0].dim_param} - {""}
            dims[0].dim_value = work.batch
            bound.append(value.name)
    if not bound:
        return
    for value in (*work.model.graph.input, *work.model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param") and dim.dim_param in names:
                dim.dim_value = work.batch
    del work.model.graph.value_info[:]  # they say the old sizes; every reader infers them
    what = f"the first dimension of {', '.join(bound)} is {work.batch}"
    yield Rewrite("EC201", "", what, "the same nodes, run with this size", 0.0)


_REWRITES: tuple[Callable[[_Work], Iterator[Rewrite]], ...] = (
    _scatter_default,
    _grid_sample_default,
    _float_bias,
    _antialias_of_enlarging,
    _bound_batch,
)


def _nodes(model: Any) -> Iterator[Any]:
    """Yield every node: of the graph, its subgraphs, and functions."""
    ahead = [model.graph, *model.functions]
    while ahead:
        for node in ahead.pop().node:
            yield node
            for attribute in node.attribute:
                ahead += [attribute.g] if attribute.HasField("g") else []
                ahead += attribute.graphs


def _is_onnx(node: Any) -> bool:
    return node.domain in ("", "ai.onnx")


def _text(node: Any, name: str) -> str:
    return next((item.s.decode(errors="replace") for item in node.attribute if item.name == name), "")


def _drop_unread(graph: Any, names: Any) -> None:
    """Remove initializers that no node reads any more."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in set(names) - read]:
        graph.initializer.remove(tensor)


# -- proof ----------------------------------------------------------------------------------------------------


def _prove(given: Path, rewritten: Path, tolerance: float, *, batch: int) -> Proof:
    """Run both on seeded inputs, without graph optimisation, so that the same kernels run what is the same."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("onnxruntime", needed_for="the proof of --fix", extra="ort") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    worst = 0.0
    for seed in _SEEDS:
        results: list[Any] = []
        for file in (given, rewritten):
            which = "the given model" if file == given else "the rewritten model"
            try:
                session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
                if not results:
                    feed = _feed(session, np.random.default_rng(seed), batch)
                results.append(session.run(None, feed))
            except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no public base class
                first = (str(error).strip().splitlines() or ["no reason is given"])[0]
                raise ParityError(
                    f"{given}: the rewrites cannot be proven, ONNX Runtime does not run {which}: {first[:300]}; "
                    "nothing was written"
                ) from None
            del session
        names = [value.name for value in onnx.load(str(given), load_external_data=False).graph.output]
        for name, one, other in zip(names, *results, strict=True):
            difference = _difference(one, other)
            if not difference <= tolerance:
                raise ParityError(
                    f"{given}: the rewritten graph is not equal: output {name!r} differs by {difference:.3g} of its "
                    f"largest value with seed {seed}, and {tolerance:g} is allowed; nothing was written. "
                    "Please report it with the model"
                )
            worst = max(worst, difference)
    return Proof(f"onnxruntime {onnxruntime.__version__}", len(_SEEDS), _SEEDS, worst, tolerance)


def _feed(session: Any, generator: np.random.Generator, batch: int) -> dict[str, npt.NDArray[Any]]:
    """Return seeded inputs: normal numbers, integers of 0 and 1 (indices, masks), bytes of an image."""
    feed: dict[str, npt.NDArray[Any]] = {}
    for item in session.get_inputs():
        shape = [
            size if isinstance(size, int) else (batch or 1) if place == 0 else _OTHER_SIZE
            for place, size in enumerate(item.shape)
        ]
        kind = item.type.removeprefix("tensor(").removesuffix(")")
        if kind in ("float", "double", "float16"):
            dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
            feed[item.name] = generator.standard_normal(shape).astype(dtype)
        elif kind == "uint8":
            feed[item.name] = generator.integers(0, 256, shape, dtype=np.uint8)
        elif kind == "bool":
            feed[item.name] = generator.integers(0, 2, shape).astype(np.bool_)
        else:
            feed[item.name] = generator.integers(0, 2, shape).astype(np.dtype(kind))
    return feed


def _difference(one: Any, other: Any) -> float:
    """Return the largest difference over the largest value; 0 where all are equal bit by bit, infinite where unlike."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if one.tobytes() == other.tobytes():
        return 0.0
    if not (np.isfinite(one) == np.isfinite(other)).all():
        return float("inf")
    a, b = (np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0) for array in (one, other))
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
