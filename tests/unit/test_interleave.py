"""Taking turns: drift meets all alike, orders by a seed, and intervals that cover what they say."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from edgecomp.errors import InvalidSpec
from edgecomp.profiles.interleave import Interleaved, interleave
from edgecomp.profiles.ratios import carries_interval, mean_ratio, paired_ratio, unpaired_ratio


class Machine:
    """A clock that callables push on, slower and slower."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now_ns, self.drift, self.log = 0, drift, list[str]()

    def run(self, name: str, us: float) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.now_ns += round(us * 1000 * (1 + self.drift * self.now_ns / 1e9))

        return call

    def sleep(self, seconds: float) -> None:
        self.log.append("-")
        self.now_ns += round(seconds * 1e9)

    def interleave(self, times: dict[str, float], **words: object) -> Interleaved:
        runs = {name: self.run(name, us) for name, us in times.items()}
        return interleave(runs, clock=lambda: self.now_ns, sleep=self.sleep, **words)  # type: ignore[arg-type]


def test_each_has_one_warmed_turn_a_round() -> None:
    machine = Machine()
    found = machine.interleave({"a": 100.0, "b": 300.0}, rounds=3, repeats=2, settle_s=0.1, seed=4)
    assert found.samples_us == {"a": (100.0,) * 3, "b": (300.0,) * 3}
    assert (found.rounds, found.repeats, found.seed) == (3, {"a": 2, "b": 2}, 4)
    said = "".join(machine.log)
    assert said[:4] == "aabb"  # the warm-up; a turn is a pause, one call that is not timed, and two that are
    assert said[4:] == "".join(f"-{name * 3}" for order in found.orders for name in order)


def test_orders_are_shuffled_by_their_seed() -> None:
    times = dict.fromkeys("abcde", 10.0)
    one, again, other = (Machine().interleave(times, rounds=8, repeats=1, seed=seed) for seed in (1, 1, 2))
    assert one.orders == again.orders != other.orders
    assert len(set(one.orders)) > 5
    assert all(sorted(order) == list("abcde") for order in one.orders)


def test_short_runs_fill_a_turn_and_long_ones_are_taken_alone() -> None:
    found = Machine().interleave({"short": 10.0, "long": 50_000.0, "none": 0.0}, rounds=1, turn_s=0.01)
    assert found.repeats == {"short": 1000, "long": 1, "none": 1000}


def test_rounds_go_on_for_the_duration() -> None:
    found = Machine().interleave({"a": 1000.0, "b": 1000.0}, rounds=2, repeats=1, settle_s=0, duration_s=0.1)
    assert found.rounds == 25  # a round takes 4 ms


def test_drift_meets_all_alike() -> None:
    """The machine becomes several times slower while it measures, and the ratio of one round in turn hardly moves."""
    found = Machine(drift=2.0).interleave({"a": 1000.0, "b": 1100.0}, rounds=40, repeats=1, settle_s=0, seed=0)
    own, base = found.samples_us["b"], found.samples_us["a"]
    assert max(own) / min(own) > 1.3
    ratio = paired_ratio(own, base)
    assert ratio.value == pytest.approx(1.1, abs=0.02)
    assert (ratio.pace, ratio.way, ratio.count) == ("slower", "paired", 40)


def test_the_collector_is_left_as_it_was() -> None:
    seen = []
    assert gc.isenabled()
    interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=2, repeats=1)
    assert gc.isenabled()
    assert seen[-1] is False

    def fail() -> None:
        if not gc.isenabled():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interleave({"a": fail}, rounds=1, repeats=1)
    assert gc.isenabled()


def test_progress_reaches_one() -> None:
    shares: list[float] = []
    Machine().interleave({"a": 10.0}, rounds=4, repeats=1, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"rounds": 0}, "0 rounds"),
        ({"rounds": 1, "settle_s": math.nan}, "settle nan s"),
        ({"rounds": 1, "duration_s": math.inf}, "duration inf s"),
        ({"rounds": 1, "repeats": -1}, "-1 repeats"),
    ],
)
def test_plans_that_cannot_be(words: dict[str, float], text: str) -> None:
    with pytest.raises(InvalidSpec, match=text):
        interleave({"a": lambda: None}, **words)  # type: ignore[arg-type]


