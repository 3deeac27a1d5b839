"""Train the `policy` router for the small vision transformer, and hold it to `fixed` and to the other routers.

    python examples/fashion_mnist/policy.py --data /usr/share/datasets/fashion-mnist

Attention pruning cuts once, in block 2 of 6, by the attention summed up until then: the stem is two whole blocks, from
whose mean token the policy judges. Host and pruning stay as they are; only the policy is trained, with the loss of the
founding notes. Then each router is calibrated on training images to the mean of the middle bucket, and meets `fixed`
there on test images. Needs `pip install '.[cpu]'` and the data (Debian's package dataset-fashion-mnist).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from host import load_host
from safetensors.torch import save_file
from table import interval
from torch import Tensor
from torch.nn import functional as F
from train import read, spent

import edgecomp
from edgecomp import api
from edgecomp.backbones.assemble import Assembly, assemble
from edgecomp.backbones.seam import Rest, Stem
from edgecomp.evaluation import Estimate, GraphScore, balanced_subset, open_data, score
from edgecomp.report.evaluate import EvaluationReport
from edgecomp.routers.policy import PolicyRouter
from edgecomp.serving import RoutedRunner
from edgecomp.specs import load_recipe
from edgecomp.specs.order import Order

_METHOD, _PRESET, _TOKENS = "attention-pruning", "inside", 49
_PARAMS = {"score": "cumulative-attention", "blocks": [2]}
_BUCKETS, _MIDDLE = (12, 24, 36), 24
_SPEEDUP, _WEIGHT = 2.0, 0.1  # the notes' target speedup, and the weight of missing it
_BATCH, _PEAK_LR, _WEIGHT_DECAY = 256, 1e-3, 0.05
_WEIGHTS = Path(__file__).parent / "policy.safetensors"


class Outcome(NamedTuple):
    """A router beside `fixed`: tokens on the images it was calibrated on, those it gave each test image, and scores."""

    calibrated: float
    served: list[int]
    fixed: GraphScore
    routed: GraphScore


def main() -> None:
    """Train, write the weights, export, calibrate, evaluate, and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--images", type=int, default=30_000, help="training images")
    parser.add_argument("--epochs", type=int, default=8, help="0: take the weights that --out names")
    parser.add_argument("--calibrate", type=int, default=2000, help="training images to calibrate on")
    parser.add_argument("--limit", type=int, default=None, help="so many test images; default: all")
    parser.add_argument("--others", nargs="*", default=["difficulty", "complexity", "coverage"], help="other routers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.epochs:
        started = time.perf_counter()
        order = Order(
            recipe=load_recipe(_METHOD), preset=_PRESET, backbone=load_host(), budgets=tuple(map(str, _BUCKETS)),
            output="logits", params=_PARAMS, router="policy", seed=options.seed,
        )  # fmt: skip
        torch.manual_seed(options.seed)
        assembly = assemble(order)
        chosen = torch.Generator().manual_seed(options.seed)
        features, losses = observe(assembly, *read(options.data, "train"), options.images, chosen)
        print(f"logits of {len(losses)} training images in {len(_BUCKETS)} buckets: {spent(started)}", flush=True)
        router: Any = assembly.router
        train(router, features, losses, options.epochs, chosen)
        save_file({name: tensor.contiguous() for name, tensor in router.state_dict().items()}, options.out)
        print(f"{options.out.stat().st_size:,} bytes written, {spent(started)}", flush=True)

    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("policy", *options.others):
            bundle, weights = Path(folder) / name, options.out if name == "policy" else "random"
            print(f"exporting, calibrating and evaluating {name}", flush=True)
            api.export(
                _METHOD, preset=_PRESET, backbone=load_host(), budget=_BUCKETS, params=_PARAMS, output="logits",
                with_plain=True, router=name, router_weights=weights, out=bundle,
            )  # fmt: skip
            made = api.calibrate(
                bundle, options.data, mean_tokens=_MIDDLE, split="train", limit=options.calibrate,
                threads=options.threads,
            )  # fmt: skip
            assert made.router.calibration is not None
            outcomes[name] = meet_fixed(bundle, made.router.calibration.mean_tokens, options)
            if name == "policy":
                report = api.evaluate(bundle, options.data, batch=1, threads=options.threads, limit=options.limit)
    print("\n".join([*describe(report), "", *describe_routers(report, outcomes)]))


# -- training ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def observe(
    assembly: Assembly, images: Tensor, labels: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Run the frozen model on `count` images: what the router reads (I, P + 1, D), cross-entropies (I, K) of buckets.

    The router takes the mean of the patch tokens. So the mean itself, as the one patch behind the prefix, gives what
    all patches give, and takes a fiftieth of the memory.
    """
    assert assembly.seam is not None
    stem, prefix = Stem(assembly.models[-1], assembly.seam), assembly.num_prefix_tokens
    rests = [Rest(model, assembly.seam) for model in assembly.models]
    features, losses = [], []
    for chosen in torch.randperm(len(images), generator=generator)[:count].split(256):
        handed = stem(images[chosen].expand(-1, 3, -1, -1))
        tokens = handed[0]
        features.append(torch.cat([tokens[:, :prefix], tokens[:, prefix:].mean(1, keepdim=True)], 1))
        per_bucket = [F.cross_entropy(rest(*handed)[0], labels[chosen], reduction="none") for rest in rests]
        losses.append(torch.stack(per_bucket, 1))
    return torch.cat(features), torch.cat(losses)


def train(router: PolicyRouter, features: Tensor, losses: Tensor, epochs: int, generator: torch.Generator) -> None:
    """Minimise the notes' loss: task loss + 0.1 (tokens used / N - 1 / target speedup)^2, for each image.

    A bucket is a choice, which has no slope. Instead an image is taken to go to one of the two buckets around its keep
    ratio, by a draw whose mean is the ratio: then the tokens used are keep * N on average, and the task loss is what
    is expected of the draw. `keep` is not held to [0, 1] here, so that no image falls where nothing pulls it back.
    """
    optimizer = torch.optim.AdamW(router.parameters(), lr=_PEAK_LR, weight_decay=_WEIGHT_DECAY)
    steps = epochs * -(-len(losses) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_PEAK_LR, total_steps=steps)
    for epoch in range(epochs):
        total = torch.zeros(3)
        for chosen in torch.randperm(len(losses), generator=generator).split(_BATCH):
            _, signals = router.judge(features[chosen])
            keep = 1.0 - signals[:, 0] * router.depth_factor
            task = (draw_shares(keep) * losses[chosen]).sum(1).mean()
            loss = task + _WEIGHT * (keep - 1.0 / _SPEEDUP).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += torch.stack([loss, task, keep.mean()]).detach() * len(chosen)
        mean = (total / len(losses)).tolist()
        print(f"epoch {epoch + 1}: loss {mean[0]:.4f}, of the task {mean[1]:.4f}, keep ratio {mean[2]:.3f}", flush=True)


def draw_shares(keep: Tensor) -> Tensor:
    """Return the chance of each bucket, so that the mean share kept is `keep` (I,), held to the buckets': (I, K)."""
    shares = torch.tensor(_BUCKETS) / _TOKENS
    above = ((keep[:, None] - shares[:-1]) / (shares[1:] - shares[:-1])).clamp(0.0, 1.0)  # the chance to go above k
    ends = torch.ones_like(keep[:, None])
    return torch.cat([ends, above], 1) - torch.cat([above, 0.0 * ends], 1)


# -- evaluation -------------------------------------------------------------------------------------------------


class FixedRunner(RoutedRunner):
    """The same model, asked for the middle bucket: the router does not run."""

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Serve one request."""
        return self.model(inputs, budget=_MIDDLE).outputs


def meet_fixed(bundle: Path, calibrated: float, options: argparse.Namespace) -> Outcome:
    """Serve every test image with the router and with the middle bucket, in turn."""
    data = open_data(options.data, split="test")
    count = min(options.limit or len(data.labels), len(data.labels))
    indices = balanced_subset(data.labels, count, seed=0) if count < len(data.labels) else np.arange(count)
    with edgecomp.load(bundle, threads=options.threads) as model:
        manifest = model.bundle.manifest
        assert manifest.preprocess is not None
        routed = RoutedRunner(model)
        found = score(
            {"fixed": FixedRunner(model), "routed": routed},
            plain="fixed",
            data=data,
            indices=indices,
            preprocess=manifest.preprocess,
            input_name="image",
            dtype="float32",
            output_name="logits",
            batch=1,
            num_classes=manifest.buckets[0].outputs[0].shape[1],
        )
    return Outcome(calibrated, routed.served[-count:], *found.scores)


def describe(report: EvaluationReport) -> list[str]:
    """Return a table of the plain model, each bucket, and what the policy routes."""
    machine, found = report.machine, report.evaluation
    load = machine.load_average[0] if machine.load_average else "unknown"
    where = f"{report.threads} thread(s) on {machine.cpu}, {machine.cores} cores, load {load}"
    header = "| model | tokens kept | top-1 % | drop, points | agreement % | FLOPs | ms/image, batch 1 | over plain |"
    lines = [f"{found.images:,} test images, {report.version}, {where}.", "", header, "|" + "---|" * 8]
    for row in found.scores:
        kept, flops = report.kept[row.model], report.flops[row.model] / report.flops[report.plain]
        name = {report.plain: "plain", "routed": "policy"}.get(row.model, f"`fixed` {kept:g}")
        top1, ms, it = f"{100 * row.top1.value:.2f}", f"{row.ms_per_image.value:.3f}", row.against_plain
        drop = agreement = over = ""
        if it is not None:
            drop, agreement = f"{100 * it.drop.value:.2f} {interval(it.drop, 100)}", f"{100 * it.agreement.value:.2f}"
            over = f"{it.time_ratio.value:.2f}x {interval(it.time_ratio, 1)}"
        cells = [name, f"{kept:.4g}", top1, drop, agreement, f"{flops:.2f}x", ms, over]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def describe_routers(report: EvaluationReport, outcomes: dict[str, Outcome]) -> list[str]:
    """Return a table of all routers beside `fixed` at the middle bucket, whose mean tokens they were calibrated to."""
    own = {report.kept[row.model]: row.top1.value for row in report.evaluation.scores if row.against_plain is not None}
    header = (
        "| router | mean tokens, calibrated | on test images | shares of "
        f"{', '.join(map(str, _BUCKETS))} % | top-1 % | same shares at random % | gain over `fixed`, points | "
        "time over `fixed` |"
    )
    first = next(iter(outcomes.values()))
    lines = [header, "|" + "---|" * 8]
    lines.append(f"| `fixed` | {_MIDDLE} | {_MIDDLE} | | {100 * first.fixed.top1.value:.2f} | | | 1.00x |")
    for name, it in outcomes.items():
        compared = it.routed.against_plain
        assert compared is not None
        shares = [it.served.count(tokens) / len(it.served) for tokens in _BUCKETS]
        gain = Estimate(-compared.drop.value, -compared.drop.high, -compared.drop.low)
        chance = sum(share * own[tokens] for share, tokens in zip(shares, _BUCKETS, strict=True))
        lines.append(
            f"| {name} | {it.calibrated:.2f} | {statistics.fmean(it.served):.2f} | "
            f"{', '.join(f'{100 * share:.0f}' for share in shares)} | {100 * it.routed.top1.value:.2f} | "
            f"{100 * chance:.2f} | {100 * gain.value:+.2f} {interval(gain, 100)} | "
            f"{typical_ms(it.served, it.routed.run_ms) / it.fixed.ms_per_image.value:.2f}x |"
        )
    return lines


def typical_ms(served: Sequence[int], run_ms: Sequence[float]) -> float:
    """Return the mean over requests of their bucket's median time: one median of all would be that of one bucket."""
    total = 0.0
    for tokens in set(served):
        times = [ms for ms, given in zip(run_ms, served, strict=True) if given == tokens]
        total += len(times) * statistics.median(times)
    return total / len(served)


if __name__ == "__main__":
    main()
