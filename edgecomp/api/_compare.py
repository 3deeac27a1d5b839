"""`edgecomp compare`: several models side by side, measured in turns in one run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgecomp import __version__
from edgecomp.api._contest import (
    CASES,
    Entry,
    Inputs,
    Read,
    digest_of_file,
    flops_of,
    open_entry,
    read_entries,
    size_of,
    spec_of,
    subject_word,
)
from edgecomp.api._parity import parity
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import MANIFEST
from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.parity import check_bucket, read_goldens
from edgecomp.parity import compare as compare_arrays
from edgecomp.profiles.comparison import (
    COMPARISON_KIND,
    NOT_INTERLEAVED,
    Agreement,
    Comparison,
    Conditions,
    Contestant,
    condition_differences,
    machine_differences,
    require_out,
    setting_differences,
    subject_differences,
    version_differences,
    write_comparison,
)
from edgecomp.profiles.device import read_state
from edgecomp.profiles.interleave import SETTLE_S, Interleaved, interleave
from edgecomp.profiles.machine import Machine, read_machine
from edgecomp.profiles.ratios import LEAST, Ratio, paired_ratio, unpaired_ratio
from edgecomp.profiles.result import Subject
from edgecomp.profiles.state import DeviceState
from edgecomp.profiles.statistics import Estimate, median_interval
from edgecomp.runners import Array, Runner, require_threads
from edgecomp.specs.manifest import Bucket, PlainGraph

__all__ = ["compare", "now", "require_rounds", "settle_of"]

_MOST_ROUNDS = 100_000


def compare(
    models: Sequence[str | Path],
    *,
    base: str = "",
    runner: str = "onnxruntime",
    threads: int = 0,
    budget: str | int | None = None,
    batch: int | None = None,
    rounds: int = 20,
    duration_s: float = 0.0,
    seed: int = 0,
    with_parity: bool = True,
    force: bool = False,
    out: str | Path = "",
    progress: Progress = silent,
) -> Comparison:
    """Compare latency, size, FLOPs, parity and outputs of several models; what can run here is measured in turns.

    Each round times every model once, in an order that is shuffled anew (see `edgecomp.profiles.interleave`); the ratio
    to the base is the median of the rounds' own ratios. A result file takes part with its raw samples; its ratio is
    that of two medians, and says nothing of what changed on the machine in between.

    Args:
        models: bundles (each of their buckets is one model), ONNX files (a bundle's `plain.onnx` too), result files.
        base: name of the model that ratios are to; "": the first.
        runner: what runs bundles and ONNX files; as in `profile`.
        threads: for the CPU; 0: the runtime's choice.
        budget: only buckets that keep so many tokens.
        batch: only this batch size; None: the smallest of each bundle, which must be the same.
        rounds: how many times round, at least.
        duration_s: rounds go on until so many seconds have passed; 0: as many rounds as were asked for.
        seed: of the orders.
        with_parity: hold each bundle's graph to its goldens too.
        force: also compare results of different models, machines or conditions, and say so.
        out: write the comparison here, a .json file.
        progress: takes a line now and then.

    Returns:
        the comparison; `bool(comparison)` is false where a parity failed.

    Raises:
        InvalidSpec, RunError, BundleError: a model or result cannot be read, does not fit, or differs without `force`.
    """
    require_threads(threads)
    require_rounds(rounds, duration_s)
    if str(out):
        require_out(Path(out), kind=COMPARISON_KIND)
    words = [str(word) for word in models]
    found, notes = read_entries(words, budget=budget, batch=batch)
    first = _find_base(found, base)
    found = (first, *(one for one in found if one is not first))
    entries = [one for one in found if isinstance(one, Entry)]
    machine = read_machine() if entries else None
    forced = _require_alike(found, machine, force=force)
    contestants: dict[str, Contestant] = {}
    turns: Interleaved | None = None
    settle = settle_of(runner, threads)
    if entries:
        inputs = Inputs(entries)
        with ExitStack() as stack:
            loaded: dict[str, Runner] = {}
            for entry in entries:
                progress(f"loading {entry.name} in {runner}")
                loaded[entry.name] = stack.enter_context(open_entry(entry, runner=runner, threads=threads))
            given = {entry.name: _in_order(loaded[entry.name], inputs.of(entry, "seeded")) for entry in entries}
            turns = interleave(
                {name: partial(opened.infer, given[name]) for name, opened in loaded.items()},
                rounds=rounds,
                duration_s=duration_s,
                seed=seed,
                settle_s=settle,
                progress=lambda share: progress(f"taking turns, {100 * share:.0f} %"),
            )
            outputs = {
                entry.name: [
                    loaded[entry.name].infer(_in_order(loaded[entry.name], inputs.of(entry, case))) for case in CASES
                ]
                for entry in entries
            }
            for entry in entries:
                said = ""
                if with_parity:
                    progress(f"parity of {entry.name}")
                    said = _parity_of(entry, loaded[entry.name], runner=runner, threads=threads)
                contestants[entry.name] = _measured(entry, loaded[entry.name], turns, threads=threads, parity_word=said)
        contestants = _with_agreement(contestants, entries, outputs, base=first.name)
    here = first.result.machine if isinstance(first, Read) else machine
    contestants |= {one.name: _read(one, here) for one in found if isinstance(one, Read)}
    paired = turns.samples_us if turns is not None else {}
    rated = tuple(_rated(contestants[one.name], contestants[first.name], paired) for one in found)
    if rounds < LEAST and turns is not None and turns.rounds < LEAST:
        notes = (*notes, f"{turns.rounds} rounds carry no interval; give --rounds {LEAST} or more")
    comparison = Comparison(
        created=now(),
        edgecomp=__version__,
        command=_command(
            words,
            base=base,
            runner=runner,
            threads=threads,
            budget=budget,
            batch=batch,
            rounds=rounds,
            duration_s=duration_s,
            seed=seed,
            force=force,
        ),
        base=first.name,
        rounds=turns.rounds if turns is not None else 0,
        seed=seed,
        settle_s=settle if len(entries) > 1 else 0.0,
        machine=machine,
        contestants=rated,
        forced=forced,
        notes=notes,
    )
    if str(out):
        write_comparison(comparison, Path(out), kind=COMPARISON_KIND)
    return comparison


def _command(words: Sequence[str], **given: Any) -> tuple[str, ...]:
    """Return the words that repeat the run, without those that say what is so anyway; paths by their last names."""
    usual = {name: parameter.default for name, parameter in inspect.signature(compare).parameters.items()}
    said = [
        f"--{name.removesuffix('_s')}" + ("" if isinstance(value, bool) else f"={value}")
        for name, value in given.items()
        if value != usual[name]
    ]
    models = [Path(word) for word in words]
    names = [f"{path.parent.name}/{path.name}" if _is_in_bundle(path) else path.name for path in models]
    return ("edgecomp", "compare", *names, *said)


def _is_in_bundle(path: Path) -> bool:
    return path.suffix == ".onnx" and (path.parent / MANIFEST).is_file()


def now() -> str:
    """Return the time, as result files have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def require_rounds(rounds: int, duration_s: float) -> None:
    """Refuse what is no number of rounds, or no duration."""
    if not 1 <= rounds <= _MOST_ROUNDS:
        raise InvalidSpec(f"rounds {rounds} is not between 1 and {_MOST_ROUNDS}")
    if not (0 <= duration_s <= 24 * 3600 and math.isfinite(duration_s)):
        raise InvalidSpec(f"duration {duration_s} s is not between 0 and a day")


def settle_of(runner: str, threads: int) -> float:
    """Return the pause before a turn: worker threads of the CPU spin for a while; one thread, or a GPU, has none."""
    return SETTLE_S if runner == "onnxruntime" and threads != 1 else 0.0


def _find_base(found: Sequence[Entry | Read], base: str) -> Entry | Read:
    if not base:
        return found[0]
    named = [one for one in found if base in (one.name, one.word)]
    if len(named) != 1:
        raise UnknownName("model to take as the base", base, [one.name for one in found])
    return named[0]


def _in_order(runner: Runner, inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {name: inputs[name] for name in runner.input_names}


def _require_alike(found: Sequence[Entry | Read], machine: Machine | None, *, force: bool) -> tuple[str, ...]:
    """Return, with `force`, what differs between results and the base, or refuse it."""
    first, forced = found[0], []
    now = read_state() if any(isinstance(one, Entry) for one in found) else None
    if all(isinstance(one, Entry) for one in found):
        return ()
    subject = first.result.subject if isinstance(first, Read) else Subject(**subject_word(first))
    here = first.result.machine if isinstance(first, Read) else machine
    assert here is not None
    for one in found[1:]:
        if isinstance(one, Entry):
            other, there = Subject(**subject_word(one)), machine or here
        else:
            other, there = one.result.subject, one.result.machine
        parts = [
            ("models", subject_differences(subject, other)),
            ("machines", machine_differences(here, there)),
            ("settings of the device", setting_differences(_state_of(first, now), _state_of(one, now))),
            ("conditions", condition_differences(_conditions(first), _conditions(one))),
        ]
        forced += [f"{first.name} and {one.name}: different {what}: {', '.join(d)}" for what, d in parts if d]
    if forced and not force:
        raise InvalidSpec(
            f"{'; '.join(forced)}. Their times say little of each other; --force compares them and says so"
        )
    return tuple(forced)


def _state_of(one: Entry | Read, now: DeviceState | None) -> DeviceState | None:
    if isinstance(one, Entry):
        return now
    return one.profile.watch.after if one.profile.watch is not None else None


def _conditions(one: Entry | Read) -> Conditions:
    if isinstance(one, Entry):
        return Conditions("single-stream", 1, one.batch)
    return Conditions(one.profile.mode, one.profile.streams, one.profile.batch)


def _parity_of(entry: Entry, loaded: Runner, *, runner: str, threads: int) -> str:
    """Return `pass` with the largest error, `FAIL` with what failed, or why nothing was checked."""
    if entry.bundle is None:
        return "not checked: a plain ONNX file holds no goldens"
    if isinstance(entry.graph, PlainGraph):
        manifest = entry.bundle.manifest
        rows = check_bucket(
            loaded, entry.graph, read_goldens(entry.bundle.path), manifest.recipe.tolerances[manifest.precision]
        )
        worst = max(rows, key=lambda row: (bool(row.failures), row.difference.max_rel))
        passed = all(rows)
    else:
        assert isinstance(entry.graph, Bucket)
        report = parity(
            entry.bundle.path,
            runner=runner,
            threads=threads,
            budget=entry.graph.budget.tokens_out,
            batch=entry.graph.batch,
        )
        worst, passed = report.worst, bool(report)
    if passed:
        return f"pass (max rel {worst.difference.max_rel:.1e})"
    return f"FAIL: {worst.case}, {worst.output}: {'; '.join(worst.failures) or 'a choice differs'}"


def _measured(entry: Entry, loaded: Runner, turns: Interleaved, *, threads: int, parity_word: str) -> Contestant:
    graph, manifest = entry.graph, entry.bundle.manifest if entry.bundle is not None else None
    samples = turns.samples_us[entry.name]
    budget = graph.budget if isinstance(graph, Bucket) else None
    notes = [f"weights: {manifest.weights}"] if manifest is not None and manifest.weights.kind == "random" else []
    return Contestant(
        name=entry.name,
        source="bundle" if entry.bundle is not None else "onnx",
        model=entry.path.name,
        digest=digest_of_file(entry),
        runner=loaded.version,
        threads=threads,
        batch=entry.batch,
        tokens_in=budget.tokens_in if budget is not None else 0,
        tokens_out=budget.tokens_out if budget is not None else 0,
        precision=graph.precision if graph is not None else "",
        flops=graph.flops if graph is not None else flops_of(entry),
        size_bytes=size_of(entry),
        latency_us=median_interval(samples),
        samples_us=samples,
        repeats=turns.repeats[entry.name],
        parity=parity_word,
        notes=tuple(notes),
    )


def _read(one: Read, here: Machine | None) -> Contestant:
    """Return what a result file says."""
    profile = one.profile
    p50 = profile.percentiles["p50"]
    low, high = (p50.us if bound is None else bound for bound in (p50.low_us, p50.high_us))
    notes = [NOT_INTERLEAVED, f"measured {one.result.created} on {one.result.machine.cpu}"]
    notes += [f"its own file marks it: {mark}" for mark in profile.marks]
    if here is not None and (versions := version_differences(here, one.result.machine)):
        notes.append(f"versions differ: {', '.join(versions)}")
    return Contestant(
        name=one.name,
        source="result",
        model=profile.model,
        digest=one.result.subject.digest,
        runner=profile.runner,
        threads=profile.threads,
        batch=profile.batch,
        tokens_in=profile.tokens_in,
        tokens_out=profile.tokens_out,
        precision=profile.precision,
        flops=profile.flops or None,
        latency_us=Estimate(p50.us, low, high),
        samples_us=profile.samples_us,
        parity="not checked: a result file holds times alone",
        agreement_note="a result file holds no outputs",
        notes=tuple(notes),
    )


def _rated(own: Contestant, base: Contestant, paired: Mapping[str, Sequence[float]]) -> Contestant:
    """Return a contestant with its ratio to the base."""
    if own.name == base.name:
        return own
    if own.name in paired and base.name in paired:
        ratio: Ratio = paired_ratio(own.samples_us, base.samples_us)
        return msgspec.structs.replace(own, ratio=ratio)
    notes = own.notes if NOT_INTERLEAVED in own.notes else (*own.notes, NOT_INTERLEAVED)
    ran = [
        f"{one.runner}, {one.threads or 'its own choice of'} thread{'s' * (one.threads != 1)}" for one in (own, base)
    ]
    if ran[0] != ran[1]:
        notes = (*notes, f"it ran in {ran[0]}, and {base.name} in {ran[1]}")
    return msgspec.structs.replace(own, ratio=unpaired_ratio(own.samples_us, base.samples_us), notes=notes)


def _with_agreement(
    contestants: Mapping[str, Contestant],
    entries: Sequence[Entry],
    outputs: Mapping[str, Sequence[Mapping[str, Array]]],
    *,
    base: str,
) -> dict[str, Contestant]:
    """Add how alike the outputs are to the base's."""
    first = next((entry for entry in entries if entry.name == base), None)
    found = {}
    for entry in entries:
        own = contestants[entry.name]
        if first is None:
            own = msgspec.structs.replace(own, agreement_note=f"the base {base} is a result, and holds no outputs")
        elif entry is not first:
            agreement, note = _agreement(first, entry, outputs[base], outputs[entry.name])
            own = msgspec.structs.replace(own, agreement=agreement, agreement_note=note)
        found[entry.name] = own
    return found


def _agreement(
    base: Entry, entry: Entry, wanted: Sequence[Mapping[str, Array]], got: Sequence[Mapping[str, Array]]
) -> tuple[Agreement | None, str]:
    """Return how alike the first output is that both give, or why there is none."""
    if {str(spec) for spec in base.inputs} != {str(spec) for spec in entry.inputs}:
        return None, f"it takes other inputs: {', '.join(map(str, entry.inputs))}"
    floats = [[name for name, array in one[0].items() if array.dtype.kind == "f"] for one in (wanted, got)]
    same = [name for name in floats[0] if name in floats[1] and wanted[0][name].shape == got[0][name].shape]
    pair = (same[0], same[0]) if same else None
    if pair is None and len(floats[0]) == len(floats[1]) == 1 and _shape(wanted, floats[0]) == _shape(got, floats[1]):
        pair = (floats[0][0], floats[1][0])
    if pair is None:
        shapes = [
            ", ".join(f"{n}{list(one[0][n].shape)}" for n in names)
            for one, names in zip((wanted, got), floats, strict=True)
        ]
        return None, f"the outputs are of different shapes: {shapes[0]} and {shapes[1]}"
    pairs = [(one[pair[0]], other[pair[1]]) for one, other in zip(wanted, got, strict=True)]
    differences = [compare_arrays(other, one) for one, other in pairs]
    spec = spec_of(base, pair[0])
    is_logits = pair[0] == "logits" or (spec is None and pairs[0][0].ndim == 2)
    top1 = float(np.mean([one.argmax(-1) == other.argmax(-1) for one, other in pairs])) if is_logits else None
    agreement = Agreement(
        output=pair[0],
        inputs=sum(len(one) for one, _ in pairs),
        cosine=min(1.0, float(np.mean([one.cosine_mean for one in differences]))),
        cosine_min=min(one.cosine_min for one in differences),
        top1=top1,
        not_finite=sum(one.not_finite for one in differences),
    )
    return agreement, ""


def _shape(cases: Sequence[Mapping[str, Array]], names: Sequence[str]) -> tuple[int, ...]:
    return cases[0][names[0]].shape
