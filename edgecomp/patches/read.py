"""From the outputs of a graph to where each patch is at its end, and to the image that it saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.patches.compose import Chosen, Composed, compose_layers
from edgecomp.patches.layers import PatchLayer, PatchLayers, grid_of, layer_title
from edgecomp.specs.choice import ChoiceNode
from edgecomp.specs.manifest import Bucket, Manifest
from edgecomp.specs.preprocess import Preprocess

__all__ = ["join_layers", "read_end", "to_rgb"]

Array = npt.NDArray[Any]


def to_rgb(pixels: Array, preprocess: Preprocess | None) -> Array:
    """Return the image that a graph was given as (S, S, 3) uint8.

    Args:
        pixels: (1, S, S, 3) uint8, or (1, 3, S, S) normalised.
        preprocess: by which they were normalised; none: they are taken as they are, from 0 to 1.
    """
    if pixels.dtype == np.uint8:
        return np.array(pixels[0])
    plain = pixels[0].astype(np.float64).transpose(1, 2, 0)
    if preprocess is not None:
        plain = plain * np.asarray(preprocess.std) + np.asarray(preprocess.mean)
    found: Array = (plain * 255).round().clip(0, 255).astype(np.uint8)
    return found


def read_end(manifest: Manifest, bucket: Bucket, outputs: Mapping[str, Array], *, row: int = 0) -> PatchLayer | None:
    """Return where the patches of one image are at the end, by `source_map` or `index`; none without these."""
    outputs = {name: array[row] for name, array in outputs.items()}
    if "source_map" in outputs:
        return _by_source_map(bucket, outputs)
    if "index" in outputs:
        return _by_index(manifest, bucket, outputs)
    return None


def join_layers(
    manifest: Manifest,
    bucket: Bucket,
    outputs: Mapping[str, Array],
    *,
    nodes: Sequence[ChoiceNode] = (),
    chosen: Chosen | None = None,
    reads: Sequence[tuple[str, Array]] = (),
    notes: Sequence[str] = (),
    row: int = 0,
) -> PatchLayers:
    """Put together what the choices of a graph and its outputs say of the patches of one image.

    The last layer that the choices give is held to the graph's own map; where they differ, the map is taken, and it is
    said.

    Args:
        outputs: of the same run as the choices.
        nodes: the graph's choices; empty where it makes none, or they are not known.
        chosen: scores and indices of each by its number; none: not known.
        reads: where nothing is chosen: of each attention of output tokens over patches the module, and (B, N) how much
            is read of each patch.
        notes: what is known already.
        row: of the batch.
    """
    count, said = bucket.budget.tokens_in, list(notes)
    grid = grid_of(count)
    end = read_end(manifest, bucket, outputs, row=row)
    composed = Composed(())
    if chosen is not None and nodes:
        composed = compose_layers(nodes, chosen, patches=count, tokens_out=bucket.budget.tokens_out, row=row)
    layers = composed.layers
    if grid is None:
        layers, grid = (), (1, count)
        said.append(f"no picture: {count} tokens make no square of patches")
    elif end is None and not layers and reads:
        layers = tuple(_read_layer(where, array[row], bucket.budget.tokens_out) for where, array in reads)
        said.append(
            f"nothing is chosen: each of the {bucket.budget.tokens_out} output tokens reads all {count} patches, "
            "some more than others"
        )
    elif end is None and not layers:
        said.append(_why_no_map(bucket, composed, is_known=chosen is not None))
    elif end is not None and not (layers and np.array_equal(layers[-1].rows, end.rows)):
        is_inside = manifest.placement == "inside"
        if is_inside and chosen is not None:
            why = composed.problem or "the last layer of its choices is not the map that the graph gives"
            said.append(f"the end alone is shown, as the graph's own map has it: {why}")
        layers = (end if is_inside else _with_scores(end, nodes, chosen or {}, row),)
    elif end is None and not reads:
        said.append("the graph gives no map: its layers are made of its choices alone, held to nothing")
    said += _sayings(layers, nodes)
    side = manifest.image_size
    if side and layers and side % grid[0]:
        said.append(f"{side} pixels are not {grid[0]} equal patches: the grid is drawn as if they were")
    return PatchLayers(
        method=manifest.method,
        model=bucket.model,
        rows=grid[0],
        columns=grid[1],
        prefix=manifest.num_prefix_tokens,
        tokens_out=bucket.budget.tokens_out,
        layers=layers,
        notes=tuple(dict.fromkeys(said)),
    )


def _why_no_map(bucket: Bucket, composed: Composed, *, is_known: bool) -> str:
    budget = bucket.budget
    if composed.problem:
        return f"no patch map: the graph gives none, and its choices do not say where patches are ({composed.problem})"
    names = ", ".join(spec.name for spec in bucket.outputs)
    if not is_known:
        return f"no patch map: the graph gives {names} alone, and its choices are not known"
    if any(spec.kind == "tokens" for spec in bucket.outputs):
        return (
            f"no patch map: nothing is chosen, and the {budget.tokens_out} output tokens are made of all "
            f"{budget.tokens_in} patches"
        )
    return f"no patch map: the graph gives {names} alone, and chooses nothing"


def _with_scores(end: PatchLayer, nodes: Sequence[ChoiceNode], chosen: Chosen, row: int) -> PatchLayer:
    """Add the scores of the first choice among all patches, where there is one, to the one layer of a method."""
    for node in nodes:
        if node.op != "TopK" or node.number not in chosen or node.merge >= 0:
            continue
        scores = chosen[node.number][0][row].reshape(-1)
        if len(scores) == len(end.rows):
            scored = f"those by which {node.where or 'the graph'} chooses among all patches"
            return msgspec.structs.replace(
                end,
                name=layer_title(node.where),
                where=node.where,
                scores=scores.astype(np.float32),
                scored=scored,
            )
    return end


def _read_layer(where: str, shares: Array, tokens: int) -> PatchLayer:
    return PatchLayer(
        name=layer_title(where),
        where=where,
        tokens=tokens,
        rows=np.arange(len(shares), dtype=np.int32),
        scores=shares.astype(np.float32),
        scored="the share of attention that the output tokens give to each patch, mean over heads and tokens",
        is_read=True,
    )


def _sayings(layers: tuple[PatchLayer, ...], nodes: Sequence[ChoiceNode]) -> list[str]:
    """Say what the colours cannot."""
    if not layers or layers[-1].is_read:
        return []
    last, said = layers[-1], []
    if last.made and last.dropped.any():
        tokens = "1 token is" if last.made == 1 else f"{last.made} tokens are"
        said.append(f"{tokens} made of several patches, and the graph does not name them: they are drawn as dropped")
    elif last.made:
        said.append(f"{last.made} of {last.tokens} tokens hold no patch")
    if last.dropped.any() and any(node.op == "ArgMax" and node.merge < 0 for node in nodes):
        said.append("patches drawn as dropped have a best match among others, and may be averaged into it")
    return said


def _by_source_map(bucket: Bucket, outputs: Mapping[str, Array]) -> PatchLayer:
    where = outputs["source_map"].astype(np.int64)
    prefix = len(where) - bucket.budget.tokens_in
    rows = where[prefix:] - prefix
    most = bucket.budget.tokens_out
    rows = np.where((rows < 0) | (rows >= most), -1, rows)  # of groups beyond the budget there are no rows
    tokens = min(most, int(outputs["count"]) - prefix) if "count" in outputs else most
    return _end(rows, tokens=tokens)


def _by_index(manifest: Manifest, bucket: Bucket, outputs: Mapping[str, Array]) -> PatchLayer:
    index = outputs["index"].astype(np.int64)
    if "mask" in outputs:
        index = index[outputs["mask"].astype(bool)]
    prefix = _prefix_of(index, manifest, bucket, is_padded="mask" in outputs)
    held = index[prefix:]
    rows = np.full(bucket.budget.tokens_in, -1)
    real = held >= 0
    rows[held[real] - prefix] = np.flatnonzero(real)
    return _end(rows, tokens=len(held))


def _prefix_of(index: Array, manifest: Manifest, bucket: Bucket, *, is_padded: bool) -> int:
    """Return how many prefix tokens stand in front of `index`; not each method hands them on."""
    prefix = manifest.num_prefix_tokens
    if manifest.placement == "inside":
        return prefix
    beside = len(index) - bucket.budget.tokens_out
    if not is_padded:
        return max(0, beside)
    return prefix if beside == prefix and np.array_equal(index[:prefix], np.arange(prefix)) else 0


def _end(rows: Array, *, tokens: int) -> PatchLayer:
    nothing = np.full(len(rows), np.nan, np.float32)
    return PatchLayer("at the end", "", tokens, rows.astype(np.int32), nothing)
