"""Labelled images: a folder of class folders, or IDX files as MNIST and Fashion-MNIST have them."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from edgecomp.errors import InvalidSpec, RunError, UnknownName
from edgecomp.images import read_image

__all__ = ["Images", "LabelledImages", "balanced_subset", "open_data", "open_images"]

Labels = npt.NDArray[np.int64]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CLASSES = "classes.txt"
_SPLITS = {"test": "t10k", "train": "train"}
_IMAGES_MAGIC, _LABELS_MAGIC = 0x0803, 0x0801  # unsigned bytes in three dimensions, and in one
_CHUNK = 16 << 20
_MOST_BYTES = 8 << 30
_NAMED = 20  # files that a message names


class LabelledImages(msgspec.Struct, frozen=True):
    """Images with their classes' numbers; an image is decoded when it is asked for.

    Attributes:
        path: the folder.
        kind: how it is laid out.
        labels: of each image, its class's number from 0.
        classes: names by number; empty where the data has none.
        image: gives an image by its index.
        notes: what of the folder was left out, in words.
    """

    path: Path
    kind: str
    labels: Labels
    classes: tuple[str, ...]
    image: Callable[[int], Image.Image]
    notes: tuple[str, ...] = ()


class Images(msgspec.Struct, frozen=True):
    """Images without classes; each of `indices` can be read.

    Attributes:
        indices: which of them to take, in this order.
        image: gives an image by its index.
        notes: what was left out, in words.
    """

    indices: tuple[int, ...]
    image: Callable[[int], Image.Image]
    notes: tuple[str, ...] = ()


def open_images(path: str | Path, *, split: str = "", limit: int | None = None, seed: int = 0) -> Images:
    """Open images whose classes do not matter: IDX files, or every image in a folder and the folders below it.

    Args:
        path: the folder.
        split: of IDX files; see `open_data`.
        limit: so many, chosen at random; None: all. Those that cannot be read are replaced by others, and named.
        seed: of that choice.

    Raises:
        RunError: the folder is absent, empty, or none of its images can be read.
    """
    path = Path(path)
    rng = np.random.default_rng(seed)
    if path.is_dir() and any("ubyte" in entry.name for entry in path.iterdir()):
        data = open_data(path, split=split)
        order = rng.permutation(len(data.labels))[:limit]
        return Images(tuple(int(index) for index in np.sort(order)), data.image, data.notes)
    if not path.is_dir():
        raise RunError(f"data {path} is not a folder; give one with images, or with IDX files (t10k-images-...)")
    if split:
        raise InvalidSpec(f"--split {split}: {path} holds no IDX files; drop it")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not images:
        raise RunError(
            f"data {path} holds {len(files)} files and no image among them ({', '.join(_SUFFIXES)}); give another"
        )
    wanted = len(images) if limit is None else min(limit, len(images))
    taken: list[int] = []
    broken: list[str] = []
    for index in rng.permutation(len(images)).tolist():
        if len(taken) == wanted:
            break
        try:
            read_image(images[index])
            taken.append(index)
        except RunError as error:
            broken.append(f"{images[index].relative_to(path)} ({str(error).partition(';')[0]})")
    if not taken:
        raise RunError(f"data {path}: none of its {len(images)} images can be read: {_some(broken)}")
    notes = [f"{len(broken)} images cannot be read and were left out: {_some(broken)}"] if broken else []
    if other := len(files) - len(images):
        named = _some([str(file.relative_to(path)) for file in files if file.suffix.lower() not in _SUFFIXES])
        notes.append(f"{other} files are no images and were left out: {named}")
    return Images(tuple(sorted(taken)), lambda index: read_image(images[index]), tuple(notes))


def open_data(path: str | Path, *, split: str = "") -> LabelledImages:
    """Open a folder of labelled images.

    Two layouts are known. **Class folders**: `DIR/<class>/*.png` (also .jpg, .jpeg, .webp, .bmp). The names of the
    folders, sorted, are the classes 0, 1, 2, ...; a file `DIR/classes.txt`, one name a line, says otherwise, and may
    name classes that have no folder. **IDX**: `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, or `train-*`,
    each plain or as .gz.

    Args:
        path: the folder.
        split: of IDX files, `test` (the default, t10k-*) or `train`. Class folders have none.

    Raises:
        RunError: the folder, or a file in it, is absent, empty, truncated or of another format, by name and value.
        InvalidSpec, UnknownName: `split` is not one that the folder has.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(
            f"data {path} is not a folder; give one with a folder for each class, or with IDX files (t10k-images-...)"
        )
    try:
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise RunError(f"data {path} cannot be read: {error.strerror}; give a folder that you may read") from None
    if any(name.partition("-")[0] in _SPLITS.values() and "ubyte" in name for name in names):
        return _open_idx(path, split)
    if split:
        raise InvalidSpec(
            f"--split {split}: {path} holds no IDX files, and class folders have no splits; drop it, and give the "
            "folder of the split as --data"
        )
    return _open_folders(path, names)


def balanced_subset(labels: Labels, count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Choose `count` images at random, as many of each class as there are, or one fewer; return their indices, sorted.

    A class with too few images gives all it has, and the others more.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    turn = np.empty(len(labels), np.int64)  # the how-manieth of its class each image is, in the shuffled order
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    order = np.lexsort((rng.random(len(labels)), turn))  # the first of each class, then the second of each, ...
    chosen: npt.NDArray[np.int64] = np.sort(order[:count])
    return chosen


# -- class folders ------------------------------------------------------------------------------------------


def _open_folders(path: Path, names: Sequence[str]) -> LabelledImages:
    folders = [name for name in names if (path / name).is_dir()]
    classes = _read_classes(path / _CLASSES) if _CLASSES in names else tuple(folders)
    strange = [name for name in folders if name not in classes]
    if strange:
        raise RunError(
            f"data {path}: the folder {strange[0]!r}{_and_more(strange)} is no class of {_CLASSES} "
            f"({len(classes)} names); add it there, or move it away"
        )
    files: list[Path] = []
    labels: list[int] = []
    left_out: list[str] = [name for name in names if name not in folders and name != _CLASSES]
    empty: list[str] = []
    for name in folders:
        entries = sorted(entry for entry in (path / name).iterdir() if not entry.name.startswith("."))
        kept = [entry.suffix.lower() in _SUFFIXES and not entry.is_dir() for entry in entries]
        images = [entry for entry, is_image in zip(entries, kept, strict=True) if is_image]
        left_out += [f"{name}/{entry.name}" for entry, is_image in zip(entries, kept, strict=True) if not is_image]
        files += images
        labels += [classes.index(name)] * len(images)
        if not images:
            empty.append(name)
    if not files:
        found = f"{len(folders)} folders and no image in them" if folders else f"{len(names)} files and no folder"
        raise RunError(
            f"data {path} holds {found}; put the images into a folder for each class "
            f"(cat/one.png; {', '.join(_SUFFIXES)}), or give one with IDX files (t10k-images-idx3-ubyte.gz)"
        )
    notes = []
    if left_out:
        notes.append(f"{len(left_out)} entries are no images of a class and were left out: {_some(left_out)}")
    if empty:
        notes.append(f"{len(empty)} class folders hold no image: {_some(empty)}")
    return LabelledImages(
        path, "class folders", np.array(labels, np.int64), classes, lambda index: read_image(files[index]), tuple(notes)
    )


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}); write one class name a line, in UTF-8") from None
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            what = f"names {name!r} again" if name else "is blank"
            raise RunError(f"{path}: line {number + 1} {what}; write each class once, in the order of the labels")
    if not names:
        raise RunError(f"{path} is empty; write one class name a line, or remove it")
    return names


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# -- IDX ----------------------------------------------------------------------------------------------------


def _open_idx(path: Path, split: str) -> LabelledImages:
    if split not in ("", *_SPLITS):
        raise UnknownName("split of IDX files", split, _SPLITS)
    prefix = _SPLITS[split or "test"]
    images_file = _find_idx(path, f"{prefix}-images-idx3-ubyte")
    labels_file = _find_idx(path, f"{prefix}-labels-idx1-ubyte")
    labels = _read_idx(labels_file, _LABELS_MAGIC)
    frames = _read_idx(images_file, _IMAGES_MAGIC)
    if len(frames) != len(labels):
        raise RunError(
            f"{images_file} holds {len(frames)} images and {labels_file.name} {len(labels)} labels; "
            "take both files from one data set"
        )
    return LabelledImages(
        path,
        f"IDX {split or 'test'}",
        labels.astype(np.int64),
        _read_classes(path / _CLASSES) if (path / _CLASSES).is_file() else (),
        lambda index: Image.fromarray(frames[index]),
    )


def _find_idx(path: Path, name: str) -> Path:
    for file in (path / name, path / f"{name}.gz"):
        if file.is_file():
            return file
    raise RunError(f"data {path} lacks {name}[.gz]; copy it there, or choose another --split ({', '.join(_SPLITS)})")


def _read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """Read unsigned bytes: a magic number, the size of each dimension (big-endian 32 bits), the values."""
    try:
        with _open_maybe_gzip(path) as file:
            dimensions = _read_idx_header(path, file, magic)
            size = int(np.prod(dimensions, dtype=object))
            if size > _MOST_BYTES:
                raise RunError(
                    f"{path} says {' x '.join(map(str, dimensions))} values, above the {_MOST_BYTES >> 30} GiB that "
                    "edgecomp reads; is its header right?"
                )
            content = _read_up_to(file, size + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RunError(
            f"{path} is truncated or no gzip file ({path.stat().st_size} bytes): {error}; copy it again"
        ) from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; give files that you may read") from None
    if len(content) != size:
        what = f"only {len(content)}" if len(content) < size else "more"
        raise RunError(
            f"{path} says {' x '.join(map(str, dimensions))} = {size} values and holds {what}; it is truncated or "
            "altered, copy it again"
        )
    if not size:
        raise RunError(f"{path} says {' x '.join(map(str, dimensions))} values, so it holds nothing to evaluate")
    return np.frombuffer(content, np.uint8).reshape(dimensions)


def _open_maybe_gzip(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_idx_header(path: Path, file: BinaryIO, magic: int) -> tuple[int, ...]:
    rank = magic & 0xFF
    header = file.read(4 + 4 * rank)
    if len(header) >= 4 and (found := struct.unpack(">I", header[:4])[0]) != magic:
        raise RunError(
            f"{path} begins with the magic number 0x{found:08x} and not 0x{magic:08x} (IDX, unsigned bytes, {rank} "
            "dimensions); is it the right file?"
        )
    if len(header) < 4 + 4 * rank:
        raise RunError(
            f"{path} holds {len(header)} bytes, fewer than the {4 + 4 * rank} of an IDX header; copy it again"
        )
    return struct.unpack(f">{rank}I", header[4:])


def _read_up_to(file: BinaryIO, size: int) -> bytes:
    """Read piece by piece: a header that lies must not make one allocation of all that it promises."""
    pieces, left = [], size
    while left and (piece := file.read(min(left, _CHUNK))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
