"""A search: exports, measures and judges what the plan asks for, until nothing else can win.

What exports, measures and judges is handed in: see `Tools`. Everything that they find goes into the journal before the
search goes on, so that one which was killed goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from edgecomp.errors import ExportError, InvalidSpec, ParityError, RunError, SpecError
from edgecomp.search.board import Board, Known
from edgecomp.search.outcome import LatencyOf, Outcome, remarks_of, rows_of, sentence_of
from edgecomp.search.plan import Step, coarse, is_monotone, next_budgets
from edgecomp.search.result import Agreement, Limits, Measured, PrecisionVerdict, Row
from edgecomp.search.space import Family, Subject, name_of
from edgecomp.search.state import Exported, Journal, Judged, Record, Refused, RefusedFor, Timed
from edgecomp.specs.precision import PRECISIONS

__all__ = ["Ask", "Export", "Failed", "Judge", "Made", "Measure", "Tools", "run_search"]


_WORTH_A_CONTROL = 4  # measurements


class Made(msgspec.Struct, frozen=True):
    """A graph that can be measured: `model` of `bundle`, which keeps `tokens`; `flops` of a run."""

    name: str
    family: Family
    tokens: int
    bundle: Path
    model: str
    flops: int


class Failed(msgspec.Struct, frozen=True):
    """Stands for what was to be found of a candidate that cannot be run; it is out, and the search goes on."""

    why: str


class Export(Protocol):
    """Makes graphs."""

    def __call__(self, family: Family, budgets: Sequence[int], *, with_plain: bool) -> Sequence[Made]:
        """Return the graphs of budgets, all in one bundle, and the plain model's where it was asked for.

        Raises:
            ParityError: the graphs do not compute what the original does. ExportError, SpecError: they cannot be.
            EdgecompError: anything that is not the candidates' fault, which ends the search.
        """
        ...


class Measure(Protocol):
    """Measures graphs, or estimates them."""

    def __call__(self, made: Sequence[Made]) -> Iterable[tuple[str, Measured | Failed]]:
        """Yield names with what each takes, as soon as it is known.

        Raises:
            EdgecompError: anything that is not a candidate's fault, such as a host that is gone; it ends the search.
        """
        ...


class Judge(Protocol):
    """Finds how far graphs agree with the reference."""

    def __call__(self, made: Made) -> Agreement | Failed | None:
        """Return the agreement; none where it cannot be told.

        Raises:
            EdgecompError: the reference cannot be run, which ends the search.
        """
        ...


class Tools(msgspec.Struct, frozen=True):
    """What a search works with.

    Attributes:
        not_on_target: says why a precision does not run there; "" where it does.
        ties: agreement comes in shares, so that several budgets may agree alike.
    """

    export: Export
    measure: Measure
    judge: Judge
    not_on_target: Callable[[str], str]
    ties: bool = True


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a search.

    Attributes:
        budgets: ascending.
        precisions: the widest first; agreement is with the plain model in the first of them that runs.
        schedules: one empty word where the method has none.
        baselines: methods, each with the word that tells its form; the budget is the winner's.
        refused_baselines: methods that cannot stand there, with the reason.
        noise, width, exhaustive: see `next_budgets`.
        control: measure the first plain model once more at the end, to see how far the machine drifted.
    """

    subject: Subject
    limits: Limits
    budgets: tuple[int, ...]
    precisions: tuple[str, ...]
    schedules: tuple[str, ...] = ("",)
    baselines: tuple[tuple[str, str], ...] = ()
    refused_baselines: tuple[tuple[str, str], ...] = ()
    noise: float = 0.05
    width: int = 2
    exhaustive: bool = False
    control: bool = False


