"""FastVLM's encoder: FastViTHD, five stages of convolution and attention, one token for each 64 x 64 pixels.

Paper: "FastVLM: Efficient Vision Encoding for Vision Language Models" (arXiv:2412.13303), section 3.2. The original's
code is under Apple's own licence: this is written from the architecture, and held to numbers that the original gave.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._attention import attend_packed
from edgecomp.compressors._base import Compressor, Natural, Params, Positive, count_heads
from edgecomp.compressors._branches import sum_parallel, unit_kernel
from edgecomp.compressors._checkpoint import count_numbered, load_exactly, rename_key
from edgecomp.compressors._eager import gelu, norm_channels
from edgecomp.compressors._grid import require_multiple
from edgecomp.compressors._keys import TRANSPOSED, KeyMap
from edgecomp.compressors._norms import ChannelLayerNorm
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["FastVLM"]

_STRIDE = 64  # pixels of one token, along each side
_FINE = 16  # pixels of a token of the third stage, which counts as what goes in
_LARGE, _SMALL = 7, 3  # sides of the kernels
_EPS = 1e-5


class FastVLMParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of FastVLM's encoder.

    Attributes:
        depths, widths: blocks and channels of each stage.
        attention_stages: how many stages at the end attend; those before mix by convolution.
        mlp_ratio: hidden width of the blocks' MLP over their own.
        head_dim: of the attention.
        expansion: channels of a token over those of the last stage.
        squeeze: hidden width of squeeze-and-excitation, as a share of these channels.
        projector_dim: width of the language model; 0: no projector, the trunk's own channels come out.
        num_classes: width of the pooled embedding (output `logits`); 0: none.
    """

    depths: tuple[Positive, ...] = (2, 12, 24, 4, 2)
    widths: tuple[Positive, ...] = (96, 192, 384, 768, 1536)
    attention_stages: Natural = 2
    mlp_ratio: Annotated[float, Meta(gt=0, le=64)] = 4.0
    head_dim: Positive = 32
    expansion: Positive = 2
    squeeze: Annotated[float, Meta(gt=0, le=1)] = 0.0625
    projector_dim: Natural = 0
    num_classes: Natural = 0

    @property
    def token_dim(self) -> int:
        """Channels of the trunk's tokens."""
        return self.widths[-1] * self.expansion


