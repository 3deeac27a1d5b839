"""Methods that group tokens by plain ops, at sizes and settings that no smoke preset has."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest
import torch

from edgecomp.compressors.similarity_merge import SimilarityMerge, SimilarityMergeParams
from edgecomp.compressors.token_pooling import TokenPooling, TokenPoolingParams
from edgecomp.compressors.tome import ToMe, ToMeParams
from edgecomp.errors import InvalidSpec
from edgecomp.export.lower import lower
from edgecomp.runners import open_runner
from edgecomp.specs import Site, TokenBudget


def _make(cls, params, tokens, *, width=8, keep=0):
    return cls(params, Site("after", tokens_in=tokens, embed_dim=width), TokenBudget(tokens, keep or tokens))


def _chain(tokens, dtype=torch.float64):
    """Return tokens on a circle, each similar to its two neighbours alone, and the cosine between those."""
    angles = torch.arange(tokens, dtype=torch.float64) * 2 * math.pi / tokens
    step = 2 * math.pi / tokens
    x = torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(0).to(dtype)
    return x, (math.cos(step) + math.cos(2 * step)) / 2


def _assert_equal(module, *inputs, atol=1e-12):
    with torch.inference_mode():
        got, expected = module(*inputs), module.reference()(*inputs)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other.double()).abs().max()) <= atol
    return got


@pytest.mark.parametrize("tokens", [40, 41])
def test_greedy_groups_settle_along_the_longest_chain(tokens, tmp_path, default_dtype):
    """Whether a token leads depends on all before it, one by one: the most rounds that the unrolled loop can need."""
    with default_dtype("float64"):
        x, threshold = _chain(tokens)
        module = _make(SimilarityMerge, SimilarityMergeParams(threshold=threshold), tokens, width=2)
        merged, count, mask, source_map = _assert_equal(module, x)
        assert int(count) == int(mask.sum()) == int(source_map.max()) + 1 == tokens // 2
        assert not merged[0, int(count) :].any()
    x, threshold = _chain(tokens, torch.float32)
    module = _make(SimilarityMerge, SimilarityMergeParams(threshold=threshold), tokens, width=2)
    model = lower(module, inputs=module.input_specs(), outputs=module.output_specs(), opset=20)
    ir.save(model, tmp_path / "merge.onnx")
    with open_runner("onnxruntime", tmp_path / "merge.onnx", threads=1) as runner:
        got = runner.infer({"tokens": x.numpy()})
    assert got["source_map"].tolist() == source_map.tolist()
    assert got["count"].tolist() == count.tolist()


def test_groups_beyond_the_budget_are_counted():
    x = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = _make(SimilarityMerge, SimilarityMergeParams(threshold=0.6), 24, keep=5).double()
    merged, count, mask, source_map = _assert_equal(module, x)
    assert merged.shape[1] == 5
    assert int(count.min()) > 5
    assert mask.all()
    assert torch.equal(source_map.amax(1) + 1, count.int())


def test_a_grid_that_does_not_fit_is_refused():
    for params, words in (({}, "no square"), ({"grid_height": 5}, "no 5 equal rows")):
        with pytest.raises(InvalidSpec, match=f"24 tokens are {words}; set params.grid_height"):
            _make(SimilarityMerge, SimilarityMergeParams(scope="adjacent", **params), 24)


@pytest.mark.parametrize("clustering", ["k-means", "k-medoids"])
@pytest.mark.parametrize("significance", ["norm", "attention"])
def test_token_pooling_over_many_iterations(clustering, significance):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 64, 2, generator=generator, dtype=torch.float64)  # few dimensions: centres move for longer
    weights = [torch.rand(3, 2, 64, generator=generator, dtype=torch.float64)] if significance == "attention" else []
    seen = []
    for iterations in (1, 4, 8):
        params = TokenPoolingParams(clustering=clustering, iterations=iterations, significance=significance)
        seen.append(_assert_equal(_make(TokenPooling, params, 64, width=2, keep=6), x, *weights)[0])
    assert not torch.equal(seen[0], seen[1])


def test_a_cluster_without_weight_keeps_its_centre():
    x = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = _make(TokenPooling, TokenPoolingParams(), 12, keep=4)
    weights = torch.zeros(1, 2, 12, dtype=torch.float64)
    merged, *_ = _assert_equal(module, x, weights)
    assert torch.equal(merged, x[:, :4])


@pytest.mark.parametrize("order", ["ascending", "rank"])
@pytest.mark.parametrize("tokens", [20, 21])
def test_tome_above_a_threshold(tokens, order):
    x = torch.randn(4, tokens, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = []
    for threshold, r in ((-1.0, 0), (0.3, 0), (0.5, 0), (0.5, 3), (1.0, 0)):
        module = _make(ToMe, ToMeParams(threshold=threshold, r=r, order=order), tokens)
        merged, size, source_map, count, mask = _assert_equal(module, x)
        assert torch.equal(mask.sum(1), count)
        assert torch.equal(source_map.amax(1) + 1, count.int())
        assert torch.equal(size.sum(1), torch.full_like(size[:, 0], tokens))
        assert not merged[~mask].any()
        counts.append(count)
    everything, some, fewer, capped, nothing = counts
    assert (everything == tokens - tokens // 2).all()
    assert (nothing == tokens).all()
    assert (some <= fewer).all()
    assert (capped >= tokens - 3).all()
    assert len(set(fewer.tolist())) > 1


def test_tome_refuses_a_threshold_where_it_has_no_place():
    site = Site("inside", 64, 16, 8, 1, 4)
    with pytest.raises(InvalidSpec, match=r"params.threshold=0.5 leaves the count of tokens to the data"):
        ToMe(ToMeParams(threshold=0.5), site, TokenBudget(16, 16, 1))
    with pytest.raises(InvalidSpec, match="rows for all 20 tokens are needed, and the budget is 10"):
        _make(ToMe, ToMeParams(threshold=0.5), 20, keep=10)
    with pytest.raises(InvalidSpec, match=r"merges once, and params\.schedule has 2 steps"):
        _make(ToMe, ToMeParams(threshold=0.5, schedule=(2, 2)), 20)
