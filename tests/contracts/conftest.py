"""The cases of the contracts: every smoke preset of every recipe, so that a new method adds tests by itself.

A test that takes `smoke` runs for each smoke preset, one that takes `method` for each method. Modules and bundles
are made once a session, when a test first asks for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgecomp.specs import Recipe, Tolerance, load_recipe, method_names

if TYPE_CHECKING:
    import torch

    from edgecomp.backbones.assemble import Assembly
    from edgecomp.bundle import Bundle

SUMMARY: pytest.StashKey[list[str]] = pytest.StashKey()
SEED = 0
_QUICK = ("attention-pruning", "evit", "tome")


@dataclass(frozen=True)
class Smoke:
    """One smoke preset of one recipe, with all budgets that it has by default."""

    method: str
    preset: str

    def __str__(self) -> str:
        return f"{self.method}-{self.preset}-{self.recipe.level}"

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.method)

    @property
    def batches(self) -> tuple[int, ...]:
        """Two batch sizes for the first preset of some methods, one for all others: each is a graph of its own."""
        return (1, 2) if self.method in _QUICK and self.preset == self.recipe.smoke_presets[0] else (2,)

    @property
    def budgets(self) -> tuple[int, ...]:
        return self.recipe.rule(self.preset).default

    @property
    def tolerance(self) -> Tolerance:
        return self.recipe.tolerances["fp32"]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUMMARY] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["contracts"] = session.config.stash[SUMMARY]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[SUMMARY] += getattr(node, "workeroutput", {}).get("contracts", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(SUMMARY, [])
    if lines:
        terminalreporter.section("contracts")
        for line in lines:
            terminalreporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "smoke" in metafunc.fixturenames:
        smokes = [Smoke(name, preset) for name in method_names() for preset in load_recipe(name).smoke_presets]
        metafunc.parametrize("smoke", smokes, ids=str)
    if "sampled_method" in metafunc.fixturenames:  # one of each kind; `-m slow` has the others
        names = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in method_names()]
        metafunc.parametrize("sampled_method", names, ids=str)
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", method_names(), ids=lambda name: f"{name}-{load_recipe(name).level}")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: on modules of this size the others only spin and take the cores from the rest."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smoke_of() -> Callable[[str, str], Smoke]:
    """Return a function that names a smoke preset of a method."""
    return Smoke


@pytest.fixture
def smokes(method: str) -> tuple[Smoke, ...]:
    """Return all smoke presets of a method."""
    return tuple(Smoke(method, preset) for preset in load_recipe(method).smoke_presets)


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that adds a line to the summary at the end of the run."""
    return request.config.stash[SUMMARY].append


@pytest.fixture(scope="session")
def default_dtype() -> Callable[[str], Any]:
    """Return a context in which modules and their constants are made in a given type."""

    @contextmanager
    def use(name: str) -> Iterator[torch.dtype]:
        import torch

        before, dtype = torch.get_default_dtype(), getattr(torch, name)
        torch.set_default_dtype(dtype)
        try:
            yield dtype
        finally:
            torch.set_default_dtype(before)

    return use


@pytest.fixture(scope="session")
def make_assembly(default_dtype: Callable[[str], Any]) -> Callable[..., Assembly]:
    """Return a function that builds the models of a smoke preset with random weights of a fixed seed."""

    def make(smoke: Smoke, *, budgets: tuple[int, ...] = (), dtype: str = "float32", **order: Any) -> Assembly:
        from edgecomp.backbones.assemble import assemble
        from edgecomp.specs.order import Order

        chosen = tuple(map(str, budgets or smoke.budgets))
        with default_dtype(dtype):
            return assemble(Order(recipe=smoke.recipe, preset=smoke.preset, budgets=chosen, seed=SEED, **order))

    return make


@pytest.fixture(scope="session")
def assembled(make_assembly: Callable[..., Assembly]) -> Callable[..., Assembly]:
    """Return `make_assembly` with a memory; what it returns must not be changed."""
    return functools.cache(make_assembly)


@pytest.fixture(scope="session")
def outputs_of(assembled: Callable[..., Assembly]) -> Callable[[Smoke], tuple[str, ...]]:
    """Return a function that lists which of the recipe's outputs the preset's placement has."""

    def supported(smoke: Smoke) -> tuple[str, ...]:
        from edgecomp.errors import InvalidSpec

        found = []
        for output in smoke.recipe.outputs:
            try:
                assembled(smoke, output=output)
            except InvalidSpec:
                continue
            found.append(output)
        assert smoke.recipe.defaults.output in found
        return tuple(found)

    return supported


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict[str, list[torch.Tensor]]]:
    """Return a function that makes the golden inputs (cases `seeded`, `photo`) for an assembly, as torch tensors."""

    def make(assembly: Assembly, *, batch: int = 2, dtype: str = "float32") -> dict[str, list[torch.Tensor]]:
        import torch

        from edgecomp.export.golden import golden_inputs

        specs = assembly.models[0].input_specs(batch)
        made = golden_inputs(specs, seed=SEED, preprocess=assembly.preprocess)

        def tensor(array: Any) -> torch.Tensor:
            value = torch.from_numpy(array.copy())
            return value.to(getattr(torch, dtype)) if value.is_floating_point() else value

        return {case: [tensor(arrays[spec.name]) for spec in specs] for case, arrays in made.items()}

    return make


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Smoke], Bundle]:
    """Return a function that exports a smoke preset, once a session: all its budgets and batches."""

    @functools.cache
    def export(smoke: Smoke) -> Bundle:
        from edgecomp import api
        from edgecomp.bundle import open_bundle

        folder: Path = tmp_path_factory.mktemp("bundles") / f"{smoke.method}-{smoke.preset}"
        options = {"budget": smoke.budgets, "batch": smoke.batches, "stem": False, "router": "none", "seed": SEED}
        api.export(smoke.method, preset=smoke.preset, out=folder, **options)
        return open_bundle(folder)

    return export
