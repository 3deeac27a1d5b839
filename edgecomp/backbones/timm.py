"""timm vision transformers as hosts: their patch tokens at one layer, with weights that are said aloud."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgecomp.backbones.attention import Attended
from edgecomp.compressors._base import HostFeature
from edgecomp.compressors._checkpoint import load_exactly, read_checkpoint, state_digest, weights_origin
from edgecomp.errors import InvalidSpec, RunError, UnknownName, WeightsError
from edgecomp.specs import Preprocess, Site
from edgecomp.specs.origin import WeightsOrigin

Attend = Callable[..., Attended]

__all__ = ["TimmHost", "host_part", "load_host", "plain_vit", "state_digest"]

_MORE = "`edgecomp list backbones` shows those that were tried, timm.list_models() all."
_CLASSIFIER = ("head.*", "head_dist.*", "fc_norm.*")  # keys of a checkpoint that no token passes
_FAMILIES = "vit, deit, deit3, CLIP, SigLIP, DINOv2 (VisionTransformer in timm)"


class TimmHost(nn.Module):
    """The patch tokens of a timm vision transformer at one layer.

    Shapes: image (B, 3, S, S) -> tokens (B, N, D). Prefix tokens (class, distillation, registers) are
    dropped. Layer -1 is the encoder's output after its final norm; -2, -3, ... are the hidden states after
    earlier blocks, without a norm, and the blocks behind them are not part of the graph.

    Args:
        model: a timm VisionTransformer; blocks and head that are not needed are removed from it.
        name: what to call it.
        feature_layer: counted from the end, -1 or lower.
        keep_head: leave the classifier on, for logits.
    """

    def __init__(self, model: nn.Module, *, name: str, feature_layer: int, keep_head: bool = False) -> None:
        super().__init__()
        _require_vit(model, name)
        vit: Any = model
        depth = len(vit.blocks)
        if not 1 <= depth + 1 + feature_layer <= depth:
            raise InvalidSpec(f"feature layer {feature_layer} of {name} must lie between -{depth} and -1")
        if keep_head and feature_layer != -1:
            raise InvalidSpec(
                f"logits come after the last layer of {name}, and feature layer {feature_layer} was asked"
            )
        vit.prune_intermediate_layers([depth + feature_layer], prune_norm=feature_layer != -1, prune_head=not keep_head)
        self.model = vit
        self.name = name
        self.feature_layer = feature_layer
        self.num_prefix_tokens = int(vit.num_prefix_tokens)
        self.num_classes = int(vit.num_classes) if keep_head else 0
        if keep_head and not self.num_classes:
            raise InvalidSpec(f"{name} has no classifier, so --output logits has nothing to give; use --output tokens")
        self.image_size = int(vit.patch_embed.img_size[0])
        config: Mapping[str, Any] = getattr(vit, "pretrained_cfg", None) or {}
        self.preprocess = Preprocess(
            size=self.image_size,
            crop=float(config.get("crop_pct") or 0.9),
            interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
            mean=tuple(config.get("mean", (0.5, 0.5, 0.5))),
            std=tuple(config.get("std", (0.5, 0.5, 0.5))),
        )

    @property
    def site(self) -> Site:
        """What a compressor after this host is handed."""
        rows, columns = self.model.patch_embed.grid_size
        return Site(
            "after",
            image_size=self.image_size,
            tokens_in=rows * columns,
            embed_dim=self.model.embed_dim,
            num_heads=int(getattr(getattr(self.model.blocks[0], "attn", None), "num_heads", 0)),
        )

    @property
    def depth(self) -> int:
        """How many blocks it has."""
        return len(self.model.blocks)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.model.patch_embed.patch_size[0])

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return getattr(self.model, "cls_token", None) is not None

    def forward(self, image: Tensor) -> Tensor:
        """Return the patch tokens."""
        return self.model.forward_features(image)[:, self.num_prefix_tokens :]  # type: ignore[no-any-return]

    def look(self, image: Tensor, names: Sequence[HostFeature], attend: Attend) -> tuple[Tensor, dict[str, Tensor]]:
        """Return all tokens (B, P + N, D), prefix tokens in front, and features of the attention by name.

        Args:
            image: (B, 3, S, S).
            names: of the features.
            attend: how the attention whose weights are read is run.
        """
        vit, prefix = self.model, self.num_prefix_tokens
        tokens = self.embed(image)
        found: dict[str, Tensor] = {}
        last = len(vit.blocks) - 1
        for index, block in enumerate(vit.blocks):
            if index < last and "cumulative_attention" not in names:
                tokens = block(tokens)
                continue
            seen = attend(block.attn, block.norm1(tokens))
            tokens = tokens + block.ls1(seen.read)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
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
        return vit.norm(tokens), {name: found[name] for name in names if name in found}

    def embed(self, image: Tensor) -> Tensor:
        """Return what goes into the first block: (B, P + N, D)."""
        vit = self.model
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(image))))  # type: ignore[no-any-return]


def _require_vit(model: nn.Module, name: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        rotary = " with rotary positions, which would have to move with the tokens" if _is_rotary(model) else ""
        raise InvalidSpec(
            f"backbone {name!r} is of class {type(model).__name__}{rotary}; hosts that work are {_FAMILIES}"
        )
    rows, columns = getattr(model.patch_embed, "img_size", None) or (0, 0)
    if rows != columns:
        raise InvalidSpec(f"backbone {name!r} takes images of {rows} x {columns} pixels; hosts take square ones")


def _is_rotary(model: nn.Module) -> bool:
    return any(getattr(model, name, None) is not None for name in ("rope", "rope_freqs", "freqs_cis"))


def load_host(
    name: str,
    *,
    weights: str,
    state: Mapping[str, Tensor] | None,
    image_size: int,
    feature_layer: int,
    keep_head: bool = False,
    seed: int,
    say: Callable[[str], None],
) -> tuple[TimmHost, WeightsOrigin]:
    """Make a timm vision transformer with random, local or downloaded weights.

    Args:
        name: timm's name, for example `vit_small_patch16_224`.
        weights: `random`, `pretrained` (timm downloads them; the one way to a download), or a file.
        state: tensors to load instead of a file (a checkpoint that holds compressor and host).
        image_size: side in pixels, a multiple of the patch; 0: the model's own. Position tables of a file are
            resized to it.
        feature_layer, keep_head: see `TimmHost`.
        seed: of random weights.
        say: is told what a user should know of the weights.

    Raises:
        UnknownName: timm has no such model; InvalidSpec: it is no vision transformer, or the size does not fit;
        WeightsError: the file does not fit; RunError: the download did not happen.
    """
    import timm

    if not timm.is_model(name):
        known = [m for m in timm.list_models() if m.startswith(("vit_", "deit"))]
        raise UnknownName("backbone", name, _nearest(name, known), hint=_MORE)
    if weights not in ("random", "pretrained") and state is None:
        state = read_checkpoint(Path(weights), say=say)
        state = host_part(state) or state
    arguments: dict[str, Any] = {"img_size": image_size} if image_size else {}
    if not keep_head:
        arguments["num_classes"] = 0
    elif state is not None and "head.weight" in state:
        arguments["num_classes"] = int(state["head.weight"].shape[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, pretrained=weights == "pretrained", **arguments)
        except (TypeError, AssertionError, ValueError) as error:
            raise InvalidSpec(
                f"backbone {name!r} cannot be built for images of {image_size} pixels: {error}; "
                f"hosts that work are {_FAMILIES}"
            ) from None
        except Exception as error:
            if weights != "pretrained":  # then nothing was downloaded, and this text would mislead
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RunError(
                f"pretrained weights of {name!r} could not be downloaded ({type(error).__name__}: {reason[:200]}); "
                "bring a file to this machine and give --backbone-weights FILE, or use random"
            ) from None
    _require_vit(model, name)
    patch = int(model.patch_embed.patch_size[0])
    if image_size % patch:
        raise InvalidSpec(
            f"image size {image_size} is not a multiple of the patch of {name}, {patch}; the nearest that is: "
            f"{max(1, round(image_size / patch)) * patch}"
        )
    if weights == "pretrained":
        origin = WeightsOrigin(kind="pretrained", name=f"timm {name}", sha256=state_digest(model.state_dict()))
    elif weights == "random" and state is None:
        origin = WeightsOrigin(kind="random", seed=seed)
    else:
        _load_state(model, state or {}, name, say, keep_head=keep_head)
        origin = weights_origin(Path(weights), state or {}, layout=f"timm {name}")
    return TimmHost(model, name=name, feature_layer=feature_layer, keep_head=keep_head), origin


def _nearest(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=6, cutoff=0.4) or known[:6]


def host_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the host's tensors of a file that holds compressor and host (keys `backbone.*`); else nothing."""
    return {
        key.removeprefix("backbone.").removeprefix("model."): tensor
        for key, tensor in state.items()
        if key.startswith("backbone.")
    }


