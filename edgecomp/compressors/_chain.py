"""Two methods in a row: the second reads the tokens that the first gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, HostFeature
from edgecomp.compressors._merging import identity_map
from edgecomp.compressors._pruning import compose_index
from edgecomp.compressors._tokens import compose_maps, group_matrix
from edgecomp.errors import InvalidSpec
from edgecomp.specs import TensorSpec, TokenBudget

__all__ = ["Chain"]

_MAPS = ("index", "source_map")


class Chain(Compressor):
    """A method, and another one on its tokens.

    Shapes: what the first takes, and what the second takes besides tokens -> what the second gives. Where both say
    where tokens came from or went to, the chain says it from end to end: `index` of two selections, else `source_map`;
    `size` of two mergers counts the first one's tokens. What else the first gives comes out as `first_NAME`; a map of
    the second alone, which is not one of the chain's tokens, as `then_NAME`. A mask of rows that the first gives goes
    to the second.

    Static rewrite: the parts' own; maps are composed by Gather and Scatter without reduction.

    Args:
        first: for the one budget that all chains of a bundle have in their middle.
        second: for the budget of the bucket.
        methods: their names, for messages.
    """

    def __init__(self, first: Compressor, second: Compressor, *, methods: tuple[str, str]) -> None:
        kept = TokenBudget(first.budget.tokens_in, second.budget.tokens_out, second.budget.num_prefix_tokens)
        super().__init__(first.params, first.site, kept)
        self.first, self.second = first, second
        self.keeps_prefix = first.keeps_prefix  # type: ignore[misc]
        self.hands_on_prefix = second.hands_on_prefix  # type: ignore[misc]
        gives, (tokens, *takes) = first.output_specs(), second.input_specs()
        _require_fit(gives[0], tokens, second, methods)
        self._mask = _find_mask([spec.name for spec in gives], gives, takes, methods)
        self._takes = takes  # of the second, besides tokens
        names = {spec.name for spec in gives}
        maps = [next((name for name in _MAPS if name in found), "") for found in (names, self._given_names)]
        self._maps: tuple[str, str] = (maps[0], maps[1])
        wired = {gives[0].name, *(("mask", "count") if self._mask else ())}
        self._carried = tuple(spec for spec in gives if spec.name not in wired)
        _require_distinct(self, methods)

    @property
    def _given_names(self) -> set[str]:
        return {spec.name for spec in self.second.output_specs()}

    # -- what goes in, over, and out ------------------------------------------------------------------

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """What the first reads of a host."""
        return self.first.host_features

    @property
    def _others(self) -> list[TensorSpec]:
        return [spec for spec in self._takes if spec.name != self._mask]

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what the first takes, and what the second takes besides."""
        return (*self.first.input_specs(batch), *(spec.with_batch(batch) for spec in self._others))

    def handed_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what goes from the first to the second, and past it."""
        takes, gives = self.second.input_specs(batch)[1:], self.first.output_specs(batch)
        handed = [msgspec.structs.replace(gives[0], name="handed")]
        handed += [msgspec.structs.replace(spec, name="handed_mask") for spec in takes if spec.name == self._mask]
        carried = (msgspec.structs.replace(spec, name=f"handed_{spec.name}") for spec in self._carried)
        return (*handed, *(spec.with_batch(batch) for spec in carried))

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what comes out."""
        specs, (first, second) = [], self._maps
        for spec in self.second.output_specs(batch):
            if spec.name != second:
                specs.append(spec)
            elif not first:
                specs.append(msgspec.structs.replace(spec, name=f"then_{spec.name}"))
            elif first == second == "index":
                specs.append(spec)
            else:
                specs.append(TensorSpec("source_map", (batch, self._rows_in), "int32", "indices"))
        composed = {first} if first and second else set()
        composed |= {"size"} & self._given_names
        return (
            *specs,
            *(
                msgspec.structs.replace(spec, name=f"first_{spec.name}").with_batch(batch)
                for spec in self._carried
                if spec.name not in composed
            ),
        )

    @property
    def _rows_in(self) -> int:
        """Rows that a map from the first tokens on has: prefix tokens among them, where the first takes some."""
        for spec in self.first.output_specs():
            if spec.name == "source_map":
                return spec.shape[1]
        spec = self.first.input_specs()[0]
        return spec.shape[-2] if spec.kind == "tokens" else self.first.budget.tokens_in

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of both."""
        return (*self.first.remarks, *self.second.remarks)

    # -- the way through ------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run both."""
        count = len(self.first.input_specs())
        return self.finish(*self.hand_over(*inputs[:count]), *inputs[count:])

    def hand_over(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the first, and return what `handed_specs` says."""
        return self.sort_handed(self.first(*inputs))

    def sort_handed(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what is handed over of what the first gave."""
        named = dict(zip((spec.name for spec in self.first.output_specs()), outputs, strict=True))
        mask = (named["mask"],) if self._mask else ()
        return (outputs[0], *mask, *(named[spec.name] for spec in self._carried))

    def finish(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the second on what was handed over and on inputs of its own."""
        given, carried = self.sort_inputs(inputs)
        return self.join(self.second(*given), carried, _compose)

    def sort_inputs(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return what the second takes, in its order, and what goes past it."""
        tokens, *rest = inputs
        mask = [rest.pop(0)] if self._mask else []
        carried, own = rest[: len(self._carried)], rest[len(self._carried) :]
        if mask:
            place = next(place for place, spec in enumerate(self._takes) if spec.name == self._mask)
            own.insert(place, mask[0])
        return (tokens, *own), tuple(carried)

    def join(
        self,
        outputs: Sequence[Tensor],
        carried: Sequence[Tensor],
        compose: Callable[[str, Tensor, str, Tensor, int], Tensor],
    ) -> tuple[Tensor, ...]:
        """Return the chain's outputs.

        Args:
            outputs: of the second.
            carried: what went past it.
            compose: composes two maps.
        """
        first, second = self._maps
        past = dict(zip((spec.name for spec in self._carried), carried, strict=True))
        named = dict(zip((spec.name for spec in self.second.output_specs()), outputs, strict=True))
        composed = set()
        if first and second:
            named[second] = compose(first, past[first], second, named[second], self._rows_in)
            composed.add(first)
        if "size" in named and "size" in past:
            named["size"] = self.size_of(named["size"], past["size"], outputs)
        composed |= {"size"} & named.keys()
        return (*named.values(), *(value for name, value in past.items() if name not in composed))

    def size_of(self, size: Tensor, before: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Return how many of the first one's input tokens each row stands for: (B, M, 1)."""
        names = [spec.name for spec in self.second.output_specs()]
        if "source_map" not in names:
            return size
        rows = outputs[names.index("source_map")]
        return group_matrix(rows, size.shape[1]).to(before.dtype) @ before

    def reference(self) -> nn.Module:
        """Return the originals in a row."""
        return ChainOriginal(self)


def _compose(first: str, one: Tensor, second: str, other: Tensor, rows_in: int) -> Tensor:
    """Return the map of both: `index` of two of them, else the row of each token that went in, -1 where dropped."""
    if first == second == "index":
        return compose_index(one, other)
    if first == second:
        return compose_maps(one, other, drops=True)
    if first == "index":  # places of the rows that stayed, and where each of these went
        return _scatter_rows(one, other, rows_in)
    row_of = identity_map(other.unsqueeze(-1))  # rows of the first, of which the second kept some
    kept = _scatter_rows(other, row_of, rows_in)
    return compose_maps(one, kept, drops=True)


def _scatter_rows(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return values (B, K) at the places of index (B, K), and -1 everywhere else: (B, size) int32."""
    places = index.to(torch.int64)
    places = torch.where(places < 0, size, places)  # of no token
    empty = torch.full((places.shape[0], size + 1), -1, dtype=torch.int64, device=places.device)
    return empty.scatter(1, places, values.to(torch.int64))[:, :size].to(torch.int32)


def _require_fit(gives: TensorSpec, takes: TensorSpec, second: Compressor, methods: tuple[str, str]) -> None:
    one, other = methods
    if second.host_features:
        raise InvalidSpec(
            f"{one} then {other}: {other} reads {', '.join(second.host_features)} of an encoder, and the tokens of "
            f"{one} have none; choose a form of {other} that reads tokens alone with --set then.NAME=VALUE"
        )
    if gives.kind != "tokens" or takes.kind != "tokens" or gives.shape != takes.shape:
        raise InvalidSpec(
            f"{one} then {other}: {one} gives {gives}, and {other} takes {takes}; choose forms of equal shape with "
            "--between, --set params.NAME=VALUE and --set then.NAME=VALUE"
        )


def _require_distinct(chain: Chain, methods: tuple[str, str]) -> None:
    """Refuse tensors that would bear one name."""
    others = chain.input_specs()[len(chain.first.input_specs()) :]
    for what, specs in (
        ("inputs", chain.input_specs()),
        ("outputs", chain.output_specs()),
        ("inputs", (*chain.handed_specs(), *others)),
    ):
        names = [spec.name for spec in specs]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise InvalidSpec(
                f"{' then '.join(methods)}: two {what} would be named {twice!r}; choose another form of one of them"
            )


def _find_mask(
    names: Sequence[str], gives: Sequence[TensorSpec], takes: Sequence[TensorSpec], methods: tuple[str, str]
) -> str:
    """Return the input of the second that takes the first one's mask; "" where there is no mask."""
    if "mask" not in names:
        return ""
    mask = gives[names.index("mask")]
    found = next((spec.name for spec in takes if spec.kind == "mask" and spec.shape == mask.shape), "")
    if not found:
        one, other = methods
        raise InvalidSpec(
            f"{one} then {other}: {one} fills rows up and says by a mask which are real, and {other} takes no mask "
            f"{list(mask.shape)}; choose a form of {one} with a fixed count, or one of {other} with a mask"
        )
    return found


class ChainOriginal(nn.Module):
    """The originals of both in a row; maps are composed token by token."""

    def __init__(self, static: Chain) -> None:
        super().__init__()
        self.static = static
        self.first, self.second = static.first.reference(), static.second.reference()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        count = len(self.static.first.input_specs())
        given, carried = self.static.sort_inputs((*self.hand_over(*inputs[:count]), *inputs[count:]))
        return self.static.join(self.second(*given), carried, _compose_by_loops)

    def hand_over(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the first one's original hands over."""
        return self.static.sort_handed(self.first(*inputs))


def _compose_by_loops(first: str, one: Tensor, second: str, other: Tensor, rows_in: int) -> Tensor:
    samples = []
    for earlier, later in zip(one.tolist(), other.tolist(), strict=True):
        if first == second == "index":
            samples.append([-1 if place < 0 else earlier[place] for place in later])
            continue
        at = {token: row for row, token in enumerate(earlier)} if first == "index" else dict(enumerate(earlier))
        goes = dict(enumerate(later))
        if second == "index":
            goes = {row: place for place, row in enumerate(later) if row >= 0}
        samples.append([goes.get(at.get(token, -1), -1) for token in range(rows_in)])
    return torch.tensor(samples, dtype=torch.int32)
