"""Bad input: a clear error of one to three lines, exit 2, nothing on stdout, nothing written, nothing lost.

The table follows the issue's list; each row is a command, and what its error must say. The values in the texts are
those that the command gave.
"""

from __future__ import annotations

import os
import pickle
import shlex
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecomp.resources import data_path, photograph_path

Cli = Callable[..., Any]

torch = pytest.importorskip("torch")


class RunsCode:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.marker,))


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _write_images(folder: Path) -> None:
    whole = photograph_path().read_bytes()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "header.jpg").write_bytes(whole[:20])
    (folder / "text.jpg").write_text("not an image at all")
    (folder / "bomb.png").write_bytes(_png(60_000, 60_000))
    (folder / "zero.png").write_bytes(_png(0, 5))
    (folder / "short.png").write_bytes(_png(64, 64, b"\0" * 100))
    (folder / "drawing.gif").write_bytes(b"GIF89a" + bytes(30))


def _write_tensors(folder: Path) -> None:
    tokens, mask = np.zeros((1, 20, 24), np.float32), np.ones((1, 20), bool)
    broken = tokens.copy()
    broken[0, 3, 4] = np.nan
    np.savez(folder / "no_mask.npz", tokens=tokens)
    np.savez(folder / "extra.npz", tokens=tokens, context_mask=mask, other=mask)
    np.savez(folder / "shape.npz", tokens=tokens[:, :19], context_mask=mask)
    np.savez(folder / "dtype.npz", tokens=tokens.astype(np.float64), context_mask=mask)
    np.savez(folder / "nan.npz", tokens=broken, context_mask=mask)
    np.savez(folder / "objects.npz", tokens=np.array([{}], dtype=object), context_mask=mask)
    (folder / "truncated.npz").write_bytes((folder / "nan.npz").read_bytes()[:900])
    (folder / "empty.safetensors").write_bytes(b"")


def _write_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    from edgecomp.compressors import compressor_class
    from edgecomp.specs import load_recipe

    model = compressor_class("lookupvit").from_recipe(load_recipe("lookupvit"), 9, preset="smoke")
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(good, folder / "good.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:9000])
    (folder / "text.safetensors").write_text("hello")
    save_file({}, folder / "none.safetensors")
    (folder / "weights.h5").write_bytes(b"x")
    missing = {k: v for k, v in good.items() if k not in ("norm.gamma", "blocks.1.refine.to_v.weight")}
    save_file(missing, folder / "missing.safetensors")
    save_file({**good, "extra.weight": good["norm.gamma"].clone()}, folder / "unknown.safetensors")
    shapes = {"blocks.1.refine.to_q.weight": torch.zeros(7, 32), "blocks.0.lookup_norm.gamma": torch.zeros(31)}
    save_file({**good, **shapes}, folder / "shapes.safetensors")
    nan = good["norm.gamma"].clone()
    nan[3] = float("nan")
    save_file({**good, "norm.gamma": nan}, folder / "nan.safetensors")
    save_file({"conv1.weight": torch.zeros(8, 3, 7, 7), "fc.weight": torch.zeros(10, 8)}, folder / "resnet.safetensors")
    torch.save(good, folder / "good.pt")
    (folder / "truncated.pt").write_bytes((folder / "good.pt").read_bytes()[:3000])
    (folder / "text.pt").write_text("hello world")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"epoch": 3, "lr": 0.1}, folder / "epoch.pt")
    torch.save({**good, "evil": RunsCode(str(folder / "HACKED"))}, folder / "code.pt")
    (folder / "code2.pt").write_bytes(pickle.dumps(RunsCode(str(folder / "HACKED")), protocol=2))


RECIPE_FAULTS = {
    "unknown": ('level = "E0"', 'level = "E0"\nlevle = "E1"'),
    "type": ("image_size = 224", 'image_size = "big"'),
    "duplicate": ('level = "E0"', 'level = "E0"\nlevel = "E1"'),
    "range": ("opset = 20", "opset = 17"),
    "preset": ('preset = "s16"', 'preset = "s17"'),
    "schema": ("schema = 1", "schema = 2"),
    "method": ('method = "lookupvit"', 'method = "lookupvot"'),
    "param": ("num_classes = 10", "num_clases = 10"),
    "syntax": ("schema = 1", "schema = "),
}
TARGET_FAULTS = {
    "unknown": ("sm = 89", "sm = 89\nsmm = 89"),
    "type": ("sm = 89", 'sm = "89"'),
    "duplicate": ("sm = 89", "sm = 89\nsm = 89"),
    "sparse": ('sparsity = "dense"', 'sparsity = "sparse"'),
    "name": ('name = "rtx-4090"', 'name = "../../../evil"'),
}


