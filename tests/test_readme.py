r"""What the README shows is true: its commands run, in order, in one folder, and print what it says.

In ```console blocks, a line that begins with `$ ` is a command and what follows is its output (a trailing `\` joins
the next line). How each kind is checked:

* The two first-screen commands hold `python3 -m venv`. They are one line each and name extras that exist. Creating
  the environment is left to `.ci/run`, which runs the test one as it stands; of the other, the part that calls
  `.venv/bin/edgecomp` is run here, since later commands use the bundle that it makes.
* `edgecomp ...` is run as `python -m edgecomp ...`. It must exit 0, or as a comment behind it says: `# exit 1`.
* `pip install ...` is not run, but its extras must exist.
* Anything else must end in `# not run: <reason>`; so nothing goes unchecked in silence.
* ```python blocks are run as scripts, each by itself; they must exit 0.
* Where edgecomp says that a package is missing, and it is, the step is skipped with that reason.

The output (stdout and stderr) is compared in shape, after `mask`. A line `...` stands for any number of lines, and a
command with no lines below it may print anything.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from edgecomp.specs.precision import PRECISIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MAKES_ENVIRONMENT = "python3 -m venv"
ANY_LINES = "..."


@dataclass(frozen=True)
class Step:
    """A command with the output that the README shows, or a Python block (`code`), and its line there."""

    line: int
    command: str = ""
    shown: tuple[str, ...] = ()
    code: str = ""

    def __str__(self) -> str:
        return f"{self.line}: {self.command or 'python block'}"

    @property
    def bare(self) -> str:
        """The command without its comment."""
        return re.split(r"\s#\s", self.command, maxsplit=1)[0].strip()

    @property
    def comment(self) -> str:
        return self.command[len(self.bare) :].strip().lstrip("# ")

    @property
    def exit_code(self) -> int:
        stated = re.match(r"exit (\d+)", self.comment)
        return int(stated[1]) if stated else 0

    @property
    def edgecomp_words(self) -> list[str]:
        """The words behind `edgecomp`, wherever in the line it is called; empty when it is not."""
        for part in self.bare.split("&&"):
            words = shlex.split(part)
            if words and words[0] in ("edgecomp", ".venv/bin/edgecomp"):
                return words[1:]
        return []


def read_steps(text: str) -> list[Step]:
    """Return the commands and Python blocks of a Markdown text, in order."""
    steps: list[Step] = []
    for block in re.finditer(r"^```(console|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start()) + 2
        if block[1] == "python":
            steps.append(Step(line, code=block[2]))
        else:
            steps += _read_console(block[2].splitlines(), line)
    return steps


def _read_console(lines: list[str], first: int) -> list[Step]:
    steps: list[Step] = []
    index = 0
    while index < len(lines):
        if not lines[index].startswith("$ "):
            raise ValueError(f"README.md line {first + index}: a console block begins with a command, `$ ...`")
        start, command = index, lines[index][2:].strip()
        while command.endswith("\\"):
            index += 1
            command = f"{command[:-1].strip()} {lines[index].strip()}"
        shown = []
        index += 1
        while index < len(lines) and not lines[index].startswith("$ "):
            shown.append(lines[index])
            index += 1
        steps.append(Step(first + start, command, tuple(_without_blank_ends(shown))))
    return steps


def _without_blank_ends(lines: list[str]) -> list[str]:
    kept = list(lines)
    while kept and not kept[-1].strip():
        kept.pop()
    while kept and not kept[0].strip():
        kept.pop(0)
    return kept


def mask(text: str) -> str:
    """Replace what differs from run to run and from machine to machine; what is left is the shape of a line.

    1. Lines of a profile that tell of the machine (`on <processor>, N cores; ...`) and of what is installed there
       (`with numpy 2.1, ...`) keep their first word alone, and of its clocks (`device state ...`) two.
    2. `warm-up did not settle` and `unstable: ...` behind a row are dropped: they tell of the machine's quiet.
    3. Hex digests of 8 digits and more, versions (1.26.0+cpu), and numbers, with sign, decimals, thousands and
       exponent, become `#`.
    4. The unit of a time (us, ms, s, min) becomes `t`: a faster machine prints another.
    5. The rule under a table's header becomes one dash, as other runs of dashes do; runs of blanks become one blank,
       and blanks at the end go: columns are as wide as their numbers, and one that is empty has no dashes.
    """
    text = re.sub(r"^(\s*)on .*\d+ cores\b.*$", r"\1on #", text)
    text = re.sub(r"^(\s*)with numpy \d.*$", r"\1with #", text)
    text = re.sub(r"^device state .*$", "device state #", text)
    text = text.replace("warm-up did not settle", "")
    text = re.sub(r"\bunstable: .*$", "", text)
    text = re.sub(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{8,64}\b", "#", text)
    text = re.sub(r"\b\d+(?:\.\d+){2,}(?:[.+]?[a-z]+[0-9.]*)*", "#", text)
    text = re.sub(r"(?:(?<![\w.)-])[-+])?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?", "#", text)
    text = re.sub(r"# (?:us|ms|s|min)\b", "# t", text)
    text = re.sub(r"-[- ]*-", "-", text)
    return re.sub(r"\s+", " ", text).rstrip()


def has_shape(shown: tuple[str, ...], printed: tuple[str, ...]) -> bool:
    """Say whether `printed` has the lines of `shown`, where `...` stands for any number of lines."""
    expected = tuple(line.strip() if line.strip() == ANY_LINES else mask(line) for line in shown)
    got = tuple(map(mask, printed))

    @functools.cache
    def match(i: int, j: int) -> bool:
        if i == len(expected):
            return j == len(got)
        if expected[i] == ANY_LINES:
            return match(i + 1, j) or (j < len(got) and match(i, j + 1))
        return j < len(got) and expected[i] == got[j] and match(i + 1, j + 1)

    return match(0, 0)


def environment() -> dict[str, str]:
    """Return this environment with the checkout on the path, and no width of a terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH", "")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def run_python(words: list[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    return done.returncode, done.stdout


