"""What all routers share: a need for tokens in [0, 1], held to thresholds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.specs import Preprocess, TensorSpec
from edgecomp.words import WORD_SIGNALS

__all__ = ["Router", "RouterSite", "StemScore", "even_thresholds", "next_above"]


class StemScore(NamedTuple):
    """The score by which a method keeps tokens, made of what the stem hands over.

    Attributes:
        reads: names of the stem's outputs.
        make: takes them and returns the score of each patch token, (B, N).
        kept: tokens that stay by it in each bucket, ascending.
    """

    reads: tuple[str, ...]
    make: Callable[..., Tensor]
    kept: tuple[int, ...]


class RouterSite(msgspec.Struct, frozen=True, kw_only=True):
    """What a router is told of the model that it serves.

    Attributes:
        buckets: tokens kept, ascending.
        tokens_in: patch tokens that go in.
        image: what the model takes, with a batch of one; none where it takes no single image.
        preprocess: of that image.
        patch_size: side of the host's patches in pixels; 0 without a host.
        span: tokens that a need of 0 and of 1 stand for, where a router speaks of tokens.
        score: the score by which tokens stay, where it can be made of what the stem hands over.
        stem: what the part in front of all buckets hands over, with a batch of one; empty where there is none.
        tokens: which of it are the tokens.
        is_grid: whether these lie on the image's grid: not where a first method has chosen or made them.
        num_prefix_tokens: in front of the patch tokens that the stem hands over.
        cuts: blocks in which an inside method takes tokens away, counted from 0, in the largest bucket.
        depth: blocks of the host.
    """

    buckets: tuple[int, ...]
    tokens_in: int
    image: TensorSpec | None = None
    preprocess: Preprocess | None = None
    patch_size: int = 0
    span: tuple[int, int] = (0, 0)
    score: StemScore | None = None
    stem: tuple[TensorSpec, ...] = ()
    tokens: str = "tokens"
    is_grid: bool = True
    num_prefix_tokens: int = 0
    cuts: tuple[int, ...] = ()
    depth: int = 0


class Router(nn.Module, ABC):
    """A tiny graph that names the bucket a request needs.

    Shapes: what `input_specs` says -> bucket (B,) int64, the place among the buckets in ascending order; need
    (B, K - 1) float32 in [0, 1] for K buckets; signals (B, S) float32, what the need was made of. The bucket is the
    count of k with need[k] >= thresholds[k], so that a request goes above bucket k where it needs more than that one.

    Args:
        params: the router's own.
        site: what it serves.
    """

    #: What it looks at: the image as the model takes it, or outputs of the stem.
    reads: ClassVar[Literal["image", "stem"]]
    #: Whether it looks at the words of a request as well; a request without words gives zeros.
    reads_words: ClassVar[bool] = False
    #: What `signals` holds, in this order.
    signal_names: ClassVar[tuple[str, ...]]
    Params: ClassVar[type[msgspec.Struct]]

    mean: Tensor
    std: Tensor

    def __init__(self, params: Any, site: RouterSite) -> None:
        super().__init__()
        name = self.label
        if len(site.buckets) < 2:
            raise InvalidSpec(
                f"router {name}: there is one bucket, {site.buckets[0]}, and nothing to choose; give several --budget, "
                "or drop --router"
            )
        if self.reads == "image" and (site.image is None or site.preprocess is None):
            raise InvalidSpec(f"router {name} reads the image, and this model takes no single image; drop --router")
        if self.reads == "stem" and not site.stem:
            raise InvalidSpec(
                f"router {name} reads what the stem hands over, and there is none; drop --no-stem, or choose a method "
                "that stands after or inside a --backbone"
            )
        self.params, self.site = params, site
        if site.preprocess is not None:
            for key in ("mean", "std"):
                value = torch.tensor(getattr(site.preprocess, key), dtype=torch.get_default_dtype())[:, None, None]
                self.register_buffer(key, value, persistent=False)

    @property
    def label(self) -> str:
        """The name by which it is chosen: its file's."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def judge(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return need (B, K - 1), or (B, 1) for all thresholds alike, and signals (B, S).

        Args:
            seen: what `input_specs` says, without the thresholds.
        """

    @property
    @abstractmethod
    def default_thresholds(self) -> tuple[float, ...]:
        """The K - 1 thresholds before `edgecomp calibrate` sets them."""

    @property
    def stem_inputs(self) -> tuple[str, ...]:
        """Names of the stem's outputs that it reads; of `reads = "stem"`."""
        return (self.site.tokens,)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of it."""
        return ()

    def load(self, state: Mapping[str, Tensor]) -> None:  # noqa: ARG002 - most have none
        """Load its weights; most have none."""
        raise InvalidSpec(f"router {self.label} has no weights; drop --router-weights")

    # -- what every router has ------------------------------------------------------------------------

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what it reads, `words` (B, 5) where it reads them, and `thresholds` (B, K - 1)."""
        if self.reads == "image":
            assert self.site.image is not None
            seen = [self.site.image.with_batch(batch)]
        else:
            by_name = {spec.name: spec for spec in self.site.stem}
            seen = [by_name[name].with_batch(batch) for name in self.stem_inputs]
        words = [TensorSpec("words", (batch, len(WORD_SIGNALS)), "float32", "features")] if self.reads_words else []
        cuts = len(self.site.buckets) - 1
        return (*seen, *words, TensorSpec("thresholds", (batch, cuts), "float32", "features"))

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `bucket`, `need` and `signals`."""
        return (
            TensorSpec("bucket", (batch,), "int64", "indices"),
            TensorSpec("need", (batch, len(self.site.buckets) - 1), "float32", "features"),
            TensorSpec("signals", (batch, len(self.signal_names)), "float32", "features"),
        )

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return bucket, need and signals."""
        *seen, thresholds = inputs
        need, signals = self.judge(*seen)
        need = need.expand(-1, thresholds.shape[1])
        above = (need >= thresholds).to(need.dtype)
        return above.sum(1).to(torch.int64), need + 0.0, signals

    def pixels(self, image: Tensor) -> Tensor:
        """Return the image as RGB pixels in [0, 1]: (B, 3, S, S)."""
        if image.dtype == torch.uint8:
            return image.to(self.mean.dtype).movedim(-1, -3) / 255
        return image * self.std + self.mean

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """Return the stem's tokens without those in front: (B, N, D)."""
        return tokens[:, self.site.num_prefix_tokens :]

    def tokens_shape(self) -> tuple[int, int]:
        """Return N and D of the stem's patch tokens; a stem without tokens (B, P + N, D) is refused."""
        for spec in self.site.stem:
            if spec.name == self.site.tokens and len(spec.shape) == 3:
                return spec.shape[1] - self.site.num_prefix_tokens, spec.shape[2]
        raise InvalidSpec(
            f"router {self.label} reads tokens (B, N, D), and the stem hands over "
            f"{', '.join(map(str, self.site.stem))}; choose another --router, or another method"
        )

    @classmethod
    def parse_params(cls, values: Mapping[str, Any], *, name: str) -> Any:
        """Check values against the router's parameters; unknown names and wrong types are errors."""
        known = {field.name for field in msgspec.structs.fields(cls.Params)}
        for key in values:
            if key not in known:
                raise UnknownName(f"parameter of router {name}", key, sorted(known))
        try:
            return msgspec.convert(dict(values), cls.Params)
        except msgspec.ValidationError as error:
            raise InvalidSpec(f"router {name}: {error}; correct it with --set router.NAME=VALUE") from None


def even_thresholds(buckets: int) -> tuple[float, ...]:
    """Return thresholds that cut [0, 1] into equal parts, one for each bucket."""
    return tuple((place + 1) / buckets for place in range(buckets - 1))


def next_above(value: float) -> float:
    """Return the next float32 above: the threshold that a need must exceed, where reaching `value` is not enough."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))
