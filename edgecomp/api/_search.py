"""`edgecomp search`: the budget that agrees most with the uncompressed model, under limits of time and energy."""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from edgecomp import __version__
from edgecomp.api._measure import Plan
from edgecomp.api._progress import Progress, silent
from edgecomp.api._search_asked import (
    SearchAsked,
    agreement_of,
    command_of,
    depends_on,
    not_on_target,
    plan_of,
)
from edgecomp.api._search_export import Described, Exporter, ModelAsked, baselines_of, describe
from edgecomp.api._search_judge import AgreementJudge, Way
from edgecomp.api._search_measure import KIND, EstimateThere, MeasureHere, MeasureThere
from edgecomp.errors import EdgecompError, InvalidSpec, UnknownName
from edgecomp.evaluation import Images, open_images
from edgecomp.files import write_whole
from edgecomp.lock import bundle_lock
from edgecomp.profiles.machine import Machine, read_machine
from edgecomp.profiles.monitor import Monitor
from edgecomp.profiles.state import Watch
from edgecomp.report.search import SearchPlan
from edgecomp.runners import require_threads, runner_names
from edgecomp.search.limits import require_limits
from edgecomp.search.outcome import Outcome
from edgecomp.search.plan import coarse
from edgecomp.search.recipe import recipe_text, winner_recipe
from edgecomp.search.result import Limits, Measured, SearchResult, write_search
from edgecomp.search.run import Ask, Failed, Made, Measure, Tools, run_search
from edgecomp.search.space import STEPS, Family, budgets_of, precisions_of, schedules_of
from edgecomp.search.state import Journal, Where
from edgecomp.specs import load_recipe, load_target, target_names
from edgecomp.specs.backbone import is_model_folder
from edgecomp.specs.recipe import Defaults

__all__ = ["search"]

_JOURNAL, _DOCUMENT, _RECIPE = "journal.jsonl", "search.json", "recipe.toml"
_REFERENCE, _BUNDLES = "reference.npz", "bundles"
_LOOK_S = 0.2


