"""What a saved module says of itself comes back: tokens kept, image size, preset, and what `inspect` tells of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402 - torch first, or skip

import edgecomp  # noqa: E402
from edgecomp import api  # noqa: E402
from edgecomp.api._request import _module_digest  # noqa: E402
from edgecomp.backbones.assemble import assemble  # noqa: E402
from edgecomp.compressors._checkpoint import write_checkpoint  # noqa: E402
from edgecomp.errors import EdgecompError, InvalidSpec  # noqa: E402
from edgecomp.specs import load_recipe  # noqa: E402
from edgecomp.specs.order import Order  # noqa: E402


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("tokenpacker", {"preset": "smoke", "queries": 4}),
        ("learned-merger", {"preset": "smoke", "queries": 3}),
        ("c-abstractor", {"grid": 6, "queries": 16, "embed_dim": 32}),
        ("d-abstractor", {"preset": "smoke"}),
        ("lookupvit", {"preset": "smoke", "image_size": 96}),
        ("lookupvit", {"preset": "smoke-table"}),
        ("deepseek-ocr", {"preset": "smoke-compressor"}),
        ("slice-wise", {"preset": "smoke"}),
        ("perceiver", {"preset": "smoke", "tokens": 8, "queries": 5}),
    ],
)
def test_a_saved_module_comes_back_as_it_was(method: str, words: dict[str, Any], tmp_path: Path) -> None:
    module = edgecomp.compressor(method, **words)
    path = module.save(tmp_path / "saved.safetensors")
    again = edgecomp.compressor(method, weights=path)
    assert (again.budget, again.site, again.preset) == (module.budget, module.site, module.preset)
    contents: Any = api.inspect(weights=path)
    (fit,) = contents.fits
    assert (fit.method, fit.preset, fit.kept, fit.problem) == (method, module.preset, (module.budget.tokens_out,), "")
    assert fit.tokens_in == module.budget.tokens_in
    asked = edgecomp.compressor(method, weights=path, queries=module.budget.tokens_out)
    assert asked.budget == module.budget


def test_what_differs_from_the_saved_module_is_told(tmp_path: Path) -> None:
    """Another image size, and a count that a factor decides: 9 of 36 tokens were kept, and of 64 it makes 16."""
    path = edgecomp.compressor("lookupvit", preset="smoke", image_size=96).save(tmp_path / "saved.safetensors")
    made = assemble(Order(recipe=load_recipe("lookupvit"), weights=str(path), image_size=64))
    assert made.image_size == 64
    assert "the weights were saved at an image size of 96, and 64 was asked for" in made.notes
    path = edgecomp.compressor("pixel-shuffle", grid=6, embed_dim=8, output_dim=8).save(tmp_path / "other.safetensors")
    order = Order(recipe=load_recipe("pixel-shuffle"), weights=str(path), backbone="none", params={"tokens": 64})
    made = assemble(order)
    assert [model.compressor.budget.tokens_out for model in made.models] == [16]
    assert "the weights were saved with 9 tokens kept of 36, and keep 16 of the 64 here" in made.notes


def test_a_damaged_count_is_refused(tmp_path: Path) -> None:
    path = edgecomp.compressor("tokenpacker", preset="smoke").save(tmp_path / "saved.safetensors")
    told = {"edgecomp.method": "tokenpacker", "edgecomp.tokens_out": "-4"}
    write_checkpoint(path, load_file(path), metadata=told)
    with pytest.raises(EdgecompError, match=r"edgecomp.tokens_out='-4' in its metadata is no count"):
        edgecomp.compressor("tokenpacker", weights=path)


def test_a_method_without_weights_saves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    with pytest.raises(EdgecompError, match="attention-pruning has no weights to save"):
        edgecomp.compressor("attention-pruning", preset="smoke").save(path)
    assert not list(tmp_path.iterdir())


def test_a_module_is_exported_by_its_own_preset() -> None:
    module = edgecomp.compressor("perceiver", preset="smoke", grid=4, latents=6, queries=6)
    recipe = load_recipe("perceiver")
    made = assemble(Order(recipe=recipe, compressor=module))
    assert (made.preset, made.models[0].compressor.budget.tokens_out) == ("smoke", 6)
    fewer = assemble(Order(recipe=recipe, compressor=module, budgets=("3",)))  # smoke keeps 1 to 16, flamingo 16 to 256
    assert fewer.models[0].compressor.budget.tokens_out == 3
    with pytest.raises(InvalidSpec, match=r"preset flamingo of perceiver was asked for, and the module .* from smoke"):
        assemble(Order(recipe=recipe, compressor=module, preset="flamingo"))


def test_two_modules_of_equal_weights_are_two_requests() -> None:
    six, five = (edgecomp.compressor("perceiver", preset="smoke", latents=6, queries=count) for count in (6, 5))
    assert all(torch.equal(value, five.state_dict()[name]) for name, value in six.state_dict().items())
    assert _module_digest(six) != _module_digest(five)
