"""What tells a search how long its candidates take: this machine, others that share the work, or arithmetic."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import msgspec
import numpy as np

from edgecomp.api._build import build
from edgecomp.api._measure import Plan, measure_opened
from edgecomp.api._progress import Progress
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.errors import RunError
from edgecomp.estimates import applied_for, estimate_graph
from edgecomp.parity import read_goldens
from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.machine import Machine
from edgecomp.profiles.result import Result
from edgecomp.remote import read_place, run_there
from edgecomp.runners.chain import open_graph
from edgecomp.search.result import Figure, Measured
from edgecomp.search.run import Made
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

    def __call__(self, made: Sequence[Made]) -> Iterator[tuple[str, Measured]]:
        """Yield what each takes."""
        for one in made:
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
            yield one.name, measured_of(profile, where="local")


class EstimateThere:
    """Computes what graphs would take on a target that is not here."""

    def __init__(self, target: Target, *, say: Progress) -> None:
        self._target, self._say, self._applied = target, say, applied_for(target.name)

    def __call__(self, made: Sequence[Made]) -> Iterator[tuple[str, Measured]]:
        """Yield what each takes."""
        from edgecomp.export.costs import count_costs

        for one in made:
            self._say(f"estimating {one.name} for {self._target.name}")
            found = estimate_graph(count_costs(one.bundle / one.model), self._target, applied=self._applied)
            yield (
                one.name,
                Measured(
                    source="estimated",
                    where=self._target.name,
                    p50_us=Figure(found.mid_us, found.low_us, found.high_us),
                    note=f"estimated, -{_percent(1 - found.low_us / found.mid_us)} to +{_percent(found.error)} %",
                ),
            )


class MeasureThere:
    """Has `edgecomp profile` run on other machines; several share the work, each taking the next candidate.

    Args:
        on: addresses, as `--on` takes them.
        runner, threads: as in `profile`; engines are built there first.
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
        check: Callable[[Machine], None] = lambda machine: None,
    ) -> None:
        self._on = {url: read_place(url).host for url in on}
        self._runner, self._duration_s, self._say, self._check = runner, duration_s, say, check
        self._words = [f"--runner={runner}"] if runner != "onnxruntime" else []
        self._words += [f"--threads={threads}"] if threads else []
        self.machine: Machine | None = None

    def __call__(self, made: Sequence[Made]) -> Iterable[tuple[str, Measured]]:
        """Yield what each takes, as soon as a host has found it."""
        if self.machine is None and made:
            self._greet(made[0])
        waiting: queue.SimpleQueue[Made] = queue.SimpleQueue()
        for one in made:
            waiting.put(one)
        done: queue.SimpleQueue[tuple[str, Measured] | BaseException] = queue.SimpleQueue()

        def work(url: str) -> None:
            while True:
                try:
                    one = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((one.name, self._measure(url, one)))
                except BaseException as error:  # noqa: BLE001 - raised where the results are awaited
                    done.put(error)
                    return

        threads = [threading.Thread(target=work, args=(url,), daemon=True) for url in self._on]
        for thread in threads:
            thread.start()
        failed: BaseException | None = None
        for _ in made:
            found = done.get()
            if isinstance(found, BaseException):
                failed = found
                break
            yield found
        if failed is not None:
            raise failed

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
                raise RunError(f"{self._on[url]}: no engine of {one.name} could be built; what it said stands above")
        run = run_there(one.bundle, "profile", [*words, *budget], on=url, say=self._say)
        if run.document is None:
            raise RunError(f"{run.host}: `edgecomp profile` ended with {run.code}; what it said stands above")
        try:
            return msgspec.convert(run.document, Result)
        except msgspec.ValidationError as error:
            raise RunError(f"{run.host} answered with a result of another edgecomp ({error})") from None

    def _greet(self, one: Made) -> None:
        """Learn what each host is, and refuse those that are not of one kind."""
        machines: dict[str, Machine] = {}
        for url in self._on:
            machines[url] = self._profile(url, one, _HELLO_S).machine
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


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
