"""Contract 1: what comes out of a module has the names, shapes and types that it declares."""

from __future__ import annotations

import torch


def test_outputs_have_the_declared_shapes_and_types(smoke, assembled, outputs_of, make_inputs):
    for output in outputs_of(smoke):
        assembly = assembled(smoke, output=output)
        assert sorted(model.compressor.budget.tokens_out for model in assembly.models) == sorted(smoke.budgets)
        for batch in (1, 2, 3):
            for inputs in make_inputs(assembly, batch=batch).values():
                for model in assembly.models:
                    for module in (model, model.reference()):
                        with torch.inference_mode():
                            outputs = module(*inputs)
                        assert isinstance(outputs, tuple)
                        found = [(tuple(value.shape), value.dtype) for value in outputs]
                        specs = model.output_specs(batch)
                        assert found == [(spec.shape, getattr(torch, spec.dtype)) for spec in specs]
                        for spec, value in zip(specs, outputs, strict=True):
                            if value.is_floating_point():  # whole numbers are declared as such: they are judged exactly
                                assert torch.equal(value, value.round()) == (spec.kind == "counts"), spec


def test_specs_are_static_and_named_apart(smoke, assembled, outputs_of):
    for output in outputs_of(smoke):
        for model in assembled(smoke, output=output).models:
            for batch in (1, 2):
                specs = (*model.input_specs(batch), *model.output_specs(batch))
                assert len({spec.name for spec in specs}) == len(specs)
                for spec in specs:
                    assert spec.name.isidentifier()
                    assert spec.shape[0] == batch
                    assert all(isinstance(size, int) and size > 0 for size in spec.shape)


def test_tokens_out_are_the_budget(smoke, assembled):
    for model in assembled(smoke).models:
        tokens = [spec for spec in model.output_specs() if spec.kind == "tokens"]
        budget = model.compressor.budget
        assert [spec.shape[-2] for spec in tokens] == [budget.num_prefix_tokens + budget.tokens_out]


def test_parameters_do_not_depend_on_the_budget(smoke, assembled):
    first, *others = assembled(smoke).models
    for other in others:
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in first.named_parameters()]
        for mine, its in zip(first.parameters(), other.parameters(), strict=True):
            assert mine.data_ptr() == its.data_ptr()


def test_every_output_of_the_recipe_has_a_smoke_preset(smokes, outputs_of):
    made = {output for smoke in smokes for output in outputs_of(smoke)}
    assert made == set(smokes[0].recipe.outputs)