def search(
    method: str = "",
    *,
    recipe: str | Path = "",
    preset: str = "",
    backbone: str = "",
    weights: str | Path = "",
    backbone_weights: str | Path = "",
    target: str = "local",
    max_p50_ms: float | None = None,
    max_p99_ms: float | None = None,
    max_energy_mj: float | None = None,
    data: str | Path = "",
    min_agreement: float | None = None,
    split: str = "",
    images: int = 128,
    seed: int = 0,
    budget: Sequence[int] = (),
    step: int = 0,
    precision: Sequence[str] = (),
    schedule: Sequence[str] = (),
    rest: str = "",
    fp32: Sequence[str] = (),
    calibration: str | Path = "",
    calibration_images: int = 0,
    image_size: int = 0,
    feature_layer: int = 0,
    output: str = "",
    input_dtype: str = "",
    batch: int = 1,
    params: Mapping[str, Any] | None = None,
    runner: str = "onnxruntime",
    threads: int = 0,
    duration_s: float = 10.0,
    on: Sequence[str] = (),
    noise: float = 0.05,
    exhaustive: bool = False,
    baselines: bool = True,
    keep_bundles: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    out: str | Path = "",
    progress: Progress = silent,
) -> SearchResult | SearchPlan:
    """Search the budget of a method that agrees most with the uncompressed model, under limits.

    Budgets are exported and measured from coarse to fine (`edgecomp.search.plan` states the rules and what they
    promise), in the fastest precision that passes parity, beside the uncompressed model, random pruning and pooling.

    Args:
        method, recipe, preset, backbone, weights, backbone_weights, image_size, feature_layer, output, input_dtype,
            params, rest, fp32, calibration, calibration_images: as in `export`; calibration is `data` where left out.
        target: `local`; or a target's name: with `on` the machine there is one, without it times are estimated.
        max_p50_ms, max_p99_ms, max_energy_mj: limits of a run; one at least.
        data: a folder of images; agreement is then told on them, else on the shipped photograph and seeded numbers.
        min_agreement: that the winner must reach, above 0 and at most 1.
        split, images, seed: of IDX files; the most images taken, at random; of that choice.
        budget: these counts and no others.
        step: distance of budgets, 8, 16 or 32; 0: by the number of tokens.
        precision: those to try, or `all`; none: the recipe's.
        schedule: those to search, or `all`; none: the preset's.
        batch: of a run.
        runner, threads, duration_s: as in `profile`, for each candidate.
        on: machines of one kind, as `--on` takes them, which share the measuring.
        noise: share by which a measured time may lie beside its true one.
        exhaustive: measure every candidate.
        baselines: measure random pruning and pooling beside the winner.
        keep_bundles: of all candidates, not of the winner and the uncompressed model alone.
        fresh: forget what was measured in `out`.
        dry_run: export and measure nothing; return what would be looked at.
        out: the folder; default: `search-<method>-<preset or backbone>`.
        progress: takes one line for each step.

    Returns:
        the document; it is true where a candidate meets all limits. With `dry_run` a plan.

    Raises:
        SpecError, WeightsError: the request cannot be, or the folder holds another search.
        RunError: a host cannot be used, or hosts are not of one kind.
    """
    command = command_of(locals(), inspect.signature(search))
    limits = require_limits(
        max_p50_ms=max_p50_ms, max_p99_ms=max_p99_ms, max_energy_mj=max_energy_mj, min_agreement=min_agreement
    )
    _require_in_range(duration_s=duration_s, noise=noise, step=step, images=images, batch=batch)
    require_threads(threads)
    if runner not in runner_names():
        raise UnknownName("runner", runner, runner_names())
    asked = SearchAsked(
        target=target, runner=runner, threads=threads, duration_s=duration_s, on=tuple(on), data=str(data), split=split,
        images=images, seed=seed,
    )  # fmt: skip
    model = ModelAsked(
        method=method,
        recipe=str(recipe),
        preset=preset,
        backbone=backbone,
        weights=str(weights),
        backbone_weights=str(backbone_weights),
        image_size=image_size,
        feature_layer=feature_layer,
        output=output,
        input_dtype=input_dtype,
        batch=batch,
        rest=rest,
        fp32=tuple(fp32),
        calibration=str(calibration) or str(data),
        calibration_images=calibration_images,
        params=dict(params or {}),
    )
    _require_place(asked, limits)
    if str(calibration) and not Path(calibration).is_dir():
        raise InvalidSpec(f"--calibration {calibration} is not a folder; give one with images")
    pictures = open_images(asked.data, split=split, limit=images, seed=seed) if asked.data else None
    progress("building the model once, to learn what can be searched")
    described = describe(model)
    subject = described.subject
    own = load_recipe(model.recipe or model.method).defaults.precision
    words = precisions_of(precision, own)
    taken, refused = baselines_of(described) if baselines else ([], [])
    ask = Ask(
        subject=subject,
        limits=limits,
        budgets=budgets_of(subject, words, asked=budget, step=step),
        precisions=words,
        schedules=schedules_of(schedule, subject),
        baselines=tuple(taken),
        refused_baselines=tuple(refused),
        noise=noise,
        width=max(2, len(asked.on)),
        exhaustive=exhaustive,
        control=asked.target == "local" or bool(asked.on),
    )
    folder = Path(out) if str(out) else Path(f"search-{subject.method}-{preset or Path(subject.backbone).name}")
    if dry_run:
        return plan_of(ask, asked)
    with bundle_lock(folder, "search", say=progress):
        _open_folder(folder, fresh=fresh)
        return _search(
            folder, ask, asked, model, described, pictures, command, keep_bundles=keep_bundles, progress=progress
        )


