"""What every compressor is: a static module, its eager original, its parameters, its checkpoint layouts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.errors import InvalidSpec, UnknownName, WeightsError
from edgecomp.specs import Output, Placement, Recipe, Site, TensorSpec, TokenBudget, load_recipe, parse_budget
from edgecomp.specs.layout import best_match

if TYPE_CHECKING:
    from edgecomp.compressors._keys import KeyMap

__all__ = ["Compressor", "HostFeature", "Natural", "Params", "Positive", "constant", "count_heads", "initialise"]

Positive = Annotated[int, Meta(ge=1, le=65536)]  # a parameter that counts something there is
Natural = Annotated[int, Meta(ge=0, le=65536)]  # one that may count nothing


#: What a host can hand over besides its tokens; N patch tokens, P prefix tokens in front of them, H heads.
#:   class_attention       (B, H, N)      what the class token reads of each patch, at the layer of the tokens
#:   received_attention    (B, H, N)      what all tokens read of each patch there, on average
#:   cumulative_attention  (B, H, N)      the same, summed over all layers up to there
#:   attention_output      (B, N, D)      what the attention there adds to each patch
#:   class_query           (B, D)         the class token's query there, heads joined
#:   keys                  (B, P + N, D)  the keys there, heads joined
#:   text_likelihood       (B, N)         how much the pixels of each patch look like text
#:   levels                (B, N, L * D)  the patches at the layers that `Compressor.levels_of` names, side by side
HostFeature = Literal[
    "class_attention", "received_attention", "cumulative_attention", "attention_output", "class_query", "keys",
    "text_likelihood", "levels",
]  # fmt: skip


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of a method; each compressor extends it.

    Attributes:
        tokens: tokens handed over where no host says how many (`--backbone none`).
        embed_dim: width of the compressor.
    """

    tokens: int = 196
    embed_dim: int = 384


P = TypeVar("P", bound=Params)


