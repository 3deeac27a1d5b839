"""The repository holds what DESIGN.md says: import order, torch-free rooms, linters, no Python among the data."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "edgecomp"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TORCH_ROOMS = ("compressors", "routers", "backbones", "export", "runners/torch.py")

#: Heavy or optional packages, and the rooms whose modules may import them when they are themselves imported.
ROOMS = {
    "torch": TORCH_ROOMS,
    "torchvision": TORCH_ROOMS,
    "timm": TORCH_ROOMS,
    "transformers": TORCH_ROOMS,
    "onnx": ("export",),
    "onnx_ir": ("export",),
    "onnxscript": ("export",),
    "onnx_graphsurgeon": ("export",),
    "onnxruntime": (),
    "tensorrt": (),
    "tensorrt_rtx": (),
    "tensorrt_rtx_bindings": (),
    "polygraphy": (),
    "cuda": (),
    "matplotlib": (),
    "jinja2": (),
}

#: Packages of extras that nothing uses so far, and what they are for.
FOR_LATER = {"onnx-graphsurgeon": "surgery by users"}

BLOCK_AND_IMPORT = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked by this test", name=name)

sys.meta_path.insert(0, Blocker())
for name in MODULES:
    importlib.import_module(name)
print(len(MODULES))
"""


def in_rooms(path: Path, rooms: tuple[str, ...]) -> bool:
    return path.relative_to(PACKAGE).as_posix().startswith(rooms) if rooms else False


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def repository_files() -> list[Path]:
    """Return what git tracks, and what is new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the repository is not known")
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in sorted(filter(None, listed.split("\0"))) if (ROOT / name).is_file()]


def run_tool(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed; pip install -e '.[dev]' brings it")
    return subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def import_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported: not the bodies of functions, nor of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from import_time_nodes(node)


def imported_packages(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").partition(".")[0]]
    return []


def test_ruff_check() -> None:
    done = run_tool("ruff", "check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_format() -> None:
    done = run_tool("ruff", "format", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_strict() -> None:
    done = run_tool("mypy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_order() -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed; pip install -e '.[dev]' brings it")
    words = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*words, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout), done.stdout


def test_all_but_the_torch_rooms_import_without_optional_packages() -> None:
    names = [module_name(path) for path in SOURCES if not in_rooms(path, TORCH_ROOMS)]
    assert {"edgecomp.api", "edgecomp.cli.app", "edgecomp.bundle", "edgecomp.parity", "edgecomp.engines"} < set(names)
    code = f"BLOCKED = {sorted(ROOMS)!r}\nMODULES = {names!r}\n{BLOCK_AND_IMPORT}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(names)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_heavy_packages_are_imported_inside_functions(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [name for node in import_time_nodes(tree) for name in imported_packages(node)]
    wrong = [name for name in found if name in ROOMS and not in_rooms(path, ROOMS[name])]
    assert not wrong, f"{module_name(path)} imports {', '.join(wrong)} when it is imported; do so inside a function"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_rules_of_a_source_file(path: Path) -> None:
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and node.level:
            wrong.append(f"{line}: relative import")
        if path.name != "resources.py" and _reads_environment(node):
            wrong.append(f"{line}: reads the environment; only resources.py does")
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if is_print and not in_rooms(path, ("cli",)):
            wrong.append(f"{line}: prints; only the command line does")
    assert not wrong, f"{module_name(path)}: {'; '.join(wrong)}"


def _reads_environment(node: ast.AST) -> bool:
    words = {"environ", "environb", "getenv", "getenvb"}
    if isinstance(node, ast.Attribute):
        return node.attr in words and isinstance(node.value, ast.Name) and node.value.id == "os"
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in words for a in node.names)


def test_every_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").read_bytes() == b""


@pytest.mark.parametrize("folder", ["export", "engines", "profiles"])
def test_data_folders_hold_no_python(folder: str) -> None:
    found = [path for path in repository_files() if path.is_relative_to(ROOT / folder)]
    assert found, f"{folder}/ is empty, and the wheel needs it"
    assert [path for path in found if path.suffix in {".py", ".pyc", ".pyi", ".so"}] == []


def test_no_text_names_a_command_that_there_is_not() -> None:
    from edgecomp.cli.app import VERBS

    kinds = {".py", ".md", ".toml", ".txt", ".cpp", ".h"}
    named = re.compile(r"(?:[`'$] ?|\buse |\brun )edgecomp ([a-z]+)\b")
    wrong = [
        f"{path.relative_to(ROOT)}: edgecomp {word}"
        for path in repository_files()
        if path.suffix in kinds and not path.is_relative_to(ROOT / "tests")
        for word in named.findall(path.read_text(encoding="utf-8"))
        if word not in VERBS
    ]
    assert wrong == []


def test_every_verb_is_a_file_and_its_line_of_help() -> None:
    from edgecomp.cli.app import VERBS, load_verb

    for verb, line in VERBS.items():
        module = load_verb(verb)
        if not hasattr(module, "app"):
            assert inspect.getdoc(module.command).partition("\n")[0] == line
    shared = {"__init__", "app", "listing", "on", "talk"}
    files = {path.stem for path in (ROOT / "edgecomp" / "cli").glob("*.py")}
    assert files - shared == set(VERBS) - {"list"}


@pytest.mark.parametrize("file", ["README.md", "docs/remote.md"])
def test_all_verbs_that_run_elsewhere_are_named(file: str) -> None:
    from edgecomp.cli.app import VERBS, load_verb

    commands = {verb: getattr(load_verb(verb), "command", None) for verb in VERBS}
    takes = {verb for verb, one in commands.items() if one is not None and "on" in inspect.signature(one).parameters}
    text = (ROOT / file).read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if re.search(r"`build`.*`--on ssh://", line))
    assert set(re.findall(r"`([a-z]+)`", line.partition("`--on")[0])) == takes


def test_every_benchmark_has_a_row() -> None:
    files = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"common.py"}
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+\.py)` \|", text, re.MULTILINE)) == sorted(files)


def test_what_an_extra_brings_is_used() -> None:
    """A package that nothing here imports, runs or names is downloaded for nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: brought for name, brought in project["optional-dependencies"].items() if name != "dev"}  # tools
    words = {word for brought in extras.values() for word in brought}
    packages = {Requirement(word).name for word in words} - {"edgecomp"}
    paths = [path for path in repository_files() if path.suffix in {".py", ".md", ".toml"}]
    own = ("pyproject.toml", Path(__file__).name)
    texts = [path.read_text(encoding="utf-8") for path in paths if path.name not in own]
    unused = {name for name in packages if not any(re.search(_spelled(name), text) for text in texts)}
    assert unused == set(FOR_LATER)


def _spelled(package: str) -> str:
    """Return a pattern of a package's name, as it is installed or imported."""
    package = package.replace("-libs", "-bindings")  # which load them
    return rf"(?<![\w-]){re.escape(package.lower()).replace(chr(92) + '-', '[-_]')}(?![\w-])"


def test_no_file_names_this_machine_or_a_package_index() -> None:
    # Classes of one letter keep the pattern from finding itself.
    wrong = re.compile(
        rb"(?<![\w.])[/](?:(?:home|Users)/[a-z][\w.-]*/|root/|work/|tmp/[a-z]/)"
        rb"|--(?:extra-)?index-[u]rl|https?://[^\s\"'`)]*/[s]imple\b|https?://(?:localhost|\d+\.\d+\.\d+\.\d+)"
    )
    found = []
    for path in repository_files():
        content = path.read_bytes()
        for match in wrong.finditer(content):
            line = content.count(b"\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: {match[0].decode(errors='replace')}")
    assert not found, "\n".join(found)
