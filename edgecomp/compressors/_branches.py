"""Convolutions side by side, as they are trained, summed into the one kernel that runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.errors import WeightsError

__all__ = ["sum_parallel", "unit_kernel"]

_EPS = 1e-5  # of torch's batch norms


def sum_parallel(name: str, parts: Mapping[str, dict[str, Tensor]], side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of convolutions side by side, each with its batch norm folded in.

    Args:
        name: of the convolution, for a refusal.
        parts: the tensors of each branch; one without a kernel is a skip with a batch norm.
        side: of the kernel that comes out; smaller ones are filled up with zeros.
        like: any of the kernels, whose channels a skip has.

    Raises:
        WeightsError: a batch norm is not whole.
    """
    weight: Tensor | None = None
    bias: Tensor | None = None
    for tensors in parts.values():
        kernel = tensors.get("conv.weight", tensors.get("weight"))
        norm = {key.removeprefix("bn."): value for key, value in tensors.items() if key.startswith("bn.")}
        if kernel is None or kernel.ndim != 4:  # a skip: its batch norm alone
            norm, kernel = tensors, unit_kernel(like.new_zeros(len(tensors["running_mean"]), *like.shape[1:3], side))
        shift = tensors.get("bias") if not norm else None
        if norm:
            missing = [key for key in ("weight", "bias", "running_mean", "running_var") if key not in norm]
            if missing:
                raise WeightsError(f"weights of {name} lack {missing[0]} of a batch norm; the checkpoint is not whole")
            factor = norm["weight"] / (norm["running_var"] + _EPS).sqrt()
            kernel = kernel * factor.reshape(-1, 1, 1, 1)
            shift = norm["bias"] - norm["running_mean"] * factor
        pad = (side - kernel.shape[-1]) // 2
        kernel = F.pad(kernel, (pad, pad, pad, pad))
        shift = kernel.new_zeros(len(kernel)) if shift is None else shift
        weight, bias = (kernel, shift) if weight is None or bias is None else (weight + kernel, bias + shift)
    assert weight is not None
    assert bias is not None
    return weight, bias


def unit_kernel(like: Tensor) -> Tensor:
    """Return the kernel that changes nothing, in the shape of another: (C, C / groups, k, k)."""
    side = like.shape[-1]
    kernel = like.new_zeros(len(like), like.shape[1], side, side)
    kernel[torch.arange(len(like)), torch.arange(len(like)) % like.shape[1], side // 2, side // 2] = 1.0
    return kernel
