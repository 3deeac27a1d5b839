"""TopKMerge's index logic and kernel against the definition in README.md, on the CPU and, where there is one, a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgecomp.resources import data_path

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

NATIVE = Path(__file__).resolve().parents[1] / "native"
FOLDER = data_path("engines", "plugins", "topk_merge")
MODES = ("wavg", "mean", "sum", "prune", "tofu")
PARTITIONS = ("alternate", "by_score")
ORDERS = ("ascending", "rank")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Of the largest value: float32 sums in another order; half a unit in the last place of the others, and its rounding.
TOLERANCE = {"float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-7}


@dataclasses.dataclass(frozen=True)
class Case:
    """The attributes of a node, and the sizes of its inputs."""

    tokens: int
    r: int
    prefix: int = 0
    mode: str = "wavg"
    partition: str = "alternate"
    order: str = "ascending"
    dtype: str = "float32"
    batch: int = 1
    metric_width: int = 16
    width: int = 8

    @property
    def rows(self) -> int:
        return self.tokens - self.r

    def params(self) -> Any:
        return (ctypes.c_int32 * 10)(
            *(self.batch, self.tokens, self.metric_width, self.width, self.r, self.prefix),
            *(MODES.index(self.mode), PARTITIONS.index(self.partition), ORDERS.index(self.order)),
            list(DTYPES).index(self.dtype),
        )


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the definition decides for one sample: the token that each row keeps, and the sources of each row."""

    row_token: list[int]
    sources: list[list[int]]
    src_map: list[int]


def descending(value: float) -> tuple[bool, float]:
    """Return what sorts ascending as the definition's descending order; NaN is the lowest."""
    return (True, 0.0) if math.isnan(value) else (False, -value)


def decide(case: Case, similarity: Any, scores: Any) -> Decision:
    """Follow README.md word by word, for one sample. `similarity` is [N, N]."""
    candidates = range(case.prefix, case.tokens)
    if case.partition == "alternate":
        sources = [token for token in candidates if token % 2 == 0]
        destinations = [token for token in candidates if token % 2 == 1]
    else:
        ranking = sorted(candidates, key=lambda token: (descending(scores[token]), token))
        best = ranking[: 2 * case.r]
        sources, destinations = best[0::2], best[1::2]
    match = {}
    for source in sources:
        order = sorted(range(len(destinations)), key=lambda j: (descending(similarity[source][destinations[j]]), j))
        match[source] = destinations[order[0]]
    if case.partition == "alternate":
        ranking = sorted(sources, key=lambda s: (descending(similarity[s][match[s]]), s))
        merged = sorted(ranking[: case.r])
    else:
        merged = sources
    left = [token for token in ranking if token not in set(merged) and token not in set(destinations)]
    if case.order == "ascending":
        left = sorted(left)
    row_token = [*range(case.prefix), *left, *destinations]
    groups = [[source for source in merged if match[source] == token] for token in row_token]
    groups = [group if token in set(destinations) else [] for group, token in zip(groups, row_token, strict=True)]
    src_map = [-1] * case.tokens
    for row, token in enumerate(row_token):
        for member in (token, *groups[row]):
            src_map[member] = row
    return Decision(row_token, groups, src_map)


def merge(case: Case, decision: Decision, x: Any, size: Any) -> tuple[Any, Any]:
    """Return y and merged_size of one sample, in float64 and not yet rounded to the type."""
    x, size = x.double(), size.double()
    rows, sizes = [], []
    for token, sources in zip(decision.row_token, decision.sources, strict=True):
        group = [token, *sources]
        total = size[group].sum(0)
        sizes.append(total)
        if not sources or case.mode == "prune":
            rows.append(x[token])
        elif case.mode == "wavg":
            rows.append((size[group] * x[group]).sum(0) / total)
        elif case.mode == "sum":
            rows.append(x[group].sum(0))
        else:
            row = x[group].mean(0)
            own = x[token].norm()
            if case.mode == "tofu" and own != 0:
                row = row * (x[group].norm(dim=1).max() / own)
            rows.append(row)
    return torch.stack(rows), torch.stack(sizes)