class Compressor(nn.Module):
    """A vision-token compressor for one budget.

    The parameters (names, shapes) do not depend on the budget, so that all buckets of a bundle share one
    set of weights; whatever depends on it is a buffer that is not saved.

    Args:
        params: the method's own parameters.
        site: where it stands and what it is handed there.
        budget: tokens in, tokens out.
        output: `tokens`, or `logits` where the method has a classifier.
    """

    Params: ClassVar[type[Params]] = Params
    #: Of the recipe, which a module was made from; "" where nobody said so.
    preset: str = ""
    #: The parameter that a host's width decides.
    width_param: ClassVar[str] = "embed_dim"
    #: Whether `load_original` takes layouts of other methods, which stand inside this one.
    takes_inner_layouts: ClassVar[bool] = False
    #: Parameters that no checkpoint stores; the export says which value it took.
    unstored_params: ClassVar[tuple[str, ...]] = ()
    #: What 0 stands for in those where it stands for a rule; `{params.NAME}` is filled in.
    zero_means: ClassVar[Mapping[str, str]] = {}
    #: Names that parameters had in weights saved before, and those of today.
    renamed_params: ClassVar[Mapping[str, str]] = {}
    #: Weights (shell patterns) that only decide which tokens are taken: no gradient passes them, and no NaN.
    ranking_params: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__()
        self.params = params
        self.site = site
        self.budget = budget
        self.output: Output = output

    #: Ends the refusal of a budget that a grid does not allow, for example by the parameter that would.
    budget_hint: ClassVar[str] = ""
    #: `after` a host: whether its prefix tokens stand in front of the patch tokens that are handed over.
    keeps_prefix: ClassVar[bool] = False
    #: Whether prefix tokens that go in come out in front.
    hands_on_prefix: ClassVar[bool] = True

    #: Whether tokens that go in are read as a grid in raster order, so that places matter.
    reads_grid: ClassVar[bool] = False

    # -- what a method writes -------------------------------------------------------------------------

    @abstractmethod
    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return names, shapes and types of what `forward` takes, in its order."""

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """What a host hands over besides tokens: inputs of `forward` right behind them, in this order.

        Without a host they are inputs of the graph, as `input_specs` says.
        """
        return ()

    @classmethod
    def levels_of(cls, params: Any) -> tuple[int, ...]:
        """Return the host's layers that the feature `levels` joins along the width, in this order.

        They are counted from the end as `--feature-layer` is: -1 is behind the final norm, -2 and lower are hidden
        states without a norm. Without a host, `levels` is an input of the graph like any other feature.
        """
        return ()

    @classmethod
    def prefix_of(cls, params: Any) -> tuple[bool, bool]:
        """Return whether a host's prefix tokens go in, `after` it, and whether they come out."""
        return cls.keeps_prefix, cls.hands_on_prefix

    @abstractmethod
    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return names, shapes and types of what `forward` returns, in its order."""

    @abstractmethod
    def reference(self) -> nn.Module:
        """Return the eager original, sharing this module's parameters, with the same inputs and outputs."""

    @classmethod
    def count_tokens(cls, params: Any, site: Site) -> int:
        """Return how many tokens go in: the host's, or as many as the method makes from the image."""
        return site.tokens_in

    @classmethod
    def site_without_host(cls, params: Any, placement: Placement, image_size: int) -> Site:
        """Return the site of an encoder, or of given tokens."""
        if placement == "encoder":
            return Site("encoder", image_size=image_size)
        return Site(
            placement,
            tokens_in=params.tokens,
            embed_dim=getattr(params, cls.width_param),
            num_prefix_tokens=getattr(params, "prefix_tokens", 0),
            num_heads=getattr(params, "attention_heads", 0),
        )

    @classmethod
    def params_of_site(cls, site: Site) -> dict[str, Any]:
        """Return the parameters that a host decides, of those that the method has."""
        found = {"tokens": site.tokens_in, cls.width_param: site.embed_dim}
        found |= {"prefix_tokens": site.num_prefix_tokens, "attention_heads": site.num_heads}
        return {name: value for name, value in found.items() if name in cls.Params.__struct_fields__}

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return the checkpoint layout that the keys tell; "" for edgecomp's own.

        The recipe declares each under `[[layouts]]`. By that the keys of a whole model are found and stripped of their
        prefix before this class sees them, so that it need know neither prefixes nor what else a file holds.
        """
        return ""

    @classmethod
    def split_checkpoint(cls, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the compressor's tensors of an original's checkpoint, and the host's under the host's own keys."""
        return dict(state), {}

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: Any) -> dict[str, Any]:
        """Return the parameters that a checkpoint decides by its keys and shapes."""
        return {}

    @classmethod
    def for_budgets(cls, params: Any, counts: Sequence[int]) -> Any:
        """Return the parameters completed by the token counts that one bundle will hold."""
        return params

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return the tokens kept where the parameters alone decide them; empty: the recipe's budgets hold."""
        return ()

    @classmethod
    def possible_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return the tokens that can be kept where a grid decides it; empty: whatever the recipe's budgets allow."""
        return ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of this compressor, for example its schedule."""
        return ()

    @classmethod
    def plain_vit(cls, params: Any) -> dict[str, Any] | None:
        """Return the arguments of the plain ViT that an `encoder` method stands in for, in timm's words."""
        return None

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint in a layout of the original or in edgecomp's own, and return that layout's name.

        Args:
            unread: keys (shell patterns) that the recipe lets stand unread.

        Raises:
            WeightsError: what does not fit, in the file's own names.
        """
        from edgecomp.compressors._checkpoint import load_exactly

        load_exactly(self, state, layout="edgecomp", unread=unread)
        return "edgecomp"

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """How each layout that this module can be saved in names its tensors."""
        return {}

    @property
    def written_state(self) -> dict[str, Tensor]:
        """This module's tensors, and what an original stores beside them."""
        return self.state_dict()

    def original_state(self, layout: str) -> dict[str, Tensor]:
        """Return this module's tensors as a layout of the original names them: what `load_original` reads back.

        Raises:
            InvalidSpec: the method has no such layout, or a file in it holds what this module has not.
        """
        method, maps = self.method_name, self.key_maps
        if layout not in maps:
            known = f" {', '.join(maps)} and" if maps else ""
            raise InvalidSpec(
                f"{method}: this module is saved in{known} edgecomp's own layout, not in {layout!r}; "
                f"{'name one of them, or ' if maps else ''}leave layout out"
            )
        state = maps[layout].write(self.written_state, method=method, layout=layout)
        self._require_read_back(state, layout)
        return state

    def _require_read_back(self, state: Mapping[str, Tensor], layout: str) -> None:
        """Refuse a state that a file's reader would not take for this module."""
        match = best_match(list(state), load_recipe(self.method_name).layouts)
        if match is None or not match.fits or match.layout.name != layout or match.unknown:
            told = "no layout" if match is None else f"{match.layout.name}, with {match.differences() or 'all of it'}"
            raise InvalidSpec(
                f"{self.method_name}: this module has not what a file in the layout {layout!r} holds (the nearest is "
                f"{told}); leave layout out, which saves in edgecomp's own"
            )

    # -- what every method has ------------------------------------------------------------------------

    @property
    def method_name(self) -> str:
        """The method's name: that of its file."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def save(self, path: str | Path, *, layout: str = "") -> Path:
        """Write the weights as safetensors, for `--weights`, `edgecomp.compressor(weights=...)` or the original.

        Args:
            path: a file that ends in .safetensors; it is replaced at once or not at all.
            layout: of an original that the method can be saved in; "": edgecomp's own names.

        Raises:
            WeightsError: it has no weights, or weights of NaN or Inf; nothing is written.
        """
        from edgecomp.compressors._checkpoint import (
            IMAGE_SIZE,
            METHOD,
            PARAMS,
            PRESET,
            TOKENS_IN,
            TOKENS_OUT,
            write_checkpoint,
        )

        if layout:
            return write_checkpoint(Path(path), self.original_state(layout), metadata={})
        state = self.state_dict()
        if not state:
            name = self.method_name
            raise WeightsError(f"{name} has no weights to save; `edgecomp export --method {name}` needs none")
        params = msgspec.json.encode(self.params, order="sorted").decode()
        told = {METHOD: self.method_name, PARAMS: params} | ({PRESET: self.preset} if self.preset else {})
        told |= {TOKENS_IN: str(self.budget.tokens_in), TOKENS_OUT: str(self.budget.tokens_out)}
        told |= {IMAGE_SIZE: str(self.site.image_size)} if self.site.placement == "encoder" else {}
        return write_checkpoint(Path(path), state, metadata=told)

    @classmethod
    def parse_params(cls, values: Mapping[str, Any], *, method: str) -> Any:
        """Check values against the method's parameters; unknown names and wrong types are errors."""
        known = {field.name: field for field in msgspec.structs.fields(cls.Params)}
        for name in values:
            if name not in known:
                raise UnknownName(f"parameter of {method}", name, known)
        for name, value in values.items():
            try:
                msgspec.convert({name: value}, cls.Params)
            except msgspec.ValidationError as error:
                text = str(error).partition(" - at ")[0]
                allowed = get_args(get_type_hints(cls.Params)[name])  # of a Literal
                choices = f" (one of {', '.join(allowed)})" if allowed and text.startswith("Invalid enum") else ""
                raise InvalidSpec(
                    f"{method}: params.{name}={value}: {text}{choices}; correct it with --set params.{name}=VALUE"
                ) from None
        return msgspec.convert(dict(values), cls.Params)

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        budget: int | str,
        *,
        preset: str = "",
        output: Output = "tokens",
        image_size: int = 0,
        **params: Any,
    ) -> Compressor:
        """Build the compressor of a recipe for one budget, with no host.

        Args:
            recipe: from `load_recipe`.
            budget: tokens kept, or a percentage such as `"25%"`.
            preset: one of `recipe.presets`; the recipe's default where empty.
            output: `tokens` or `logits`.
            image_size: of an encoder, in pixels; 0: the preset's.
            params: parameters of the method that replace the preset's.
        """
        chosen = recipe.preset(preset or recipe.defaults.preset)
        values = cls.parse_params({**chosen.params, **params}, method=recipe.method)
        size = image_size or chosen.image_size or recipe.defaults.image_size
        site = cls.site_without_host(values, chosen.placement, size)
        kept = parse_budget(
            str(budget),
            tokens_in=cls.count_tokens(values, site),
            rule=(chosen.budgets or recipe.budgets).narrowed(cls.possible_counts(values, site)),
            method=recipe.method,
            hint=cls.budget_hint,
        )
        made = cls(cls.for_budgets(values, [kept.tokens_out]), site, kept, output)
        made.preset = preset or recipe.defaults.preset
        return made


def count_heads(rows: int, head_dim: int, *, name: str, param: str = "head_dim") -> int:
    """Return how many heads of `head_dim` a projection with `rows` outputs holds."""
    if rows % head_dim:
        raise WeightsError(
            f"{name} of the weights has {rows} outputs, not a multiple of head width {head_dim}; a checkpoint does "
            f"not store the head width, give it with --set params.{param}=N"
        )
    return rows // head_dim


def constant(values: Tensor) -> Tensor:
    """Return a constant computed in fp64 as the default type, so that modules built in fp64 keep its digits."""
    return values.to(torch.get_default_dtype())


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter random values that leave no part of the network without effect.

    Matrices: normal with standard deviation 1/sqrt(fan in). Vectors: their own start value (1 for a norm's
    scale, 0 for a bias) plus 0.1 times a normal value, so that a dropped bias or scale shows in parity.
    """
    for _, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim >= 2:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(0.1 * noise)