def run_search(
    ask: Ask,
    tools: Tools,
    journal: Journal,
    *,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Search, and return what was found; the same journal gives the same outcome without measuring again."""
    return _Search(ask, tools, journal, say, clock).run()


class _Search:
    def __init__(
        self, ask: Ask, tools: Tools, journal: Journal, say: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self.ask, self.tools, self.journal, self.say, self.clock = ask, tools, journal, say, clock
        self.board = Board(ask.limits)
        self.stopped: list[str] = []
        self.notes: list[str] = []
        self.precisions: dict[str, PrecisionVerdict] = {}
        self.taken = self.measured_now = 0
        self.plain: dict[str, Made] = {}  # uncompressed models that this run exported
        self.is_resumed = any(isinstance(record, Timed) for record in journal.records)
        self.old: dict[str, list[Record]] = {}
        for record in journal.records:
            names = record.names if isinstance(record, Exported) else (getattr(record, "name", ""),)
            for name in names:
                self.old.setdefault(name, []).append(record)

    # -- the course of a search -----------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Look at the plain model, settle the precision, go through the budgets, compare with baselines."""
        words = [word for word in self.ask.precisions if self._runs(word)]
        if not words:
            raise InvalidSpec(f"no precision that was asked for runs on the target: {self._why_not()}")
        ranked = self._rank(words)
        plain = [name for name, one in self.board.known.items() if self.board.wins_outright(one)]
        if plain and not self.ask.exhaustive:
            self.stopped.append(f"{plain[0]} meets all limits, and nothing agrees with it more than itself")
            self._skip_all(ranked[0], "the uncompressed model meets all limits")
            return self._conclude([])
        for place, word in enumerate(ranked):
            families = [self._family(word, schedule) for schedule in self.ask.schedules]
            for family in families:
                self._search(family)
            if self.ask.exhaustive:
                continue
            if self.board.winner():
                break
            is_fast = any(seen.load <= 1 for family in families for seen in self.board.seen(family).values())
            if not is_fast and place + 1 < len(ranked):
                self.stopped.append(f"{word} is the fastest precision, and misses the limits of time already")
                break
        rows = self._compare(ranked[0])
        self._look_again()
        return self._conclude(rows)

    def _family(self, word: str, schedule: str) -> Family:
        return Family("candidate", self.ask.subject.method, word, schedule)

    def _runs(self, word: str) -> bool:
        why = self.tools.not_on_target(word)
        if why:
            self.precisions[word] = PrecisionVerdict(word, "not on the target", why)
        return not why

    def _why_not(self) -> str:
        return "; ".join(f"{one.precision}: {one.why}" for one in self.precisions.values())

    def _rank(self, words: Sequence[str]) -> list[str]:
        """Return the precisions that pass parity, fastest first, each measured at one budget beside its plain model."""
        first = coarse(self.ask.budgets)
        middle = first[len(first) // 2]
        times: dict[str, tuple[float, int]] = {}
        for word in words:
            family = self._family(word, self.ask.schedules[0])
            for count in (middle, *(other for other in first if other != middle)):
                self._look(family, (count,), with_plain=self.ask.subject.has_plain)
                one = self.board.of(family, count)
                if one.measured is not None:
                    times[word] = one.measured.p50_us.value, count
                    break
                kind = one.refused.partition(":")[0]
                verdict: PrecisionVerdict = PrecisionVerdict(word, msgspec.convert(kind, RefusedFor), one.refused)
                self.precisions[word] = verdict
                if kind == "fails parity":
                    break  # not the budget's fault
        if not times:
            is_run = any(one.verdict == "cannot be run" for one in self.precisions.values())
            raise InvalidSpec(f"nothing could be {'measured' if is_run else 'exported'}: {self._why_not()}")
        ranked = sorted(times, key=lambda word: times[word])
        best_us = times[ranked[0]][0]
        for word, (us, count) in times.items():
            at = f"p50 {us / 1000:.3f} ms at {count} tokens"
            self.precisions[word] = (
                PrecisionVerdict(word, "chosen", at)
                if word == ranked[0]
                else PrecisionVerdict(word, "slower", f"{at}, and {ranked[0]} takes {best_us / 1000:.3f}")
            )
        return ranked

    def _search(self, family: Family) -> None:
        """Go through the budgets of a family until no other can win."""
        while True:
            seen, refused = self.board.seen(family), self.board.refused(family)
            if len(seen) > 1 or self.ask.exhaustive:
                wanted = self._plan(family).budgets
            else:
                usable = [count for count in self.ask.budgets if count not in refused]
                wanted = tuple(count for count in coarse(usable) if count not in seen) or self._plan(family).budgets
            if not wanted:
                break
            self._look(family, wanted)
        for count, why in self._plan(family).skipped.items():
            self.board.of(family, count).skipped = why
            if why not in self.stopped:
                self.stopped.append(why)
        if not is_monotone(self.board.seen(family), noise=self.ask.noise):
            self.notes.append(
                f"latency does not grow with the budget of {family.method} in {family.precision}: one that was left "
                "out may be faster than the rules assume; --exhaustive measures all"
            )

    def _plan(self, family: Family) -> Step:
        return next_budgets(
            self.ask.budgets,
            self.board.seen(family),
            refused=self.board.refused(family),
            min_agreement=self.ask.limits.min_agreement or 0.0,
            noise=self.ask.noise,
            width=self.ask.width,
            ties=self.tools.ties,
            exhaustive=self.ask.exhaustive,
        )

    def _compare(self, word: str) -> list[Row]:
        """Measure the baselines beside the winner, or what is closest; return rows for those that cannot be."""
        tokens = self.board.tokens_of_interest()
        one = self.board.known.get(self.board.winner() or self.board.closest())
        word = one.family.precision if one is not None else word
        for method, kind in self.ask.baselines if tokens else ():
            self._look(Family("baseline", method, word, kind), (tokens,))
        return [
            Row(
                name=f"{method} {word}",
                role="baseline",
                method=method,
                precision=word,
                tokens_in=self.ask.subject.tokens_in,
                tokens_out=tokens,
                state="refused",
                why=why,
            )
            for method, why in self.ask.refused_baselines
        ]

    def _look_again(self) -> None:
        """Measure the plain model once more where others were measured after it, and tell each time that it was.

        A kill may fall between the last candidate and this, so that measurements count over all runs of the journal. A
        run that went on with an earlier one's has numbers of two times side by side: any of its own is controlled.
        """
        plain = (one for one in self.board.known.values() if one.family.role == "plain")
        first = next((one for one in plain if one.measured is not None), None)
        if first is None or first.measured is None or not self.ask.control:
            return
        name = name_of(first.family, first.tokens)
        earlier = [record.value for record in self.old.get(_again(name), ()) if isinstance(record, Timed)]
        for value in earlier:
            self.notes.append(self._drift(name, first.measured, value, "at the end of an earlier run"))
        waiting = 0  # measurements that no control has followed
        for record in self.journal.records:
            if isinstance(record, Timed):
                waiting = 0 if record.name == _again(name) else waiting + 1
        if waiting >= _WORTH_A_CONTROL or (self.is_resumed and self.measured_now):
            self._control(name, first)

    def _control(self, name: str, first: Known) -> None:
        assert first.measured is not None
        try:
            made = self.plain.get(name) or self._plain_again(name, first)
            started = self.clock()
            for _, again in self.tools.measure([made]):
                if isinstance(again, Failed):
                    raise RunError(again.why)
                self.journal.add(Timed(_again(name), again, self.clock() - started, made.flops))
                self.notes.append(self._drift(name, first.measured, again, "at the end"))
        except (ExportError, SpecError, RunError) as error:
            self.notes.append(
                f"{name} could not be measured again at the end, so that it is not known how far the machine drifted: "
                f"{error}"
            )

    def _plain_again(self, name: str, first: Known) -> Made:
        """Return the plain model of an earlier run, out of the bundle that it was exported in."""
        record = next(one for one in self.journal.records if isinstance(one, Exported) and name in one.names)
        beside = [one for one in map(self.board.known.get, record.names) if one and one.family.role == "candidate"]
        family = beside[0].family if beside else self._family(first.family.precision, self.ask.schedules[0])
        budgets = tuple(one.tokens for one in beside) or coarse(self.ask.budgets)[:1]
        return next(one for one in self.tools.export(family, budgets, with_plain=True) if one.name == name)

    def _drift(self, name: str, before: Measured, after: Measured, when: str) -> str:
        times = [one.p50_us.value / 1000 for one in (before, after)]
        share = times[1] / times[0] - 1
        said = f"{name} took {times[0]:.3f} ms at the beginning and {times[1]:.3f} {when} ({share:+.1%})"
        if abs(share) > self.ask.noise:
            said += (
                f": the machine drifted by more than --noise {self.ask.noise:g}, so that candidates are not "
                "measured alike; repeat it on a quiet one, with --fresh"
            )
        return said

    def _skip_all(self, word: str, why: str) -> None:
        for schedule in self.ask.schedules:
            for count in self.ask.budgets:
                one = self.board.of(self._family(word, schedule), count)
                one.skipped = why if one.measured is None else ""

    # -- looking at candidates ------------------------------------------------------------------------------

    def _look(self, family: Family, budgets: Sequence[int], *, with_plain: bool = False) -> None:
        """Export, measure and judge candidates, as far as the journal does not have them."""
        wanted = [self.board.of(family, count) for count in budgets]
        if with_plain:
            wanted.append(self.board.of(Family("plain", "", family.precision), self.ask.subject.tokens_in))
        for one in wanted:
            one.skipped = ""
            for record in self.old.pop(name_of(one.family, one.tokens), ()):
                if isinstance(record, Refused) and record.kind == "cannot be run":
                    continue  # the machine may have been the reason: it is tried again
                self._take(one, record)
                self.taken += isinstance(record, Timed)
        if all(one.is_done for one in wanted):
            return
        made = self._make(family, tuple(budgets), with_plain)
        started = self.clock()
        todo = [one for one in made if not self.board.known[one.name].refused]
        todo = [one for one in todo if self.board.known[one.name].measured is None]
        flops = {one.name: one.flops for one in todo}
        for name, measured in self.tools.measure(todo) if todo else ():
            if isinstance(measured, Failed):
                self._refuse(name, measured)
                continue
            self._note(Timed(name, measured, self.clock() - started, flops[name]))
            self.measured_now += 1
            self.say(f"{name}: p50 {measured.p50_us.value / 1000:.3f} ms, {measured.source}")
            started = self.clock()
        for graph in made:
            one = self.board.known[graph.name]
            if not one.is_judged and not one.refused:
                started = self.clock()
                found = self.tools.judge(graph)
                if isinstance(found, Failed):
                    self._refuse(graph.name, found)
                    continue
                self._note(Judged(graph.name, found, self.clock() - started))

    def _refuse(self, name: str, failed: Failed) -> None:
        self.say(f"{name} cannot be run: {failed.why}")
        self._note(Refused(name, "cannot be run", failed.why))

    def _make(self, family: Family, budgets: tuple[int, ...], with_plain: bool) -> list[Made]:
        """Export budgets in one bundle; one by one where one of them cannot be, so that it can be named."""
        open_ = tuple(count for count in budgets if not self.board.of(family, count).refused)
        if not open_:
            return []
        started = self.clock()
        try:
            made = list(self.tools.export(family, open_, with_plain=with_plain))
        except (ExportError, SpecError) as error:
            if len(open_) > 1:
                return [one for count in open_ for one in self._make(family, (count,), with_plain)]
            fails = isinstance(error, ParityError)
            name = name_of(family, open_[0])
            self._note(Refused(name, "fails parity" if fails else "cannot be exported", str(error)))
            return []
        record = Exported(tuple(one.name for one in made), made[0].bundle.name, self.clock() - started)
        self.journal.add(record)
        for one in made:
            self._take(self.board.known[one.name], record)
            if one.family.role == "plain":
                self.plain[one.name] = one
        plain = name_of(Family("plain", "", family.precision), 0)
        if with_plain and plain not in record.names:
            self._note(Refused(plain, "cannot be exported", f"{record.bundle} has no uncompressed model"))
        return made

    def _note(self, record: Timed | Judged | Refused) -> None:
        self.journal.add(record)
        self._take(self.board.known[record.name], record)

    def _take(self, one: Known, record: Record) -> None:
        if isinstance(record, Exported):
            one.bundle = record.bundle
        elif isinstance(record, Timed):
            one.measured, one.flops = record.value, record.flops
        elif isinstance(record, Judged):
            one.agreement, one.is_judged = record.value, True
        elif isinstance(record, Refused):
            one.refused = f"{record.kind}: {record.why}"

    # -- the outcome ----------------------------------------------------------------------------------------

    def _conclude(self, more: Sequence[Row]) -> Outcome:
        board, subject = self.board, self.ask.subject
        winner = board.winner()
        closest = "" if winner else board.closest()
        latency_of: LatencyOf = "p99" if self.ask.limits.max_p99_ms is not None else "p50"
        for word in PRECISIONS:
            not_tried = PrecisionVerdict(word, "not tried", f"--precision {word}, or all, tries it")
            self.precisions.setdefault(word, not_tried)
        if self.taken:
            self.notes.append(f"{self.taken} measurements were taken from {self.journal.path.name}, of an earlier run")
        rows = (*rows_of(board, subject, latency_of), *more)
        timed = [record for record in self.journal.records if isinstance(record, Timed)]
        return Outcome(
            rows=rows,
            winner=winner,
            closest=closest,
            latency_of=latency_of,
            verdict=sentence_of(board, subject, winner, closest),
            stopped=tuple(self.stopped),
            precisions=tuple(self.precisions[word] for word in PRECISIONS),
            measuring_s=sum(record.seconds for record in timed),
            total_s=sum(getattr(record, "seconds", 0.0) for record in self.journal.records),
            notes=(*self.notes, *remarks_of(rows, winner, latency_of)),
            winner_known=board.known.get(winner),
            known=tuple(board.known.values()),
        )


def _again(name: str) -> str:
    """Return the name under which the journal has the second measurement of a plain model."""
    return f"{name} again"
