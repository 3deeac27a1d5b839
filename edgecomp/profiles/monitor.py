"""Watches clocks, power and heat while a measurement runs, at a cost that is measured too.

A thread wakes every 100 ms, reads some files and asks NVML, and keeps what it got as it came; it is understood only
when the watch is over. It holds the interpreter's lock for some tens of microseconds a sample, and not while the kernel
or the driver answers. Where a Jetson's rails are not readable as files, tegrastats runs as a child, and a second thread
keeps its lines.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from edgecomp.errors import InvalidSpec, RunError
from edgecomp.profiles import sysfs
from edgecomp.profiles.device import open_nvml, read_state
from edgecomp.profiles.nvml import Nvml, NvmlSampler, throttle_words
from edgecomp.profiles.sampling import Files, Known, TegrastatsChild
from edgecomp.profiles.state import Sample, Watch
from edgecomp.profiles.tegra import is_jetson, parse_tegrastats

__all__ = ["Monitor", "energy_mj"]

_MOST_SAMPLES = 6000  # kept in a watch: ten minutes at 100 ms
_COARSE_S = 0.2  # ticks are too coarse to tell who worked in a shorter time
_AVERAGED_S = 2.0  # a watch shorter than this says little by a power that is an average over a second

Raw = tuple[int, tuple[bytes, ...], tuple[int | None, ...] | None]


class Monitor:
    """Watches from the beginning of a `with` block to its end; `watch` is there afterwards.

    Where nothing can be read, no thread starts, and the watch says so.

    Args:
        interval_ms: between two samples, 10 to 60000.
        root: of the file system; for another one than "/", neither NVML nor tegrastats is used.
        nvml: to be asked; it is left open. Without one it is opened, where there is one.
        tegrastats: the program to read where rails are not files; "" for the one on PATH of a Jetson.
    """

    def __init__(
        self,
        *,
        interval_ms: float = 100.0,
        root: Path = Path("/"),
        nvml: Nvml | None = None,
        tegrastats: str = "",
    ) -> None:
        if not 10 <= interval_ms <= 60_000:
            raise InvalidSpec(
                f"interval of {interval_ms} ms must be from 10 to 60000: shorter ones disturb, longer ones miss"
            )
        self._interval_ms, self._root = interval_ms, root
        self._nvml, self._owns_nvml = nvml, False
        self._program = tegrastats
        self._files: Files | None = None
        self._sampler: NvmlSampler | None = None
        self._child: TegrastatsChild | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._raw: list[Raw] = []
        self._cost_ns = 0
        self._watch: Watch | None = None

    @property
    def watch(self) -> Watch:
        """What was seen.

        Raises:
            RunError: the `with` block is not over.
        """
        if self._watch is None:
            raise RunError("the watch is not over; read `watch` behind the `with` block")
        return self._watch

    def __enter__(self) -> Monitor:
        try:
            self._open()
        except BaseException:  # also Ctrl-C: no child and no file stays behind
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop.set()
            if self._thread is not None:
                self._thread.join()
                self._take()
            if kind is None:
                self._watch = self._conclude()
        finally:
            self._close()

    def _open(self) -> None:
        if self._nvml is None and self._root == Path("/"):
            with suppress(RunError):  # the state says why there is none
                self._nvml, self._owns_nvml = open_nvml(), True
        self._before = read_state(self._root, nvml=self._nvml)
        self._counter = self._nvml.energy_mj() if self._nvml is not None else None
        sampler = self._nvml.sampler() if self._nvml is not None else None
        if sampler is not None and any(value is not None for value in sampler.sample()):  # a Jetson's may say nothing
            self._sampler = sampler
        self._files = Files(self._root)
        program = self._find_tegrastats()
        self._ticks = sysfs.busy_jiffies(self._root), time.process_time()
        self._start_ns = time.perf_counter_ns()
        if program and not self._files.rails:
            self._child = TegrastatsChild(program, self._interval_ms)
        if self._sampler is not None or self._files.descriptors:
            self._take()
            thread = threading.Thread(target=self._run, name="edgecomp-monitor", daemon=True)
            thread.start()
            self._thread = thread

    def _find_tegrastats(self) -> str:
        if self._program or self._root != Path("/") or not is_jetson(self._root):
            return self._program
        return shutil.which("tegrastats") or ""

    def _run(self) -> None:
        step = self._interval_ms / 1000
        due = time.monotonic() + step
        while not self._stop.wait(max(due - time.monotonic(), 0.0)):
            self._take()
            due = max(due + step, time.monotonic())

    def _take(self) -> None:
        """Keep one sample as it came."""
        start = time.thread_time_ns()
        files = self._files.sample() if self._files is not None else ()
        self._raw.append((time.perf_counter_ns(), files, self._sampler.sample() if self._sampler is not None else None))
        self._cost_ns += time.thread_time_ns() - start

    def _conclude(self) -> Watch:
        end_ns = time.perf_counter_ns()
        ticks = sysfs.busy_jiffies(self._root), time.process_time()
        counter = self._nvml.energy_mj() if self._nvml is not None else None
        lines = self._child.stop() if self._child is not None else []
        after = read_state(self._root, nvml=self._nvml)
        samples = sorted([*self._understood(), *self._from_lines(lines)], key=lambda sample: sample.time_s)
        duration_s = (end_ns - self._start_ns) / 1e9
        energy = energy_mj(samples, duration_s)
        rails = _total(tuple(energy))
        total = sum(energy[rail] for rail in rails) if rails else None
        other, stolen = _others(self._ticks, ticks, duration_s)
        risen = counter - self._counter if counter is not None and self._counter is not None else None
        return Watch(
            before=self._before,
            after=after,
            duration_s=duration_s,
            interval_ms=self._interval_ms,
            sources=self._sources(lines),
            samples=_thinned(samples),
            energy_mj=energy,
            total_rails=rails,
            total_energy_mj=total,
            mean_power_mw=total / duration_s if total is not None and duration_s > 0 else None,
            counter_energy_mj=None if risen is None or risen < 0 else float(risen),
            other_cores=other,
            stolen_cores=stolen,
            sample_cost_us=self._cost_ns / 1000 / len(self._raw) if self._raw else None,
            notes=tuple(self._notes(samples, energy, rails, duration_s)),
        )

    def _sources(self, lines: list[tuple[int, bytes]]) -> tuple[str, ...]:
        names = ["nvml"] if self._sampler is not None else []
        names += self._files.names if self._files is not None else []
        return (*names, "tegrastats") if lines else tuple(names)

    def _notes(
        self, samples: list[Sample], energy: dict[str, float], rails: tuple[str, ...], duration_s: float
    ) -> Iterable[str]:
        if not samples:
            yield "nothing to watch: neither NVML nor files nor tegrastats give clocks or power here"
        if self._child is not None and self._child.fault:
            yield self._child.fault
        if energy and not rails:
            yield f"total power unknown: nothing says which of the rails {', '.join(energy)} add up to it"
        if "gpu" in rails:
            yield "power is that of the GPU's board alone, without the CPU and its memory"
            if self._sampler is not None and self._sampler.power_is_averaged:
                short = f", and the watch took {duration_s:.2f} s" if duration_s < _AVERAGED_S else ""
                yield f"power is an average over about the last second{short}"
        times = [sample.time_s for sample in samples if sample.rails_mw]
        gap = max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)
        if gap > 5 * self._interval_ms / 1000:
            yield f"no power was read for {gap:.2f} s; the energy takes it as a straight line"
        if len(samples) > _MOST_SAMPLES:
            yield f"of {len(samples)} samples {len(_thinned(samples))} are kept; the energy is of all"

    def _understood(self) -> Iterable[Sample]:
        for time_ns, files, answer in self._raw:
            time_s = max((time_ns - self._start_ns) / 1e9, 0.0)
            known = self._files.understand(files) if self._files is not None else Known()
            reasons = known.cooling
            if answer is not None:
                clock, memory, celsius, power, mask = (None if word is None else float(word) for word in answer)
                known.gpu_mhz, known.memory_mhz = clock or known.gpu_mhz, memory or known.memory_mhz
                known.celsius = known.celsius if celsius is None else celsius
                if power is not None:
                    known.rails_mw["gpu"] = power
                if mask is not None:
                    reasons = (*throttle_words(int(mask)), *(reasons or ()))
            yield Sample(
                time_s=time_s,
                rails_mw=known.rails_mw,
                gpu_mhz=known.gpu_mhz,
                memory_mhz=known.memory_mhz,
                cpu_mhz=known.cpu_mhz,
                temperature_c=known.celsius,
                throttle_reasons=reasons,
            )

    def _from_lines(self, lines: list[tuple[int, bytes]]) -> Iterable[Sample]:
        for time_ns, line in lines:
            said = parse_tegrastats(line.decode(errors="replace"))
            if said is None:
                continue
            zones = said.temperatures_c.items()
            heat = {zone.lower(): celsius for zone, celsius in zones if not zone.startswith("PMIC")}
            yield Sample(
                time_s=max((time_ns - self._start_ns) / 1e9, 0.0),
                rails_mw=said.rails_mw,
                gpu_mhz=said.gpu_mhz,
                memory_mhz=said.emc_mhz,
                cpu_mhz=max((clock for clock in said.cpu_mhz if clock), default=None),
                temperature_c=heat.get("gpu", max(heat.values(), default=None)),
            )

    def _close(self) -> None:
        self._stop.set()
        if self._child is not None:
            self._child.stop()
        if self._thread is not None:
            self._thread.join()
        if self._files is not None:
            self._files.close()
        if self._owns_nvml and self._nvml is not None:
            self._nvml.close()


def energy_mj(samples: Sequence[Sample], duration_s: float) -> dict[str, float]:
    """Return the energy of each rail: the trapezoid of its power over time, held level before and behind its samples.

    Milliwatts times seconds are millijoules. A rail that was read once counts with that power all along.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        for rail, power in sample.rails_mw.items():
            series.setdefault(rail, []).append((sample.time_s, power))
    return {rail: _trapezoid(points, duration_s) for rail, points in series.items()}