def _write_toml(folder: Path) -> None:
    for kind, file, faults, word in (
        ("recipe", data_path("export", "recipes", "lookupvit.toml"), RECIPE_FAULTS, b"LookupViT"),
        ("target", data_path("profiles", "targets", "rtx-4090.toml"), TARGET_FAULTS, b"GeForce"),
    ):
        text = file.read_text()
        for name, (old, new) in faults.items():
            assert old in text
            (folder / f"{kind}_{name}.toml").write_text(text.replace(old, new, 1))
        (folder / f"{kind}_utf8.toml").write_bytes(file.read_bytes().replace(word, b"\xff\xfe", 1))
    with (folder / "huge.toml").open("wb") as huge:
        huge.truncate(1 << 31)


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that must be refused."""
    folder = tmp_path_factory.mktemp("bad")
    for write in (_write_images, _write_tensors, _write_weights, _write_toml):
        write(folder)
    return folder


SMOKE = "export --method lookupvit --preset smoke --out {out}"
MERGE = "export --method tome --preset smoke --out {out}"
GIVEN = "export --method tome --backbone none --out {out}"
HOST = "export --method perceiver --preset smoke-host --out {out}"
TOKENS = "export --method perceiver --preset smoke --out {out}"

TABLE: list[tuple[str, tuple[str, ...]]] = [
    # unknown names
    ("export --method lookupvitt --out {out}", ("no method 'lookupvitt'; did you mean 'lookupvit'?", "perceiver")),
    ("build {bundle} --target rtx-409", ("no target 'rtx-409'; did you mean 'rtx-4090'?", "orin-nano")),
    ("export --method perceiver --backbone vit_small_patch16_244 --out {out}", ("'vit_small_patch16_244'", "_224")),
    ("export --method perceiver --backbone resnet18 --out {out}", ("'resnet18' is of class ResNet", "DINOv2")),
    (f"{SMOKE} --precision fp61", ("no precision 'fp61'", "fp32")),
    ("export --method lookupvit --preset smok --out {out}", ("'smok'; did you mean 'smoke'?", "s16, b16")),
    (f"{SMOKE} --set params.dept=4", ("'dept'; did you mean 'depth'?", "num_heads", "patch_size", "table_entries")),
    (f"{SMOKE} --output logit", ("'logit'; did you mean 'logits'?", "tokens")),
    (f"{SMOKE} --input-dtype int8", ("no input dtype 'int8'; did you mean 'uint8'?", "float32")),
    ("parity {bundle} --runner onxruntime", ("no runner 'onxruntime'; did you mean 'onnxruntime'?",)),
    ("run {bundle} {photo} --runner tensorflow", ("no runner 'tensorflow'", "onnxruntime")),
    ("profile {bundle} --runner tensorflow", ("no runner 'tensorflow'", "onnxruntime")),
    ("build {bundle} --target rtx-4090 --runtime tensort", ("'tensort'", "'tensorrt'", "rtx")),
    ("lst methods", ("'lst'", "'list'")),
    ("list method", ("'method'", "'methods'")),
    ("export --metod lookupvit", ("--metod", "--method")),
    # neither, or both
    ("export --out {out}", ("either a method or a recipe file", "--method NAME", "--recipe FILE")),
    ("export --method lookupvit --recipe {recipe} --out {out}", ("either a method or a recipe file",)),
    ("build {bundle}", ("--target",)),
    # values of the wrong type, or out of range
    (f"{SMOKE} --batch x", ("--batch", "'x'")),
    (f"{SMOKE} --batch 0", ("batch 0 is not between 1 and 4096",)),
    (f"{SMOKE} --batch 2 --batch 2", ("batches 2, 2", "twice")),
    (f"{SMOKE} --seed -1", ("seed -1 is not between 0",)),
    (f"{SMOKE} --opset 17", ("opset 17 is not between 18 and 20",)),
    (f"{SMOKE} --opset 21", ("opset 21 is not between 18 and 20",)),
    (f"{SMOKE} --opset twenty", ("--opset", "'twenty'")),
    # precision
    (f"{SMOKE} --precision fp16 --rest fp16", ("--rest fp16 is of what int8 and fp8 leave", "--precision is fp16")),
    (f"{SMOKE} --precision int8 --rest int8", ("no precision of the rest 'int8'", "fp16, bf16, fp32")),
    (f"{SMOKE} --fp32 blocks.0", ("--fp32 'blocks.0'", "in fp32 already", "drop --fp32")),
    (f"{SMOKE} --precision int8 --rest fp32 --fp32 blocks.0", ("--fp32 'blocks.0'", "in fp32 already")),
    (f"{SMOKE} --precision fp16 --fp32 blocks.77", ("--fp32 'blocks.77' fits no module", "compressor.")),
    (f"{SMOKE} --precision bf16 --opset 20", ("opset 20", "bf16 from opset 22 on", "drop --opset")),
    (f"{SMOKE} --precision int8 --opset 18", ("int8 needs opset 19 or newer", "18")),
    (f"{SMOKE} --precision fp16 --calibration {{bad}}/none", ("--calibration", "none is not a folder")),
    (f"{SMOKE} --calibration {{bad}}", ("fp32 takes nothing from images", "drop it")),
    (f"{SMOKE} --precision bf16 --calibration {{bad}}", ("bf16 takes nothing from images",)),
    (f"{SMOKE} --precision int8 --calibration {{bad}} --calibration-images 0", ("--calibration-images 0 is out",)),
    (f"{SMOKE} --precision int8 --calibration {{bad}} --calibration-images -2", ("-2 is below 1; 64 is the default",)),
    (f"{SMOKE} --precision int8 --calibration-images 5", ("-images 5: there is no folder", "--calibration DIR")),
    (f"{SMOKE} --precision fp16 --calibration-images 64", ("-images 64: there is no folder", "or drop it")),
    (f"{SMOKE} --precision bf16 --calibration-images 5", ("-images 5: bf16 takes nothing", "fp16, int8 or fp8")),
    (f"{SMOKE} --calibration-images 5", ("--calibration-images 5: fp32 takes nothing from images", "drop it")),
    (f"{TOKENS} --precision int8 --calibration {{bad}}", ("takes tokens", "no images", "--backbone")),
    (f"{SMOKE} --set depth=4", ("'depth=4'", "params.NAME=VALUE")),
    (f"{SMOKE} --set params.depth=four", ("depth", "int", "four")),
    (f"{SMOKE} --set params.depth=1.5", ("depth", "int", "1.5")),
    (f"{SMOKE} --set params.depth=-1", ("depth", ">= 1", "-1")),
    (f"{SMOKE} --set params.table=resise", ("table", "resise", "learned")),
    (f"{SMOKE} --set params.embed_dim=30", ("embed_dim=30 must be a multiple of 4",)),
    (f"{SMOKE} --set params.patch_kernel=2", ("patch_kernel=2",)),
    (f"{SMOKE} --set params.depth=1 --set params.depth=2", ("params.depth is given twice",)),
    (f"{TOKENS} --set params.kv_heads=3", ("num_heads=2 is not a multiple of kv_heads=3",)),
    (f"{TOKENS} --output logits", ("output of perceiver 'logits'", "tokens")),
    (f"{TOKENS} --input-dtype uint8", ("uint8 is for images", "drop --input-dtype")),
    (f"{TOKENS} --with-plain", ("has no uncompressed model", "drop --with-plain")),
    (f"{TOKENS} --image-size 64", ("--image-size 64", "takes tokens")),
    (f"{HOST} --feature-layer 3", ("feature layer 3 of test_vit", "-6 and -1")),
    (f"{HOST} --feature-layer -7", ("feature layer -7 of test_vit", "-6 and -1")),
    (f"{SMOKE} --feature-layer -2", ("--feature-layer -2", "without a host")),
    (f"{SMOKE} --backbone test_vit", ("test_vit", "smoke")),
    (f"{SMOKE} --backbone-weights pretrained", ("--backbone-weights pretrained", "without a host")),
    (f"{SMOKE} --weights pretrained", ("--weights pretrained", "no download")),
    ("parity {bundle} --threads -1", ("threads=-1 is not between 0",)),
    ("run {bundle} {photo} --threads -1", ("threads=-1 is not between 0",)),
    ("profile {bundle} --threads 4096", ("threads=4096 is not between 0",)),
    ("profile {bundle} --duration 0", ("duration 0.0 s",)),
    ("profile {bundle} --runs 0", ("0 runs are not from 1",)),
    ("profile {bundle} --warmup nan", ("warm-up nan s is not from 0",)),
    ("profile {bundle} --percentile 100", ("percentile 100 is not from 1 to 99.99",)),
    ("profile {bundle} --streams 2", ("2 streams in mode single-stream, which takes 1", "--mode offline")),
    ("profile {bundle} --mode server", ("no mode 'server'", "single-stream, multi-stream, offline")),
    ("profile {bundle} --mode offline --streams 0", ("0 streams in mode offline, which takes 1 to 256",)),
    ("profile {bundle} --cuda-graph", ("--cuda-graph with runner onnxruntime", "--runner tensorrt or rtx")),
    ("profile {bundle} --duration nan", ("duration nan s",)),
    ("profile {bundle} --duration 1e9", ("duration 1000000000.0 s",)),
    ("build {bundle} --target rtx-4090 --workspace -1", ("workspace -1 MiB",)),
    # image sizes
    (f"{SMOKE} --image-size 65", ("image size 65 is not a multiple of the patch, 16", "nearest that is: 64")),
    (f"{SMOKE} --image-size 79", ("image size 79", "nearest that is: 80")),
    (f"{SMOKE} --image-size 7", ("image size 7", "nearest that is: 16")),
    (f"{SMOKE} --image-size -16", ("image size -16 is not between 1 and 8192",)),
    (f"{SMOKE} --image-size 9008", ("image size 9008 is not between 1 and 8192",)),
    (f"{HOST} --image-size 100", ("image size 100 is not a multiple of the patch of test_vit, 16", "96")),
    # budgets
    (f"{SMOKE} --budget 5", ("budget 5 is not possible for lookupvit", "one of 4, 9")),
    (f"{SMOKE} --budget 49", ("budget 49 is above the 16 tokens",)),
    (f"{SMOKE} --budget 0%", ("budget '0%' is not above 0%",)),
    (f"{SMOKE} --budget abc", ("budget 'abc' is neither a count nor a percentage",)),
    (f"{SMOKE} --budget 50%", ("budget 50% of 16 = 8 is not possible", "one of 4, 9")),
    (f"{SMOKE} --budget 101%", ("budget '101%'", "at most 100%")),
    (f"{SMOKE} --budget inf%", ("budget 'inf%'",)),
    (f"{SMOKE} --budget nan%", ("budget 'nan%'",)),
    (f"{SMOKE} --budget 0", ("budget 0 is not possible",)),
    (f"{SMOKE} --budget -3", ("budget -3 is not possible",)),
    (f"{SMOKE} --budget 9 --budget 9", ("budgets 9, 9", "twice")),
    (f"{MERGE} --align 7", ("--align 7 is none of 1, 8, 16, 32",)),
    (f"{MERGE} --budget 3 --budget 8 --align 8", ("budgets 3, 8 with --align 8 name [8, 8]", "twice")),
    (
        f"{MERGE} --budget 9 --align 32",
        ("the next multiple is 32, and 16 tokens", "drop --align"),
    ),
    # merging inside a host
    (f"{MERGE} --set params.r=-1", ("params.r=-1", ">= 0")),
    (f"{MERGE} --set params.r=2.5", ("params.r=2.5", "int")),
    (f"{MERGE} --set params.r=9", ("r=9 is above 8, the most that one merge of 16 tokens can remove", "1 protected")),
    (f"{MERGE} --set params.r=2 --set params.inflect=2", ("params.inflect=2", "<= 1.0")),
    (f"{MERGE} --set params.schedule=[1,2]", ("params.schedule has 2 entries and the host 6 blocks",)),
    (f"{MERGE} --set params.schedule=[1,2,3,1,0,-1]", ("params.schedule=[1, 2, 3, 1, 0, -1]", ">= 0")),
    (f"{MERGE} --set params.schedule=[1,1,1,1,1,1] --set params.r=1", ("params.r=1 and params.schedule=", "give one")),
    (f"{MERGE} --set params.r=2 --budget 9", ("leaves 4 of 16 tokens and the budget says 9",)),
    (f"{MERGE} --budget 17", ("budget 17 is above the 16 tokens",)),
    (f"{MERGE} --set params.metric=q", ("params.metric=q", "k, x")),
    (f"{MERGE} --backbone none", ("stands inside a host, and the backbone is none", "given")),
    (f"{MERGE} --output logits --feature-layer -2", ("logits come after the last layer of test_vit", "-2")),
    ("export --method tome --backbone none --output logits --out {out}", ("a host's classifier", "--backbone")),
    ("export --method tome --backbone resnet18 --out {out}", ("'resnet18' is of class ResNet", "DINOv2")),
    (
        "export --method tome --backbone eva02_tiny_patch14_224 --out {out}",
        ("Eva with rotary positions", "deit3"),
    ),
    (f"{MERGE} --set params.prefix_tokens=3", ("params.prefix_tokens=3 was set, and the tokens of test_vit say 1",)),
    (f"{GIVEN} --set params.prefix_tokens=99", ("params.prefix_tokens=99", "<= 64")),
    (f"{GIVEN} --set params.prefix_tokens=2 --set params.threshold=0.5", ("protects some", "give one of both")),
    (f"{GIVEN} --set params.threshold=0.0 --set params.matching=kth", ("params.matching=kth and params.threshold",)),
    ("export --method token-pooling --backbone none --set params.tokens=9 --out {out}", ("keeps 64", "--budget 4")),
    (f"{HOST} --budget 17", ("budget 17 is above the 16 tokens",)),
    ("export --method perceiver --backbone none --budget 300 --out {out}", ("budget 300", "from 16 to 256")),
    ("export --method lookupvit --out {out} --budget 10%", ("budget 10% of 196 = 20", "one of 9, 25, 49, 100")),
    ("parity {bundle} --budget 5", ("has no budget 5; it has 4, 9",)),
    ("build {bundle} --target rtx-4090 --budget inf%", ("budget 'inf%'",)),
    ("profile {bundle} --batch 8", ("has no batch 8; it has 1",)),
    # weights
    (f"{SMOKE} --weights nowhere.safetensors", ("weights file nowhere.safetensors is not there",)),
    (f"{SMOKE} --weights {{bad}}", ("folder", "checkpoints: empty.safetensors, ", "name one of them")),
    (f"{SMOKE} --weights {{taken}}", ("taken holds no checkpoint", ".index.json")),
    (f"{HOST} --backbone-weights nowhere.pt", ("weights file nowhere.pt is not there",)),
    (f"{SMOKE} --weights {{bad}}/weights.h5", ("weights.h5 ends in '.h5'", ".safetensors")),
    (f"{SMOKE} --weights {{bad}}/truncated.safetensors", ("truncated.safetensors is truncated", "9000 bytes")),
    (f"{SMOKE} --weights {{bad}}/empty.safetensors", ("empty.safetensors is truncated", "0 bytes")),
    (f"{SMOKE} --weights {{bad}}/text.safetensors", ("text.safetensors is truncated or not safetensors", "5 bytes")),
    (f"{SMOKE} --weights {{bad}}/none.safetensors", ("none.safetensors holds no tensor",)),
    (f"{SMOKE} --weights {{bad}}/truncated.pt", ("truncated.pt is truncated or no checkpoint", "3000 bytes")),
    (f"{SMOKE} --weights {{bad}}/text.pt", ("text.pt is truncated or no checkpoint", "11 bytes")),
    (f"{SMOKE} --weights {{bad}}/list.pt", ("list.pt holds a list, not named tensors",)),
    (f"{SMOKE} --weights {{bad}}/epoch.pt", ("epoch.pt holds no tensor, only epoch, lr",)),
    (f"{SMOKE} --weights {{bad}}/code.pt", ("code.pt holds more than weights", "posix.mkdir")),
    (f"{SMOKE} --weights {{bad}}/code2.pt", ("code2.pt holds more than weights", "posix.mkdir")),
    (f"{HOST} --backbone-weights {{bad}}/code.pt", ("code.pt holds more than weights", "posix.mkdir")),
    (
        f"{SMOKE} --weights {{bad}}/missing.safetensors",
        ("54 keys given, 56 needed", "2 missing: blocks.1.refine.to_v.weight, norm.gamma"),
    ),
    (f"{SMOKE} --weights {{bad}}/unknown.safetensors", ("57 keys given, 56 needed", "1 not known: extra.weight")),
    (
        f"{SMOKE} --weights {{bad}}/shapes.safetensors",
        (
            "2 of another shape",
            "blocks.0.lookup_norm.gamma (31,) instead of (32,)",
            "blocks.1.refine.to_q.weight (7, 32) instead of (32, 32)",
        ),
    ),
    (f"{SMOKE} --weights {{bad}}/resnet.safetensors", ("layout", "conv1.weight, fc.weight")),
    (
        f"{TOKENS} --weights {{bad}}/resnet.safetensors",
        ("none of the layouts of perceiver (flamingo, ", "first keys of 2: conv1.weight, fc.weight"),
    ),
    (
        f"{HOST} --backbone-weights {{bad}}/resnet.safetensors",
        ("timm test_vit layout", "2 not known: conv1.weight, fc.weight"),
    ),
    (f"{SMOKE} --weights {{bad}}/nan.safetensors", ("1 of 32 values of 'norm.gamma' are NaN or Inf",)),
    (f"{SMOKE} --weights {{bad}}/good.safetensors --set params.depth=3", ("params.depth=3", "weights say 2")),
    # recipes and targets
    ("export --recipe nowhere.toml --out {out}", ("recipe nowhere.toml cannot be read: No such file",)),
    ("export --recipe {bad}/recipe_unknown.toml --out {out}", ("recipe_unknown.toml", "unknown field `levle`")),
    ("export --recipe {bad}/recipe_type.toml --out {out}", ("Expected `int`, got `str`", "$.defaults.image_size")),
    ("export --recipe {bad}/recipe_duplicate.toml --out {out}", ("recipe_duplicate.toml: Cannot overwrite", "line 5")),
    ("export --recipe {bad}/recipe_utf8.toml --out {out}", ("recipe_utf8.toml is not UTF-8 (byte ",)),
    ("export --recipe {bad}/recipe_range.toml --out {out}", (">= 18", "$.defaults.opset")),
    ("export --recipe {bad}/recipe_preset.toml --out {out}", ("defaults.preset names 's17'",)),
    ("export --recipe {bad}/recipe_schema.toml --out {out}", ("value 2", "$.schema")),
    ("export --recipe {bad}/recipe_method.toml --out {out}", ("'lookupvot'; did you mean 'lookupvit'?",)),
    ("export --recipe {bad}/recipe_param.toml --preset smoke --out {out}", ("'num_clases'", "'num_classes'")),
    ("export --recipe {bad}/recipe_syntax.toml --out {out}", ("recipe_syntax.toml", "line 1")),
    ("export --recipe {bad}/huge.toml --out {out}", ("huge.toml is larger than 1048576 bytes",)),
    ("build {bundle} --target nowhere.toml", ("target nowhere.toml cannot be read",)),
    ("build {bundle} --target {bad}/target_unknown.toml", ("unknown field `smm`",)),
    ("build {bundle} --target {bad}/target_type.toml", ("Expected `int`, got `str` - at `$.sm`",)),
    ("build {bundle} --target {bad}/target_duplicate.toml", ("Cannot overwrite a value", "line 6")),
    ("build {bundle} --target {bad}/target_utf8.toml", ("target_utf8.toml is not UTF-8 (byte ",)),
    ("build {bundle} --target {bad}/target_sparse.toml", ("'sparse'", "sparsity")),
    ("build {bundle} --target {bad}/target_name.toml", ("'../../../evil'",)),
    # targets that nothing here builds for
    ("build {bundle} --target agx-xavier", ("agx-xavier (SM72)", "estimate")),
    ("build {bundle} --target orin-nano --runtime rtx", ("orin-nano (SM87)", "TensorRT")),
    # the out folder
    (f"{SMOKE.replace('{out}', '{taken}')} --force", ("taken is not empty (dear.txt)",)),
    (SMOKE.replace("{out}", "{file}"), ("is a file or a link, not a folder",)),
    (f"{SMOKE.replace('{out}', '{link}')} --seed 5", ("is a file or a link, not a folder",)),
    (SMOKE.replace("{out}", "{file}/sub"), ("file/sub lies below", "which is a file")),
    (SMOKE.replace("{out}", "/proc/edgecomp/sub"), ("/proc", "be written")),
    (f"{SMOKE.replace('{out}', '{bundle}')} --seed 5", ("holds another bundle; give --force",)),
    # things that are no bundle; what is wrong with a bundle itself stands in test_bundle.py
    ("parity nowhere", ("bundle nowhere is not a folder",)),
    ("run nowhere {photo}", ("bundle nowhere is not a folder",)),
    ("build nowhere --target rtx-4090", ("bundle nowhere is not a folder",)),
    ("profile {bad}", ("holds no manifest.json",)),
    ("inspect nowhere", ("nowhere is not there",)),
    ("inspect {photo}", ("ends in '.jpg'", ".onnx")),
    ("inspect {bad}", ("holds no manifest.json",)),
    # images
    ("run {bundle} nowhere.jpg", ("image nowhere.jpg does not exist",)),
    ("run {bundle} {bad}/empty.jpg", ("empty.jpg is empty (0 bytes)",)),
    ("run {bundle} {bad}/truncated.jpg", ("truncated.jpg is truncated or damaged",)),
    ("run {bundle} {bad}/header.jpg", ("header.jpg is truncated or damaged", "20 bytes")),
    ("run {bundle} {bad}/text.jpg", ("text.jpg is not a JPEG, PNG, WebP or BMP", "b'not an i'")),
    ("run {bundle} {bad}/drawing.gif", ("drawing.gif is not a JPEG, PNG, WebP or BMP", "GIF89a")),
    ("run {bundle} {bad}/bomb.png", ("bomb.png has", "3600.0 megapixels", "above the 100 megapixels")),
    ("run {bundle} {bad}/zero.png", ("zero.png is 0 x 5 pixels",)),
    ("run {bundle} {bad}/short.png", ("short.png is truncated or damaged",)),
    ("run {bundle} {bad}", ("cannot be read: Is a directory",)),
    # tensors
    ("run {tokens} {photo}", ("context_mask bool[1, 20]", "photograph.jpg is no file of named tensors")),
    ("run {tokens} {bad}/no_mask.npz", ("no_mask.npz: inputs missing: context_mask",)),
    ("run {tokens} {bad}/extra.npz", ("unexpected: other",)),
    ("run {tokens} {bad}/shape.npz", ("'tokens' has shape [1, 19, 24], expected [1, 20, 24]",)),
    ("run {tokens} {bad}/dtype.npz", ("'tokens' is float64, expected float32",)),
    ("run {tokens} {bad}/nan.npz", ("'tokens' holds 1 NaN",)),
    ("run {tokens} {bad}/objects.npz", ("objects.npz", "'tokens' holds Python objects")),
    ("run {tokens} {bad}/truncated.npz", ("truncated.npz is not a whole npz file (900 bytes)",)),
    ("run {tokens} {bad}/empty.safetensors", ("empty.safetensors is empty (0 bytes)",)),
    ("run {tokens} nowhere.npz", ("nowhere.npz does not exist",)),
    ("run {bundle} {photo} --out {out}.txt", ("must end in .safetensors or .npz", "out.txt")),
    ("run {bundle} {photo} --out {out}/sub/x.npz", ("cannot be written: No such file or directory",)),
]


def _require_clean(code: int, out: str, err: str, texts: tuple[str, ...]) -> None:
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert 1 <= err.count("\n") <= 3, err
    for text in texts:
        assert text in err, f"{text!r} is not in {err!r}"


def _files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(("command", "texts"), TABLE, ids=[command for command, _ in TABLE])
def test_table(
    command: str,
    texts: tuple[str, ...],
    cli: Cli,
    bad: Path,
    exported: Path,
    exported_tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "dear.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    words = {
        "bad": bad,
        "bundle": exported,
        "tokens": exported_tokens,
        "photo": photograph_path(),
        "recipe": data_path("export", "recipes", "lookupvit.toml"),
        **{name: tmp_path / name for name in ("out", "taken", "file", "link")},
    }
    watched = (tmp_path, bad, exported.parent, exported_tokens.parent)
    before = [_files(folder) for folder in watched]
    _require_clean(*cli(*shlex.split(command.format(**words))), texts)
    assert [_files(folder) for folder in watched] == before


def test_debug_shows_the_traceback_before_the_error(cli: Cli, tmp_path: Path) -> None:
    for words in (["--debug", "export"], ["export", "--debug"]):
        said = cli(*words, "--method", "nothing", "--out", tmp_path / "out")
        assert said.code == 2
        assert said.err.startswith("Traceback (most recent call last):")
        assert "UnknownName" in said.err
        assert said.err.splitlines()[-1].startswith("error: no method 'nothing'")


def test_what_nobody_expected_is_no_traceback_and_no_failed_gate(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecomp import api

    for error, texts in (
        (ZeroDivisionError("a bug\nwith lines"), ("ZeroDivisionError: a bug", "--debug shows the traceback")),
        (MemoryError(), ("out of memory",)),
        (PermissionError(13, "Permission denied", "/secret"), ("Permission denied (/secret)",)),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(api, "doctor", fail, raising=False)
        _require_clean(*cli("doctor"), texts)


# -- nothing to run it with ---------------------------------------------------------------------------------

WITHOUT: list[tuple[str, str, tuple[str, ...]]] = [
    ("torch", SMOKE, ("`edgecomp export` needs the package 'torch'", "edgecomp[cpu]")),
    ("timm", SMOKE, ("'timm'", "edgecomp[cpu]")),
    ("onnx", SMOKE, ("`edgecomp export` needs the package 'onnx'", "edgecomp[cpu]")),
    ("onnxruntime", SMOKE, ("needs the package 'onnxruntime'", "edgecomp[cpu]")),
    ("onnxruntime", "parity {bundle}", ("needs the package 'onnxruntime'", "edgecomp[ort]")),
    ("onnxruntime", "run {bundle} {photo}", ("needs the package 'onnxruntime'", "edgecomp[ort]")),
    ("onnxruntime", "profile {bundle}", ("needs the package 'onnxruntime'", "edgecomp[ort]")),
    ("onnxruntime", "profile {bundle} --runner onnxruntime-cuda", ("'onnxruntime'", "edgecomp[gpu]")),
    ("onnx", "inspect {bundle}/model.m4.b1.onnx", ("needs the package 'onnx'", "edgecomp[export]")),
    ("tensorrt tensorrt_rtx tensorrt_rtx_bindings", "build {bundle} --target rtx-4090", ("rtx-4090", "edgecomp[rtx]")),
    (
        "tensorrt tensorrt_rtx tensorrt_rtx_bindings",
        "build {bundle} --target orin-nano",
        ("'tensorrt'", "edgecomp[gpu]", "orin-nano"),
    ),
    ("tensorrt", "build {bundle} --target rtx-4090 --runtime tensorrt", ("'tensorrt'", "edgecomp[gpu]")),
]


@pytest.mark.parametrize(("packages", "command", "texts"), WITHOUT, ids=[f"{p}: {c}" for p, c, _ in WITHOUT])
def test_package_that_is_not_installed(
    packages: str, command: str, texts: tuple[str, ...], exported: Path, tmp_path: Path
) -> None:
    script = "import sys\nfor name in sys.argv.pop(1).split(): sys.modules[name] = None\n"
    script += "from edgecomp.cli import main\nmain()\n"
    words = command.format(bundle=exported, photo=photograph_path(), out=tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", script, packages, *shlex.split(words)], capture_output=True, text=True, check=False
    )
    _require_clean(done.returncode, done.stdout, done.stderr, texts)
    assert list(tmp_path.iterdir()) == []


def test_pretrained_without_network(tmp_path: Path) -> None:
    command = "export --method perceiver --backbone test_vit --backbone-weights pretrained --out {out}"
    words = shlex.split(command.format(out=tmp_path / "out"))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "TORCH_HOME": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "edgecomp", *words], capture_output=True, text=True, check=False, env=offline
    )
    texts = ("pretrained weights of 'test_vit' could not be downloaded", "--backbone-weights FILE")
    _require_clean(done.returncode, done.stdout, done.stderr, texts)
    assert time.monotonic() - started < 60
    assert not (tmp_path / "out").exists()


def test_pickle_with_code_was_never_run(bad: Path, cli: Cli, tmp_path: Path) -> None:
    for name in ("code.pt", "code2.pt"):
        words = SMOKE.format(out=tmp_path / "out")
        _require_clean(*cli(*shlex.split(words), "--weights", bad / name), (name,))
    assert not (bad / "HACKED").exists()
    with pytest.raises(RuntimeError):  # but it would have: the pickle is what it is said to be
        pickle.loads(pickle.dumps(_Raises()))


class _Raises:
    def __reduce__(self) -> tuple[Any, ...]:
        return (_fail, ())


def _fail() -> None:
    raise RuntimeError
