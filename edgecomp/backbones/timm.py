"""timm vision transformers as hosts: their patch tokens at one layer, with weights that are said aloud."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgecomp.backbones.host import Host, HostBlock, HostRequest, host_part, no_classifier, require_layers
from edgecomp.compressors._checkpoint import load_exactly, read_checkpoint, state_digest, weights_origin
from edgecomp.errors import InvalidSpec, RunError, UnknownName, WeightsError
from edgecomp.specs import Preprocess
from edgecomp.specs.backbone import Backbone
from edgecomp.specs.origin import WeightsOrigin

__all__ = ["TimmHost", "load_host", "plain_vit"]

_MORE = (
    "`edgecomp list backbones` shows those that were tried, timm.list_models() all of timm; a folder that transformers "
    "saved is given by its path."
)
_CLASSIFIER = ("head.*", "head_dist.*", "fc_norm.*")  # keys of a checkpoint that no token passes
_FAMILIES = "vit, deit, deit3, CLIP, SigLIP, DINOv2 (VisionTransformer in timm)"
_OPEN_FAMILIES = "vit, deit, deit3, CLIP, SigLIP, DINOv2 (pre-norm blocks with absolute positions)"


class TimmHost(Host):
    """A timm vision transformer; see `Host`.

    Args:
        model: a timm VisionTransformer; blocks and head that are not needed are removed from it.
        name: what to call it.
        feature_layer: counted from the end, -1 or lower.
        levels: further layers that are read.
        keep_head: leave the classifier on, for logits.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        feature_layer: int,
        levels: Sequence[int] = (),
        keep_head: bool = False,
    ) -> None:
        super().__init__()
        _require_vit(model, name)
        vit: Any = model
        self.total_depth = len(vit.blocks)
        runs = require_layers(name, self.total_depth, feature_layer, levels, keep_head=keep_head)
        vit.prune_intermediate_layers([runs - 1], prune_norm=runs < self.total_depth, prune_head=not keep_head)
        self.model = vit
        self.name = name
        self.feature_layer = feature_layer
        self.levels = tuple(levels)
        self.num_prefix_tokens = int(vit.num_prefix_tokens)
        self.num_classes = int(vit.num_classes) if keep_head else 0
        if keep_head and not self.num_classes:
            raise no_classifier(name)
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
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.model.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def embed_dim(self) -> int:
        """Width of its tokens."""
        return int(self.model.embed_dim)

    @property
    def num_heads(self) -> int:
        """Heads of its attention; 0 where there is none."""
        return int(getattr(getattr(self.model.blocks[0], "attn", None), "num_heads", 0))

    @property
    def depth(self) -> int:
        """How many blocks it runs."""
        return len(self.model.blocks)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.model.patch_embed.patch_size[0])

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return getattr(self.model, "cls_token", None) is not None

    def block(self, index: int) -> HostBlock:
        """Return a block by its number."""
        block: Any = self.model.blocks[index]
        parts = (getattr(block, name, None) for name in ("norm1", "attn", "ls1", "norm2", "mlp", "ls2"))
        return HostBlock(block, *parts)  # type: ignore[arg-type]

    def embed(self, image: Tensor) -> Tensor:
        """Return what goes into the first block: (B, P + N, D)."""
        vit = self.model
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(image))))  # type: ignore[no-any-return]

    def norm(self, tokens: Tensor) -> Tensor:
        """Return tokens behind the final norm."""
        return self.model.norm(tokens)  # type: ignore[no-any-return]

    def head(self, tokens: Tensor) -> Tensor:
        """Return the logits of tokens behind the final norm."""
        return self.model.forward_head(tokens)  # type: ignore[no-any-return]

    @property
    def classifier(self) -> nn.Module:
        """The module that makes logits of an image."""
        return self.model  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        """Return the patch tokens."""
        if self.depth == self.total_depth + 1 + self.feature_layer:
            return self.model.forward_features(image)[:, self.num_prefix_tokens :]  # type: ignore[no-any-return]
        return super().forward(image)

    def require_open_blocks(self, *, tokens_move: bool) -> None:  # noqa: ARG002 - none of these blocks is rotary
        """Refuse blocks that are not pre-norm ones with plain attention, or whose own forward would be passed by."""
        from timm.layers import Attention
        from timm.models.vision_transformer import Block

        for index, block in enumerate(self.model.blocks):
            kinds = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
            if type(block) is not Block or type(block.attn) is not Attention:
                raise InvalidSpec(
                    f"block {index} of {self.name} is a {kinds}; compressors that look into a host know pre-norm "
                    f"blocks with plain attention (Block with Attention). Hosts that work: {_OPEN_FAMILIES}"
                )
            _require_run(block, f"block {index} of {self.name}")
            _require_run(block.attn, f"the attention of block {index} of {self.name}")


def _require_run(part: nn.Module, where: str) -> None:
    """Refuse what only a call of the part itself would run."""
    if not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)):
        return
    what = "a forward of its own" if "forward" in vars(part) else "a forward hook"
    raise InvalidSpec(
        f"{where} has {what}, which would not run: compressors that look into a host run its blocks part by part; "
        "take it off, or choose a method that stands behind the host"
    )


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
    request: HostRequest, *, listed: Sequence[Backbone], say: Callable[[str], None]
) -> tuple[TimmHost, WeightsOrigin]:
    """Make a timm vision transformer with random, local or downloaded weights.

    Args:
        request: of timm's name, for example `vit_small_patch16_224`.
        listed: other hosts, for an error that names what there is.
        say: is told what a user should know of the weights.

    Raises:
        UnknownName: timm has no such model; InvalidSpec: it is no vision transformer, or the size does not fit;
        WeightsError: the file does not fit; RunError: the download did not happen.
    """
    import timm

    name, weights, state, image_size = request.name, request.weights, request.state, request.image_size
    if not timm.is_model(name):
        known = [m for m in timm.list_models() if m.startswith(("vit_", "deit"))]
        known += [one.name for one in listed if one.library == "transformers"]
        raise UnknownName("backbone", name, _nearest(name, known), hint=_MORE)
    if weights not in ("random", "pretrained") and state is None:
        state = read_checkpoint(Path(weights), say=say)
        state = host_part(state) or state
    arguments: dict[str, Any] = {"img_size": image_size} if image_size else {}
    if not request.keep_head:
        arguments["num_classes"] = 0
    elif state is not None and "head.weight" in state:
        arguments["num_classes"] = int(state["head.weight"].shape[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
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
        origin = WeightsOrigin(kind="random", seed=request.seed)
    else:
        _load_state(model, state or {}, name, say, keep_head=request.keep_head)
        origin = weights_origin(Path(weights), state or {}, layout=f"timm {name}")
    host = TimmHost(
        model, name=name, feature_layer=request.feature_layer, levels=request.levels, keep_head=request.keep_head
    )
    return host, origin


def _nearest(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=6, cutoff=0.4) or known[:6]


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
