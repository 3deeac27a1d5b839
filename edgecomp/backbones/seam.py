"""A model cut in two where its buckets begin to differ: the stem, which they share, and what each has of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edgecomp.backbones.placed import PlacedModel
from edgecomp.compressors._chain import Chain
from edgecomp.specs import TensorSpec

__all__ = ["Rest", "Stem", "find_seam"]


def find_seam(models: Sequence[PlacedModel]) -> int | None:
    """Return how many blocks of the host all models have in common; none where they share nothing that can be cut off.

    Two methods in a row are cut between them, also where there is one model: each can then be held to its original.
    Attention, norms and positions of the host are the same in front of the seam, whatever the budget.
    """
    seams = [seam for model in models if (seam := model.seam) is not None]
    in_a_row = any(isinstance(model.compressor, Chain) for model in models)
    return min(seams) if len(seams) > 1 or (seams and in_a_row) else None


class Stem(nn.Module):
    """The part in front of the seam.

    Shapes: the model's first input -> tokens (B, P + N, D), prefix tokens where the compressor takes them, and the
    host's features that it reads, as `PlacedModel.seam_specs` says. Of two methods in a row: all inputs of the first ->
    what it hands to the second.

    Args:
        model: any of the models that share it.
        seam: what `find_seam` returned.
    """

    def __init__(self, model: PlacedModel, seam: int) -> None:
        super().__init__()
        self.model, self.seam = model, seam

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return the model's first input, or the first method's."""
        return self.model.stem_specs(batch)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what is handed over."""
        return self.model.seam_specs(batch)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what is handed over."""
        return self.model.before(*inputs, seam=self.seam)


class Rest(nn.Module):
    """The part of one bucket behind the seam.

    Shapes: what the stem hands over, and the inputs that the stem does not take -> the model's outputs.
    """

    def __init__(self, model: PlacedModel, seam: int) -> None:
        super().__init__()
        self.model, self.seam = model, seam

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what the stem hands over, and the other inputs."""
        return (*self.model.seam_specs(batch), *self.model.input_specs(batch)[len(self.model.stem_specs()) :])

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return the model's outputs."""
        return self.model.output_specs(batch)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the model's outputs."""
        return self.model.behind(*inputs, seam=self.seam)
