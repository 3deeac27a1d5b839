"""Estimates a graph on hardware that is not here: time as a band, what bounds it, and who takes it."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from edgecomp.errors import InvalidSpec
from edgecomp.estimates.applied import Applied, applied_for
from edgecomp.estimates.efficiency import Load, modelled_us
from edgecomp.estimates.fusion import Kernel, fuse
from edgecomp.estimates.peaks import Rate, rate_of, require_precision
from edgecomp.specs.costs import (
    ELEMENT_BYTES,
    FLOATS,
    PRECISION_OF,
    Amount,
    GraphCosts,
    Kind,
    Role,
    Us,
    ValueCost,
    Whole,
)
from edgecomp.specs.target import Precision, Target

__all__ = ["Bound", "Estimate", "KernelTime", "Work", "estimate_graph", "load_of", "prepare"]

Bound = Literal["compute", "memory", "launch"]
_EIGHT = frozenset({"int8", "fp8", "fp4"})
_TYPES: dict[Precision, tuple[str, str]] = {  # of products with weights, and of the rest
    "fp32": ("float32", "float32"),
    "tf32": ("float32", "float32"),
    "fp16": ("float16", "float16"),
    "bf16": ("bfloat16", "bfloat16"),
    "int8": ("int8", "float16"),
    "fp8": ("float8e4m3fn", "float16"),
    "fp4": ("float4e2m1", "float16"),
}
_PLUGIN_LAUNCHES = 3  # engines/plugins/topk_merge/README.md


class KernelTime(msgspec.Struct, frozen=True):
    """One kernel of an estimate; times are the middle of the band.

    Attributes:
        op: the op that leads it; `ops` run in it.
        fill: share of the multiprocessors that its products occupy; 1 without products.
        bound: what takes most of its time.
    """

    name: str
    block: str
    kind: Kind
    role: Role
    ops: Whole
    flops: Whole
    bytes: Whole
    fill: Annotated[float, Meta(ge=0, le=1)]
    us: Us
    bound: Bound


class Estimate(msgspec.Struct, frozen=True):
    """A graph on a target.

    Attributes:
        precision: `as written`, or the one that was asked for.
        low_us, mid_us, high_us: the band; its ends are `mid_us` divided and multiplied by `1 + error`.
        error: the 90th percentile of the model's error where published latencies were left out of its fit.
        compute_us, memory_us, launch_us: the parts of `mid_us`; they sum to it.
        idle_us: the part of `compute_us` that is lost because products are too small to fill the chip.
        selection_us, merge_us: the parts of `mid_us` that choosing and moving tokens take.
        peaks: the rates that were used, each with its confidence and source.
        weight_bytes, activation_bytes: of all weights, and of the values that live at once where most do.
        efficiency_from: whose efficiency it was computed with.
    """

    target: str
    precision: str
    batch: int
    low_us: Amount
    mid_us: Amount
    high_us: Amount
    error: Amount
    bound: Bound
    compute_us: Amount
    memory_us: Amount
    launch_us: Amount
    idle_us: Amount
    selection_us: Amount
    merge_us: Amount
    flops: Whole
    bytes: Whole
    weight_bytes: Whole
    activation_bytes: Whole
    kernels: tuple[KernelTime, ...]
    peaks: dict[str, Rate]
    efficiency_from: str
    notes: tuple[str, ...] = ()


class Work(NamedTuple):
    """A graph as kernels with their bytes, for one batch and precision.

    Attributes:
        sizes: bytes of each value that crosses a kernel's border.
        products: of each kernel, (FLOPs, precision, elements of the result).
        moved: bytes each kernel reads and writes.
        factor: the batch over that of the file.
    """

    kernels: tuple[Kernel, ...]
    sizes: dict[str, float]
    products: tuple[tuple[tuple[float, Precision, float], ...], ...]
    moved: tuple[float, ...]
    weight_bytes: float
    factor: float


def estimate_graph(
    costs: GraphCosts,
    target: Target,
    *,
    precision: str = "",
    batch: int = 0,
    plugin: bool = True,
    applied: Applied | None = None,
) -> Estimate:
    """Estimate a graph on a target; milliseconds of work, so that a search can call it for every candidate.

    Args:
        costs: of `export.costs.count_costs`.
        precision: as if it were exported so; "": as it is written.
        batch: 0: that of the file.
        plugin: calls of edgecomp functions run in their plugin.
        applied: the efficiency to compute with; None: the user's own calibration of this target where there is one, and
            else the fit that ships with edgecomp.

    Raises:
        InvalidSpec: a precision that the target does not run or states no peak for; a batch that cannot be scaled to.
    """
    applied = applied or applied_for(target.name)
    efficiency = applied.efficiency
    work = prepare(costs, precision=precision, batch=batch, plugin=plugin, target=target)
    load, rates = load_of(work, target)
    times = modelled_us(load, efficiency)
    total = float(times.sum())
    compute = load.compute_us / efficiency.compute + load.compute8_us / efficiency.compute8
    fill = np.where(load.blocks > 0, np.minimum(1.0, load.blocks / efficiency.tile), 1.0)
    filled, moved = compute / fill, load.memory_us / efficiency.bandwidth
    launch = load.launches * efficiency.launch_us
    by_compute = filled >= moved
    parts: dict[Bound, float] = {
        "compute": float(filled[by_compute].sum()),
        "memory": float(moved[~by_compute].sum()),
        "launch": float(launch.sum()),
    }
    bounds: list[Bound] = [
        "launch" if launch[place] > max(filled[place], moved[place]) else "compute" if by_compute[place] else "memory"
        for place in range(len(times))
    ]
    kernels = tuple(
        KernelTime(
            kernel.name,
            kernel.block,
            kernel.kind,
            kernel.role,
            kernel.ops,
            int(sum(product[0] for product in work.products[place])),
            int(work.moved[place]),
            float(fill[place]),
            float(times[place]),
            bounds[place],
        )
        for place, kernel in enumerate(work.kernels)
    )
    spread = math.exp(applied.error)
    return Estimate(
        target=target.name,
        precision=precision or "as written",
        batch=batch or costs.batch,
        low_us=total / spread,
        mid_us=total,
        high_us=total * spread,
        error=spread - 1,
        bound=max(parts, key=lambda word: parts[word]),
        compute_us=parts["compute"],
        memory_us=parts["memory"],
        launch_us=parts["launch"],
        idle_us=float((filled - compute)[by_compute].sum()),
        selection_us=sum(kernel.us for kernel in kernels if kernel.role == "selection"),
        merge_us=sum(kernel.us for kernel in kernels if kernel.role == "merge"),
        flops=int(sum(kernel.flops for kernel in kernels)),
        bytes=int(sum(work.moved)),
        weight_bytes=int(work.weight_bytes),
        activation_bytes=int(_live_bytes(costs, work)),
        kernels=kernels,
        peaks=rates,
        efficiency_from=applied.source,
        notes=_notes(costs, work, target, rates),
    )


def prepare(costs: GraphCosts, *, precision: str, batch: int, plugin: bool, target: Target) -> Work:
    """Fuse a graph and size it for a precision and batch; the arguments are those of `estimate_graph`."""
    factor = _factor(costs, batch)
    word = require_precision(target, precision) if precision else None
    of_weights, rest = _TYPES[word] if word is not None else ("", "")
    kernels = fuse(costs, plugin=plugin)
    wide = {  # a product's weights, in the type of the products
        name for op in costs.ops if op.of_weights for name in op.weights if len(costs.weights[name].dims) > 1
    }

    def size(value: ValueCost, kind: str) -> float:
        elements = value.elements * (factor if value.moves else 1)
        return elements * ELEMENT_BYTES.get(kind if kind and value.dtype in FLOATS else value.dtype, 4)

    def weigh(name: str) -> float:
        weight = costs.weights[name]
        if word is not None and weight.dtype in ("int8", "int4", "uint8") and name in wide:
            return weight.elements * ELEMENT_BYTES[of_weights]  # it was quantised; the asked precision takes its place
        return size(weight, of_weights if name in wide else rest)

    sizes = {name: size(costs.values[name], rest) for kernel in kernels for name in (*kernel.reads, *kernel.writes)}
    products = tuple(
        tuple(
            (
                flops * factor,
                _precision(dtype if word is None else of_weights if has_weights else rest, word),
                elements * factor,
            )
            for flops, dtype, has_weights, elements in kernel.products
        )
        for kernel in kernels
    )
    moved = tuple(
        sum(sizes[name] for name in (*kernel.reads, *kernel.writes)) + sum(weigh(name) for name in kernel.weights)
        for kernel in kernels
    )
    return Work(kernels, sizes, products, moved, sum(weigh(name) for name in costs.weights), factor)


def _precision(dtype: str, word: Precision | None) -> Precision:
    if word == "tf32":
        return "tf32"
    if dtype not in PRECISION_OF:
        raise InvalidSpec(
            f"the graph multiplies in {dtype or 'a type that is not known'}, which has no peak; export fp32"
        )
    return PRECISION_OF[dtype]


def _factor(costs: GraphCosts, batch: int) -> float:
    if not batch or batch == costs.batch:
        return 1.0
    if not costs.batch:
        shapes = ", ".join(f"{name} {list(costs.values[name].dims)}" for name in (*costs.inputs, *costs.outputs))
        raise InvalidSpec(
            f"--batch {batch}: {costs.file} has no first dimension that inputs and outputs share ({shapes}), "
            "so it cannot "
            "be scaled; export it at that batch"
        )
    return batch / costs.batch


def load_of(work: Work, target: Target) -> tuple[Load, dict[str, Rate]]:
    """Return what the kernels take at the target's peaks, and the rates that were used."""
    rates: dict[str, Rate] = {}
    compute, compute8, blocks = [], [], []
    for products in work.products:
        wide = narrow = 0.0
        for flops, precision, _ in products:
            if precision not in rates:
                rates[precision] = rate_of(target, precision)
            us = flops / rates[precision].tera / 1e6
            wide, narrow = (wide, narrow + us) if precision in _EIGHT else (wide + us, narrow)
        compute.append(wide)
        compute8.append(narrow)
        last = products[-1][2] if products else 0.0
        blocks.append(last / target.multiprocessors if target.multiprocessors else 0.0)
    memory = [moved / target.bandwidth_gb_s.value / 1e3 for moved in work.moved]
    launches = [_PLUGIN_LAUNCHES if kernel.kind == "other" and kernel.role == "merge" else 1 for kernel in work.kernels]
    arrays = [np.asarray(one, np.float64) for one in (compute, compute8, memory, blocks, launches)]
    return Load(*arrays), rates