def _depthwise(before: int, behind: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, behind, kernel, stride=stride, padding=kernel // 2, groups=before)


class ConvMlp(nn.Module):
    """A large depthwise kernel, its batch norm folded in, and an MLP on each pixel. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv = _depthwise(width, width, _LARGE)
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of x."""
        return self.scale * self.fc2(F.gelu(self.fc1(self.conv(x))))  # type: ignore[no-any-return]


class MixBlock(nn.Module):
    """Pixels mix by a small depthwise kernel, which holds its own skip and norms, then an MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mix = _depthwise(width, width, _SMALL)
        self.mlp = ConvMlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = self.mix(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class AttendBlock(nn.Module):
    """Pixels attend to each other, then an MLP."""

    def __init__(self, width: int, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.norm = ChannelLayerNorm(width, eps=_EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.attn_scale = nn.Parameter(torch.ones(width, 1, 1))
        self.mlp = ConvMlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        update = attend_packed(tokens, self.qkv, self.proj, self.heads).transpose(1, 2).reshape(x.shape)
        x = x + self.attn_scale * update
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Half the side and another width (but in front of the first), a position kernel where it attends, blocks."""

    def __init__(self, params: FastVLMParams, index: int) -> None:
        super().__init__()
        width = params.widths[index]
        attends = index >= len(params.widths) - params.attention_stages
        if index:
            self.down = _depthwise(params.widths[index - 1], width, _LARGE, stride=2)
            self.point = nn.Conv2d(width, width, 1)
        if attends:
            self.position = _depthwise(width, width, _LARGE)
        hidden = int(width * params.mlp_ratio)
        self.blocks = nn.ModuleList(
            AttendBlock(width, hidden, params.head_dim) if attends else MixBlock(width, hidden)
            for _ in range(params.depths[index])
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h / 2, w / 2)."""
        if hasattr(self, "down"):
            x = F.gelu(self.point(F.gelu(self.down(x))))
        if hasattr(self, "position"):
            x = self.position(x)
        for block in self.blocks:
            x = block(x)
        return x


class FastVLM(Compressor):
    """Encode an image of S x S pixels as (S / 64)^2 tokens, by convolutions first and attention on what they leave.

    Shapes: image (B, 3, S, S), S a multiple of 64 -> compressed (B, M, D), with M = (S / 64)^2; or logits
    (B, classes), the pooled embedding. Tokens that go in are counted on the third stage's grid, (S / 16)^2.

    Static rewrite (level E0): the original has no shape that depends on data. Its branches for training (parallel
    convolutions, skips, batch norms) are summed into one kernel each when weights are loaded, and the pooling of
    squeeze-and-excitation is a mean.

    Source: arXiv:2412.13303, section 3.2; blocks: arXiv:2303.14189, sections 3.1 and 3.2.
    """

    Params = FastVLMParams
    params: FastVLMParams
    unstored_params = ("head_dim",)

    def __init__(self, params: FastVLMParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        _require_consistent(params, site, budget, output)
        first, last, dim = params.widths[0], params.widths[-1], params.token_dim
        self.stem = nn.ModuleList(
            [nn.Conv2d(3, first, _SMALL, stride=2, padding=1), _depthwise(first, first, _SMALL, stride=2),
             nn.Conv2d(first, first, 1)]
        )  # fmt: skip
        self.stages = nn.ModuleList(Stage(params, index) for index in range(len(params.widths)))
        self.expand = _depthwise(last, dim, _SMALL)
        hidden = max(1, int(dim * params.squeeze))
        self.squeeze, self.excite = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        if params.projector_dim:
            self.projector = nn.ModuleList(
                [nn.Linear(dim, params.projector_dim), nn.Linear(params.projector_dim, params.projector_dim)]
            )
        if params.num_classes:
            self.head = nn.Parameter(torch.zeros(dim, params.num_classes))

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `image`."""
        side = self.site.image_size
        return (TensorSpec("image", (batch, 3, side, side), "float32", "image"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `compressed` (B, M, D), or `logits` (B, classes)."""
        if self.output == "logits":
            return (TensorSpec("logits", (batch, self.params.num_classes), "float32", "features"),)
        width = self.params.projector_dim or self.params.token_dim
        return (TensorSpec("compressed", (batch, self.budget.tokens_out, width), "float32", "tokens"),)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the tokens, or the pooled embedding."""
        x = image
        for layer in self.stem:
            x = F.gelu(layer(x))
        for stage in self.stages:
            x = stage(x)
        x = self.expand(x)
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = F.gelu(x * gate)  # (B, C, h, w)
        if self.output == "logits":
            return (x.mean((2, 3)) @ self.head,)
        tokens = x.flatten(2).transpose(1, 2)
        if self.params.projector_dim:
            first, second = self.projector
            tokens = second(F.gelu(first(tokens)))
        return (tokens,)

    def reference(self) -> nn.Module:
        """Return the published forward pass on this module's parameters."""
        return FastVLMOriginal(self)

    @classmethod
    def count_tokens(cls, params: FastVLMParams, site: Site) -> int:  # noqa: ARG003 - the signature of all
        """Return the tokens of the third stage's grid, one for each 16 x 16 pixels."""
        require_multiple("image size", site.image_size, _STRIDE, method="fastvlm")
        return (site.image_size // _FINE) ** 2

    @classmethod
    def default_counts(cls, params: FastVLMParams, site: Site) -> tuple[int, ...]:
        """Return the tokens that the image size gives."""
        return (cls.count_tokens(params, site) * _FINE**2 // _STRIDE**2,)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `apple`, or `timm`."""
        if any(re.search(r"(^|\.)conv_exp\.", key) for key in state):
            return "apple"
        return "timm" if any(re.search(r"(^|\.)final_conv\.", key) for key in state) else ""

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: FastVLMParams) -> dict[str, Any]:
        """Return what the shapes of a checkpoint decide; the head width comes from the parameters."""
        own = {key: tuple(tensor.shape) for key, tensor in _to_own_keys(state).items()}
        if "expand.weight" not in own or "squeeze.weight" not in own or "stages.0.blocks.0.mix.weight" not in own:
            raise WeightsError(
                "weights are in no layout of fastvlm (apple, timm or edgecomp): the trunk of FastViTHD is missing; "
                f"first keys: {', '.join(list(state)[:5])}"
            )
        stages = count_numbered(own, "stages")
        depths = [count_numbered(own, f"stages.{index}.blocks") for index in range(stages)]
        widths = [own[f"stages.{index}.blocks.0.mlp.fc2.weight"][0] for index in range(stages)]
        attention = [f"stages.{index}.blocks.0.qkv.weight" in own for index in range(stages)]
        for index, attends in enumerate(attention):
            if attends:
                count_heads(widths[index], params.head_dim, name=f"stages.{index}.blocks.0.qkv")
        dim = own["expand.weight"][0]
        hidden = own["squeeze.weight"][0]
        found: dict[str, Any] = {"depths": depths, "widths": widths, "attention_stages": sum(attention)}
        found["mlp_ratio"] = own["stages.0.blocks.0.mlp.fc1.weight"][0] / widths[0]
        found["expansion"] = dim // widths[-1]
        if max(1, int(dim * params.squeeze)) != hidden:
            found["squeeze"] = hidden / dim
        found["projector_dim"] = own["projector.0.weight"][0] if "projector.0.weight" in own else 0
        found["num_classes"] = own["head"][1] if "head" in own else 0
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint of Apple or timm, of training or of inference; branches become one kernel each."""
        layout = self.layout_of(state) or "edgecomp"
        own = _to_own_keys(state)
        spelt = {key: key for key in own} if layout == "edgecomp" else _spelling(state)
        load_exactly(self, own, layout=layout, unread=unread, file_keys=spelt)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """Apple's names and timm's, of inference: branches that were summed up cannot be told apart again."""
        return {"apple": _apple(self.params), "timm": _timm(self.params)}

    @property
    def written_state(self) -> dict[str, Tensor]:
        """The module's tensors, and the batch norm behind each large kernel, which changes nothing here."""
        state = self.state_dict()
        for name in [key.removesuffix(".bias") for key in state if key.endswith(".mlp.conv.bias")]:
            like = state[f"{name}.bias"]
            state[f"{name}.variance"] = torch.ones_like(like)
            state[f"{name}.mean"] = torch.zeros_like(like)
            state[f"{name}.factor"] = (torch.ones_like(like) + _EPS).sqrt()
            state[f"{name}.steps"] = torch.zeros((), dtype=torch.int64)
        return state


def _require_consistent(params: FastVLMParams, site: Site, budget: TokenBudget, output: Output) -> None:
    if site.placement != "encoder":
        raise InvalidSpec("fastvlm is an encoder itself; drop the host")
    if len(params.depths) != len(params.widths) or len(params.widths) < 1:
        raise InvalidSpec(
            f"fastvlm: {len(params.depths)} depths and {len(params.widths)} widths; give one of both for each stage"
        )
    if 4 * 2 ** (len(params.widths) - 1) != _STRIDE:
        raise InvalidSpec(f"fastvlm: {len(params.widths)} stages do not make one token of {_STRIDE} pixels; give 5")
    for before, behind in zip(params.widths, params.widths[1:], strict=False):
        if behind % before:
            raise InvalidSpec(
                f"fastvlm: width {behind} is not a multiple of {before}, the stage before; kernels between them are "
                "depthwise"
            )
    attending = params.widths[len(params.widths) - params.attention_stages :] if params.attention_stages else ()
    for width in attending:
        if width % params.head_dim:
            raise InvalidSpec(f"fastvlm: width {width} is not a multiple of head_dim={params.head_dim}")
    if output == "logits" and not params.num_classes:
        raise InvalidSpec("fastvlm: there is no pooled embedding to give as logits; set params.num_classes")
    made = (site.image_size // _STRIDE) ** 2
    if budget.tokens_out != made:
        side = math.isqrt(budget.tokens_out)
        hint = f"; --image-size {side * _STRIDE} gives that" if side * side == budget.tokens_out else ""
        raise InvalidSpec(
            f"fastvlm: {site.image_size} pixels give {made} tokens, not a budget of {budget.tokens_out}{hint}"
        )


# -- checkpoints ------------------------------------------------------------------------------------------------

#: The one spelling that both layouts are brought to; a whole model keeps the trunk below names of its own.
_RULES = (
    (r"^vision_tower\.(vision_tower\.model|timm_model)\.", ""),
    (r"^(mm_projector\.0|multi_modal_projector\.linear_1)\.", "projector.0."),
    (r"^(mm_projector\.2|multi_modal_projector\.linear_2)\.", "projector.1."),
    (r"^patch_embed\.", "stem."),
    (r"(^|\.)rbr_conv\.", r"\1conv_kxk."),
    (r"(^|\.)rbr_scale\.", r"\1conv_scale."),
    (r"(^|\.)rbr_skip\.", r"\1identity."),
    (r"^conv_exp\.", "final_conv."),
    (r"\.lkb_origin\.", ".large_conv."),
    (r"\.lkb_reparam\.", ".reparam_conv."),
    (r"\.convffn\.", ".mlp."),
    (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."),
    (r"\.layer_scale(_[12])?$", r".layer_scale\1.gamma"),
    (r"^head\.proj$", "head"),
)


def _to_own_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint of either layout by this module's keys, branches summed into one kernel each."""
    if not FastVLM.layout_of(state):
        return dict(state)
    plain = _stages({rename_key(key, _RULES): tensor for key, tensor in state.items()})
    own: dict[str, Tensor] = {}
    for key, tensor in plain.items():
        if (name := _own_name(key)) is not None:
            own[name] = tensor
    for name, (weight, bias) in _fused(plain).items():
        own[f"{name}.weight"], own[f"{name}.bias"] = weight, bias
    if "head.fc.weight" in own:  # timm's form of the pooled embedding
        own["head"] = own.pop("head.fc.weight").T
    return own


def _stages(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort Apple's flat list of modules into stages, as timm has them."""
    numbers = {int(found[1]) for key in plain if (found := re.match(r"network\.(\d+)\.", key))}
    downs = sorted(number for number in numbers if any(key.startswith(f"network.{number}.proj.") for key in plain))
    renamed = {}
    for key, tensor in plain.items():
        if found := re.match(r"network\.(\d+)\.(.*)", key):
            number, rest = int(found[1]), found[2]
            stage = sum(down <= number for down in downs)
            if number in downs:
                rest = f"downsample.{rest}"
            elif rest.startswith(("reparam_conv.", "pe.")):
                rest = f"pos_emb.{rest}"
            else:
                rest = f"blocks.{rest}"
            key = f"stages.{stage}.{rest}"
        renamed[key] = tensor
    return renamed


def _attends(params: FastVLMParams) -> list[bool]:
    """Say of each stage whether it attends."""
    return [index >= len(params.widths) - params.attention_stages for index in range(len(params.widths))]


def _timm(params: FastVLMParams) -> KeyMap:
    """Return timm's names of a trunk for inference, with transformers' of what stands around it."""
    top = "vision_tower.timm_model." if params.projector_dim else ""
    stage, block = f"{top}stages.*.", f"{top}stages.*.blocks.*."
    scales: list[tuple[str, str]] = []
    for index, attends in enumerate(_attends(params)):
        theirs, own = f"{top}stages.{index}.blocks.*.layer_scale", f"stages.{index}.blocks.*."
        if attends:
            scales.append((f"{theirs}_{{1,2}}.gamma", f"{own}{{attn_scale,mlp.scale}}"))
        else:
            scales.append((f"{theirs}.gamma", f"{own}mlp.scale"))
    return KeyMap(
        *scales,
        (f"{top}stem.*.reparam_conv.**", "stem.*.**"),
        (f"{stage}downsample.proj.{{0,1}}.reparam_conv.**", "stages.*.{down,point}.**"),
        (f"{stage}pos_emb.reparam_conv.**", "stages.*.position.**"),
        (f"{block}token_mixer.reparam_conv.**", "stages.*.blocks.*.mix.**"),
        (f"{block}token_mixer.{{qkv,proj}}.**", "stages.*.blocks.*.{qkv,proj}.**"),
        (f"{block}norm.**", "stages.*.blocks.*.norm.**"),
        (f"{block}mlp.{{fc1,fc2}}.**", "stages.*.blocks.*.mlp.{fc1,fc2}.**"),
        (f"{block}mlp.conv.conv.weight", "stages.*.blocks.*.mlp.conv.weight"),
        (f"{block}mlp.conv.bn.{_NORM}", f"stages.*.blocks.*.mlp.conv.{_OWN_NORM}"),
        (f"{top}final_conv.reparam_conv.**", "expand.**"),
        (f"{top}final_conv.se.{{fc1,fc2}}.**", "{squeeze,excite}.**"),
        (f"{top}head.fc.weight", "head", TRANSPOSED),
        ("multi_modal_projector.linear_{1,2}.**", "projector.{0,1}.**"),
    )


def _apple(params: FastVLMParams) -> KeyMap:
    """Return Apple's names for inference; its modules stand in one list, whatever they are."""
    top = "vision_tower.vision_tower.model." if params.projector_dim else ""
    rules: list[tuple[str, str]] = []
    number = 0
    for index, attends in enumerate(_attends(params)):
        stage = f"stages.{index}."
        if index:
            rules.append((f"{top}network.{number}.proj.0.lkb_reparam.**", f"{stage}down.**"))
            rules.append((f"{top}network.{number}.proj.1.reparam_conv.**", f"{stage}point.**"))
            number += 1
        if attends:
            rules.append((f"{top}network.{number}.reparam_conv.**", f"{stage}position.**"))
            number += 1
        theirs, own = f"{top}network.{number}.*.", f"{stage}blocks.*."
        if attends:
            rules.append((f"{theirs}layer_scale_{{1,2}}", f"{own}{{attn_scale,mlp.scale}}"))
        else:
            rules.append((f"{theirs}layer_scale", f"{own}mlp.scale"))
        rules += [
            (f"{theirs}token_mixer.reparam_conv.**", f"{own}mix.**"),
            (f"{theirs}token_mixer.{{qkv,proj}}.**", f"{own}{{qkv,proj}}.**"),
            (f"{theirs}norm.**", f"{own}norm.**"),
            (f"{theirs}convffn.{{fc1,fc2}}.**", f"{own}mlp.{{fc1,fc2}}.**"),
            (f"{theirs}convffn.conv.conv.weight", f"{own}mlp.conv.weight"),
            (f"{theirs}convffn.conv.bn.{_NORM}", f"{own}mlp.conv.{_OWN_NORM}"),
        ]
        number += 1
    return KeyMap(
        *rules,
        (f"{top}patch_embed.*.reparam_conv.**", "stem.*.**"),
        (f"{top}conv_exp.reparam_conv.**", "expand.**"),
        (f"{top}conv_exp.se.{{reduce,expand}}.**", "{squeeze,excite}.**"),
        (f"{top}head.proj", "head"),
        ("mm_projector.{0,2}.**", "projector.{0,1}.**"),
    )


#: A batch norm's tensors, and what `FastVLM.written_state` calls them.
_NORM = "{weight,bias,running_mean,running_var,num_batches_tracked}"
_OWN_NORM = "{factor,bias,mean,variance,steps}"


#: timm's name of a convolution (all branches of it behind a dot) -> ours.
_CONVOLUTIONS = (
    (r"^stem\.(\d)$", r"stem.\1"),
    (r"^(stages\.\d+)\.downsample\.proj\.0$", r"\1.down"),
    (r"^(stages\.\d+)\.downsample\.proj\.1$", r"\1.point"),
    (r"^(stages\.\d+)\.pos_emb$", r"\1.position"),
    (r"^(stages\.\d+\.blocks\.\d+)\.token_mixer$", r"\1.mix"),
    (r"^(stages\.\d+\.blocks\.\d+\.mlp\.conv)$", r"\1"),
    (r"^final_conv$", "expand"),
)
_BRANCH = re.compile(
    r"^(?P<place>.*?)\.(?P<branch>reparam_conv|conv_kxk\.\d+|conv_scale|identity|large_conv|small_conv|pos_enc|pe"
    r"|layer_scale|(?:mixer|norm)\.(?:conv_kxk\.\d+|conv_scale|identity|reparam_conv))\."
    r"(?P<rest>(?:conv\.|bn\.)?\w+)$"
)
_OTHERS = (
    (r"^(stages\.\d+\.blocks\.\d+)\.token_mixer\.(qkv|proj)\.", r"\1.\2."),
    (r"^(stages\.\d+\.blocks\.\d+)\.layer_scale_1\.gamma$", r"\1.attn_scale"),
    (r"^(stages\.\d+\.blocks\.\d+)\.layer_scale_2\.gamma$", r"\1.mlp.scale"),
    (r"^(stages\.\d+\.blocks\.\d+)\.layer_scale\.gamma$", r"\1.mlp.scale"),
    (r"^final_conv\.se\.fc1\.", "squeeze."),
    (r"^final_conv\.se\.fc2\.", "excite."),
)


def _place(key: str) -> tuple[str, str, str] | None:
    """Return the convolution that a key belongs to by our name, the branch, and what of it; none for other keys."""
    if key.endswith(".num_batches_tracked"):  # of training alone
        return None
    if found := re.match(r"^(stages\.\d+\.blocks\.\d+\.mlp\.conv)\.(conv|bn)\.(\w+)$", key):
        return found[1], "", f"{found[2]}.{found[3]}"
    if (found := _BRANCH.match(key)) is None or not any(re.match(rule, found["place"]) for rule, _ in _CONVOLUTIONS):
        return None
    return rename_key(found["place"], _CONVOLUTIONS), found["branch"], found["rest"]


def _own_name(key: str) -> str | None:
    """Return our name of a key that is no part of a convolution with branches."""
    return None if _place(key) is not None else rename_key(key, _OTHERS)


def _spelling(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what the file calls a key of ours; of a convolution the first of its branches."""
    plain = _stages({rename_key(key, _RULES): torch.empty(0) for key in state})
    spelt: dict[str, str] = {}
    for key, given in zip(plain, state, strict=True):
        place = _place(key)
        names = [f"{place[0]}.weight", f"{place[0]}.bias"] if place is not None else [rename_key(key, _OTHERS)]
        for name in names:
            spelt.setdefault(name, given)
    return spelt


def _fused(plain: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return kernel and bias of each convolution, its branches summed up."""
    branches: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in plain.items():
        if (place := _place(key)) is not None:
            name, branch, rest = place
            branches.setdefault(name, {}).setdefault(branch, {})[rest] = tensor
    return {name: _sum_branches(name, parts) for name, parts in branches.items()}


def _sum_branches(name: str, parts: dict[str, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    scale = parts.pop("layer_scale", {}).get("gamma")
    inner: dict[str, dict[str, dict[str, Tensor]]] = {"": {}}
    for branch, tensors in parts.items():
        owner, _, own = branch.partition(".") if branch.startswith(("mixer.", "norm.")) else ("", "", branch)
        inner.setdefault(owner, {})[own] = tensors
    kernels = [tensors[key] for tensors in parts.values() for key in ("conv.weight", "weight") if key in tensors
               and tensors[key].ndim == 4]  # fmt: skip
    if not kernels:
        raise WeightsError(f"weights of {name} hold no kernel; the checkpoint is not whole")
    side = max(kernel.shape[-1] for kernel in kernels)
    if "mixer" in inner:  # x + scale (mixer(x) - norm(x))
        mixer, norm = (sum_parallel(name, inner[part], side, kernels[0]) for part in ("mixer", "norm"))
        factor = torch.ones(()) if scale is None else scale.reshape(-1)
        weight = factor.reshape(-1, 1, 1, 1) * (mixer[0] - norm[0]) + unit_kernel(mixer[0])
        return weight, factor * (mixer[1] - norm[1])
    weight, bias = sum_parallel(name, inner[""], side, kernels[0])
    if "pe" in parts or "pos_enc" in parts:  # beside a skip
        weight = weight + unit_kernel(weight)
    return weight, bias


class FastVLMOriginal(nn.Module):
    """The eager original: its modules one after the other, on the parameters of a `FastVLM`.

    Written apart from the static form: channels last through torch's own attention, pooling by `avg_pool2d`.
    """

    def __init__(self, static: FastVLM) -> None:
        super().__init__()
        self.static: Any = static

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static = self.static
        strides = (2, 2, 1)
        x = image
        for layer, stride in zip(static.stem, strides, strict=True):
            x = gelu(self._convolve(layer, x, stride=stride))
        for stage in static.stages:
            if hasattr(stage, "down"):
                x = gelu(self._convolve(stage.down, x, stride=2))
                x = gelu(self._convolve(stage.point, x))
            if hasattr(stage, "position"):
                x = self._convolve(stage.position, x)
            for block in stage.blocks:
                x = self._attend(block, x) if hasattr(block, "qkv") else self._convolve(block.mix, x)
                hidden = gelu(self._convolve(block.mlp.fc1, self._convolve(block.mlp.conv, x)))
                x = x + block.mlp.scale * self._convolve(block.mlp.fc2, hidden)
        x = self._convolve(static.expand, x)
        pooled = F.avg_pool2d(x, x.shape[2:])
        gate = torch.sigmoid(self._convolve(static.excite, torch.relu(self._convolve(static.squeeze, pooled))))
        x = gelu(x * gate)
        if static.output == "logits":
            return (torch.einsum("bcyx,ck->bk", x, static.head) / (x.shape[2] * x.shape[3]),)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        if static.params.projector_dim:
            first, second = static.projector
            tokens = F.linear(gelu(F.linear(tokens, first.weight, first.bias)), second.weight, second.bias)
        return (tokens,)

    def _convolve(self, layer: Any, x: Tensor, stride: int = 1) -> Tensor:
        side = layer.weight.shape[-1]
        groups = x.shape[1] // layer.weight.shape[1]
        return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=side // 2, groups=groups)

    def _attend(self, block: Any, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = norm_channels(block.norm, x).permute(0, 2, 3, 1).flatten(1, 2)
        qkv = (tokens @ block.qkv.weight.T).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(*qkv.unbind(0)).movedim(1, 2).flatten(2)
        update = F.linear(read, block.proj.weight, block.proj.bias).reshape(len(x), height, width, -1)
        updated: Tensor = x + block.attn_scale * update.permute(0, 3, 1, 2)
        return updated
