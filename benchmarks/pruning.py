"""Pruning inside ViT-S in ONNX Runtime: over the plain model, and over the originals in torch eager.

    python benchmarks/pruning.py [--rounds 9] [--json FILE]

224 pixels, batch 1, logits, keep rates of 0.7 and 0.5 in the blocks of the papers (a quarter, a half and three quarters
of the depth), 1 and 2 threads; all models interleaved. Speed is plain over pruned: above 1 is a gain. Beside it stands
what the FLOPs alone would give, and the share of it that was reached.
"""

from __future__ import annotations

from common import parse, publish, time_inside

_RATES = (0.7, 0.5)
_MODELS = {
    **{f"evit {rate}": ("evit", {"keep_rate": rate}) for rate in _RATES},
    **{f"dynamicvit {rate}": ("dynamicvit", {"ratios": (rate, rate**2, rate**3)}) for rate in _RATES},
    **{
        f"attention-pruning {rate}": (
            "attention-pruning",
            {"schedule": "table", "table": ((3, rate), (6, rate**2), (9, rate**3))},
        )
        for rate in _RATES
    },
}


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 9, "rounds"))
    rows = time_inside("vit_small_patch16_224", _MODELS, rounds=2 if options.quick else options.rounds)
    for row in rows:
        row.append(f"{float(str(row[3])) / float(str(row[4])):.0%}")
    header = ["threads", "model", "ms", "speed over plain", "by FLOPs", "over eager", "of the FLOPs' gain"]
    publish("latency of ViT-S, batch 1, medians of interleaved rounds", header, rows, options.json)


if __name__ == "__main__":
    main()
