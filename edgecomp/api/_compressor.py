"""`edgecomp.compressor`: a method's static module, to train and to export from Python."""

from __future__ import annotations

import math
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecomp.api._request import read_order
from edgecomp.errors import InvalidSpec, MissingDependency
from edgecomp.specs import load_recipe

if TYPE_CHECKING:
    from edgecomp.compressors._base import Compressor
    from edgecomp.specs import Recipe

__all__ = ["compressor"]


def compressor(
    method: str,
    *,
    grid: int = 0,
    queries: int | str = 0,
    preset: str = "",
    weights: str | Path = "random",
    image_size: int = 0,
    output: str = "",
    seed: int = 0,
    **params: Any,
) -> Compressor:
    """Return a method as a PyTorch module: the static rewrite that `export` writes, in training mode.

    Its `save` writes a checkpoint that `--weights` reads, `api.export(module, ...)` a bundle with its weights, and
    `module.reference()` is the eager original on the same parameters.

    Args:
        method: as `edgecomp list methods` names it.
        grid: side of the square of tokens that go in, so that `tokens` is its square.
        queries: tokens kept, all that come out (`eos_tokens` among them), a count or a percentage such as "25%"; 0: the
            checkpoint's, or the preset's: of several budgets the largest, which reads every weight.
        preset: a named size of the recipe; "": the recipe's, or the one that the weights tell.
        weights: `random`, or a checkpoint: a file, or a folder of shards.
        image_size: of an encoder, in pixels; 0: the preset's.
        output: `tokens` or `logits`; "": the recipe's.
        seed: of random weights.
        params: the method's own parameters, by name.

    Raises:
        SpecError, WeightsError: such a module cannot be. MissingDependency: torch is not installed.
    """
    if not isinstance(method, str):
        raise InvalidSpec(f"method={method!r} is no name of a method; give one, for example 'perceiver'")
    try:
        from edgecomp.backbones.assemble import assemble
        from edgecomp.compressors import compressor_class
    except ImportError as error:
        raise MissingDependency(error.name or str(error), needed_for="edgecomp.compressor", extra="export") from error
    known = compressor_class(method).Params.__struct_fields__
    grid, image_size, seed = _count("grid", grid), _count("image_size", image_size), _count("seed", seed)
    queries = queries if isinstance(queries, str) else _count("queries", queries)
    if not 0 <= seed < 1 << 63:
        raise InvalidSpec(f"seed {seed} is not between 0 and 2^63 - 1")
    params = {name: _plain(value) for name, value in params.items()}
    if preset or str(weights) == "random":  # else the weights may tell another preset
        _require_own_module(load_recipe(method), preset)
    if grid < 0 or (isinstance(queries, int) and queries < 0):
        raise InvalidSpec(f"{method}: grid={grid}, queries={queries}: neither can be below 0")
    if grid:
        params |= {"grid": grid} if "grid" in known else {"tokens": _tokens_of(method, grid, params)}
    order = read_order(
        method, "", preset, "none", weights, "random", (str(queries),) if queries else (), 1, image_size, 0, output,
        "", params, False, "", None, "random", 0, seed,
    )  # fmt: skip
    made = assemble(order)
    module = made.models[-1].compressor.train()
    module.preset = made.preset
    return module


def _count(name: str, value: Any) -> int:
    """Return a number as an int, numpy's too."""
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidSpec(f"{name}={value!r} is no whole number; give one") from None


def _plain(value: Any) -> Any:
    """Return numpy's numbers as Python's own."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _require_own_module(recipe: Recipe, preset: str) -> None:
    """Refuse what stands between the blocks of an encoder, and is nothing without one."""
    name = preset or recipe.defaults.preset
    if recipe.preset(name).placement != "inside":
        return
    others = [other for other, one in recipe.presets.items() if one.placement != "inside"]
    alone = f"; presets that are modules of their own: {', '.join(others)}" if others else ""
    raise InvalidSpec(
        f"{recipe.method}: its preset {name} works between the blocks of an encoder and is no module without one. "
        "Train it as its original is and load that checkpoint, or put it into your encoder: "
        f"api.export({recipe.method!r}, backbone=encoder){alone}"
    )


def _tokens_of(method: str, grid: int, params: dict[str, Any]) -> int:
    """Return the tokens of a grid, unless they were given, too, and are others."""
    tokens = params.get("tokens", grid * grid)
    if tokens != grid * grid:
        side = math.sqrt(tokens) if isinstance(tokens, int) and tokens > 0 else 0.0
        raise InvalidSpec(f"{method}: tokens={tokens} is not a grid of {grid} x {grid} (but of {side:.4g}); give one")
    return grid * grid
