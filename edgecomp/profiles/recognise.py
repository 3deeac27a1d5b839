"""Which target a machine is, by the names that NVIDIA's driver and board support packages give."""

from __future__ import annotations

import re

__all__ = ["target_of"]

# A card of another memory or form (H100 PCIe, A100 40GB) has other peaks, and is not the target.
_CARDS = (
    (r"\bH200$", "h200"), (r"\bH100 80GB HBM3$", "h100"), (r"\bA100-SXM4-80GB$", "a100"), (r"\bA10$", "a10"),
    (r"\bL4$", "l4"), (r"\bT4$", "t4"), (r"\bRTX 4090$", "rtx-4090"), (r"\bRTX 5090$", "rtx-5090"),
    (r"\bGB10$", "dgx-spark"),
)  # fmt: skip

# (board's model, least and most GiB, whether it is in a Super power mode or None for either, target)
_BOARDS = (
    (r"Orin Nano", 6, 9, True, "orin-nano-super"), (r"Orin Nano", 6, 9, False, "orin-nano"),
    (r"Orin NX", 12, 17, True, "orin-nx-16-super"), (r"Orin NX", 12, 17, False, "orin-nx-16"),
    (r"AGX Orin", 24, 33, None, "agx-orin-32"), (r"AGX Orin", 50, 65, None, "agx-orin-64"),
    (r"AGX Xavier", 24, 33, None, "agx-xavier"), (r"Xavier NX", 6, 17, None, "xavier-nx"),
    (r"Thor.*T4000", 40, 65, None, "thor-t4000"), (r"AGX Thor|Thor.*T5000", 100, 130, None, "thor-t5000"),
)  # fmt: skip


def target_of(*, gpu: str, board: str = "", memory_gib: float = 0.0, power_mode: str = "", on_gpu: bool) -> str:
    """Return the name of the folder that results of a machine go to: a target's, else `cpu` or the GPU's own.

    Args:
        gpu: its name by the driver; "" without one.
        board: the model in a Jetson's device tree; "" elsewhere. A Jetson is its target whatever ran the model.
        memory_gib: of the board.
        power_mode: of the board, by nvpmodel; "Super" modes are targets of their own.
        on_gpu: the GPU ran the model.
    """
    if board:
        is_super = "super" in f"{board} {power_mode}".lower()
        for pattern, least, most, of_super, name in _BOARDS:
            if re.search(pattern, board) and least <= memory_gib <= most and of_super in (None, is_super):
                return name
        return _slug(board)
    if not on_gpu or not gpu:
        return "cpu"
    named = gpu.strip()
    return next((name for pattern, name in _CARDS if re.search(pattern, named)), _slug(named))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "cpu"
