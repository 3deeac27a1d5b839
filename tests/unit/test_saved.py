"""What a saved module says of itself comes back: tokens kept, image size, preset, and what `inspect` tells of it."""

from __future__ import annotations

import functools
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
        ("query-aware", {"preset": "smoke-latents"}),
        ("slice-wise", {"grid": 4, "queries": 4, "context_dim": 16, "inner_params": {"embed_dim": 16, "num_heads": 2}}),
        ("fastvlm", {"preset": "smoke", "depths": (1, 1, 1, 1, 1)}),
        ("d-abstractor", {"grid": 5, "queries": 17, "eos_tokens": 1, "embed_dim": 8, "hidden_dim": 16, "depth": 1}),
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
    alike = edgecomp.compressor(method, weights=path, **words)
    assert (alike.budget, alike.params) == (module.budget, again.params)


def test_inspect_where_a_constant_stays_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has torch make ranges on the CPU, whatever device is asked for, once it has loaded a model."""
    path = edgecomp.compressor("d-abstractor", preset="smoke").save(tmp_path / "saved.safetensors")
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    contents: Any = api.inspect(weights=path)
    assert [fit.problem for fit in contents.fits] == [""]


def test_an_inner_method_is_held_to_what_was_saved(tmp_path: Path) -> None:
    """One parameter of those in the table may be said again; another value, or one that no tensor allows, may not."""
    words: dict[str, Any] = {"preset": "smoke-mask", "inner_params": {"latents": 8}, "queries": 5}
    path = edgecomp.compressor("slice-wise", **words).save(tmp_path / "saved.safetensors")
    assert edgecomp.compressor("slice-wise", weights=path, inner_params={"num_heads": 2}).budget.tokens_out == 5
    for params, told in (
        ({"num_heads": 4}, r"params\.inner_params\.num_heads=4 was set, and the weights were saved with 2"),
        ({"latents": 7}, r"params\.inner_params\.latents=7 was set, and the weights say 8"),
        ({"heads": 4}, "no parameter of perceiver:smoke-cross-only"),
    ):
        with pytest.raises(EdgecompError, match=told):
            edgecomp.compressor("slice-wise", weights=path, inner_params=params)


@pytest.mark.parametrize(
    ("method", "words", "kept"),
    [
        ("dual-path", {"preset": "smoke"}, 7),
        ("perceiver", {"preset": "smoke"}, 6),
        ("matryoshka", {"preset": "smoke"}, 36),
        ("perceiver", {"preset": "smoke", "queries": 4}, 4),
    ],
)
def test_of_several_budgets_the_largest_is_made(method: str, words: dict[str, Any], kept: int) -> None:
    module = edgecomp.compressor(method, **words)
    assert module.budget.tokens_out == kept


def test_queries_count_the_tokens_of_the_end() -> None:
    words: dict[str, Any] = {"grid": 5, "eos_tokens": 1, "embed_dim": 8, "hidden_dim": 16, "depth": 1, "output_dim": 8}
    module = edgecomp.compressor("d-abstractor", queries=17, **words)
    assert (module.params.queries, module(torch.randn(1, 25, 8))[0].shape) == (16, (1, 17, 8))
    with pytest.raises(EdgecompError, match=r"budget 16 .* one of 2, 5, 10, 17, a square and the eos_tokens behind it"):
        edgecomp.compressor("d-abstractor", queries=16, **words)


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