def _trapezoid(points: list[tuple[float, float]], end_s: float) -> float:
    total = points[0][0] * points[0][1] + max(end_s - points[-1][0], 0.0) * points[-1][1]
    for (start, before), (stop, after) in itertools.pairwise(points):
        total += (stop - start) * (before + after) / 2
    return total


def _total(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the rails to add up: a Jetson's, which has the GPU's in it, or else the GPU's."""
    return sysfs.total_rails(names) or tuple(name for name in names if name == "gpu")


def _others(
    before: tuple[tuple[int, int] | None, float], after: tuple[tuple[int, int] | None, float], duration_s: float
) -> tuple[float | None, float | None]:
    """Return how many cores other processes, and a hypervisor, kept on average; None where it is not to be told."""
    if before[0] is None or after[0] is None or duration_s < _COARSE_S:
        return None, None
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    busy_s, stolen_s = ((new - old) * tick_s for old, new in zip(before[0], after[0], strict=True))
    other_s = busy_s - (after[1] - before[1])
    return max(other_s / duration_s, 0.0), max(stolen_s / duration_s, 0.0)


def _thinned(samples: list[Sample]) -> tuple[Sample, ...]:
    """Return so few samples that a result file stays readable, evenly spread."""
    return tuple(samples[:: -(-len(samples) // _MOST_SAMPLES)]) if samples else ()