def missing_package(printed: str) -> str:
    """Return the package that edgecomp says is not installed, when that is true; else ""."""
    named = re.search(r"needs the package '([\w.-]+)', which is not installed here", printed)
    return named[1] if named and importlib.util.find_spec(named[1].partition(".")[0]) is None else ""


def known_extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


def named_extras(command: str) -> set[str]:
    """Return the extras in the words `edgecomp[...]` and `.[...]` of a command."""
    found: set[str] = set()
    for word in shlex.split(command.replace("&&", " ")):
        if re.match(r"(edgecomp|\.)\[", word):
            found |= Requirement(word.replace(".[", "edgecomp[", 1) if word.startswith(".") else word).extras
    return found


STEPS = read_steps(README.read_text(encoding="utf-8")) if README.is_file() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder in which the commands run, one after the other."""
    return tmp_path_factory.mktemp("readme")


def test_readme_is_there_and_has_commands() -> None:
    assert README.is_file()
    assert [step for step in STEPS if step.edgecomp_words], "no `$ edgecomp ...` in a console block"


def test_first_screen_has_the_job_and_the_tests_in_one_line_each() -> None:
    first = [step for step in STEPS if MAKES_ENVIRONMENT in step.command]
    assert len(first) == 2, [str(step) for step in first]
    lines = README.read_text(encoding="utf-8").splitlines()
    for step in first:
        assert lines[step.line - 1] == f"$ {step.command}", f"{step} is not one line"
        assert step.line <= 60, f"{step} is not on the first screen"
        extras = named_extras(step.command)
        assert extras, f"{step} names no extra"
        assert extras <= known_extras(), f"{step} names unknown extras: {extras - known_extras()}"
    assert [step for step in first if step.edgecomp_words], "neither does the main job"
    tests = [step for step in first if "/bin/pytest" in step.command]
    assert len(tests) == 1
    assert {"cpu", "dev"} <= named_extras(tests[0].command)


def test_readme_denies_nothing_that_is_there() -> None:
    """What it does not do names no precision of `export` as one that is still to come."""
    section = README.read_text(encoding="utf-8").partition("## What it does not do\n")[2].partition("\n## ")[0]
    items = [line for line in section.splitlines() if line.startswith("* ")]
    assert len(items) >= 5, "the section is gone, or no list"
    late = re.compile(r"\b(not there yet|so far|for now)\b")
    assert [line for line in items if late.search(line)] == []
    denied = re.compile(rf"\b({'|'.join(PRECISIONS)})\b (alone|is missing|are missing|is refused|are refused)\b")
    assert [line for line in items if denied.search(line)] == []


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_step(step: Step, folder: Path) -> None:
    if step.code:
        script = folder / "snippet.py"
        script.write_text(step.code, encoding="utf-8")
        code, printed = run_python([script.name], folder)
        assert code == 0, printed
        return
    if not step.edgecomp_words:
        is_install = step.bare.startswith(("pip install", "python3 -m pip install"))
        if is_install or MAKES_ENVIRONMENT in step.bare:
            assert named_extras(step.bare) <= known_extras()
            pytest.skip("installs; `.ci/run` does so")
        assert step.comment.startswith("not run: "), f"{step}: neither edgecomp nor `# not run: <reason>`"
        pytest.skip(step.comment)
    code, printed = run_python(["-m", "edgecomp", *step.edgecomp_words], folder)
    if code != step.exit_code and (absent := missing_package(printed)):
        pytest.skip(f"{absent} is not installed; the README's own test command installs it")
    assert code == step.exit_code, f"{step} exits {code}:\n{printed}"
    got = tuple(_without_blank_ends(printed.splitlines()))
    if step.shown:
        shapes = "\n".join(map(mask, step.shown)), "\n".join(map(mask, got))
        assert has_shape(step.shown, got), (
            f"README shows\n{shapes[0]}\n\nand it prints\n{shapes[1]}\n\nin full\n{printed}"
        )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("written in 50.7 s", "written in 3 s"),
        ("  p50   1.2 ms", "  p50 980.0 us"),
        ("onnxruntime 1.31.1, CPU", "onnxruntime 1.19.2, CPU"),
        ("torch 2.8.0+cpu, x", "torch 2.15.0, x"),
        ("36,134,400 parameters", "12 parameters"),
        ("max rel error 2.6e-06 (allowed 2e-05)", "max rel error 0 (allowed 1e-3)"),
        ("got -0.52, expected 0.5", "got 0.1, expected -3.5"),
        ("golden.safetensors  1.2 MiB    0847f5700ffa2b71", "golden.safetensors  999.9 MiB  deadbeefdead0007"),
        ("-----  ---", "--  --------"),
        ("  ----- --- -----", "  ---  --  "),
        ("on AMD EPYC, 2 cores; load 3", "on Neoverse-N1, 64 cores; governor unknown, load 1, a GPU"),
        ("with numpy 2.4.6, torch 2.15.0", "with numpy 1.26.0, onnxruntime 1.19, torch 2.8.0"),
        ("model.m25.b1.onnx  1  51.7  40", "model.m25.b1.onnx  1  51.7  40  warm-up did not settle"),
    ],
)
def test_mask_takes_runs_of_one_command_for_the_same(one: str, other: str) -> None:
    assert mask(one) == mask(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("verdict: pass", "verdict: FAIL"),
        ("kept 25 tokens", "kept tokens"),
        ("weights 134.6 MiB", "weights 134.6 GiB"),
        ("12 a", "a 12"),
        ("-> next", "next"),
        ("batch 1", "batches 1"),
    ],
)
def test_mask_keeps_words(one: str, other: str) -> None:
    assert mask(one) != mask(other)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (("a", "b 1"), ("a", "b 2"), True),
        (("a", "b"), ("a",), False),
        (("a",), ("a", "b"), False),
        (("a", "..."), ("a", "b", "c"), True),
        (("a", "..."), ("a",), True),
        (("...", "c"), ("a", "b", "c"), True),
        (("...", "c", "..."), ("a", "b"), False),
        (("a", "...", "d"), ("a", "b", "c", "e"), False),
    ],
)
def test_dots_stand_for_any_lines(shown: tuple[str, ...], printed: tuple[str, ...], same: bool) -> None:
    assert has_shape(shown, printed) is same


def test_steps_are_read_in_order_with_their_output() -> None:
    text = (
        "# T\n```console\n$ edgecomp a \\\n    --b 1  # exit 1\none\n\ntwo\n\n$ edgecomp c\n```\n"
        "```python\nx = 1\n```\n```toml\n$ no = 1\n```\n```console\n$ cat x  # not run: no x\n```\n"
    )
    steps = read_steps(text)
    assert [str(step) for step in steps] == [
        "3: edgecomp a --b 1  # exit 1",
        "9: edgecomp c",
        "12: python block",
        "18: cat x  # not run: no x",
    ]
    assert steps[0].shown == ("one", "", "two")
    assert steps[0].edgecomp_words == ["a", "--b", "1"]
    assert (steps[0].exit_code, steps[1].exit_code) == (1, 0)
    assert steps[3].comment == "not run: no x"


def test_extras_are_found_in_commands() -> None:
    command = (
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[cpu,rtx]' 'edgecomp[dev]' && .venv/bin/edgecomp list"
    )
    assert named_extras(command) == {"cpu", "rtx", "dev"}
    assert Step(1, command).edgecomp_words == ["list"]