# -- intervals ------------------------------------------------------------------------------------------------


def covered(ratio_of: Callable[[random.Random], tuple[float, float]], truth: float, times: int) -> float:
    chance = random.Random(0)
    return sum(low <= truth <= high for low, high in (ratio_of(chance) for _ in range(times))) / times


def skewed(chance: random.Random, scale: float) -> float:
    """Times as they are: a floor, and a tail to the right."""
    return scale * (1 + chance.expovariate(5.0))


def test_paired_interval_covers_the_ratio_as_often_as_it_says() -> None:
    def once(chance: random.Random) -> tuple[float, float]:
        drift = [1 + 0.5 * math.sin(k) for k in range(20)]
        own = [skewed(chance, 1.3 * d) for d in drift]
        found = paired_ratio(own, [skewed(chance, d) for d in drift])
        return found.low, found.high

    assert 0.94 <= covered(once, 1.3, 500) <= 1.0


def test_unpaired_interval_covers_the_ratio_as_often_as_it_says() -> None:
    def once(chance: random.Random) -> tuple[float, float]:
        own = [skewed(chance, 0.8) for _ in range(60)]
        found = unpaired_ratio(own, [skewed(chance, 1.0) for _ in range(90)])
        return found.low, found.high

    assert 0.93 <= covered(once, 0.8, 300) <= 0.99


def test_bootstrap_by_order_statistics_is_the_bootstrap() -> None:
    chance = np.random.default_rng(3)
    own, base = chance.exponential(1.0, 41), chance.exponential(1.0, 31)
    draws = [np.sort(chance.choice(own, 41))[20] / np.sort(chance.choice(base, 31))[15] for _ in range(4000)]
    found = unpaired_ratio(own.tolist(), base.tolist())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))), rel=0.05)
    assert found == unpaired_ratio(own.tolist(), base.tolist())  # the seed is fixed


def test_mean_interval_covers_the_ratio_as_often_as_it_says() -> None:
    def once(chance: random.Random) -> tuple[float, float]:
        own = [skewed(chance, 2.0) for _ in range(50)]
        base = [skewed(chance, 1.0) for _ in range(50)]
        found = mean_ratio(own, base, value=sum(own) / sum(base))
        return found.low, found.high

    assert 0.92 <= covered(once, 2.0, 500) <= 0.98


def test_alike_is_no_difference() -> None:
    chance = random.Random(1)
    own, base = ([skewed(chance, 1.0) for _ in range(50)] for _ in range(2))
    assert paired_ratio(own, base).pace == "no difference"
    assert unpaired_ratio(own, base).pace == "no difference"


def test_clear_differences() -> None:
    chance = random.Random(2)
    own, base = ([skewed(chance, scale) for _ in range(50)] for scale in (1.0, 2.0))
    assert paired_ratio(own, base).pace == unpaired_ratio(own, base).pace == "faster"
    assert paired_ratio(base, own).pace == unpaired_ratio(base, own).pace == "slower"


def test_too_few_say_nothing() -> None:
    assert paired_ratio([1.0] * 5, [9.0] * 5).pace == "too few to tell"
    assert paired_ratio([1.0] * 6, [9.0] * 6).pace == "faster"
    few = unpaired_ratio([1.0, 2.0], [4.0, 8.0])
    assert (few.pace, few.low, few.high, few.count) == ("too few to tell", 0.125, 0.5, 2)
    assert not carries_interval(100, 99)
    assert carries_interval(1000, 99)
    assert unpaired_ratio([1.0] * 100, [2.0] * 100, percent=99).pace == "too few to tell"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: paired_ratio([1.0], [1.0, 2.0]), "1 and 2 rounds cannot be paired"),
        (lambda: unpaired_ratio([], [1.0]), "0 and 1 samples"),
        (lambda: unpaired_ratio([1.0, math.nan], [1.0]), "1 of 3 samples are no times: nan"),
        (lambda: paired_ratio([1.0, 2.0], [0.0, 1.0]), "1 of 4 samples are no times: 0.0"),
        (lambda: mean_ratio([], [1.0], value=1.0), "0 and 1 samples"),
    ],
)
def test_no_ratio(call: Callable[[], object], text: str) -> None:
    with pytest.raises(InvalidSpec, match=text):
        call()
