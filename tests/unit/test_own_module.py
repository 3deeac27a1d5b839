"""A module of the user's own is exported as its params and weights say; one that computes something else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402 - torch first, or skip

import edgecomp  # noqa: E402
from edgecomp import api  # noqa: E402
from edgecomp.backbones.assemble import assemble  # noqa: E402
from edgecomp.backbones.own import require_as_made  # noqa: E402
from edgecomp.errors import InvalidSpec  # noqa: E402
from edgecomp.specs import load_recipe  # noqa: E402
from edgecomp.specs.order import Order  # noqa: E402


def make(**words: Any) -> Any:
    sizes = {"grid": 4, "queries": 4, "context_dim": 16, "embed_dim": 16, "num_heads": 2}
    return edgecomp.compressor("resampler-2d", **{**sizes, **words})


def replace_forward(module: Any) -> None:
    module.forward = lambda tokens: (tokens[:, :4],)


def mix_types(module: Any) -> None:
    """As automatic mixed precision leaves it; a hook is seen where torch cannot compute in these types."""
    module.bfloat16().ln_q.float()
    module.attn.register_forward_hook(lambda part, given, out: out.flip(-1))


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "another eps": (
        lambda module: setattr(module, "ln_q", nn.LayerNorm(16, eps=0.5)),
        r"another latents than its params and weights say \(0\.\d+ of .* ln_q is LayerNorm\(.*eps=0\.5.* not .*=1e-06",
    ),
    "a hook": (
        lambda module: module.attn.register_forward_hook(lambda part, given, out: out.flip(-1)),
        "another latents .* attn has a forward hook",
    ),
    "a hook that raises": (
        lambda module: module.attn.register_forward_hook(lambda part, given, out: 1 / 0),
        "does not run, .*ZeroDivisionError.* attn has a forward hook",
    ),
    "another forward": (replace_forward, "the forward of the module was replaced"),
    "other outputs": (
        lambda module: setattr(module, "forward", lambda tokens: (tokens, tokens)), "gives 2 outputs and not 1"
    ),
    "another shape": (
        lambda module: setattr(module, "forward", lambda tokens: tokens), r"shape \[1, 16, 16\] and not \[1, 4, 16\]"
    ),
    "a table in place": (
        lambda module: module.pos_embed.mul_(3),
        "the buffer key_places of the module is not what params and weights make",
    ),
    "a hook in two types": (mix_types, "attn has a forward hook"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_refused(change: str) -> None:
    module = make()
    CHANGES[change][0](module)
    with pytest.raises(InvalidSpec, match=CHANGES[change][1]):
        require_as_made(module)
    assert module.training


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.register_forward_hook(lambda part, given, out: None),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.attn.eval(),
        lambda module: module.requires_grad_(False),
        lambda module: module.load_state_dict(make(seed=3).state_dict()),
    ],
    ids=["a hook that only looks", "fp16", "fp64", "one part in evaluation", "frozen", "other weights"],
)
def test_what_changes_nothing_is_taken(change: Callable[[Any], object]) -> None:
    module = make()
    change(module)
    modes = [part.training for part in module.modules()]
    require_as_made(module)
    assert [part.training for part in module.modules()] == modes


def test_a_plain_attribute_is_seen() -> None:
    """Choosing methods hold their counts as attributes."""
    module = edgecomp.compressor("spatial-frequency-protect", preset="smoke")
    module.protected -= 1
    with pytest.raises(InvalidSpec, match=r"protected of the module is \d+ and not \d+"):
        require_as_made(module)


def test_export_refuses_it_and_writes_nothing(tmp_path: Path) -> None:
    module = make()
    module.ln_q = nn.LayerNorm(16, eps=0.5)
    with pytest.raises(InvalidSpec, match="the Resampler2d given gives another latents"):
        api.export(module, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda block: block.register_forward_hook(lambda part, given, out: out), "block 1 of .* has a forward hook"),
        (
            lambda block: block.attn.register_forward_pre_hook(lambda part, given: None),
            "attention of block 1 of .* hook",
        ),
        (lambda block: setattr(block, "forward", lambda x: x), "block 1 of .* has a forward of its own, which would"),
    ],
    ids=["block", "attention", "forward"],
)
@pytest.mark.parametrize(("method", "preset"), [("tome", "smoke"), ("visionzip", "smoke-host")])
def test_what_a_host_would_not_run_is_refused(
    method: str, preset: str, change: Callable[[Any], object], words: str
) -> None:
    vit = pytest.importorskip("timm").create_model("test_vit", pretrained=False)
    change(vit.blocks[1])
    with pytest.raises(InvalidSpec, match=words):
        assemble(Order(recipe=load_recipe(method), preset=preset, backbone=vit))
    assert assemble(Order(recipe=load_recipe("perceiver"), preset="smoke-host", backbone=vit)).models