def _load_state(
    model: Any, state: Mapping[str, Tensor], name: str, say: Callable[[str], None], *, keep_head: bool
) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        fitted = checkpoint_filter_fn(dict(state), model)
    except (KeyError, RuntimeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"weights do not fit backbone {name!r}: {type(error).__name__} {error}; first keys: "
            f"{', '.join(list(state)[:5])}. Give a checkpoint in timm's layout of that model"
        ) from None
    unread = () if keep_head else _CLASSIFIER
    skipped = load_exactly(model, fitted, layout=f"timm {name}", unread=unread)
    if skipped:
        say(f"left unread in the weights of {name}, since tokens do not pass its classifier: {', '.join(skipped)}")


def plain_vit(arguments: Mapping[str, Any], *, image_size: int, num_classes: int, seed: int) -> nn.Module:
    """Make the plain ViT that an `encoder` method stands in for, with random weights.

    Args:
        arguments: patch_size, embed_dim, depth, num_heads, in timm's words.
        image_size: side in pixels.
        num_classes: 0 for tokens.
        seed: of its weights.
    """
    from timm.models.vision_transformer import VisionTransformer

    pool = "token" if num_classes else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit: nn.Module = VisionTransformer(img_size=image_size, num_classes=num_classes, global_pool=pool, **arguments)
    return vit.eval()