def any_case(chance: random.Random, **fixed: Any) -> Case:
    """Return attributes from anywhere in their ranges, the limits of r among them."""
    prefix = chance.randint(0, 5)
    tokens = prefix + chance.randint(2, 40)
    most = (tokens - prefix) // 2
    r = chance.choice([1, most, chance.randint(1, most)])
    words = {"mode": chance.choice(MODES), "partition": chance.choice(PARTITIONS), "order": chance.choice(ORDERS)}
    return Case(**{"tokens": tokens, "r": r, "prefix": prefix, **words, **fixed})


def compile_on_host(out: Path, *words: str | Path) -> ctypes.CDLL:
    program = shutil.which("g++") or shutil.which("clang++")
    if program is None:
        pytest.skip("there is no g++ or clang++ here")
    common = ["-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{FOLDER}"]
    command = [program, *common, *map(str, words), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """index.h, compiled for the host."""
    out = tmp_path_factory.mktemp("index") / "index.so"
    return compile_on_host(out, "-O2", "-fsanitize=undefined", "-fno-sanitize-recover", NATIVE / "index_on_host.cpp")


def pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data if hasattr(array, "ctypes") else array.data_ptr())


def index_on_host(index: ctypes.CDLL, case: Case, similarity: Any, scores: Any) -> Decision:
    sentinel = -7
    row_token, begin, merged, src_map = (np.full(case.tokens + 1, sentinel, np.int32) for _ in range(4))
    params = case.params()
    index.index_on_host(ctypes.byref(params), *map(pointer, (similarity, scores, row_token, begin, merged, src_map)))
    destinations = case.r if case.partition == "by_score" else case.tokens // 2 - case.prefix // 2
    first = case.rows - destinations
    sources: list[list[int]] = [[] for _ in range(case.rows)]
    for j in range(destinations):
        sources[first + j] = merged[begin[j] : begin[j + 1]].tolist()
    used = {"row_token": case.rows, "begin": destinations + 1, "merged": case.r, "src_map": case.tokens}
    for name, array in {"row_token": row_token, "begin": begin, "merged": merged, "src_map": src_map}.items():
        assert (array[used[name] :] == sentinel).all(), f"{name} was written behind its end"
    return Decision(row_token[: case.rows].tolist(), sources, src_map[: case.tokens].tolist())


def test_index_logic_follows_the_definition(index: ctypes.CDLL) -> None:
    """Thousands of random cases, most of them with ties, some with NaN, infinities and both zeros."""
    chance = random.Random(3)
    seen = set()
    for number in range(6000):
        case = any_case(chance)
        generator = np.random.default_rng(number)
        levels = chance.choice([1, 2, 5, 1000000])
        similarity = (generator.integers(0, levels, (case.tokens, case.tokens)) / levels - 0.5).astype(np.float32)
        scores = (generator.integers(0, levels, case.tokens) / levels - 0.5).astype(np.float32)
        if number % 5 == 0:
            for odd in (np.nan, np.inf, -np.inf, -0.0, 0.0):
                similarity[generator.random(similarity.shape) < 0.1] = odd
                scores[generator.random(case.tokens) < 0.1] = odd
        expected = decide(case, similarity.tolist(), scores.tolist())
        found = index_on_host(index, case, similarity, scores)
        assert found == expected, case
        seen.add((case.partition, case.order, case.prefix % 2, (case.tokens - case.prefix) % 2))
    assert len(seen) == 16


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_index_logic_at_the_limit(partition: str, order: str, index: ctypes.CDLL) -> None:
    """4096 tokens, every r being possible, and one destination that takes all."""
    case = Case(tokens=4096, r=2048, partition=partition, order=order)
    generator = np.random.default_rng(1)
    similarity = np.zeros((4096, 4096), np.float32)
    scores = generator.permutation(4096).astype(np.float32)
    found = index_on_host(index, case, similarity, scores)
    assert sorted([token for group in found.sources for token in group] + found.row_token) == list(range(4096))
    assert max(map(len, found.sources)) == 2048


