"""What methods after an encoder cost in the bands of 4x, 9x and 16x: FLOPs over those of CLIP ViT-L/14 at 336 pixels.

    python benchmarks/bands.py [--json FILE]

576 tokens of width 1024 go in, 144, 64 or 36 are kept; each method with the recipe's own preset for given tokens.
Counted from shapes, nothing is timed.
"""

from __future__ import annotations

from typing import Any

from common import parse, publish

from edgecomp.backbones.assemble import assemble
from edgecomp.compressors import compressor_class
from edgecomp.errors import InvalidSpec
from edgecomp.export.flops import count_module_flops
from edgecomp.specs import load_recipe, method_names
from edgecomp.specs.order import Order

_HOST, _TOKENS, _WIDTH, _HEADS = "openai/clip-vit-large-patch14-336", 576, 1024, 16
_BANDS = (144, 64, 36)


def main() -> None:
    """Count and print."""
    options = parse(__doc__ or "")
    host = "vit_tiny_patch16_384" if options.quick else _HOST
    plain = assemble(Order(recipe=load_recipe("fastervlm"), backbone=host, budgets=("64",), feature_layer=-1)).plain
    assert plain is not None
    encoder = count_module_flops(plain)
    rows = [[host, f"{encoder / 1e9:.1f}", "", "", ""]]
    for name in method_names():
        if "after" in load_recipe(name).placements:
            costs = [_count(name, kept) for kept in _BANDS]
            weights = next((count for _, count in costs if count is not None), 0)
            shares = [f"{100 * flops / encoder:.2f} %" if flops is not None else "-" for flops, _ in costs]
            rows.append([name, f"{weights / 1e6:.1f} M", *shares])
    header = ["method", "GFLOP or weights", *(f"{_TOKENS // kept}x, {kept} tokens" for kept in _BANDS)]
    publish("FLOPs of the method over the encoder's", header, [list(row) for row in rows], options.json)


def _count(name: str, kept: int) -> tuple[int | None, int | None]:
    """Return FLOPs and parameters of a method; none where it cannot keep so many."""
    cls = compressor_class(name)
    given: dict[str, Any] = {"tokens": _TOKENS, cls.width_param: _WIDTH, "attention_heads": _HEADS}
    params = {key: value for key, value in given.items() if key in cls.Params.__struct_fields__}
    recipe = load_recipe(name)
    order = Order(
        recipe=recipe, preset=recipe.placements["after"], backbone="none", params=params, budgets=(str(kept),)
    )
    try:
        model = assemble(order).models[0]
    except InvalidSpec:
        return None, None
    return count_module_flops(model), sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
