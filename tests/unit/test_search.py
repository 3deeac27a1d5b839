"""A search as a whole, with fakes for what exports, measures and judges; and the real ones on the smallest models."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from edgecomp import api
from edgecomp.api import _search_measure
from edgecomp.api._measure import Plan
from edgecomp.api._search_export import Exporter, made_of
from edgecomp.api._search_measure import MeasureThere
from edgecomp.bundle import open_bundle
from edgecomp.errors import InvalidSpec, ParityError, RunError
from edgecomp.profiles.latency import LatencyProfile, percentiles_of
from edgecomp.profiles.machine import Machine
from edgecomp.profiles.result import Result
from edgecomp.profiles.result import Subject as ResultSubject
from edgecomp.search.outcome import Outcome
from edgecomp.search.recipe import recipe_text, winner_recipe
from edgecomp.search.result import Agreement, Figure, Limits, Measured, SearchResult, read_search
from edgecomp.search.run import Ask, Failed, Made, Tools, run_search
from edgecomp.search.space import Family, Subject, name_of
from edgecomp.search.state import Journal
from edgecomp.specs import BudgetRule, load_recipe, method_names

COUNTS = tuple(range(16, 197, 16))
SPEED = {"fp32": 1.0, "fp16": 1.4, "int8": 0.5}


class Shop:
    """Exports, measures and judges, by formulas; remembers what it was asked."""

    def __init__(self) -> None:
        self.exported: list[tuple[str, tuple[int, ...]]] = []
        self.measured: list[str] = []
        self.judged: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.ms: Callable[[Family, int], float] = lambda family, n: (20 + n / 4) * SPEED[family.precision]
        self.agreement: Callable[[Family, int], float | None] = lambda family, n: n / 200
        self.plain = 0.6  # agreement of the plain model in another precision than fp32
        self.die_at = -1

    def export(self, family: Family, budgets: Sequence[int], *, with_plain: bool) -> list[Made]:
        self.exported.append((family.key, tuple(budgets)))
        for count in budgets:
            if (error := self.fails.get(name_of(family, count))) is not None:
                raise error
        folder = Path("-".join([family.key, *map(str, budgets)]))
        made = [Made(name_of(family, n), family, n, folder, f"m{n}.onnx", n) for n in budgets]
        if with_plain:
            plain = Family("plain", "", family.precision)
            made.append(Made(name_of(plain, 196), plain, 196, folder, "plain.onnx", 400))
        return made

    def measure(self, made: Sequence[Made]) -> Iterator[tuple[str, Measured]]:
        for one in made:
            if len(self.measured) == self.die_at:
                raise KeyboardInterrupt
            self.measured.append(one.name)
            us = 1000 * (
                72 * SPEED[one.family.precision] if one.family.role == "plain" else self.ms(one.family, one.tokens)
            )
            p50, p99 = Figure(us, us * 0.99, us * 1.01), Figure(us * 1.2, us, us * 1.3, True)
            yield one.name, Measured(source="measured", where="local", p50_us=p50, p99_us=p99, samples=100)

    def judge(self, made: Made) -> Agreement | None:
        self.judged.append(made.name)
        if made.family.role == "plain":
            return Agreement(1.0 if made.family.precision == "fp32" else self.plain, None, None, 2)
        found = self.agreement(made.family, made.tokens)
        return None if found is None else Agreement(found, None, None, 2)

    def go(self, path: Path, limits: Limits, **fields: Any) -> Outcome:
        subject = Subject("tome", "vit", "inside", "vit", 196, BudgetRule(default=(40,)))
        precisions = {"precisions": ("fp32",), "budgets": COUNTS, **fields}
        not_there = {"bf16": "no kernels"}
        tools = Tools(self.export, self.measure, self.judge, lambda word: not_there.get(word, ""), ties=False)
        with Journal(path / "journal.jsonl", {"of": 1}) as journal:
            return run_search(Ask(subject=subject, limits=limits, **precisions), tools, journal)


def row(outcome: Outcome, name: str) -> Any:
    return next(one for one in outcome.rows if one.name == name)


def test_the_largest_budget_under_the_limit_wins(tmp_path: Path) -> None:
    shop = Shop()
    found = shop.go(tmp_path, Limits(max_p50_ms=50), baselines=(("attention-pruning", "random"),))
    assert found.winner == "tome m112 fp32"  # 48 ms and 1 % of it; m128 takes 52
    assert found.verdict == "tome m112 fp32 wins: 112 of 196 tokens kept"
    assert len(shop.measured) == len(set(shop.measured)) < len(COUNTS) + 2, "nothing twice, and not everything"
    states = {one.name: one.state for one in found.rows}
    assert states["plain fp32"] == "front"
    assert states["tome m112 fp32"] == "front"
    assert states["tome m192 fp32"] == "front"
    assert not row(found, "tome m192 fp32").meets
    assert row(found, "tome m192 fp32").misses == ("p50 68.000 ms is above 50",)
    assert row(found, "tome m32 fp32").why.startswith("m")
    assert states["tome m32 fp32"] == "skipped"
    baseline = row(found, "attention-pruning random m112 fp32")
    assert (baseline.role, baseline.state) == ("baseline", "front")
    assert [one.verdict for one in found.precisions] == ["chosen", *["not tried"] * 4]
    everything = shop.go(tmp_path / "..", Limits(max_p50_ms=50), exhaustive=True)
    assert everything.winner == found.winner
    (tmp_path / ".." / "journal.jsonl").unlink()


def test_where_the_plain_model_meets_the_limit_it_wins_and_the_search_ends(tmp_path: Path) -> None:
    shop = Shop()
    found = shop.go(tmp_path, Limits(max_p50_ms=100), baselines=(("token-pooling", ""),))
    assert found.winner == "plain fp32"
    assert (
        found.verdict == "the uncompressed model wins: plain fp32 meets all limits, so that compression is not needed"
    )
    assert len(shop.measured) == 2
    assert found.stopped == ("plain fp32 meets all limits, and nothing agrees with it more than itself",)
    assert row(found, "tome m16 fp32").why == "the uncompressed model meets all limits"
    every = shop.go(tmp_path, Limits(max_p50_ms=100), exhaustive=True)
    assert every.winner == "plain fp32"
    assert {one.state for one in every.rows} <= {"front", "dominated"}


def test_where_nothing_meets_the_limit_the_closest_is_named(tmp_path: Path) -> None:
    shop = Shop()
    found = shop.go(tmp_path, Limits(max_p50_ms=10))
    assert (found.winner, found.closest) == ("", "tome m16 fp32")
    assert found.verdict == "no candidate meets the limits; the closest is tome m16 fp32: p50 24.000 ms is above 10"
    assert len(shop.measured) == 5, "the first few, and the plain model"
    poor = shop.go(tmp_path, Limits(max_p50_ms=50, min_agreement=0.9))
    assert (poor.winner, poor.closest) == ("", "tome m144 fp32")
    assert poor.verdict.endswith("m144 fp32: p50 56.000 ms is above 50; agreement 0.7200 is below 0.9")


def test_agreement_that_is_asked_for_is_held(tmp_path: Path) -> None:
    found = Shop().go(tmp_path, Limits(max_p50_ms=50, min_agreement=0.5))
    assert found.winner == "tome m112 fp32"
    assert row(found, "tome m16 fp32").misses == ("agreement 0.0800 is below 0.5",)


def test_the_fastest_precision_that_passes_parity_is_taken(tmp_path: Path) -> None:
    shop = Shop()
    shop.fails = {name_of(Family("candidate", "tome", "fp16"), count): ParityError("x is off by 3") for count in COUNTS}
    found = shop.go(tmp_path, Limits(max_p50_ms=30), precisions=("fp32", "fp16", "bf16", "int8"))
    assert found.winner == "tome m144 int8"
    verdicts = {one.precision: (one.verdict, one.why) for one in found.precisions}
    assert verdicts["fp32"] == ("slower", "p50 56.000 ms at 144 tokens, and int8 takes 28.000")
    assert verdicts["fp16"] == ("fails parity", "fails parity: x is off by 3")
    assert verdicts["bf16"] == ("not on the target", "no kernels")
    assert verdicts["int8"] == ("chosen", "p50 28.000 ms at 144 tokens")
    assert verdicts["fp8"][0] == "not tried"
    assert row(found, "tome m144 fp16").state == "refused"


def test_a_slower_precision_is_tried_where_the_fastest_agrees_too_little(tmp_path: Path) -> None:
    shop = Shop()
    shop.plain = 0.4
    shop.agreement = lambda family, n: n / 200 * (0.5 if family.precision == "int8" else 1)
    found = shop.go(tmp_path, Limits(max_p50_ms=50, min_agreement=0.5), precisions=("fp32", "int8"))
    assert found.winner == "tome m112 fp32"  # int8 is faster, and its largest agrees by 0.48
    assert row(found, "plain int8").misses == ("agreement 0.4000 is below 0.5",)
    fast = Shop()
    fast.ms = lambda family, n: 90.0
    slow = fast.go(tmp_path / "..", Limits(max_p50_ms=10, min_agreement=0.5), precisions=("fp32", "int8"))
    (tmp_path / ".." / "journal.jsonl").unlink()
    assert "misses the limits of time already" in " ".join(slow.stopped)


def test_a_budget_that_cannot_be_is_refused_and_the_others_are_searched(tmp_path: Path) -> None:
    shop = Shop()
    shop.fails = {"tome m16 fp32": InvalidSpec("budget 16 is below 25"), "tome m144 fp32": InvalidSpec("no 144")}
    found = shop.go(tmp_path, Limits(max_p50_ms=50))
    assert found.winner == "tome m112 fp32"
    assert row(found, "tome m16 fp32").why == "cannot be exported: budget 16 is below 25"
    shop.fails = {name_of(Family("candidate", "tome", "fp32"), count): InvalidSpec("no") for count in COUNTS}
    with pytest.raises(InvalidSpec, match="nothing could be exported: fp32: cannot be exported: no"):
        shop.go(tmp_path / "..", Limits(max_p50_ms=50))
    (tmp_path / ".." / "journal.jsonl").unlink()


def test_a_candidate_that_cannot_be_run_is_out_and_the_search_goes_on(tmp_path: Path) -> None:
    shop, usual = Shop(), Shop.measure
    broken = {"tome m16 fp32", "tome m112 fp32"}

    def measure(made: Sequence[Made]) -> Iterator[tuple[str, Measured | Failed]]:
        for one in made:
            if one.name in broken:
                yield one.name, Failed("out of memory")
            else:
                yield from usual(shop, [one])

    shop.measure = measure  # type: ignore[method-assign,assignment]
    found = shop.go(tmp_path, Limits(max_p50_ms=50))
    assert found.winner == "tome m96 fp32"
    assert row(found, "tome m112 fp32").why == "cannot be run: out of memory"
    assert "tome m112 fp32" not in shop.judged
    broken.clear()
    assert shop.go(tmp_path, Limits(max_p50_ms=50)).winner == "tome m112 fp32", "it was tried again"
    broken |= {name_of(Family("candidate", "tome", "fp32"), count) for count in COUNTS}
    with pytest.raises(InvalidSpec, match="nothing could be measured: fp32: cannot be run: out of memory"):
        shop.go(tmp_path / "..", Limits(max_p50_ms=50))
    (tmp_path / ".." / "journal.jsonl").unlink()


def test_a_candidate_whose_outputs_cannot_be_computed_does_not_win(tmp_path: Path) -> None:
    shop, usual = Shop(), Shop.judge
    shop.judge = lambda made: Failed("no kernel") if made.tokens == 112 else usual(shop, made)  # type: ignore[method-assign,assignment,return-value]
    found = shop.go(tmp_path, Limits(max_p50_ms=50))
    assert found.winner == "tome m96 fp32"
    assert (row(found, "tome m112 fp32").state, row(found, "tome m112 fp32").why) == (
        "refused",
        "cannot be run: no kernel",
    )


def test_what_does_not_run_here_is_told_of_its_candidate_alone(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = _search_measure.measure_opened

    def measure(*words: Any, model: str, **more: Any) -> LatencyProfile:
        if ".m4." in model:
            raise RunError("no kernel for MatMul")
        return usual(*words, model=model, **more)

    monkeypatch.setattr(_search_measure, "measure_opened", measure)
    made = made_of(Family("candidate", "lookupvit", "fp32"), exported, open_bundle(exported).manifest)
    plan = Plan(duration_s=0.02, threads=1, stages=False, warmup_s=0.0)
    found = dict(_search_measure.MeasureHere(plan, say=lambda line: None)(made))
    assert found["lookupvit m4 fp32"] == Failed("no kernel for MatMul")
    assert isinstance(found["lookupvit m9 fp32"], Measured)


def test_what_is_nobodys_fault_ends_the_search(tmp_path: Path) -> None:
    shop = Shop()
    shop.fails = {"tome m16 fp32": RunError("the disk is full")}
    with pytest.raises(RunError, match="the disk is full"):
        shop.go(tmp_path, Limits(max_p50_ms=50))
    with pytest.raises(InvalidSpec, match="runs on the target: bf16: no kernels"):
        shop.go(tmp_path, Limits(max_p50_ms=50), precisions=("bf16",))


def test_a_search_that_was_ended_anywhere_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    whole = Shop()
    right = whole.go(tmp_path, Limits(max_p50_ms=50))
    content = (tmp_path / "journal.jsonl").read_bytes()
    for number in range(len(whole.measured)):
        folder = tmp_path / str(number)
        folder.mkdir()
        shop = Shop()
        shop.die_at = number
        with pytest.raises(KeyboardInterrupt):
            shop.go(folder, Limits(max_p50_ms=50))
        shop.die_at = -1
        again = shop.go(folder, Limits(max_p50_ms=50))
        assert shop.measured == whole.measured, "each was measured once, in the same order"
        assert [one.name for one in again.rows] == [one.name for one in right.rows]
        assert again.winner == right.winner
    for size in range(0, len(content), 97):
        folder = tmp_path / f"cut{size}"
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(content[:size])
        shop = Shop()
        assert shop.go(folder, Limits(max_p50_ms=50)).winner == right.winner
        assert len(shop.measured) <= len(whole.measured)


def test_another_limit_takes_what_was_measured(tmp_path: Path) -> None:
    shop = Shop()
    shop.go(tmp_path, Limits(max_p50_ms=50))
    before = len(shop.measured)
    found = shop.go(tmp_path, Limits(max_p50_ms=40))
    assert found.winner == "tome m64 fp32"  # 36 ms; m80 takes 40 and its interval ends above
    assert len(shop.measured) - before <= 3
    assert any("were taken from journal.jsonl" in note for note in found.notes)
    assert found.measuring_s <= found.total_s


def test_a_machine_that_drifts_is_told(tmp_path: Path) -> None:
    shop = Shop()
    found = shop.go(tmp_path, Limits(max_p50_ms=50), control=True)
    assert shop.measured.count("plain fp32") == 2
    assert shop.measured[-1] == "plain fp32"
    assert "plain fp32 took 72.000 ms at the beginning and 72.000 at the end (+0.0%)" in found.notes
    assert found.measuring_s > 0
    again = shop.go(tmp_path, Limits(max_p50_ms=50), control=True)
    assert shop.measured.count("plain fp32") == 2, "nothing was measured, so that nothing is held to it"
    assert again.winner == found.winner
    assert "plain fp32 took 72.000 ms at the beginning and 72.000 at the end of an earlier run (+0.0%)" in again.notes
    factors = iter([1.0, 1.2])
    usual = shop.measure

    def drifting(made: Sequence[Made]) -> Iterator[tuple[str, Measured]]:
        for name, one in usual(made):
            factor = next(factors) if name.startswith("plain") else 1.0
            p50 = Figure(one.p50_us.value * factor, one.p50_us.low, one.p50_us.high)
            yield name, msgspec.structs.replace(one, p50_us=p50)

    shop.measure = drifting  # type: ignore[method-assign]
    (tmp_path / "journal.jsonl").unlink()
    notes = shop.go(tmp_path, Limits(max_p50_ms=50), control=True).notes
    assert any("86.400 at the end (+20.0%): the machine drifted by more than --noise 0.05" in note for note in notes)


def test_a_search_that_goes_on_has_its_drift_and_keeps_what_was_told(tmp_path: Path) -> None:
    shop, usual = Shop(), Shop.measure
    factor = 1.0

    def drifting(made: Sequence[Made]) -> Iterator[tuple[str, Measured]]:
        for name, one in usual(shop, made):
            us = one.p50_us.value * factor
            yield name, msgspec.structs.replace(one, p50_us=Figure(us, us * 0.99, us * 1.01))

    shop.measure = drifting  # type: ignore[method-assign]
    shop.die_at = 6
    with pytest.raises(KeyboardInterrupt):
        shop.go(tmp_path, Limits(max_p50_ms=50), control=True)
    assert shop.measured.count("plain fp32") == 1
    shop.die_at, factor = -1, 1.2
    drift = "plain fp32 took 72.000 ms at the beginning and 86.400 at the end"
    went_on = shop.go(tmp_path, Limits(max_p50_ms=50), control=True)
    assert any(f"{drift} (+20.0%): the machine drifted" in note for note in went_on.notes)
    factor, before = 1.0, len(shop.measured)
    other = shop.go(tmp_path, Limits(max_p50_ms=30), control=True)
    assert len(shop.measured) - before <= 4, "fewer than a search from the beginning, and yet controlled"
    assert shop.measured[-1] == "plain fp32"
    assert any(f"{drift} of an earlier run (+20.0%): the machine drifted" in note for note in other.notes)
    assert any("72.000 at the end (+0.0%)" in note for note in other.notes)


def test_a_control_that_cannot_be_is_told(tmp_path: Path) -> None:
    shop, usual = Shop(), Shop.measure

    def gone(made: Sequence[Made]) -> Iterator[tuple[str, Measured]]:
        if "plain fp32" in shop.measured and made[0].name == "plain fp32":
            raise RunError("the host is gone")
        yield from usual(shop, made)

    shop.measure = gone  # type: ignore[method-assign]
    found = shop.go(tmp_path, Limits(max_p50_ms=50), control=True)
    assert found.winner == "tome m112 fp32"
    assert any("plain fp32 could not be measured again at the end" in n and "host is gone" in n for n in found.notes)


def test_schedules_are_searched_each_and_the_better_wins(tmp_path: Path) -> None:
    shop = Shop()
    shop.agreement = lambda family, n: n / 200 + (0.1 if family.schedule == "linear" else 0)
    found = shop.go(tmp_path, Limits(max_p50_ms=50), schedules=("constant", "linear"))
    assert found.winner == "tome linear m112 fp32"


def test_a_baseline_that_is_as_good_is_said(tmp_path: Path) -> None:
    shop = Shop()
    shop.agreement = lambda family, n: 0.99 if family.role == "baseline" else n / 200
    shop.ms = lambda family, n: 10.0 if family.role == "baseline" else 20 + n / 4
    refused = (("token-pooling", "it gives tokens alone"),)
    baselines = (("attention-pruning", "random"),)
    found = shop.go(tmp_path, Limits(max_p99_ms=60), baselines=baselines, refused_baselines=refused)
    assert found.latency_of == "p99"
    assert found.winner.startswith("tome"), "a baseline never wins"
    note = f"attention-pruning random m{row(found, found.winner).tokens_out} fp32 is no slower than {found.winner}"
    assert any(note in one for one in found.notes)
    assert any("is indicative: 100 samples do not carry it" in one for one in found.notes)
    assert row(found, "token-pooling fp32").why == "it gives tokens alone"


def test_another_network_is_there_for_its_latency_alone(tmp_path: Path) -> None:
    shop = Shop()
    shop.judge = lambda made: None if made.family.role == "plain" else Agreement(made.tokens / 200)  # type: ignore[method-assign]
    found = shop.go(tmp_path, Limits(max_p50_ms=100))
    assert found.winner == "tome m192 fp32"
    assert row(found, "plain fp32").why == "its agreement cannot be told, so that it stands in no front"
    assert not any("uncompressed model" in note for note in found.notes), "72 ms is slower than the winner's 68"
    shop.ms = lambda family, n: 73 + n / 4
    slow = shop.go(tmp_path / "..", Limits(max_p50_ms=200))
    (tmp_path / ".." / "journal.jsonl").unlink()
    said = "plain fp32, the uncompressed model, is no slower than tome m192 fp32 (72.000 and 121.000 ms)"
    assert any(note.startswith(said) for note in slow.notes)


def test_latency_that_is_not_monotone_is_said(tmp_path: Path) -> None:
    shop = Shop()
    shop.ms = lambda family, n: 90.0 if n == 80 else 20 + n / 4
    found = shop.go(tmp_path, Limits(max_p50_ms=50))
    assert any("latency does not grow with the budget of tome in fp32" in note for note in found.notes)
    assert not found.winner or row(found, found.winner).meets


# -- with a real model --------------------------------------------------------------------------------------

Cli = Callable[..., Any]
LOOK = ("search", "--method", "lookupvit", "--preset", "smoke", "--duration", "0.02", "--threads", "1")


@pytest.fixture
def one_bundle(exported: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every export gives the budgets that were asked for out of one bundle that is there; returns what was asked."""
    from edgecomp.api import _search_export
    from edgecomp.report.export import ExportReport

    asked: list[list[int]] = []

    def export(*, out: Path, budget: list[int], **_: Any) -> ExportReport:
        asked.append(budget)
        if not out.is_dir():
            shutil.copytree(exported, out)
        manifest = open_bundle(out).manifest
        buckets = tuple(one for one in manifest.buckets if one.budget.tokens_out in budget)
        return ExportReport(out, msgspec.structs.replace(manifest, buckets=buckets), False, None, 0.0, 0)

    monkeypatch.setattr(_search_export, "export", export)
    return asked