def _live_bytes(costs: GraphCosts, work: Work) -> float:
    """Return the bytes of the values that live at once where most do: inputs and outputs throughout."""
    last: dict[str, int] = {}
    for place, kernel in enumerate(work.kernels):
        for name in (*kernel.reads, *kernel.writes):
            last[name] = place
    held = {*costs.inputs, *costs.outputs}
    ends: dict[int, list[str]] = {}
    for name, place in last.items():
        if name not in held:
            ends.setdefault(place, []).append(name)
    live = sum(work.sizes.get(name, 0.0) for name in held)
    most = live
    for place, kernel in enumerate(work.kernels):
        live += sum(work.sizes[name] for name in kernel.writes if name not in held)
        most = max(most, live)
        live -= sum(work.sizes[name] for name in ends.get(place, ()))
    return most


def _notes(costs: GraphCosts, work: Work, target: Target, rates: dict[str, Rate]) -> tuple[str, ...]:
    notes = list(costs.notes)
    if work.factor != 1:
        notes.append(f"the file is for batch {costs.batch}; FLOPs and activations are scaled by {work.factor:g}")
    if not target.multiprocessors:
        notes.append(
            f"how many multiprocessors {target.name} has is not known: every product is taken to fill the chip"
        )
    for precision, rate in rates.items():
        if rate.confidence != "stated":
            notes.append(f"the {precision} peak of {target.name} is {rate.confidence}: {rate.source}")
    if target.bandwidth_gb_s.confidence != "stated":
        notes.append(f"the bandwidth of {target.name} is {target.bandwidth_gb_s.confidence}")
    for precision in ("fp8", "fp4"):
        if precision in rates:
            notes.append(f"no published row is in {precision}: it is taken to reach the share that int8 does")
    return tuple(notes)