def _search(
    folder: Path, ask: Ask, asked: SearchAsked, model: ModelAsked, described: Described, pictures: Images | None,
    command: tuple[str, ...], *, keep_bundles: bool, progress: Progress,
) -> SearchResult:  # fmt: skip
    """Search in a folder that is open to us alone."""
    subject = described.subject
    machine = read_machine() if not asked.on and asked.target == "local" else None
    notes = list(pictures.notes) if pictures else []
    is_logits = described.output == "logits"
    if asked.data and not is_logits:
        notes.append("the outputs are tokens, so that no class can be compared; --output logits, where there is one")
    way: Way = "classes" if is_logits else "tokens" if described.is_same_network else "mean token"
    exporter = Exporter(model, subject, folder / _BUNDLES, progress)
    kept: list[str] = []

    def reference() -> Made:
        family = Family("candidate", subject.method, words[0], ask.schedules[0])
        if not described.is_same_network:
            return exporter(family, ask.budgets[-1:], with_plain=False)[0]
        return exporter.plain(family, coarse(ask.budgets))

    with Journal(folder / _JOURNAL, depends_on(asked, model, ask, machine)) as journal:
        if journal.dropped:
            notes.append(f"{_JOURNAL} ended within a line ({journal.dropped} bytes); what that said was done again")
        measure: Measure
        if asked.on:
            measure = MeasureThere(
                asked.on,
                runner=asked.runner,
                threads=asked.threads,
                duration_s=asked.duration_s,
                say=progress,
                target=asked.target if asked.target in target_names() else "",
                check=lambda found: _check_machine(journal, found),
            )
        elif asked.target != "local":
            measure = EstimateThere(load_target(asked.target), say=progress)
            notes.append(f"nothing was measured on {asked.target}: all times are estimates, and p99 is not known")
        else:
            plan = Plan(runner=asked.runner, threads=asked.threads, duration_s=asked.duration_s, stages=False)
            measure = MeasureHere(plan, say=progress)
        words = [word for word in ask.precisions if not not_on_target(word, asked)] or list(ask.precisions)
        judge = AgreementJudge(reference, pictures, way=way, threads=0, keep=folder / _REFERENCE, say=progress)
        agree: Any = judge
        if not described.is_same_network:
            agree = lambda made: None if made.family.role != "candidate" else judge(made)  # noqa: E731
        kit = Tools(
            export=exporter,
            measure=lambda made: _with_power(measure(made), ask.limits),
            judge=agree,
            not_on_target=lambda word: not_on_target(word, asked),
            ties=is_logits,
        )
        outcome = run_search(ask, kit, journal, say=progress)
        notes += measure.left_out if isinstance(measure, MeasureThere) else ()
        on_machine = next((one.machine for one in journal.records if isinstance(one, Where)), machine)
        recipe_name = _write_recipe(folder, outcome, exporter, model, kept)
    kept += [row.bundle for row in outcome.known if row.family.role == "plain"]
    if not keep_bundles:
        exporter.remove_all_but(kept)
    result = SearchResult(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        edgecomp=__version__,
        command=command,
        method=subject.method,
        preset=subject.preset,
        backbone=subject.backbone,
        batch=model.batch,
        target=asked.target,
        runner=asked.runner,
        threads=asked.threads,
        duration_s=asked.duration_s,
        machine=on_machine,
        limits=ask.limits,
        latency_of=outcome.latency_of,
        agreement_of=agreement_of(asked, ask, words[0], described, len(pictures.indices) if pictures else 0),
        is_proxy=not (asked.data and is_logits),
        rows=outcome.rows,
        winner=outcome.winner,
        closest=outcome.closest,
        verdict=outcome.verdict,
        stopped=outcome.stopped,
        precisions=outcome.precisions,
        folder=str(folder),
        recipe=recipe_name,
        measuring_s=outcome.measuring_s,
        total_s=outcome.total_s,
        notes=(*notes, *outcome.notes),
    )
    write_search(result, folder / _DOCUMENT)
    return result


# -- what is asked ------------------------------------------------------------------------------------------


def _require_in_range(*, duration_s: float, noise: float, step: int, images: int, batch: int) -> None:
    if not 0 < duration_s <= 3600:
        raise InvalidSpec(f"duration {duration_s} s is not above 0 and at most 3600 s")
    if not 0 <= noise < 0.5:
        raise InvalidSpec(f"noise {noise:g} is not from 0 to below 0.5: the share by which a time may be off")
    if step not in (0, *STEPS):
        raise InvalidSpec(f"--step {step} is none of {', '.join(map(str, reversed(STEPS)))}")
    if not 1 <= batch <= 4096:
        raise InvalidSpec(f"batch {batch} is not between 1 and 4096")
    if images < 1:
        raise InvalidSpec(f"--images {images} is below 1; leave it out for 128")


