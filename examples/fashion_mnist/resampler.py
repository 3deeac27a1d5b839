"""Train a resampler on the small host's features in your own loop, save it as its original does, and export it.

    python examples/fashion_mnist/resampler.py --data /usr/share/datasets/fashion-mnist

Nine queries read the host's 49 tokens, and a linear layer their mean: the host stays as it is. Needs `pip install
'.[cpu]'` and the data (Debian's package dataset-fashion-mnist); without the data it says so and ends.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from host import load_host
from torch import Tensor, nn
from torch.nn import functional as F
from train import read

import edgecomp
from edgecomp import api
from edgecomp.compressors._base import Compressor


def train(images: Tensor, labels: Tensor, host: nn.Module) -> tuple[Compressor, nn.Linear]:
    """Return the resampler and the linear layer after one pass over the images."""
    resampler = edgecomp.compressor("resampler-2d", grid=7, queries=9, context_dim=96, embed_dim=96, num_heads=3)
    head = nn.Linear(96, 10)
    optimizer = torch.optim.AdamW([*resampler.parameters(), *head.parameters()], lr=1e-3)
    for chosen in torch.randperm(len(images)).split(64):
        (latents,) = resampler(features(host, images[chosen]))  # (B, 9, 96)
        loss = F.cross_entropy(head(latents.mean(1)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return resampler.eval(), head


@torch.no_grad()
def features(host: nn.Module, images: Tensor) -> Tensor:
    """Return the host's patch tokens, (B, 49, 96)."""
    tokens: Tensor = host.forward_features(images.expand(-1, 3, -1, -1))[:, 1:]  # type: ignore[operator]
    return tokens


@torch.inference_mode()
def accuracy(resampler: nn.Module, head: nn.Linear, host: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose highest logit is the label's."""
    found = [head(resampler(features(host, part))[0].mean(1)).argmax(-1) for part in images.split(256)]
    return (torch.cat(found) == labels).to(torch.float64).mean().item()


def main() -> None:
    """Train, test, save and export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path("fashion-resampler"), help="folder of the bundle")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"skipped: there is no Fashion-MNIST in {options.data}; apt-get install dataset-fashion-mnist brings it")
        return
    torch.manual_seed(options.seed)
    host = load_host()
    resampler, head = train(*read(options.data, "train"), host)
    images, labels = read(options.data, "test")
    print(f"top-1 on {len(images)} test images, 9 of 49 tokens: {accuracy(resampler, head, host, images, labels):.2%}")
    saved = resampler.save(options.out.with_suffix(".safetensors"), layout="omnilmm")
    print(f"saved in the layout omnilmm: {saved}, {saved.stat().st_size:,} bytes")
    report = api.export(resampler, backbone=host, out=options.out, force=True)
    print(f"exported: {report.bundle}, {report.manifest.buckets[0].model}, {report.manifest.weights}")


if __name__ == "__main__":
    main()
