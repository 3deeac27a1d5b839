"""ToMe inside ViT-S and ViT-B in ONNX Runtime: over the plain model, and over the paper's form in torch eager.

    python benchmarks/tome.py [--rounds 9] [--json FILE]

224 pixels, batch 1, logits, r = 8, 13 and 16 in each block, 1 and 2 threads; plain and merged models interleaved. Speed
is plain over merged: above 1 is a gain. Beside it stands what the FLOPs alone would give.
"""

from __future__ import annotations

from common import parse, publish, time_inside

_HOSTS = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}
_MODELS = {f"tome r={r}": ("tome", {"r": r}) for r in (8, 13, 16)}


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 9, "rounds"))
    rounds = 2 if options.quick else options.rounds
    hosts = {"ViT-S": _HOSTS["ViT-S"]} if options.quick else _HOSTS
    rows = [[name, *row] for name, host in hosts.items() for row in time_inside(host, _MODELS, rounds=rounds)]
    header = ["host", "threads", "model", "ms", "speed over plain", "by FLOPs", "over eager ToMe"]
    publish("latency, batch 1, medians of interleaved rounds", header, rows, options.json)


if __name__ == "__main__":
    main()
