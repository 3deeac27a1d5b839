"""Precision as a graph is written in: one word, what the rest runs in, and the islands in fp32."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, get_args

import msgspec

from edgecomp.errors import InvalidSpec, UnknownName

__all__ = ["PRECISIONS", "PrecisionPlan", "Rest", "WrittenPrecision", "pattern_of"]

WrittenPrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Rest = Literal["fp16", "bf16", "fp32"]
PRECISIONS: tuple[WrittenPrecision, ...] = get_args(WrittenPrecision)
_RESTS: tuple[Rest, ...] = get_args(Rest)
_QUANTIZED = ("int8", "fp8")
_OPSET_BF16 = 22  # the first with a bf16 Conv
_OPSETS, _DEFAULT_OPSET = (18, 20), 20


class PrecisionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the graphs of a bundle compute in.

    Attributes:
        word: of the matrix products that have weights; all else too where it is no quantized type.
        rest: what is not quantized; equal to `word` where nothing is.
        fp32: shell patterns of modules (from any dot of their path on) or node names that stay in fp32, beyond norms,
            softmax, sums, scores and sizes.
    """

    word: WrittenPrecision = "fp32"
    rest: Rest = "fp32"
    fp32: tuple[str, ...] = ()

    @classmethod
    def asked(cls, word: str, rest: str, fp32: tuple[str, ...]) -> PrecisionPlan:
        """Return the plan of a request; an empty `rest` is the default.

        Raises:
            UnknownName, InvalidSpec: a word is none, or has no meaning beside the others.
        """
        if word not in PRECISIONS:
            raise UnknownName("precision", word, PRECISIONS)
        if rest and rest not in _RESTS:
            raise UnknownName("precision of the rest", rest, _RESTS)
        quantized = word in _QUANTIZED
        if rest and not quantized:
            raise InvalidSpec(f"--rest {rest} is of what int8 and fp8 leave, and --precision is {word}; drop --rest")
        plan = cls(word, (rest or "fp16") if quantized else word, fp32)  # type: ignore[arg-type]
        if fp32 and plan.rest == "fp32":
            raise InvalidSpec(f"--fp32 {fp32[0]!r}: everything that is not quantized is in fp32 already; drop --fp32")
        if "" in fp32:
            raise InvalidSpec("--fp32 '' names nothing; give a module or a node, for example --fp32 'blocks.3.mlp'")
        return plan

    @property
    def quantized(self) -> Literal["int8", "fp8"] | None:
        """The type of the products with weights where it is a quantised one."""
        return self.word if self.word in ("int8", "fp8") else None

    @property
    def needs_samples(self) -> bool:
        """Whether numbers are looked at before the graph is written: for scales, and for the range of fp16."""
        return self.quantized is not None or self.rest == "fp16"

    def opset(self, asked: int) -> int:
        """Return the opset to write, the default where 0 was asked for.

        Raises:
            InvalidSpec: the opset has no such type.
        """
        if self.rest == "bf16":
            if asked not in (0, _OPSET_BF16):
                raise InvalidSpec(f"opset {asked}: a convolution has bf16 from opset {_OPSET_BF16} on; drop --opset")
            return _OPSET_BF16
        low, high = _OPSETS
        opset = asked or _DEFAULT_OPSET
        if not low <= opset <= high:
            raise InvalidSpec(f"opset {opset} is not between {low} and {high}; {_DEFAULT_OPSET} is the default")
        return opset


def pattern_of(patterns: tuple[str, ...], *, node: str, module: str) -> str:
    """Return the first pattern that names a node, its module or a module around that one; "" where none does.

    A pattern may begin at any dot of a module's path, for what wraps a model is not what its user knows it by:
    `blocks.2.mlp` is `model.backbone.model.blocks.2.mlp`, with all inside it. A node's name has no such parts.
    """
    parts = module.split(".") if module else []
    ends = range(1, len(parts) + 1)
    names = (node, *(".".join(parts[start:end]) for end in ends for start in range(end)))
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), "")
