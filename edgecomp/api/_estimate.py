"""`edgecomp estimate`: a graph on hardware that is not here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import open_bundle
from edgecomp.errors import InvalidSpec, MissingDependency, RunError
from edgecomp.estimates import applied_for, estimate_graph
from edgecomp.estimates.chain import in_a_row
from edgecomp.estimates.go_no_go import GoNoGo
from edgecomp.estimates.go_no_go import go_no_go as answer
from edgecomp.estimates.llm import SHAPES, activation_bytes, load_shape, prefill, weight_bytes
from edgecomp.estimates.memory import judge_bytes, judge_memory
from edgecomp.estimates.peaks import at_power_mode, require_precision
from edgecomp.report.estimate import EstimateReport, GraphEstimate, findings_of, graph_estimate
from edgecomp.report.foresight import LlmReport, LlmRow
from edgecomp.specs import Target, load_target
from edgecomp.specs.costs import GraphCosts
from edgecomp.specs.manifest import Graph, Manifest, PlainGraph

__all__ = ["costs_of", "estimate"]

_LARGEST_BATCH = 1 << 16
_MUCH = 0.3  # of the time


class _Read(NamedTuple):
    """A graph of what was given: its name and role, the tokens it keeps, its costs."""

    model: str
    role: str
    kept: int
    costs: GraphCosts


def estimate(
    path: str | Path = "",
    *,
    target: str,
    precision: str = "",
    batch: int | None = None,
    budget: str | None = None,
    plugin: bool = True,
    power_mode: str = "",
    per_op: bool = False,
    go_no_go: bool = False,
    llm: str = "",
    visual_tokens: int = 0,
    kept: int = 0,
    text_tokens: int = 0,
    schedule: str = "",
    progress: Progress = silent,
) -> EstimateReport:
    """Compute what a bundle's graphs, or any ONNX file, would take on a target; nothing is built or run.

    Args:
        path: a bundle, or an .onnx file of anyone; "" where `llm` alone is asked for.
        target: a target's name, or the path of a target's TOML file.
        precision: as if it were exported so; "": as it is written.
        batch: as if it were exported so, where the graph has a batch axis; None: that of the file, of a bundle its
            smallest.
        budget: of a bundle, only the bucket that keeps so many tokens.
        plugin: merge nodes run in edgecomp's plugin; False: by their function's body.
        power_mode: of the target; the peaks are scaled by its GPU clock, and it is refused where the target's file
            does not say that clock, as those that ship say it of their highest modes alone.
        per_op: keep each kernel.
        go_no_go: also answer whether fewer tokens would help; of a bundle by its plain model.
        llm: also what the cut saves behind the encoder: a known language model's name, or its config.json.
        visual_tokens: that the language model is given without a compressor.
        kept: that it is given with one; 0: those of the bundle's buckets, and of a file all of them.
        text_tokens: beside them.
        schedule: of dropping visual tokens inside the language model (`estimates.llm.parse_schedule`).
        progress: takes one line for each step.

    Raises:
        RunError: the file is absent, truncated or no ONNX model, or has a shape that is not fixed.
        BundleError: the bundle is not whole. UnknownName: no such target, precision or power mode.
        InvalidSpec: a precision that the target does not run or states no peak for; a batch that cannot be scaled to.
        MissingDependency: the package onnx is not installed.
    """
    chosen = load_target(target)
    _require_words(path, go_no_go=go_no_go, llm=llm, visual=visual_tokens, more=kept or text_tokens or schedule)
    if batch is not None and not 1 <= batch <= _LARGEST_BATCH:
        raise InvalidSpec(f"--batch {batch} is not between 1 and {_LARGEST_BATCH}")
    if precision:
        require_precision(chosen, precision)
    notes: list[str] = []
    if power_mode:
        chosen, said = at_power_mode(chosen, power_mode)
        notes.append(said)
    graphs = _graphs_of(Path(path), batch=batch or 0, budget=budget, progress=progress) if path else []
    applied = applied_for(chosen.name)
    made = {
        graph.model: estimate_graph(
            graph.costs, chosen, precision=precision, batch=batch or 0, plugin=plugin, applied=applied
        )
        for graph in graphs
    }
    plain = next((made[graph.model] for graph in graphs if graph.role == "plain"), None)
    shown = tuple(
        graph_estimate(
            made[graph.model],
            judge_memory(made[graph.model], chosen),
            model=graph.model,
            role=graph.role,  # type: ignore[arg-type]
            kept=graph.kept,
            plain=plain if graph.role == "bucket" else None,
            per_op=per_op,
        )
        for graph in graphs
    )
    for graph in graphs:
        if precision and precision != graph.costs.precision:
            written = graph.costs.precision
            notes.append(f"{graph.model} is written in {written}: taken as if it were exported in {precision}")
    notes += [note for one in made.values() for note in one.notes]
    if not applied.is_own and any(one.launch_us > _MUCH * one.mid_us for one in made.values()):
        notes.append(
            f"launches take much of the time: the fit has {applied.efficiency.launch_us:.1f} us a kernel, and its rows "
            "do not say whether CUDA graphs ran, with which it is less; measure there, and `edgecomp target calibrate`"
        )
    if plain is None and any(graph.role == "bucket" for graph in graphs):
        notes.append("the bundle has no plain model to compare with; export it with --with-plain")
    return EstimateReport(
        path=str(path),
        target=chosen.name,
        title=chosen.title,
        graphs=shown,
        efficiency=applied.efficiency,
        efficiency_from=applied.source,
        error=math.expm1(applied.error),
        is_own=applied.is_own,
        findings=findings_of(shown, chosen.name),
        notes=tuple(dict.fromkeys(notes)),
        bandwidth_gb_s=chosen.bandwidth_gb_s.value,
        go_no_go=_answer(graphs, chosen, precision, batch or 0, plugin) if go_no_go else None,
        llm=_llm(llm, shown, graphs, chosen, precision, visual_tokens, kept, text_tokens, schedule) if llm else None,
    )


def _require_words(path: str | Path, *, go_no_go: bool, llm: str, visual: int, more: object) -> None:
    """Refuse options that do not go together."""
    if not path and (go_no_go or not llm):
        raise InvalidSpec("no model was given: name a bundle or an .onnx file, or a language model with --llm")
    if llm and visual < 1:
        raise InvalidSpec(f"--llm {llm} needs --visual-tokens, what it is given without a compressor; {visual} is none")
    if not llm and (visual or more):
        raise InvalidSpec("--visual-tokens, --kept, --text-tokens and --schedule are of --llm, which was not given")


def _answer(graphs: list[_Read], target: Target, precision: str, batch: int, plugin: bool) -> GoNoGo:
    """Answer for the plain model of a bundle, or for the file."""
    costs = next((graph.costs for graph in graphs if graph.role in ("plain", "file")), None)
    if costs is None:
        raise InvalidSpec(
            "--go-no-go asks about the uncompressed model, and the bundle holds none; export it with "
            "--with-plain, or give the ONNX file of the plain model"
        )
    return answer(costs, target, precision=precision, batch=batch, plugin=plugin)


def _llm(
    name: str,
    shown: tuple[GraphEstimate, ...],
    graphs: list[_Read],
    target: Target,
    precision: str,
    visual: int,
    kept: int,
    text: int,
    schedule: str,
) -> LlmReport:
    """Put a language model behind the graphs: all visual tokens, those that a compressor keeps, and the schedule."""
    shape, word = load_shape(name), precision or "fp16"
    if kept > visual:
        raise InvalidSpec(f"--kept {kept} is more than the {visual} of --visual-tokens")
    for one in shown:
        if one.estimate.batch > 1:
            raise InvalidSpec(
                f"--llm {name} is given one sequence, and {one.model} would encode {one.estimate.batch} images at "
                "once; leave --batch out, or export the model at batch 1"
            )
    whole_encoder = next((one for one in shown if one.role in ("plain", "file")), None)
    given: list[tuple[str, int, GraphEstimate | None]] = [("all", visual, whole_encoder)]
    given += [
        (one.model, min(kept or one.kept or visual, visual), one)
        for one in shown
        if one.role == "bucket" or (one.role == "file" and kept)
    ]
    if kept and not shown:
        given.append((f"{kept} kept", kept, None))
    steps = [(label, count, encoder, "") for label, count, encoder in given]
    steps += [(f"{label}, {schedule}", count, encoder, schedule) for label, count, encoder in given if schedule]
    rows: list[LlmRow] = []
    for label, count, encoder, words in steps:
        made = prefill(shape, target, visual=count, text=text, schedule=words, precision=word)
        whole = rows[0].prefill.flops if rows else made.flops
        us, weights, live = 0.0, weight_bytes(shape, word), activation_bytes(shape, made.tokens)
        if encoder is not None:  # both models are loaded, and run one after the other
            us = encoder.estimate.mid_us
            weights += encoder.estimate.weight_bytes
            live = max(live, encoder.estimate.activation_bytes)
        held = judge_bytes(target, weight_bytes=weights, activation_bytes=made.kv_bytes + live)
        first = us + made.mid_us if encoder is not None or not shown else 0.0
        rows.append(LlmRow(label, us, made, (made.flops + made.overhead_flops) / whole, first, held))
    written = dict.fromkeys(precision or f"{graph.costs.precision}, as written" for graph in graphs)
    label = name if name in SHAPES else shape.name
    return LlmReport(label, shape, word, visual, text, schedule, tuple(rows), encoder_precision="; ".join(written))


def _graphs_of(path: Path, *, batch: int, budget: str | None, progress: Progress) -> list[_Read]:
    """Return the graphs to estimate: of a bundle its buckets, stem and all, and its plain model; or the one file."""
    try:
        from edgecomp.export.costs import count_costs
    except ImportError as error:
        raise MissingDependency("onnx", needed_for="counting what a graph costs", extra="export") from error
    if not path.is_dir():
        if not path.is_file():
            raise RunError(f"{path} is not there; give a bundle or an .onnx file")
        if budget is not None:
            raise InvalidSpec(f"--budget {budget} is of a bundle, and {path} is a file; leave it out")
        progress(path.name)
        return [_Read(path.name, "file", 0, count_costs(path, batch=batch))]
    opened = open_bundle(path, verify=False)
    manifest = opened.manifest
    have = sorted({bucket.batch for bucket in manifest.buckets})
    chosen = batch if batch in have else have[0]
    found = []
    for bucket in opened.select(budget=budget, batch=chosen):
        progress(bucket.model)
        found.append(_Read(bucket.model, "bucket", bucket.budget.tokens_out, costs_of(path, bucket)))
    found += [_Read(graph.model, "plain", 0, costs_of(path, graph)) for graph in _plain(manifest, chosen)]
    return found


def costs_of(folder: Path, graph: Graph) -> GraphCosts:
    """Return the costs of a graph of a bundle, with its stem in front of it."""
    from edgecomp.export.costs import count_costs

    costs = count_costs(folder / graph.model)
    if not graph.stem:
        return costs
    return in_a_row(count_costs(folder / graph.stem), costs, taken={spec.name for spec in graph.inputs})


def _plain(manifest: Manifest, batch: int) -> list[PlainGraph]:
    return [graph for graph in manifest.plain if graph.batch == batch][:1]