def inputs_of(case: Case, seed: int, *, discrete: bool) -> tuple[Any, Any, Any, Any]:
    """Return metric, x, size, scores. A discrete metric has equal norms and whole products: its ties are exact."""
    generator = torch.Generator().manual_seed(seed)
    kind = DTYPES[case.dtype]
    shape = (case.batch, case.tokens, case.metric_width)
    metric = torch.randn(shape, generator=generator)
    if discrete:
        metric = torch.where(metric > 0, 1.0, -1.0)
    x = torch.randn((case.batch, case.tokens, case.width), generator=generator)
    size = torch.randint(1, 9, (case.batch, case.tokens, 1), generator=generator).float()
    scores = torch.randint(0, 30, (case.batch, case.tokens), generator=generator).float()
    return metric.to(kind), x.to(kind), size, scores


def similarity_of(metric: Any) -> Any:
    metric = metric.double()
    norm = metric.norm(dim=-1, keepdim=True)
    unit = torch.where(norm == 0, 0.0, metric / norm)
    return unit @ unit.transpose(-1, -2)


Call = Callable[..., tuple[Any, Any, Any]]


def call_kernel(library: ctypes.CDLL, case: Case, inputs: tuple[Any, ...], *, device: str = "cpu") -> tuple[Any, ...]:
    """Run the kernel through its C interface; outputs and workspace are filled with other values before."""
    metric, x, size, scores = (tensor.to(device).contiguous() for tensor in inputs)
    library.edgecomp_topk_merge_workspace.restype = ctypes.c_size_t
    library.edgecomp_topk_merge_error.restype = ctypes.c_char_p
    params = case.params()
    needed = library.edgecomp_topk_merge_workspace(ctypes.byref(params))
    assert needed > 0
    guard = 256
    space = torch.full((needed + 2 * guard,), 0xA5, dtype=torch.uint8, device=device)
    start = -space.data_ptr() % 256
    y = torch.full((case.batch, case.rows, case.width), 99.0, dtype=DTYPES[case.dtype], device=device)
    merged_size = torch.full((case.batch, case.rows, 1), 99.0, device=device)
    src_map = torch.full((case.batch, case.tokens), -9, dtype=torch.int32, device=device)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if device == "cuda" else 0)
    code = library.edgecomp_topk_merge(
        stream, ctypes.byref(params), *map(pointer, (metric, x, size, scores, y, merged_size, src_map)),
        ctypes.c_void_p(space.data_ptr() + start), ctypes.c_size_t(needed),
    )  # fmt: skip
    assert code == 0, library.edgecomp_topk_merge_error(code)
    if device == "cuda":
        torch.cuda.synchronize()
    assert (space[start + needed :] == 0xA5).all(), "the workspace was written behind its end"
    return y.cpu(), merged_size.cpu(), src_map.cpu()


