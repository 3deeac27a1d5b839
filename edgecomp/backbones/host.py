"""What a host encoder is to a compressor, whichever library its modules are of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from edgecomp.backbones.attention import Attended
from edgecomp.compressors._base import HostFeature
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Preprocess, Site

__all__ = ["Attend", "Host", "HostBlock", "HostRequest", "host_part", "no_classifier", "require_layers"]

Attend = Callable[..., Attended]
_NOT_OF_ATTENTION = ("levels", "text_likelihood")


class HostBlock(NamedTuple):
    """The parts of a pre-norm block: x + scale1(attention(norm1(x))), then x + scale2(mlp(norm2(x))).

    Attributes:
        run: the whole block.
        attention: what `attend` takes.
    """

    run: Callable[[Tensor], Tensor]
    norm1: Callable[[Tensor], Tensor]
    attention: Any
    scale1: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scale2: Callable[[Tensor], Tensor]


class HostRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What host is asked for, whichever library makes it.

    Attributes:
        name: timm's name, a name of the list, or a folder that transformers saved.
        weights: `random`, a file or a folder in the model's own layout; for timm `pretrained` too (timm downloads
            them; the one way to a download); for a folder "": its own, random where it has none.
        state: tensors to load instead (a checkpoint that holds compressor and host).
        image_size: side in pixels, a multiple of the patch; 0: the model's own. Position tables are resized to it.
        feature_layer, levels: see `Host`.
        keep_head: whether logits are asked: the classifier stays.
        seed: of random weights.
    """

    name: str
    weights: str
    state: Mapping[str, Tensor] | None = None
    image_size: int = 0
    feature_layer: int
    levels: tuple[int, ...] = ()
    keep_head: bool = False
    seed: int


class Host(nn.Module):
    """The patch tokens of a vision transformer at one layer, and at further ones where a compressor reads them.

    Shapes: image (B, 3, S, S) -> tokens (B, N, D). Prefix tokens (class, distillation, registers) are
    dropped. Layer -1 is the encoder's output after its final norm; -2, -3, ... are the hidden states after
    earlier blocks, without a norm. Blocks that nothing reads are not part of the graph.

    Attributes:
        model: the library's module, without the parts that are not needed.
        name: what to call it.
        feature_layer: the layer of the tokens, counted from the end, -1 or lower.
        levels: the layers that the feature `levels` joins, counted likewise.
        total_depth: blocks of the whole model.
        num_prefix_tokens: class, distillation and register tokens in front.
        num_classes: of its classifier; 0 where it has none, or is not kept.
        image_size: side of the image in pixels.
        preprocess: how images are prepared.
    """

    model: nn.Module
    name: str
    feature_layer: int
    levels: tuple[int, ...]
    total_depth: int
    num_prefix_tokens: int
    num_classes: int
    image_size: int
    preprocess: Preprocess

    # -- what a library's host writes -----------------------------------------------------------------

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width of its tokens."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Heads of its attention; 0 where there is none."""

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Side of a patch in pixels."""

    @property
    @abstractmethod
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many blocks it runs."""

    @abstractmethod
    def block(self, index: int) -> HostBlock:
        """Return a block by its number."""

    @abstractmethod
    def embed(self, image: Tensor) -> Tensor:
        """Return what goes into the first block: (B, P + N, D)."""

    @abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """Return tokens behind the final norm."""

    @abstractmethod
    def head(self, tokens: Tensor) -> Tensor:
        """Return the logits of tokens behind the final norm."""

    @property
    @abstractmethod
    def classifier(self) -> nn.Module:
        """The module that makes logits of an image."""

    @abstractmethod
    def require_open_blocks(self, *, tokens_move: bool) -> None:
        """Refuse a host whose blocks cannot be run part by part as they are meant.

        Args:
            tokens_move: tokens are merged or dropped between the blocks, so that positions must be in the tokens alone.

        Raises:
            InvalidSpec: blocks in parallel, post-norm, differential or rotary attention.
        """

    # -- what every host has --------------------------------------------------------------------------

    @property
    def site(self) -> Site:
        """What a compressor after this host is handed."""
        rows, columns = self.grid
        return Site(
            "after",
            image_size=self.image_size,
            tokens_in=rows * columns,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the patch tokens."""
        return self.look(image, (), None)[0][:, self.num_prefix_tokens :]

    def look(
        self, image: Tensor, names: Sequence[HostFeature], attend: Attend | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return all tokens (B, P + N, D), prefix tokens in front, and features by name.

        Args:
            image: (B, 3, S, S).
            names: of the features.
            attend: how the attention whose weights are read is run.
        """
        prefix, main = self.num_prefix_tokens, self.total_depth + self.feature_layer
        opens = any(name not in _NOT_OF_ATTENTION for name in names)
        tokens = self.embed(image)
        found: dict[str, Tensor] = {}
        states: dict[int, Tensor] = {}
        for index in range(self.depth):
            block = self.block(index)
            if not opens or index > main or (index < main and "cumulative_attention" not in names):
                tokens = block.run(tokens)
            else:
                assert attend is not None
                seen = attend(block.attention, block.norm1(tokens))
                tokens = tokens + block.scale1(seen.read)
                tokens = tokens + block.scale2(block.mlp(block.norm2(tokens)))
                assert seen.weights is not None
                received = seen.weights.mean(2)[:, :, prefix:]
                total = found.get("cumulative_attention")
                found = {
                    "class_attention": seen.weights[:, :, 0, prefix:],
                    "received_attention": received,
                    "cumulative_attention": received if total is None else total + received,
                    "attention_output": seen.read[:, prefix:],
                    "class_query": seen.queries[:, :, 0].flatten(1),
                    "keys": seen.keys.transpose(1, 2).flatten(2),
                }
            layer = index - self.total_depth
            if layer == self.feature_layer or layer in self.levels:
                states[layer] = self.norm(tokens) if layer == -1 else tokens
        if "levels" in names:
            found["levels"] = torch.cat([states[layer][:, prefix:] for layer in self.levels], dim=-1)
        return states[self.feature_layer], {name: found[name] for name in names if name in found}


def require_layers(name: str, depth: int, feature_layer: int, levels: Sequence[int], *, keep_head: bool) -> int:
    """Return how many blocks have to run for the layers that are read.

    Raises:
        InvalidSpec: there is no such layer, or logits are wanted of an earlier one.
    """
    if not depth:
        raise InvalidSpec(f"{name} has 0 blocks, and so no layer to read; give an encoder of 1 or more")
    if not -depth <= feature_layer <= -1:
        raise InvalidSpec(f"feature layer {feature_layer} of {name} must lie between -{depth} and -1")
    for level in levels:
        if not -depth <= level <= -1:
            raise InvalidSpec(
                f"level {level} of {list(levels)} is no layer of {name}: they are counted from the end, from -{depth} "
                "to -1; name others with --set params.levels=[...]"
            )
    if keep_head and feature_layer != -1:
        raise InvalidSpec(f"logits come after the last layer of {name}, and feature layer {feature_layer} was asked")
    return depth + 1 + max((feature_layer, *levels))


def no_classifier(name: str) -> InvalidSpec:
    """Return the error of logits that are asked of a model without a classifier."""
    return InvalidSpec(f"{name} has no classifier, so --output logits has nothing to give; use --output tokens")


def host_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the host's tensors of a file that holds compressor and host (keys `backbone.*`); else nothing."""
    return {
        key.removeprefix("backbone.").removeprefix("model."): tensor
        for key, tensor in state.items()
        if key.startswith("backbone.")
    }
