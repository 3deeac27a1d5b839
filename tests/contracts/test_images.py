"""Several images in one request: each gets what it would get by itself."""

from __future__ import annotations

import msgspec
import pytest
import torch

from edgecomp.compressors import compressor_class
from edgecomp.specs import load_recipe, method_names

IMAGES = 3


@pytest.fixture(autouse=True)
def _fp64():
    """Make constants in fp64 too: those of a module that is cast afterwards keep the rounding of fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _cases():
    """Return every smoke preset that stands after an encoder, of each method that takes several images."""
    for method in method_names():
        recipe = load_recipe(method)
        if "images" in compressor_class(method).Params.__struct_fields__:
            yield from (pytest.param(method, preset, id=f"{method}-{preset}") for preset in recipe.smoke_presets)


def _build(method, preset, images):
    """Return a method for so many images on given tokens, in fp64, with weights that depend on names alone."""
    recipe = load_recipe(method)
    sizes = {"tokens": 16, "context_dim": 32} if recipe.preset(preset).backbone == "test_vit" else {}
    count = recipe.rule(preset).default[0]
    module = compressor_class(method).from_recipe(recipe, count, preset=preset, images=images, **sizes).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    module.load_state_dict(module.state_dict())  # tables that are baked when weights are loaded
    return module


def _inputs(module, batch):
    generator = torch.Generator().manual_seed(1)
    made = []
    for spec in module.input_specs(batch):
        if spec.kind == "mask":
            made.append(torch.rand(spec.shape, generator=generator) < 0.6)
        elif spec.kind == "sizes":
            made.append(torch.randint(1, 4, spec.shape, generator=generator, dtype=torch.int32))
        else:
            made.append(torch.randn(spec.shape, generator=generator, dtype=torch.float64))
    return made


def test_the_methods_that_take_several_images_call_them_alike():
    named = {method for method in method_names() if "images" in compressor_class(method).Params.__struct_fields__}
    assert named >= {"perceiver", "slice-wise", "resampler-2d"}


@pytest.mark.parametrize(("name", "preset"), list(_cases()))
def test_images_of_a_request_are_requests_of_one_image(name, preset):
    """The maths of no image sees another. Flamingo adds a row of a table to each place: then the first row is moved."""
    several, single = (_build(name, preset, images) for images in (IMAGES, 1))
    params = msgspec.structs.asdict(several.params)
    inputs = _inputs(several, batch=2)
    assert all(value.shape[:2] == (2, IMAGES) for value in inputs)
    table = params.get("media_embeds", 0)
    with torch.inference_mode():
        together, original = several(*inputs), several.reference()(*inputs)
        assert [tuple(value.shape) for value in together] == [spec.shape for spec in several.output_specs(2)]
        for index in range(IMAGES):
            if table:
                single.media_embeds.copy_(several.media_embeds.roll(-index, 0))
            shapes = [spec.shape for spec in single.input_specs(2)]
            alone = single(*(value[:, index].reshape(shape) for value, shape in zip(inputs, shapes, strict=True)))
            for whole, reference, part in zip(together, original, alone, strict=True):
                expected = part.reshape(whole[:, index].shape)
                scale = max(1.0, float(expected.abs().max()))
                assert float((whole[:, index] - expected).abs().max()) <= 1e-12 * scale
                assert float((reference[:, index] - expected).abs().max()) <= 1e-10 * scale
    assert float((together[0][:, 0] - together[0][:, 1]).abs().max()) > 1e-3  # and they are not all the same
