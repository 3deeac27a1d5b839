"""Named tensors survive a file, and what is not plain numbers is refused by name."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgecomp.errors import RunError
from edgecomp.inputs import Array, read_tensors, require_inputs, write_tensors
from edgecomp.specs.tensor import DType, TensorSpec

SUFFIXES = ["npz", "safetensors"]


def refused(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def make_safetensors(path: Path, dtype: str, shape: list[int], size: int) -> None:
    header = json.dumps({"weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {
        "file": rng.standard_normal((2, 3, 4)).astype(np.float32),  # a name that numpy.savez cannot take
        "half": rng.standard_normal(5).astype(np.float16),
        "indices": np.arange(6, dtype=np.int64).reshape(2, 3).T,  # not contiguous
        "swapped": np.arange(4, dtype=">f4"),
        "scalar": np.array(3, dtype=np.int32),
        "empty": np.zeros((0, 7), np.uint8),
        "mask": np.array([True, False]),
        "blocks.0/attn.weight": np.ones(1, np.float64),
    }
    path = tmp_path / f"tensors.{suffix}"
    write_tensors(path, tensors)
    read = read_tensors(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].shape == tensor.shape, name
        assert read[name].dtype == tensor.dtype.newbyteorder("="), name
        assert np.array_equal(read[name], tensor), name
        assert read[name].flags.c_contiguous, name
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_tensors_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    for name in ("first", "second"):
        write_tensors(tmp_path / f"{name}.{suffix}", {"x": np.arange(5), "y": np.ones(3)})
    assert (tmp_path / f"first.{suffix}").read_bytes() == (tmp_path / f"second.{suffix}").read_bytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path: Path, save: object) -> None:
    save(tmp_path / "x.NPZ.npz", x=np.arange(5), y=np.asfortranarray(np.ones((2, 3))))  # type: ignore[operator]
    read = read_tensors(tmp_path / "x.NPZ.npz")
    assert read["x"].tolist() == [0, 1, 2, 3, 4]
    assert read["y"].flags.c_contiguous


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.npz", {"x": np.arange(5)})
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file["x"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["x.pt", "x.npy", "x"])
def test_wrong_suffix(tmp_path: Path, name: str) -> None:
    text = f"ends in {Path(name).suffix!r}; name a file that ends in .safetensors or .npz"
    assert text in refused(tmp_path / name)
    with pytest.raises(RunError, match=re.escape(text)):
        write_tensors(tmp_path / name, {"x": np.ones(1)})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_absent(tmp_path: Path, suffix: str) -> None:
    assert "does not exist; check the path" in refused(tmp_path / f"no.{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folder(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"folder.{suffix}"
    path.mkdir()
    refused(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.touch()
    assert "is empty (0 bytes)" in refused(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"x.{suffix}"
    write_tensors(path, {"x": np.ones((50, 50))})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert f"is not a whole {suffix} file ({path.stat().st_size} bytes)" in refused(path)


def test_flipped_bit_in_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_tensors(path, {"x": np.ones((50, 50))})
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32 for file 'x.npy'" in refused(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_text("this is a text about tensors and nothing else")
    assert f"is not a whole {suffix} file (45 bytes)" in refused(path)


def test_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "exploded"),))  # type: ignore[return-value]

    path = tmp_path / "x.npz"
    np.savez(path, objects=np.array([Bomb()], dtype=object), allow_pickle=True)
    assert "tensor 'objects' holds Python objects in a pickle" in refused(path)
    assert not (tmp_path / "exploded").exists()


def test_member_that_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "member 'readme.txt' is not an array" in refused(path)


def test_text_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, words=np.array(["a", "bc"]))
    assert "tensor 'words' is of type <U2" in refused(path)


def test_bfloat16_in_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make_safetensors(path, "BF16", [2, 2], 8)
    assert "tensor 'weight' is bfloat16, which numpy does not support; store it as float32" in refused(path)


def test_float8_in_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make_safetensors(path, "F8_E4M3", [2, 2], 4)
    assert "tensor 'weight' is of type F8_E4M3, which numpy does not support" in refused(path)


def test_bfloat16_in_npz(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="brings bfloat16 to numpy")
    tensor = np.ones(3, ml_dtypes.bfloat16)
    with pytest.raises(RunError, match="tensor 'x' is bfloat16, which numpy does not support"):
        write_tensors(tmp_path / "x.npz", {"x": tensor})
    np.savez(tmp_path / "y.npz", y=tensor)
    assert "'y' is |V2, probably bfloat16" in refused(tmp_path / "y.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_without_tensors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        with zipfile.ZipFile(path, "w"):
            pass
    else:
        path.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert "holds no tensors" in refused(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "no tensors were given to write to"),
        ({"words": np.array(["a"])}, "tensor 'words' is of type <U1"),
        ({"things": np.array([None])}, "tensor 'things' holds Python objects"),
        ({"waves": np.ones(1, np.complex64)}, "tensor 'waves' is of type complex64"),
    ],
)
def test_unwritable_tensors_leave_the_old_file(
    tmp_path: Path, suffix: str, tensors: dict[str, Array], text: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(RunError, match=re.escape(text)):
        write_tensors(path, tensors)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_crash_while_moving_leaves_the_old_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        write_tensors(path, {"x": np.ones(3)})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_write_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no/x\.npz cannot be written: No such file or directory"):
        write_tensors(tmp_path / "no" / "x.npz", {"x": np.ones(1)})


@pytest.mark.skipif(os.name != "posix", reason="permission bits are of POSIX")
def test_written_file_has_usual_permissions(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.npz", {"x": np.ones(1)})
    (tmp_path / "usual").touch()
    assert stat.S_IMODE((tmp_path / "x.npz").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def spec(name: str, shape: tuple[int, ...], dtype: DType = "float32") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype, kind="features")


def test_matching_inputs_pass() -> None:
    tensors = {"image": np.zeros((1, 3, 4, 4), np.float32), "mask": np.ones((1, 4), bool)}
    require_inputs(tensors, [spec("image", (1, 3, 4, 4)), spec("mask", (1, 4), "bool")], "x.npz")


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (
            {"pixels": np.zeros((2, 3), np.float32)},
            "x.npz: inputs missing: tokens; unexpected: pixels. Give exactly: tokens float32[2, 3]",
        ),
        (
            {"tokens": np.zeros((2, 3), np.float32), "mask": np.zeros(3)},
            "x.npz: inputs missing: none; unexpected: mask",
        ),
        ({}, "inputs missing: tokens; unexpected: none"),
        ({"tokens": np.zeros((2, 3))}, "x.npz: input 'tokens' is float64, expected float32"),
        ({"tokens": np.zeros((1, 2, 3), np.float32)}, "has shape [1, 2, 3], expected [2, 3]"),
        (
            {"tokens": np.array([[1, np.nan, np.nan], [np.inf, 0, 0]], np.float32)},
            "input 'tokens' holds 2 NaN and 1 infinite of 6 values",
        ),
    ],
)
def test_mismatched_inputs(tensors: dict[str, Array], text: str) -> None:
    with pytest.raises(RunError, match=re.escape(text)):
        require_inputs(tensors, [spec("tokens", (2, 3))], "x.npz")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([[4, 5], [100, 1]], "x.npz: input 'target_sizes' holds 100 x 1, which is no grid of 1 to 9 rows and columns"),
        ([[5, 5], [4, 5]], "holds 5 x 5, which is no grid of 1 to 9 rows and columns, 20 tokens at most"),
        ([[4, 5], [-2, -3]], "holds -2 x -3"),
        ([[4, 5], [-1, 4]], "holds -1 x 4"),
        ([[4, 0], [4, 5]], "holds 4 x 0"),
    ],
)
def test_sizes_that_no_grid_has(sizes: list[list[int]], text: str) -> None:
    specs = [
        TensorSpec("tokens", (2, 20, 3), "float32", "tokens"),
        TensorSpec("target_sizes", (2, 2), "int32", "sizes", 9, 20),
    ]
    tokens = np.zeros((2, 20, 3), np.float32)
    require_inputs({"tokens": tokens, "target_sizes": np.array([[4, 5], [0, 0]], np.int32)}, specs, "x.npz")
    with pytest.raises(RunError, match=re.escape(text)):
        require_inputs({"tokens": tokens, "target_sizes": np.array(sizes, np.int32)}, specs, "x.npz")


@pytest.mark.parametrize("wrong", [-1, 30])
def test_ids_that_no_table_has(wrong: int) -> None:
    specs = [TensorSpec("text_ids", (1, 3), "int32", "ids", 30)]
    require_inputs({"text_ids": np.array([[0, 29, 1]], np.int32)}, specs, "x.npz")
    with pytest.raises(RunError, match=f"'text_ids' holds {wrong}, and the table has the entries 0 to 29"):
        require_inputs({"text_ids": np.array([[0, wrong, 1]], np.int32)}, specs, "x.npz")


def test_bfloat16_graph_input() -> None:
    with pytest.raises(RunError, match=r"input tokens bfloat16\[2\] is bfloat16, which numpy does not support; export"):
        require_inputs({"tokens": np.zeros(2, np.float32)}, [spec("tokens", (2,), "bfloat16")], "x.npz")
