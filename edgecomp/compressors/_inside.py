"""What a compressor between the blocks of a host is handed, and what it hands back."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from edgecomp.compressors._base import Compressor
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["BlockState", "InsideCompressor", "LowRank", "Shift", "Trail"]


class BlockState(NamedTuple):
    """What a compressor is handed in a block.

    Attributes:
        tokens: (B, N, D) where the compressor acts; prefix tokens first.
        normed: (B, N, D) what the attention read; before a block the tokens themselves.
        keys: (B, H, N, d) of the attention, after their norm where they have one.
        size: (B, N, 1) input tokens that each token stands for.
        attention: (B, H, N, N) what each token reads of each, where the method reads it.
        read: (B, N, D) what the attention gave, where one ran.
    """

    tokens: Tensor
    normed: Tensor
    keys: Tensor
    size: Tensor
    attention: Tensor | None = None
    read: Tensor | None = None


class LowRank(NamedTuple):
    """The matrix up diag(weights) down: down (d, D), weights (d,), up (D, d)."""

    down: Tensor
    weights: Tensor
    up: Tensor


class Shift(NamedTuple):
    """What is added to the matrices of an attention's queries and values."""

    query: LowRank
    value: LowRank


class Trail(NamedTuple):
    """Tokens on their way through the blocks.

    Attributes:
        tokens: (B, N, D).
        size: (B, N, 1) input tokens that each stands for; none while all are ones.
        rows: where tokens came from or went to, as the method counts it, int32; none while nothing was changed.
        score: (B, N) what the method sums up over blocks; none where it sums nothing.
    """

    tokens: Tensor
    size: Tensor | None = None
    rows: Tensor | None = None
    score: Tensor | None = None


class InsideCompressor(Compressor):
    """A compressor that can stand between the blocks of a host."""

    #: Where in a block it works: in front of it, or between its attention and its MLP.
    acts: ClassVar[Literal["before block", "after attention"]] = "after attention"

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if output == "logits" and site.placement != "inside":
            raise InvalidSpec(
                "output logits comes from a host's classifier, and here tokens are taken as they are given; name a "
                "--backbone, or a preset, for the method to stand in, or drop --output"
            )
        self.num_prefix_tokens = site.num_prefix_tokens

    def tokens_spec(self, batch: int) -> TensorSpec:
        """Return the first input: a host's image, or the tokens that are given, prefix tokens in front."""
        if self.site.placement == "inside":
            side = self.site.image_size
            return TensorSpec("image", (batch, 3, side, side), "float32", "image")
        tokens = self.num_prefix_tokens + self.budget.tokens_in
        return TensorSpec("tokens", (batch, tokens, self.site.embed_dim), "float32", "tokens")

    def logits_spec(self, batch: int) -> TensorSpec:
        """Return the output of a host's classifier."""
        return TensorSpec("logits", (batch, self.site.num_classes), "float32", "features")

    @abstractmethod
    def acts_in(self, block: int) -> bool:
        """Say whether it changes the tokens of a block."""

    @abstractmethod
    def advance(self, reducer: Any, block: int, state: BlockState, trail: Trail) -> Trail:
        """Return the trail behind a block in which it acts.

        Args:
            reducer: this compressor, or its eager original: whose `reduce` is used.
        """

    @abstractmethod
    def finish(self, trail: Trail) -> tuple[Tensor, ...]:
        """Return the outputs, after the host's last norm."""

    def observe(self, block: int, attention: Tensor, trail: Trail) -> Trail:  # noqa: ARG002 - most look at nothing
        """Return the trail with what the attention (B, H, N, N) of any block adds to `score`."""
        return trail

    def attention_bias(self, trail: Trail) -> Tensor | None:  # noqa: ARG002 - most weigh nothing
        """Return sizes (B, N, 1) whose log is added to the attention's scores; none: all tokens weigh alike."""
        return None

    def shift(self, block: int) -> Shift | None:  # noqa: ARG002 - most correct nothing
        """Return what is added to a block's queries and values; none: nothing."""
        return None

    @property
    def reads_attention(self) -> bool:
        """Whether it looks at the attention's weights."""
        return False

    @property
    def sums_score(self) -> bool:
        """Whether `observe` sums up a score over blocks."""
        return False

    @property
    def first_cut(self) -> int:
        """The first block in which it acts; the host's depth where it acts in none."""
        return next((block for block in range(self.site.depth) if self.acts_in(block)), self.site.depth)