def test_searches_here_writes_a_recipe_and_goes_on(one_bundle: list[list[int]], cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "found"
    words = (*LOOK, "--max-p50", "10000", "--out", out)
    said = cli(*words)
    assert said.code == 0, said.err
    assert said.out.startswith("lookupvit m9 fp32 wins: 9 of 16 tokens kept")
    assert "cosine of the mean token with that of lookupvit with its largest budget, 9, in fp32" in said.out
    assert f"next       edgecomp export --recipe {out}/recipe.toml" in said.out
    found = read_search(out / "search.json")
    assert found.row("lookupvit m9 fp32").agreement == Agreement(1.0, None, None, 2)
    assert found.row("attention-pruning fp32").why.startswith("lookupvit stands in no host here (encoder)")
    assert found.machine is not None
    recipe = load_recipe(str(out / "recipe.toml"))
    assert (recipe.defaults.preset, recipe.rule("searched").default) == ("searched", (9,))
    assert recipe.preset("searched").params["embed_dim"] == 32
    exports = len(one_bundle)
    again = cli(*words, "--json")
    document = msgspec.json.decode(again.out)
    assert document["winner"] == "lookupvit m9 fp32"
    assert any("2 measurements were taken from journal.jsonl" in note for note in document["notes"])
    assert len(one_bundle) == exports, "nothing was exported again"
    none = cli(*LOOK, "--max-p50", "0.000001", "--out", out)
    assert none.code == 1
    assert none.out.startswith("no candidate meets the limits; the closest is lookupvit m")
    assert not (out / "recipe.toml").exists(), "the recipe of another limit is not left behind"
    changed = cli(*LOOK[:-1], "2", "--max-p50", "1", "--out", out)
    assert changed.code == 2
    assert "was begun with measuring.threads 1, and this one has 2" in changed.err
    assert cli(*LOOK[:-1], "2", "--max-p50", "10000", "--out", out, "--fresh").code == 0


def test_images_that_change_are_another_search(one_bundle: list[list[int]], cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (40, 40), (10, 20, 30)).save(data / "a.bmp")
    words = (*LOOK, "--max-p50", "10000", "--data", data, "--out", tmp_path / "found")
    assert cli(*words).code == 0
    (data / "a.bmp").touch()
    assert cli(*words).code == 0, "another time alone is no other image"
    size = (data / "a.bmp").stat().st_size
    Image.new("RGB", (40, 40), (10, 20, 31)).save(data / "a.bmp")
    assert (data / "a.bmp").stat().st_size == size
    said = cli(*words)
    assert said.code == 2
    assert "was begun with model.calibration" in said.err


def test_operations_are_those_of_a_run(exported: Path) -> None:
    manifest = open_bundle(exported).manifest
    twice = tuple(msgspec.structs.replace(one, batch=2, flops=2 * one.flops) for one in manifest.buckets)
    made = made_of(Family("candidate", "lookupvit", "fp32"), exported, msgspec.structs.replace(manifest, buckets=twice))
    assert [one.flops for one in made if one.family.role == "candidate"] == [one.flops for one in twice]


def test_images_that_cannot_be_read_are_named(one_bundle: list[list[int]], cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (40 * number, 90, 200)).save(data / f"{number}.png")
    (data / "bad.png").write_bytes(b"no image")
    said = cli(*LOOK, "--max-p50", "10000", "--data", data, "--out", tmp_path / "found")
    assert said.code == 0, said.err
    assert "on 3 images of data" in said.out
    assert "1 images cannot be read and were left out: bad.png" in said.out
    assert "the outputs are tokens, so that no class can be compared" in said.out
    for file in data.glob("[0-9].png"):
        file.unlink()
    none = cli(*LOOK, "--max-p50", "10000", "--data", data, "--out", tmp_path / "other")
    assert none.code == 2
    assert "none of its 1 images can be read: bad.png" in none.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no limit was given; give --max-p50 MS"),
        (("--max-p50", "0"), "--max-p50 0 is not above 0"),
        (("--max-p99", "nan"), "--max-p99 nan is not above 0"),
        (("--max-p50", "1", "--min-agreement", "1.5"), "--min-agreement 1.5 is not above 0 and at most 1"),
        (("--max-p50", "1", "--duration", "0"), "duration 0.0 s is not above 0"),
        (("--max-p50", "1", "--step", "3"), "--step 3 is none of 1, 2, 4, 8, 16, 32"),
        (("--max-p50", "1", "--noise", "0.5"), "noise 0.5 is not from 0"),
        (("--max-p50", "1", "--images", "0"), "--images 0 is below 1"),
        (("--max-p50", "1", "--batch", "0", "--dry-run"), "batch 0 is not between 1 and 4096"),
        (("--max-p50", "1", "--runner", "foo", "--dry-run"), "no runner 'foo'"),
        (("--max-p50", "1", "--data", "nosuch", "--dry-run"), "data nosuch is not a folder"),
        (("--max-p50", "1", "--calibration", "nosuch", "--dry-run"), "--calibration nosuch is not a folder"),
        (("--max-p50", "1", "--split", "test"), "--split test is of --data"),
        (("--max-p50", "1", "--target", "orin"), "no target 'orin'"),
        (("--max-energy", "1", "--target", "t4"), "an estimate for t4 knows no power"),
        (("--max-p50", "1", "--precision", "int4"), "precision 'int4' is none of fp32"),
        (("--max-p50", "1", "--budget", "5"), "budget 5 is not possible for lookupvit: it must be one of 4, 9"),
        (("--max-p50", "1", "--schedule", "linear"), "--schedule linear: lookupvit has no schedules"),
    ],
)
def test_refuses(words: tuple[str, ...], says: str, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    said = cli(*LOOK, *words, "--out", tmp_path / "found")
    assert said.code == 2
    assert says in said.err
    assert not (tmp_path / "found").exists()


def test_refuses_a_folder_of_something_else_and_energy_without_power(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "mine").write_text("x")
    said = cli(*LOOK, "--max-p50", "1", "--out", tmp_path)
    assert (said.code, "is there and holds no search" in said.err) == (2, True)
    monkeypatch.setattr("edgecomp.api._search.total_energy_of", lambda watch: None)
    said = cli(*LOOK, "--max-energy", "5", "--out", tmp_path / "found")
    assert "--max-energy 5: no power of this machine can be read" in said.err


def test_a_dry_run_says_what_would_be_looked_at(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    said = cli(*LOOK, "--max-p50", "1", "--dry-run", "--out", tmp_path / "found")
    assert said.code == 0, said.err
    assert "first      lookupvit m4 fp32, lookupvit m9 fp32" in said.out
    assert "measuring  2 to 3 times 0.02 s" in said.out
    assert not (tmp_path / "found").exists()


def test_the_command_repeats_every_word_that_was_given() -> None:
    import inspect

    from edgecomp.api._search_asked import command_of

    signature = inspect.signature(api.search)
    usual = {name: one.default for name, one in signature.parameters.items()}
    assert command_of(usual, signature) == ("edgecomp", "search")
    words = (
        "--method=tome --recipe=r.toml --preset=vit --backbone=b --weights=w.pt --backbone-weights=pretrained "
        "--target=t4 --max-p50=1.5 --max-p99=2.5 --max-energy=3.5 --data=flowers --min-agreement=0.9 --split=test "
        "--images=7 --seed=3 --budget=48 --budget=64 --step=16 --precision=fp32 --precision=int8 --schedule=linear "
        "--rest=bf16 --fp32=a.b --calibration=scales --calibration-images=9 --image-size=64 --feature-layer=2 "
        "--output=logits --input-dtype=uint8 --batch=2 --set=params.depth=4 --set=params.kind=x "
        "--runner=onnxruntime-cuda --threads=1 --duration=30.0 --on=ssh://HOST/DIR --noise=0.1 --exhaustive "
        "--no-baselines"
    )
    given = usual | {
        "method": "tome", "recipe": Path("/a/r.toml"), "preset": "vit", "backbone": "b", "weights": "/a/w.pt",
        "backbone_weights": "pretrained", "target": "t4", "max_p50_ms": 1.5, "max_p99_ms": 2.5, "max_energy_mj": 3.5,
        "data": "/a/flowers/", "min_agreement": 0.9, "split": "test", "images": 7, "seed": 3, "budget": [48, 64],
        "step": 16, "precision": ("fp32", "int8"), "schedule": ["linear"], "rest": "bf16", "fp32": ["a.b"],
        "calibration": "/a/scales", "calibration_images": 9, "image_size": 64, "feature_layer": 2, "output": "logits",
        "input_dtype": "uint8", "batch": 2, "params": {"depth": 4, "kind": "x"}, "runner": "onnxruntime-cuda",
        "threads": 1, "duration_s": 30.0, "on": ["ssh://me@secret/~/x"], "noise": 0.1, "exhaustive": True,
        "baselines": False, "out": "/a/out", "fresh": True,
    }  # fmt: skip
    assert command_of(given, signature) == ("edgecomp", "search", *words.split())
    assert {name for name in usual if given[name] == usual[name]} == {"keep_bundles", "dry_run", "progress"}
    import typer.testing

    from edgecomp.cli.app import app

    options = typer.testing.CliRunner().invoke(app, ["search", "--help"], env={"COLUMNS": "200"}).output
    assert all(word.partition("=")[0] in options for word in words.split())


# -- on other machines --------------------------------------------------------------------------------------


def result_of(model: str, ms: float, cpu: str) -> bytes:
    """What `edgecomp profile --json` prints there."""
    samples = [1000 * ms + place for place in range(30)]
    profile = LatencyProfile(
        model=model, runner="onnxruntime 1", threads=1, batch=1, samples_us=tuple(samples), num_samples=30,
        percentiles=percentiles_of(samples), mean_us=sum(samples) / 30, min_us=min(samples), max_us=max(samples),
        throughput_per_s=1.0, warmup_runs=1, is_steady=True, loop_overhead_us=0.1,
    )  # fmt: skip
    machine = Machine(cpu, 2, "", (), 8.0, 4.0, "Linux", "CPython 3.11", "", "", {})
    result = Result(
        created="2026-01-01T00:00:00Z", edgecomp="0", command=(), target="cpu",
        subject=ResultSubject("b", "0"), machine=machine, profiles=(profile,),
    )  # fmt: skip
    return msgspec.json.encode(result)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Machines behind a stand-in for ssh, each with a CPU; a folder of its own on each has a job that answers."""
    from edgecomp.remote import job
    from edgecomp.remote.wheel import make_wheel

    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    wheel = make_wheel()
    monkeypatch.setattr(job, "make_wheel", lambda: wheel)
    shutil.copyfile(Path(__file__).with_name("fake_ssh.py"), programs / "fake_ssh.py")
    plan = {"faults": {}, "home": str(home), "path": os.environ["PATH"], "before": ""}
    (programs / "plan.json").write_text(json.dumps(plan))
    program(programs / "ssh", f'exec {sys.executable} -IS {programs}/fake_ssh.py "$@"')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def make(**cpus: str) -> list[str]:
        for name, cpu in cpus.items():
            for tokens, ms in ((4, 5.0), (9, 8.0)):
                (home / f"{name}-{tokens}.json").write_bytes(result_of(f"model.m{tokens}.b1.onnx", ms, cpu))
            answer = f"*--budget=4*) cat {home}/{name}-4.json ;; *) cat {home}/{name}-9.json ;; esac; exit 0"
            words = f'echo "$*" >> {home}/{name}.asked; case "$*" in {answer}'
            lines = f'case "$*" in *"-m edgecomp"*) {words} ;; esac\nexec {sys.executable} "$@"'
            program(home / name / "venv" / "bin" / "python", lines)
        return [word for name in cpus for word in ("--on", f"ssh://{name}/~/{name}")]

    return make


def program(path: Path, lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    path.chmod(0o755)


def test_hosts_of_one_kind_share_the_work(
    one_bundle: list[list[int]], hosts: Callable[..., list[str]], cli: Cli, tmp_path: Path
) -> None:
    on = hosts(nano="A", orin="A")
    out = tmp_path / "found"
    said = cli(*LOOK, *on, "--max-p50", "6", "--out", out)
    assert said.code == 0, said.err
    assert said.out.startswith("lookupvit m4 fp32 wins: 4 of 16 tokens kept")
    found = read_search(out / "search.json")
    assert found.row("lookupvit m9 fp32").misses == ("p50 8.014 ms is above 6",)
    assert {row.measured.where for row in found.rows if row.measured is not None} <= {"nano", "orin"}
    assert found.machine is not None
    assert found.machine.cpu == "A"
    asked = {name: (tmp_path / "home" / f"{name}.asked").read_text().splitlines() for name in ("nano", "orin")}
    assert all(asked.values()), "each was asked what it is"
    assert "--duration=0.02" in "".join(asked["nano"] + asked["orin"])
    words = cli(*LOOK, *hosts(agx="B"), "--max-p50", "9", "--budget", "4", "--out", out).code
    assert words == 0, "nothing is left to measure, so that no other machine is asked"


def answers(measured: MeasureThere, of: Callable[[str, Made], Measured]) -> Callable[[str], None]:
    measured._measure = of  # type: ignore[method-assign]
    measured.machine = Machine("A", 2, "", (), 8.0, 4.0, "Linux", "CPython 3.11", "", "", {})
    return lambda line: None


def test_what_one_host_cannot_do_the_others_take() -> None:
    family = Family("candidate", "tome", "fp32")
    made = [Made(name_of(family, n), family, n, Path("b"), f"m{n}.onnx", n) for n in (16, 32, 48, 64)]
    fine = Measured(source="measured", where="x", p50_us=Figure(1.0))

    def there(**of: Callable[[Made], Measured]) -> MeasureThere:
        urls = [f"ssh://{name}/~/x" for name in of]
        measured = MeasureThere(urls, runner="onnxruntime", threads=0, duration_s=1.0, say=lambda line: None)
        answers(measured, lambda url, one: of[url.split("/")[2]](one))
        return measured

    def gone(one: Made) -> Measured:
        raise RunError("nano cannot be reached")

    def fails(one: Made) -> Measured:
        if one.tokens == 32:
            raise _search_measure._NotRun("orin: ended with 2")
        return fine

    both = there(nano=gone, orin=fails)
    found = dict(both(made))
    assert {name: isinstance(one, Measured) for name, one in found.items()} == {
        "tome m16 fp32": True, "tome m32 fp32": False, "tome m48 fp32": True, "tome m64 fp32": True,
    }  # fmt: skip
    assert found["tome m32 fp32"] == Failed("orin: ended with 2")
    assert both.left_out == ["nano was left out, and others took its share: nano cannot be reached"]
    assert set(dict(there(nano=fails, orin=lambda one: fine)(made)).values()) == {fine}
    with pytest.raises(RunError, match="nano cannot be reached"):
        dict(there(nano=gone)(made))


def test_a_host_that_is_another_target_is_refused(
    one_bundle: list[list[int]], hosts: Callable[..., list[str]], cli: Cli, tmp_path: Path
) -> None:
    said = cli(*LOOK, *hosts(nano="A"), "--target", "t4", "--max-p50", "6", "--out", tmp_path / "found")
    assert said.code == 2
    assert "nano is no t4: what onnxruntime measures there counts as 'cpu'" in said.err


def test_hosts_of_different_kinds_are_refused(
    one_bundle: list[list[int]], hosts: Callable[..., list[str]], cli: Cli, tmp_path: Path
) -> None:
    on = hosts(nano="A", agx="B")
    said = cli(*LOOK, *on, "--max-p50", "6", "--out", tmp_path / "found")
    assert said.code == 2
    assert "nano and agx are not of one kind: cpu is 'A' and 'B'" in said.err
    alone = cli(*LOOK, *on[:2], "--max-energy", "6", "--out", tmp_path / "energy")
    assert "--max-energy 6: no power of nano is known" in alone.err


@pytest.mark.slow
def test_a_search_does_not_go_on_on_another_machine(
    one_bundle: list[list[int]], hosts: Callable[..., list[str]], cli: Cli, tmp_path: Path
) -> None:
    on = hosts(nano="A", agx="B")
    begun = cli(*LOOK, *on[:2], "--max-p50", "6", "--budget", "4", "--out", tmp_path / "two")
    assert begun.code == 0, begun.err
    other = cli(*LOOK, *on[2:], "--max-p50", "6", "--budget", "9", "--out", tmp_path / "two")
    assert other.code == 2
    assert "was begun on a machine with cpu 'A', and this one has 'B'" in other.err


def test_a_host_that_answers_something_else_is_told(
    one_bundle: list[list[int]], hosts: Callable[..., list[str]], cli: Cli, tmp_path: Path
) -> None:
    on = hosts(nano="A")
    answer = tmp_path / "home" / "nano-9.json"
    words = (*LOOK, *on, "--max-p50", "6", "--budget", "9", "--out", tmp_path / "found")
    answer.write_bytes(result_of("model.m4.b1.onnx", 5.0, "A"))
    assert "nano measured model.m4.b1.onnx, not model.m9.b1.onnx" in cli(*words).err
    answer.write_bytes(b'{"rows": []}')
    assert "nano answered with a result of another edgecomp" in cli(*words).err
    ends = f'case "$*" in *"-m edgecomp"*) exit 2 ;; esac\nexec {sys.executable} "$@"'
    program(tmp_path / "home" / "nano" / "venv" / "bin" / "python", ends)
    assert "nano: `edgecomp profile` ended with 2" in cli(*words).err


# -- the recipe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", method_names())
def test_a_recipe_that_is_written_is_the_recipe_that_was_read(method: str, tmp_path: Path) -> None:
    recipe = load_recipe(method)
    strange = {**recipe.unread, 'a "key".\x7f\n*': "tab\tquote' back\\slash \u20ac and a reason"}
    recipe = msgspec.structs.replace(recipe, unread=strange)
    (tmp_path / "r.toml").write_text(recipe_text(recipe, said="two\nlines"), encoding="utf-8")
    assert load_recipe(str(tmp_path / "r.toml")) == recipe


def test_a_recipe_holds_what_the_export_ended_with(exported: Path, tmp_path: Path) -> None:
    manifest = open_bundle(exported).manifest
    manifest = msgspec.structs.replace(manifest, precision="int8", rest="bf16", fp32=("a.b",), input_dtype="uint8")
    own = manifest.recipe.defaults
    asked = msgspec.structs.replace(own, weights="/w.pt", calibration="/images", calibration_images=9)
    recipe = winner_recipe(manifest, manifest.buckets[0], asked=asked)
    (tmp_path / "r.toml").write_text(recipe_text(recipe, said="x"), encoding="utf-8")
    found = load_recipe(str(tmp_path / "r.toml")).defaults
    assert (found.precision, found.rest, found.fp32, found.input_dtype) == ("int8", "bf16", ("a.b",), "uint8")
    assert (found.weights, found.calibration, found.calibration_images) == ("/w.pt", "/images", 9)
    assert (found.preset, found.batch, found.image_size) == ("searched", (1,), 64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attention-pruning", "lookupvit", "tome", "visionzip"])
def test_the_recipe_exports_the_very_graph_that_won(method: str, tmp_path: Path) -> None:
    from edgecomp.api._search_export import ModelAsked, describe

    preset = {"attention-pruning": "smoke-inside", "visionzip": ""}.get(method, "smoke")
    host = {"visionzip": "test_vit"}.get(method, "")
    asked = ModelAsked(method=method, preset=preset, backbone=host)
    described = describe(asked)
    assert described.is_same_network == (method != "lookupvit")
    family = Family("candidate", method, "fp32", "linear" if method == "attention-pruning" else "")
    exporter = Exporter(asked, described.subject, tmp_path, lambda line: None)
    opened = exporter.open(family, 9, "")
    recipe = winner_recipe(opened.manifest, opened.manifest.buckets[0], asked=opened.manifest.recipe.defaults)
    (tmp_path / "r.toml").write_text(recipe_text(recipe, said="x"), encoding="utf-8")
    report = api.export(recipe=tmp_path / "r.toml", out=tmp_path / "again")
    (bucket,) = report.manifest.buckets
    name = bucket.model
    assert next(one.sha256 for one in report.manifest.files if one.name == name) == opened.file(name).sha256


@pytest.mark.slow
def test_a_real_search_has_every_baseline_in_its_front_or_behind_it(tmp_path: Path) -> None:
    found = api.search(
        "tome", preset="smoke", max_p50_ms=1e-6, duration_s=0.02, threads=1, out=tmp_path / "s", budget=(5, 9)
    )
    assert isinstance(found, SearchResult)
    assert not found
    assert {(row.role, row.method) for row in found.rows} == {
        ("plain", ""), ("candidate", "tome"), ("baseline", "attention-pruning"), ("baseline", "token-pooling"),
    }  # fmt: skip
    assert all(row.state in ("front", "dominated") for row in found.rows)
    assert all(row.agreement is not None and 0.3 < row.agreement.value <= 1 for row in found.rows)
    assert found.row("plain fp32").agreement == Agreement(1.0, None, None, 2)


class ShopExporter(Exporter):
    """An exporter that makes nothing, and knows where it fails."""

    def __init__(self, shop: Shop) -> None:
        self.shop, self.said = shop, []
        self.say = self.said.append

    def __call__(self, family: Family, budgets: Sequence[int], *, with_plain: bool) -> list[Made]:
        return self.shop.export(family, budgets, with_plain=with_plain)


def test_the_reference_tells_each_budget_that_does_not_give_it() -> None:
    shop, family = Shop(), Family("candidate", "tome", "fp32")
    shop.fails = {name_of(family, 96): ParityError("x is off by 3")}
    exporter = ShopExporter(shop)
    assert exporter.plain(family, (16, 96, 192)).family.role == "plain"
    assert exporter.said == ["budget 96 gives no uncompressed model: x is off by 3"]
    assert [budgets for _, budgets in shop.exported] == [(96,), (16,)]


def test_a_reference_that_cannot_be_made_is_an_error() -> None:
    shop, family = Shop(), Family("candidate", "tome", "fp32")
    shop.fails = {name_of(family, count): InvalidSpec(f"no {count}") for count in (16, 96)}
    with pytest.raises(InvalidSpec, match="no 16"):
        ShopExporter(shop).plain(family, (16, 96))
