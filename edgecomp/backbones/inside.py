"""A host encoder with a compressor between attention and MLP of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from edgecomp.backbones.attention import Folded, attend, attend_fused, fold
from edgecomp.backbones.host import Host, HostBlock
from edgecomp.backbones.placed import PlacedModel
from edgecomp.compressors._inside import BlockState, InsideCompressor, Trail
from edgecomp.specs import DType, Preprocess, TensorSpec

__all__ = ["InsideModel"]


class InsideModel(PlacedModel):
    """A vision transformer in which a compressor works between attention and MLP of each block.

    Shapes: image (B, 3, S, S) -> the compressor's outputs. The host's blocks run as a static sequence, each on as many
    tokens as the one before left; its weights and modules are its own, and nothing of it is replaced. LayerScale, norms
    of queries and keys, gates and all poolings are the host's; drop paths and dropouts do nothing.
    """

    compressor: InsideCompressor
    backbone: Host

    def __init__(
        self,
        compressor: InsideCompressor,
        backbone: Host,
        *,
        preprocess: Preprocess | None,
        input_dtype: DType,
        pad_to: int = 0,
    ) -> None:
        super().__init__(compressor, backbone, preprocess=preprocess, input_dtype=input_dtype, pad_to=pad_to)
        backbone.require_open_blocks(tokens_move=True)

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """Hold what is added to queries and values folded into their matrices, as constants of their own."""
        names = []
        for index in range(self.backbone.depth):
            folded = self._fold(index)
            for part, matrix in (folded._asdict() if folded is not None else {}).items():
                names.append(_buffer_of(index, part))
                self.register_buffer(names[-1], matrix.detach(), persistent=False)
        try:
            yield
        finally:
            for name in names:
                delattr(self, name)

    def _fold(self, index: int) -> Folded | None:
        """Return a block's matrices of queries and values where the compressor adds to them."""
        buffers = dict(self.named_buffers(recurse=False))
        if _buffer_of(index, "query") in buffers:
            return Folded(*(buffers[_buffer_of(index, part)] for part in Folded._fields))
        shift = self.compressor.shift(index)
        return None if shift is None else fold(self.backbone.block(index).attention, shift)

    @property
    def media_shape(self) -> tuple[int, ...]:
        """No axes between batch and image."""
        return ()

    def forward(self, first: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002 - the signature of all models
        """Return tokens, sizes and source map, or the logits."""
        return self.walk(first, self.compressor, attend, self._fold)

    def walk(self, image: Tensor, reducer: Any, attend: Any, shift_of: Any) -> tuple[Tensor, ...]:
        """Run the host with a compressor's `reduce` between its blocks.

        Args:
            image: pixels.
            reducer: the compressor or its original.
            attend: how attention is run.
            shift_of: returns what is added to the queries and values of a block, in a form that `attend` takes.
        """
        way = (reducer, attend, shift_of)
        return self._leave(self._pass_blocks(self._enter(image), range(self.backbone.depth), *way))

    # -- the point from which buckets differ ----------------------------------------------------------

    @property
    def seam(self) -> int:
        """Blocks in front of the first one that cuts or corrects."""
        shifted = (block for block in range(self.backbone.depth) if self.compressor.shift(block) is not None)
        return min(self.compressor.first_cut, next(shifted, self.backbone.depth))

    def seam_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return the tokens, prefix tokens in front, and the score that the method sums up."""
        site = self.compressor.site
        rows = site.num_prefix_tokens + site.tokens_in
        tokens = TensorSpec("tokens", (batch, rows, site.embed_dim), "float32", "tokens")
        score = TensorSpec("score", (batch, rows), "float32", "features")
        return (tokens, score) if self.compressor.sums_score else (tokens,)

    def before(self, *inputs: Tensor, seam: int) -> tuple[Tensor, ...]:
        """Run the blocks in front of the seam, in which nothing is cut."""
        trail = self._pass_blocks(self._enter(inputs[0]), range(seam), self.compressor, attend, self._fold)
        if not self.compressor.sums_score:
            return (trail.tokens,)
        score = trail.tokens.new_zeros(trail.tokens.shape[:2]) if trail.score is None else trail.score
        return trail.tokens, score

    def behind(self, *inputs: Tensor, seam: int) -> tuple[Tensor, ...]:
        """Run the other blocks."""
        tokens, *score = inputs
        trail = Trail(tokens, score=score[0] if score else None)
        return self._leave(
            self._pass_blocks(trail, range(seam, self.backbone.depth), self.compressor, attend, self._fold)
        )

    # -- parts of the walk ----------------------------------------------------------------------------

    def _enter(self, image: Tensor) -> Trail:
        return Trail(self.backbone.embed(self.normalise(image) if self.input_dtype == "uint8" else image))

    def _pass_blocks(self, trail: Trail, blocks: range, reducer: Any, attend: Any, shift_of: Any) -> Trail:
        for index in blocks:
            block = self.backbone.block(index)
            trail = self._pass_block(block, index, trail, reducer, partial(attend, shift=shift_of(index)))
        return trail

    def _leave(self, trail: Trail) -> tuple[Tensor, ...]:
        trail = trail._replace(tokens=self.backbone.norm(trail.tokens))
        if self.compressor.output == "logits":
            return (self.backbone.head(trail.tokens),)
        return self.give(self.compressor.finish(trail))

    def _pass_block(self, block: HostBlock, index: int, trail: Trail, reducer: Any, attend: Any) -> Trail:
        compressor = self.compressor
        acts = compressor.acts if compressor.acts_in(index) else ""
        if acts == "before block":
            trail = compressor.advance(reducer, index, _state_of(trail), trail)
        normed = block.norm1(trail.tokens)
        seen = attend(block.attention, normed, compressor.attention_bias(trail), weigh=compressor.reads_attention)
        trail = trail._replace(tokens=trail.tokens + block.scale1(seen.read))
        if seen.weights is not None:
            trail = compressor.observe(index, seen.weights, trail)
        if acts == "after attention":
            state = _state_of(trail)._replace(normed=normed, keys=seen.keys, attention=seen.weights, read=seen.read)
            trail = compressor.advance(reducer, index, state, trail)
        return trail._replace(tokens=trail.tokens + block.scale2(block.mlp(block.norm2(trail.tokens))))

    def reference(self) -> nn.Module:
        """Return the same host with the compressor's eager original and torch's own attention."""
        return _InsideReference(self)


def _buffer_of(index: int, part: str) -> str:
    return f"folded_{part}_{index}"


def _state_of(trail: Trail) -> BlockState:
    """Return what a compressor in front of a block is handed: tokens, and no attention."""
    tokens = trail.tokens
    size = tokens.new_ones(*tokens.shape[:2], 1) if trail.size is None else trail.size
    return BlockState(tokens, tokens, tokens.unsqueeze(1), size)


class _InsideReference(nn.Module):
    def __init__(self, model: InsideModel) -> None:
        super().__init__()
        self.model = model
        self.original = model.compressor.reference()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the original's outputs."""
        return self.model.walk(image, self.original, attend_fused, self.model.compressor.shift)