def _require_place(asked: SearchAsked, limits: Limits) -> None:
    if asked.target != "local":
        load_target(asked.target)
    if asked.split and not asked.data:
        raise InvalidSpec(f"--split {asked.split} is of --data, which was not given; drop it")
    if limits.max_energy_mj is None or asked.on:
        return
    if asked.target != "local":
        raise InvalidSpec(
            f"--max-energy {limits.max_energy_mj:g}: an estimate for {asked.target} knows no power; measure there with "
            "--on, or drop it"
        )
    with Monitor(interval_ms=50) as monitor:
        time.sleep(_LOOK_S)
    if total_energy_of(monitor.watch) is None:
        raise InvalidSpec(
            f"--max-energy {limits.max_energy_mj:g}: no power of this machine can be read, so that no energy can be "
            "told; drop it"
        )


def total_energy_of(watch: Watch) -> float | None:
    """Return the energy that was seen; none where no power can be read."""
    return watch.total_energy_mj


def _check_machine(journal: Journal, found: Machine) -> None:
    """Refuse to go on with a search on another machine than the one it was begun on."""
    begun = next((one.machine for one in journal.records if isinstance(one, Where)), None)
    if begun is None:
        journal.add(Where(found))
        return
    for field in KIND:
        old, new = getattr(begun, field), getattr(found, field)
        if old != new:
            raise InvalidSpec(
                f"the search in {journal.path.parent} was begun on a machine with {field} {old!r}, and this one has "
                f"{new!r}: their times do not belong together. Name another --out, or give --fresh"
            )


def _with_power(
    found: Iterable[tuple[str, Measured | Failed]], limits: Limits
) -> Iterator[tuple[str, Measured | Failed]]:
    """Refuse a limit of energy where no power is known."""
    for name, measured in found:
        if limits.max_energy_mj is not None and isinstance(measured, Measured) and measured.energy_mj is None:
            raise InvalidSpec(
                f"--max-energy {limits.max_energy_mj:g}: no power of {measured.where} is known, so that no energy can "
                "be told; drop it"
            )
        yield name, measured


# -- the folder ---------------------------------------------------------------------------------------------


def _open_folder(folder: Path, *, fresh: bool) -> None:
    ours = (_JOURNAL, _DOCUMENT, _RECIPE, _REFERENCE)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _JOURNAL).is_file():
        raise InvalidSpec(f"{folder} is there and holds no search; name another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgecompError(f"{folder} cannot be made: {error.strerror}; name another --out") from None
    if fresh:
        for name in ours:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / _BUNDLES, ignore_errors=True)


def _write_recipe(folder: Path, outcome: Outcome, exporter: Exporter, model: ModelAsked, kept: list[str]) -> str:
    """Write the winner's recipe, and return its name; "" where no compressed model won."""
    path, winner = folder / _RECIPE, outcome.winner_known
    if winner is None or winner.family.role != "candidate":
        path.unlink(missing_ok=True)
        return ""
    opened = exporter.open(winner.family, winner.tokens, winner.bundle)
    kept.append(opened.path.name)
    bucket = next(one for one in opened.manifest.buckets if one.budget.tokens_out == winner.tokens)
    of_files = {"weights": model.weights, "backbone_weights": model.backbone_weights}
    if is_model_folder(model.backbone):
        of_files["backbone"] = model.backbone
    if opened.manifest.samples is not None and model.calibration:
        of_files["calibration"] = model.calibration
    defaults = opened.manifest.recipe.defaults
    given = msgspec.structs.replace(
        Defaults(
            preset=defaults.preset, image_size=defaults.image_size, batch=defaults.batch, output=defaults.output,
            opset=defaults.opset, precision=defaults.precision, weights=defaults.weights,
            backbone_weights=defaults.backbone_weights, calibration_images=model.calibration_images,
        ),
        **{name: _absolute(value) for name, value in of_files.items() if value},
    )  # fmt: skip
    recipe = winner_recipe(opened.manifest, bucket, asked=given)
    write_whole(path, recipe_text(recipe, said=f"edgecomp search: {outcome.verdict}").encode(), noun="recipe")
    load_recipe(str(path))  # what cannot be read back is told now
    return path.name


def _absolute(value: str) -> str:
    return value if value in ("random", "pretrained") else str(Path(value).resolve())
