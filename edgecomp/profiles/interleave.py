"""Times several callables in one run, taking turns, so that the machine's drift meets all of them alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping

import msgspec

from edgecomp.errors import InvalidSpec

__all__ = ["SETTLE_S", "Interleaved", "interleave"]

SETTLE_S = 0.2
_MOST_REPEATS = 1000
_WARM_RUNS = 10
_WARM_S = 1.0


class Interleaved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What taking turns gave.

    Attributes:
        samples_us: by name, of each round: microseconds of one call, the median of the turn's calls.
        repeats: by name, calls in each turn.
        rounds: how often each had its turn.
        orders: the names in the order of each round's turns.
        seed: of these orders.
    """

    samples_us: dict[str, tuple[float, ...]]
    repeats: dict[str, int]
    rounds: int
    orders: tuple[tuple[str, ...], ...]
    seed: int


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seed: int = 0,
    repeats: int = 0,
    turn_s: float = 0.02,
    duration_s: float = 0.0,
    settle_s: float = SETTLE_S,
    progress: Callable[[float], None] = lambda share: None,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> Interleaved:
    """Time each callable once in every round; the order of a round is shuffled.

    **Order.** A fixed order would let each always run behind the same other one, whose heat and cache lines it finds.
    So every round has an order of its own, drawn with `seed`: the same seed gives the same orders.

    **Turns.** Before a turn nothing runs for `settle_s`: the worker threads of the one before spin for a while after
    its last run, and would take a core from this one. Then comes one call that is not timed, which finds its caches
    and threads again, then the timed calls, each by itself; their median is the sample, as a result file's samples are
    single calls. Python's garbage collector is off meanwhile.

    **Warm-up.** Before the first round each is called until 10 calls or a second are spent, and twice at least.

    Args:
        runs: callables by name, each of which returns when its result is there.
        rounds: how many times round.
        seed: of the orders.
        repeats: timed calls in each turn; 0: as many for each as fill `turn_s`, by its time in the warm-up.
        turn_s: see `repeats`.
        duration_s: rounds go on until so many seconds have passed since the first one began; `rounds` are the least.
        settle_s: pause before each turn; 0 where nothing spins: one thread, or a GPU.
        progress: told the share that is done, from 0 to 1, between two rounds.
        clock: nanoseconds that only grow.
        sleep: waits for seconds.
    """
    if not runs or rounds < 1 or repeats < 0:
        raise InvalidSpec(
            f"{len(runs)} runs, {rounds} rounds of {repeats} repeats: give one run and one round at least"
        )
    if not (0 <= settle_s < math.inf and 0 < turn_s < math.inf and 0 <= duration_s < math.inf):
        raise InvalidSpec(f"settle {settle_s} s, turn {turn_s} s and duration {duration_s} s must be numbers from 0 on")
    calls = {name: repeats or _fitting(_warm_up(run, clock), turn_s) for name, run in runs.items()}
    if repeats:
        for run in runs.values():
            _warm_up(run, clock, most=2)
    chance = random.Random(seed)  # noqa: S311 - an order, not a secret
    samples: dict[str, list[float]] = {name: [] for name in runs}
    orders: list[tuple[str, ...]] = []
    was_enabled = gc.isenabled()
    try:
        gc.collect()
        gc.disable()
        begun = clock()
        while len(orders) < rounds or clock() - begun < duration_s * 1e9:
            order = list(runs)
            chance.shuffle(order)
            for name in order:
                if settle_s and len(runs) > 1:
                    sleep(settle_s)
                samples[name].append(_turn(runs[name], calls[name], clock))
            orders.append(tuple(order))
            done = len(orders) / rounds
            progress(min(done, 1.0 if not duration_s else (clock() - begun) / (duration_s * 1e9), 1.0))
    finally:
        if was_enabled:
            gc.enable()
    return Interleaved(
        samples_us={name: tuple(values) for name, values in samples.items()},
        repeats=calls,
        rounds=len(orders),
        orders=tuple(orders),
        seed=seed,
    )


def _turn(run: Callable[[], object], calls: int, clock: Callable[[], int]) -> float:
    """Return microseconds of a call: one that is not timed, then the median of so many."""
    run()
    times = []
    for _ in range(calls):
        started = clock()
        run()
        times.append(clock() - started)
    return statistics.median(times) / 1000


def _warm_up(run: Callable[[], object], clock: Callable[[], int], most: int = _WARM_RUNS) -> float:
    """Call until it is warm; return the median in microseconds, without the first, which loads what is lazy."""
    times: list[float] = []
    begun = clock()
    while len(times) < 2 or (len(times) < most and clock() - begun < _WARM_S * 1e9):
        started = clock()
        run()
        times.append((clock() - started) / 1000)
    return statistics.median(times[1:])


def _fitting(call_us: float, turn_s: float) -> int:
    """Return how many calls fill a turn."""
    return max(1, min(_MOST_REPEATS, round(turn_s * 1e6 / max(call_us, 1e-3))))
