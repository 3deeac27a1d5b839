"""What tells a search how long its candidates take: this machine, others that share the work, or arithmetic."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import msgspec
import numpy as np

from edgecomp.api._build import build
from edgecomp.api._measure import Plan, measure_opened
from edgecomp.api._progress import Progress
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.errors import BuildError, RunError, TargetMismatch
from edgecomp.estimates import applied_for, estimate_graph
from edgecomp.parity import read_goldens
from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.machine import Machine
from edgecomp.profiles.result import Result
from edgecomp.remote import read_place, run_there
from edgecomp.runners.chain import open_graph
from edgecomp.search.result import Figure, Measured
from edgecomp.search.run import Failed, Made
from edgecomp.specs import Target

__all__ = ["KIND", "EstimateThere", "MeasureHere", "MeasureThere", "measured_of"]

ENGINES = ("tensorrt", "rtx")
_HELLO_S = 0.05  # of measuring, to see what a host is
KIND = ("cpu", "cores", "gpu", "os")  # of a machine: hosts that differ in one of these are not of one kind


def measured_of(profile: LatencyProfile, *, where: str) -> Measured:
    """Return what a search keeps of a profile."""
    p50, p99 = (
        Figure(one.us, one.low_us, one.high_us, one.is_indicative)
        for one in (profile.percentiles["p50"], profile.percentiles["p99"])
    )
    return Measured(
        source="measured",
        where=where,
        p50_us=p50,
        p99_us=p99,
        max_us=profile.max_us,
        samples=profile.num_samples,
        energy_mj=profile.energy_mj,
        is_steady=not profile.marks,
        note="; ".join(profile.marks),
    )


class MeasureHere:
    """Times graphs on this machine, one after the other, as `edgecomp profile` does."""

    def __init__(self, plan: Plan, *, say: Progress) -> None:
        self._plan, self._say = plan, say

    def __call__(self, made: Sequence[Made]) -> Iterator[tuple[str, Measured | Failed]]:
        """Yield what each takes."""
        for one in made:
            try:
                found: Measured | Failed = self._measure(one)
            except TargetMismatch:
                raise
            except (BuildError, RunError) as error:
                found = Failed(str(error))
            yield one.name, found

    def _measure(self, one: Made) -> Measured:
        if self._plan.runner in ENGINES:
            build(one.bundle, target="auto", runtime=self._plan.runner, progress=self._say)
        opened = open_bundle(one.bundle, verify=False)
        graph = next(graph for graph in opened.manifest.graphs if graph.model == one.model)
        goldens = read_goldens(opened.path)
        self._say(f"timing {one.name} for {self._plan.duration_s:g} s")
        profile = measure_opened(
            self._plan,
            partial(open_graph, self._plan.runner, opened, graph, threads=self._plan.threads),
            {
                spec.name: np.ascontiguousarray(goldens[golden_key("input", "seeded", spec.name)][: graph.batch])
                for spec in graph.inputs
            },
            model=one.model,
            batch=graph.batch,
            say=self._say,
        )
        return measured_of(profile, where="local")


class EstimateThere:
    """Computes what graphs would take on a target that is not here."""

    def __init__(self, target: Target, *, say: Progress) -> None:
        self._target, self._say, self._applied = target, say, applied_for(target.name)

    def __call__(self, made: Sequence[Made]) -> Iterator[tuple[str, Measured | Failed]]:
        """Yield what each takes."""
        from edgecomp.export.costs import count_costs

        for one in made:
            self._say(f"estimating {one.name} for {self._target.name}")
            try:
                costs = count_costs(one.bundle / one.model)
            except RunError as error:
                yield one.name, Failed(str(error))
                continue
            found = estimate_graph(costs, self._target, applied=self._applied)
            yield (
                one.name,
                Measured(
                    source="estimated",
                    where=self._target.name,
                    p50_us=Figure(found.mid_us, found.low_us, found.high_us),
                    note=f"estimated, -{_percent(1 - found.low_us / found.mid_us)} to +{_percent(found.error)} %",
                ),
            )


class _NotRun(RunError):
    """A host works, and a candidate does not run on it."""


_Answer = tuple[str, Made, Measured | BaseException]


class MeasureThere:
    """Has `edgecomp profile` run on other machines; several share the work, each taking the next candidate.

    Args:
        on: addresses, as `--on` takes them.
        runner, threads: as in `profile`; engines are built there first.
        target: that the hosts must be; "": whatever they are.
        check: is told the machine that measured, and refuses one that does not fit; called once.
    """

    def __init__(
        self,
        on: Sequence[str],
        *,
        runner: str,
        threads: int,
        duration_s: float,
        say: Progress,
        target: str = "",
        check: Callable[[Machine], None] = lambda machine: None,
    ) -> None:
        self._on = {url: read_place(url).host for url in on}
        self._runner, self._duration_s, self._say, self._check = runner, duration_s, say, check
        self._target = target
        self._words = [f"--runner={runner}"] if runner != "onnxruntime" else []
        self._words += [f"--threads={threads}"] if threads else []
        self._usable = list(self._on)
        self.machine: Machine | None = None
        self.left_out: list[str] = []  # hosts, each with its reason

    def __call__(self, made: Sequence[Made]) -> Iterator[tuple[str, Measured | Failed]]:
        """Yield what each takes, as soon as a host has found it.

        A candidate that does not run on one host goes to the others, and has failed where it runs on none. A host that
        cannot be used any more is left out, and what it had goes to the others.

        Raises:
            RunError: no host is left.
        """
        if self.machine is None and made:
            self._greet(made)
        waiting, idle = list(made), list(self._usable)
        why: dict[str, dict[str, str]] = {one.name: {} for one in made}  # of each candidate, by host
        done: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        while True:
            for one in [one for one in waiting if all(url in why[one.name] for url in self._usable)]:
                waiting.remove(one)
                yield one.name, Failed("; ".join(why[one.name].values()))
            for url in tuple(idle):
                for one in [one for one in waiting if url not in why[one.name]][:1]:
                    waiting.remove(one)
                    idle.remove(url)
                    threading.Thread(target=self._answer, args=(url, one, done), daemon=True).start()
            if len(idle) == len(self._usable):
                return
            url, one, found = done.get()
            if isinstance(found, Measured):
                idle.append(url)
                yield one.name, found
                continue
            waiting.insert(0, one)
            if isinstance(found, _NotRun):
                idle.append(url)
                why[one.name][url] = str(found)
                continue
            self._usable.remove(url)
            if not isinstance(found, RunError) or not self._usable:
                raise found
            self.left_out.append(f"{self._on[url]} was left out, and others took its share: {found}")
            self._say(self.left_out[-1])

    def _answer(self, url: str, one: Made, done: queue.SimpleQueue[_Answer]) -> None:
        found: Measured | BaseException
        try:
            found = self._measure(url, one)
        except BaseException as error:  # noqa: BLE001 - told apart where it is awaited
            found = error
        done.put((url, one, found))

    def _measure(self, url: str, one: Made) -> Measured:
        profile = self._profile(url, one, self._duration_s).profiles
        found = next((item for item in profile if item.model == one.model), None)
        if found is None:
            raise RunError(f"{self._on[url]} measured {', '.join(item.model for item in profile)}, not {one.model}")
        return measured_of(found, where=self._on[url])

    def _profile(self, url: str, one: Made, duration_s: float) -> Result:
        words = [f"--duration={duration_s:g}", "--no-stages", *self._words]
        budget = []
        if one.family.role != "plain":  # whose bundle holds one budget, which is measured beside it
            budget = [f"--budget={one.tokens}"]
        if self._runner in ENGINES:
            build_words = ["--target=auto", f"--runtime={self._runner}", *budget]
            if run_there(one.bundle, "build", build_words, on=url, say=self._say).code:
                raise _NotRun(f"{self._on[url]}: no engine of {one.name} could be built; what it said stands above")
        run = run_there(one.bundle, "profile", [*words, *budget], on=url, say=self._say)
        if run.document is None:
            raise _NotRun(
                f"{run.host}: `edgecomp profile` ended with {run.code} for {one.name}; what it said stands above"
            )
        try:
            return msgspec.convert(run.document, Result)
        except msgspec.ValidationError as error:
            raise RunError(f"{run.host} answered with a result of another edgecomp ({error})") from None

    def _greet(self, made: Sequence[Made]) -> None:
        """Learn what each host is, and refuse those that are not of one kind, or another target than was named."""
        machines: dict[str, Machine] = {}
        for url in self._on:
            hello = self._hello(url, made)
            if self._target and hello.target != self._target:
                raise RunError(
                    f"{self._on[url]} is no {self._target}: what {self._runner} measures there counts as "
                    f"{hello.target!r}. Name the --target that it is, another --runner, or none, and what is there is "
                    "measured"
                )
            machines[url] = hello.machine
        first = next(iter(machines))
        for url, machine in machines.items():
            for field in KIND:
                mine, others = getattr(machines[first], field), getattr(machine, field)
                if mine != others:
                    raise RunError(
                        f"{self._on[first]} and {self._on[url]} are not of one kind: {field} is {mine!r} and "
                        f"{others!r}. Their times cannot stand in one table; leave one of them out"
                    )
        self._check(machines[first])
        self.machine = machines[first]

    def _hello(self, url: str, made: Sequence[Made]) -> Result:
        """Return a result of the first graph that runs there."""
        problem: _NotRun | None = None
        for one in made:
            try:
                return self._profile(url, one, _HELLO_S)
            except _NotRun as error:
                problem = error
        raise problem or RunError(f"{self._on[url]} was given nothing to run")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
