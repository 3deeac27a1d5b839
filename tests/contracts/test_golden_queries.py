"""Contract 3 of the Q-Former: the original takes its queries as an input, here they are weights."""

from __future__ import annotations

import pytest
import torch
from goldens import FLOORS, by_onnx, golden_files, read_golden, relative_error

from edgecomp.compressors import compressor_class
from edgecomp.specs import Site, TokenBudget

FILES = golden_files("qformer")
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def samples(path):
    """Yield a module with the queries of each sample as its own, its inputs, and what the original gave."""
    config, inputs, outputs, weights, _ = read_golden(path)
    cls = compressor_class("q-former")
    given = {"prefix_tokens": 0, "num_heads": config["H"], "words": config["T"], "mask": True}
    for row in range(config["B"]):
        state = {**weights, "query_tokens": inputs["query_embeds"][row : row + 1]}
        found = cls.infer_params(state, cls.parse_params(given, method="q-former"))
        params = cls.parse_params({**given, **found}, method="q-former")
        tokens = inputs["image_embeds"][row : row + 1]
        count, budget = tokens.shape[1], TokenBudget(tokens.shape[1], config["Q"])
        module = cls(params, Site("after", tokens_in=count, embed_dim=tokens.shape[2]), budget).eval()
        assert module.load_original(state) == cls.layout_of(state) == ("instructblip" if config["T"] else "blip-2")
        values = [tokens, inputs["image_mask"][row : row + 1].bool()]
        if config["T"]:
            text_mask = inputs["attention_mask"][row : row + 1, config["Q"] :].bool()
            values += [inputs["input_ids"][row : row + 1].int(), text_mask]
        yield module, values, outputs["last_hidden_state"][row : row + 1]


@each_file
def test_static_original_and_onnx_equal_the_golden_file(path, tmp_path):
    floor = read_golden(path)[-1]
    for module, values, expected in samples(path):
        for one in (module, module.reference()):
            with torch.inference_mode():
                assert relative_error(torch.cat(one(*values), 1), expected) <= FLOORS * floor
        got = by_onnx(tmp_path, module, *values)
        rows = torch.cat([torch.from_numpy(got[spec.name]) for spec in module.output_specs()], 1)
        assert relative_error(rows, expected) <= FLOORS * floor


@each_file
def test_every_weight_of_the_original_counts(path):
    module, values, _ = next(samples(path))
    for parameter in module.parameters():
        before = parameter.detach().clone()
        with torch.inference_mode():
            parameter.fill_(float("nan"))
            assert not all(torch.isfinite(value).all() for value in module(*values))
            parameter.copy_(before)