def assert_follows(case: Case, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Indices exactly; values within the type's precision; rows of one token bit by bit."""
    metric, x, size, scores = inputs
    y, merged_size, src_map = outputs
    similarity = similarity_of(metric)
    for sample in range(case.batch):
        table = np.round(similarity[sample].numpy(), 6).tolist()
        decision = decide(case, table, scores[sample].tolist())
        assert src_map[sample].tolist() == decision.src_map, case
        expected, total = merge(case, decision, x[sample], size[sample])
        assert torch.equal(merged_size[sample], total.float()), case
        alone = [row for row, group in enumerate(decision.sources) if not group or case.mode == "prune"]
        kept = x[sample][[decision.row_token[row] for row in alone]]
        assert torch.equal(y[sample][alone], kept), case
        largest = expected.abs().max().clamp(min=1)
        error = (y[sample].double() - expected).abs().max() / largest
        assert error <= TOLERANCE[case.dtype], (case, float(error))


@pytest.fixture(scope="module", params=["", "-D__CUDA_ARCH__=750"], ids=["sm80", "sm75"])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """kernel.cu on the CPU: every thread a fibre, in shuffled order. For SM75, bf16 has no tensor cores."""
    out = tmp_path_factory.mktemp("kernel") / "kernel.so"
    emulation = NATIVE / "cuda_on_host"
    words = ["-O2", "-fno-strict-aliasing", f"-I{emulation}", *filter(None, [request.param])]
    return compile_on_host(out, *words, NATIVE / "kernel_on_host.cpp")


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_follows_the_definition(dtype: str, kernel: ctypes.CDLL) -> None:
    """Random attributes at small sizes; the widths are often no multiple of a vector."""
    chance = random.Random(5)
    for seed in range(40):
        width = chance.choice([1, 3, 8, 24, 40])
        case = any_case(
            chance, dtype=dtype, batch=chance.choice([1, 3]), metric_width=chance.choice([4, 16, 64, 100]), width=width
        )
        inputs = inputs_of(case, seed, discrete=True)
        if case.metric_width == 100:  # norms of 10: similarities are whole hundredths
            assert inputs[0].float().square().sum(-1).eq(100).all()
        assert_follows(case, inputs, call_kernel(kernel, case, inputs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_kernel_at_the_size_of_a_vit(mode: str, partition: str, kernel: ctypes.CDLL) -> None:
    """197 tokens: several tiles, the last of them not full."""
    case = Case(197, 16, prefix=1, mode=mode, partition=partition, metric_width=64, width=192, dtype="float16")
    inputs = inputs_of(case, 1, discrete=True)
    assert_follows(case, inputs, call_kernel(kernel, case, inputs))


def test_kernel_repeats_its_bits_and_splits_as_the_batch_does(kernel: ctypes.CDLL) -> None:
    """The order of the threads is another at each run; a batch cuts the destinations into other parts."""
    case = Case(300, 70, prefix=2, order="rank", metric_width=24, width=40, batch=3)
    inputs = inputs_of(case, 2, discrete=False)
    first = call_kernel(kernel, case, inputs)
    for again in (call_kernel(kernel, case, inputs), call_kernel(kernel, case, inputs)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    one = dataclasses.replace(case, batch=1)
    for sample in range(case.batch):
        alone = call_kernel(kernel, one, tuple(tensor[sample : sample + 1] for tensor in inputs))
        assert all(torch.equal(a[sample : sample + 1], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.parametrize("number", range(4))
def test_missing_barrier_shows(number: int, tmp_path: Path) -> None:
    """The CPU stands in for a GPU only if it notices: without one barrier of the matching, the result is another."""
    source = (FOLDER / "kernel.cu").read_text(encoding="utf-8")
    start = source.index("void match_tile(")
    parts = source[start:].split("__syncthreads();")
    assert len(parts) == 5, "the number of barriers in match_tile has changed; so does this test"
    mutant = source[:start] + "__syncthreads();".join(parts[: number + 1]) + "".join(parts[number + 1 : number + 2])
    mutant += "".join(f"__syncthreads();{part}" for part in parts[number + 2 :])
    (tmp_path / "kernel.cu").write_text(mutant, encoding="utf-8")
    for name in ("index.h", "kernel.h"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    shutil.copyfile(NATIVE / "kernel_on_host.cpp", tmp_path / "kernel_on_host.cpp")
    words = ["-O1", "-fno-strict-aliasing", f"-I{NATIVE / 'cuda_on_host'}", tmp_path / "kernel_on_host.cpp"]
    library = compile_on_host(tmp_path / "mutant.so", *words)
    case = Case(197, 16, prefix=1, metric_width=96, dtype="float16")
    inputs = inputs_of(case, 1, discrete=True)
    with pytest.raises(AssertionError):
        assert_follows(case, inputs, call_kernel(library, case, inputs))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0.0, 3e38])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_hostile_metric_keeps_every_index_in_range(odd: float, partition: str, kernel: ctypes.CDLL) -> None:
    """All-equal tokens, zero norms, NaN, infinities: each input ends in exactly one row."""
    for share in (0.1, 1.0):
        case = Case(67, 20, prefix=1, partition=partition, metric_width=8)
        inputs = inputs_of(case, 3, discrete=False)
        mask = torch.rand(inputs[0].shape, generator=torch.Generator().manual_seed(1)) < share
        inputs[0][mask] = odd
        inputs[3][:, ::3] = odd
        y, merged_size, src_map = call_kernel(kernel, case, inputs)
        assert set(src_map.flatten().tolist()) == set(range(case.rows))
        assert float(merged_size.sum()) == float(inputs[2].sum())
        assert torch.isfinite(y).all()


def test_nan_in_x_stays_in_its_group(kernel: ctypes.CDLL) -> None:
    """A NaN token spoils the row that it is merged into, and no other."""
    case = Case(32, 8, metric_width=16)
    inputs = inputs_of(case, 4, discrete=True)
    clean = call_kernel(kernel, case, inputs)
    inputs[1][0, 6] = float("nan")
    y, _, src_map = call_kernel(kernel, case, inputs)
    spoilt = int(src_map[0, 6])
    others = [row for row in range(case.rows) if row != spoilt]
    assert torch.isnan(y[0, spoilt]).all()
    assert torch.equal(y[0, others], clean[0][0, others])


def test_outputs_that_nobody_wants(kernel: ctypes.CDLL) -> None:
    """NULL for an output leaves the others as they are; what only it needs may be NULL too."""
    case = Case(50, 12, prefix=1)
    metric, x, size, scores = inputs_of(case, 6, discrete=True)
    y, merged_size, src_map = call_kernel(kernel, case, (metric, x, size, scores))
    params = case.params()
    needed = kernel.edgecomp_topk_merge_workspace(ctypes.byref(params))
    space = torch.zeros(needed + 256, dtype=torch.uint8)
    at = ctypes.c_void_p(space.data_ptr() + -space.data_ptr() % 256)
    for wanted in range(1, 8):
        outputs = [torch.zeros_like(tensor) for tensor in (y, merged_size, src_map)]
        given = [pointer(tensor) if wanted >> bit & 1 else None for bit, tensor in enumerate(outputs)]
        tokens = pointer(x) if given[0] else None
        sizes = pointer(size) if given[0] or given[1] else None
        code = kernel.edgecomp_topk_merge(
            None, ctypes.byref(params), pointer(metric), tokens, sizes, None, *given, at, ctypes.c_size_t(needed)
        )
        assert code == 0
        for bit, (found, expected) in enumerate(zip(outputs, (y, merged_size, src_map), strict=True)):
            assert torch.equal(found, expected if wanted >> bit & 1 else torch.zeros_like(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is not between 1 and 1024"),
        ({"batch": 1025}, "batch is not between 1 and 1024"),
        ({"tokens": 4097}, "tokens is not between 2 and 4096"),
        ({"tokens": 1}, "tokens is not between 2 and 4096"),
        ({"metric_width": 4097}, "metric_width is not between 1 and 4096"),
        ({"width": 0}, "width is not between 1 and 4096"),
        ({"prefix": 15}, "num_prefix_tokens is not between 0 and tokens - 2"),
        ({"r": 8}, "r is not between 1 and half"),
        ({"r": 0}, "r is not between 1 and half"),
    ],
)
def test_parameters_out_of_range_are_refused(changes: dict[str, int], message: str, kernel: ctypes.CDLL) -> None:
    """The workspace is 0, the call returns a code, and the code has a text."""
    kernel.edgecomp_topk_merge_workspace.restype = ctypes.c_size_t
    kernel.edgecomp_topk_merge_error.restype = ctypes.c_char_p
    params = dataclasses.replace(Case(16, 4, prefix=1), **changes).params()
    assert kernel.edgecomp_topk_merge_workspace(ctypes.byref(params)) == 0
    space = ctypes.create_string_buffer(16)
    code = kernel.edgecomp_topk_merge(
        None, ctypes.byref(params), space, space, space, None, space, space, space, space, ctypes.c_size_t(16)
    )
    assert message in kernel.edgecomp_topk_merge_error(code).decode()


def test_small_workspace_and_missing_scores_are_refused(kernel: ctypes.CDLL) -> None:
    """Neither is read or written before the check."""
    kernel.edgecomp_topk_merge_error.restype = ctypes.c_char_p
    space = ctypes.create_string_buffer(16)
    for case, message in ((Case(16, 4), "workspace is smaller"), (Case(16, 4, partition="by_score"), "needs scores")):
        params = case.params()
        code = kernel.edgecomp_topk_merge(
            None, ctypes.byref(params), space, space, space, None, space, space, space, space, ctypes.c_size_t(16)
        )
        assert message in kernel.edgecomp_topk_merge_error(code).decode()


# -- on a GPU -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel alone, without TensorRT, compiled for the GPU that is here."""
    from edgecomp.engines import local_gpu_sm

    program = shutil.which("nvcc")
    if program is None:
        pytest.skip("there is no nvcc on PATH")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    sm, out = local_gpu_sm(), tmp_path_factory.mktemp("gpu") / "kernel.so"
    words = ["-shared", "-std=c++17", "-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}", "-Xcompiler=-fPIC"]
    subprocess.run([program, *words, FOLDER / "kernel.cu", "-o", out], check=True, timeout=600)
    return ctypes.CDLL(str(out))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_follows_the_definition(dtype: str, on_gpu: ctypes.CDLL) -> None:
    """Small random cases, as on the CPU."""
    chance = random.Random(7)
    for seed in range(200):
        sizes = {"batch": chance.choice([1, 3]), "metric_width": chance.choice([4, 16, 64, 100])}
        case = any_case(chance, dtype=dtype, width=chance.choice([1, 3, 8, 24, 40]), **sizes)
        inputs = inputs_of(case, seed, discrete=True)
        assert_follows(case, inputs, call_kernel(on_gpu, case, inputs, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 197, "r": 16, "prefix": 1, "batch": 64, "metric_width": 64, "width": 768},
        {"tokens": 577, "r": 288, "prefix": 1, "batch": 2, "metric_width": 64, "width": 1024},
        {"tokens": 4096, "r": 2048, "batch": 1, "metric_width": 64, "width": 64, "order": "rank"},
        {"tokens": 16, "r": 4, "batch": 1024, "metric_width": 4096, "width": 4096},
    ],
    ids=lambda sizes: f"b{sizes['batch']}-n{sizes['tokens']}-d{sizes['width']}",
)
def test_gpu_at_size(sizes: dict[str, Any], partition: str, dtype: str, on_gpu: ctypes.CDLL) -> None:
    """The sizes of encoders, and the limits; twice, with the same bits."""
    for mode in MODES:
        case = Case(**sizes, mode=mode, partition=partition, dtype=dtype)
        inputs = inputs_of(case, 1, discrete=True)
        first = call_kernel(on_gpu, case, inputs, device="cuda")
        again = call_kernel(on_gpu, case, inputs, device="cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        few = dataclasses.replace(case, batch=1)
        assert_follows(few, tuple(t[:1] for t in inputs), tuple(t[:1] for t in first))
