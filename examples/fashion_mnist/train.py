"""Train the small vision transformer on Fashion-MNIST, in about five minutes on two cores.

    python examples/fashion_mnist/train.py --data /usr/share/datasets/fashion-mnist

Needs `pip install '.[cpu]'` and the data (Debian's package dataset-fashion-mnist). Everything is seeded: order of the
images, initial weights. AdamW with one cycle of the learning rate, cross-entropy, and nothing else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from host import PREPROCESS, WEIGHTS, make_host
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from edgecomp.evaluation import open_data

_BATCH, _PEAK_LR, _WEIGHT_DECAY = 64, 1.5e-3, 0.05


def main() -> None:
    """Train, test, and write the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    started = time.perf_counter()
    torch.manual_seed(options.seed)
    images, labels = read(options.data, "train")
    model = make_host().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LR, weight_decay=_WEIGHT_DECAY)
    steps = options.epochs * (len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_PEAK_LR, total_steps=steps, pct_start=0.2)
    for epoch in range(options.epochs):
        total, batches = 0.0, torch.randperm(len(images)).split(_BATCH)[: len(images) // _BATCH]
        for chosen in batches:
            loss = F.cross_entropy(model(images[chosen].expand(-1, 3, -1, -1)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: mean loss {total / len(batches):.4f}, {spent(started)}", flush=True)

    state = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()})
    images, labels = read(options.data, "test")
    print(f"top-1 on {len(images)} test images, weights rounded to fp16: {accuracy(model.eval(), images, labels):.2%}")
    save_file(state, options.out)
    print(f"{options.out.stat().st_size:,} bytes written, {spent(started)}")


def spent(started: float) -> str:
    """Return wall and processor time so far."""
    return f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of processor time"


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return pixels (N, 1, 28, 28), normalised as the bundle will do, and labels (N,)."""
    data = open_data(folder, split=split)
    raw = np.stack([np.asarray(data.image(index)) for index in range(len(data.labels))])
    pixels = torch.from_numpy(raw).to(torch.float32).unsqueeze(1) / 255
    return (pixels - PREPROCESS["mean"][0]) / PREPROCESS["std"][0], torch.from_numpy(data.labels)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose highest logit is the label's."""
    right = 0
    for pixels, expected in zip(images.split(256), labels.split(256), strict=True):
        right += int((model(pixels.expand(-1, 3, -1, -1)).argmax(-1) == expected).sum())
    return right / len(images)


if __name__ == "__main__":
    main()
