"""A loaded bundle: which graph serves a request, and the graphs that are held in memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Union

import msgspec
import numpy as np

from edgecomp.bundle import Bundle, open_bundle
from edgecomp.errors import InvalidSpec, RunError, UnknownName
from edgecomp.inputs import require_inputs
from edgecomp.runners import Array, Runner, open_runner, require_sharing, require_threads, runner_names
from edgecomp.runners.chain import require_kernels
from edgecomp.serving.parts import LaidOut, image_pixels, kind_of, lay_out, suffices, to_image
from edgecomp.serving.stats import Recorder, Stats
from edgecomp.slices import Layout
from edgecomp.specs.budget import read_count
from edgecomp.specs.manifest import Bucket, Graph, RouterRecord
from edgecomp.words import read_words

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Answer", "Model", "RoutedRunner", "load"]

_IMAGE_RANK = 4
AnyGraph = TypeVar("AnyGraph", bound=Graph)

#: An image's path or the image itself, or one request's pixels as the graph takes them; a list of these for a graph
#: that takes several in a request; its inputs by name; a .txt file, or None beside a text, where the text is read.
Request = Union[str, Path, "Image.Image", Array, Sequence[Any], Mapping[str, Array], None]


class Answer(msgspec.Struct, frozen=True):
    """What one request got.

    Attributes:
        outputs: by name, with a batch of one; of slices with their overview, and of images of text, one row for each.
        budget: tokens kept by the bucket that served it.
        reason: why that bucket.
        need: what the router's need was, one number for each threshold; empty where no router was asked.
        signals: what the need was made of, by name.
        layout: how the rows follow each other, of an image in slices or tiles and of a text in strips.
    """

    outputs: dict[str, Array]
    budget: int
    reason: str
    need: tuple[float, ...] = ()
    signals: dict[str, float] = {}
    layout: Layout | None = None

    def __getitem__(self, name: str) -> Array:
        """Return an output."""
        return self.outputs[name]


class _Choice(msgspec.Struct, frozen=True):
    """A bucket for a request, and why."""

    tokens: int
    reason: str
    need: tuple[float, ...] = ()
    signals: dict[str, float] = {}

    def answer(self, outputs: dict[str, Array]) -> Answer:
        return Answer(outputs, self.tokens, self.reason, self.need, self.signals)


def load(
    bundle: str | Path,
    *,
    runner: str = "onnxruntime",
    threads: int = 0,
    resident: int | None = None,
    share_weights: bool = False,
    font: str | Path = "",
) -> Model:
    """Load a bundle as one object; needs neither torch nor the compressors.

        import edgecomp

        with edgecomp.load("attention-pruning-vit_small_patch16_224") as model:
            answer = model("photo.jpg", "How many birds are there?")
            print(answer["kept"].shape, answer.budget, answer.reason)
            print(model.stats())

    Args:
        bundle: the folder; it is verified once, here.
        runner: `onnxruntime`, or `onnxruntime-cuda`.
        threads: for the CPU; 0: as many as the runtime chooses.
        resident: graphs held in memory at most; the one used longest ago goes first. None: all that were asked for.
        share_weights: all graphs read one mapping of the weights, instead of each a copy packed for speed: the memory
            of several buckets is nearly that of one, and requests take longer (a tenth, for ViT-S). CPU alone.
        font: a TrueType file to render texts with, for a bundle that reads strips; "": the font that Pillow brings.

    Raises:
        BundleError: the bundle is not whole. InvalidSpec: `resident` is below 1, or the runner cannot share.
    """
    if not isinstance(bundle, (str, Path)):
        raise InvalidSpec(f"bundle {bundle!r} is of type {type(bundle).__name__}; give the folder's path")
    return Model(
        open_bundle(Path(bundle)),
        runner=runner,
        threads=threads,
        resident=resident,
        share_weights=share_weights,
        font=font,
    )


class Model:
    """A bundle that serves requests; safe to call from several threads. `load` makes one.

    A graph is loaded when a request first needs it, and requests of other threads wait meanwhile. A budget is served by
    the smallest bucket that keeps at least so many tokens. Without a budget the bundle's router is asked, and where
    there is none the largest bucket serves. Stem and router stay in memory; `resident` bounds the buckets.

    Slices of an image, and images of a text, are the batch: the smallest that holds them serves. A page in tiles goes
    to the bucket that holds them. None of these is routed.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        runner: str,
        threads: int,
        resident: int | None,
        share_weights: bool = False,
        font: str | Path = "",
    ) -> None:
        if not isinstance(share_weights, bool):
            raise InvalidSpec(f"share_weights={share_weights!r} is neither True nor False")
        if resident is not None and (not isinstance(resident, int) or isinstance(resident, bool) or resident < 1):
            raise InvalidSpec(
                f"resident={resident!r}: at least one graph has to be in memory; give a whole number from 1"
            )
        require_threads(threads)
        if runner not in runner_names():
            raise UnknownName("runner", str(runner), runner_names())
        require_sharing(runner, share_weights=share_weights)
        require_kernels(bundle, runner)
        self._bundle, self._runner, self._threads, self._resident = bundle, runner, threads, resident
        self._share_weights, self._font = share_weights, font
        if str(font) and kind_of(bundle) != "text":
            raise InvalidSpec(f"font {font}: {bundle.path} takes no text that is rendered; drop it")
        manifest = bundle.manifest
        self._graphs: dict[int, dict[int, Bucket]] = {}
        for bucket in manifest.buckets:
            self._graphs.setdefault(bucket.budget.tokens_out, {})[bucket.batch] = bucket
        self._buckets = tuple(sorted(self._graphs))
        self._inputs = [spec.with_batch(1) for spec in manifest.buckets[0].inputs]
        self._stems = {stem.model: stem for stem in manifest.stem}
        self._router = manifest.router
        self._takes_turns = bool(manifest.stem or manifest.router or len(self._graphs) > 1)
        self._routers = {graph.batch: graph for graph in manifest.router.graphs} if manifest.router is not None else {}
        self._loaded: OrderedDict[str, Runner] = OrderedDict()  # buckets by file, used longest ago first
        self._shared: dict[str, Runner] = {}  # stem and router
        self._lock = threading.Lock()
        self._recorder = Recorder(self._buckets)
        self._closed, self._under_way = False, 0

    @property
    def buckets(self) -> tuple[int, ...]:
        """Tokens that each bucket keeps, ascending."""
        return self._buckets

    @property
    def bundle(self) -> Bundle:
        """What it serves."""
        return self._bundle

    @property
    def runner_version(self) -> str:
        """Name and version of what runs the graphs; "" before the first request."""
        with self._lock:
            return next((held.version for held in (*self._loaded.values(), *self._shared.values())), "")

    def __call__(
        self,
        request: Request = None,
        text: str | None = None,
        budget: int | str | None = None,
        *,
        features: Mapping[str, Array] | None = None,
    ) -> Answer:
        """Serve one request.

        Args:
            request: an image (path, Pillow image, or an array: uint8 (H, W, 3), or pixels as the graph takes them
                without the batch), a list of them where a request is several, or the inputs by name, each with a batch
                of one. A .txt file, or none, for a bundle that reads strips of text.
            text: the question, for a router that reads words; or what strips are rendered of.
            budget: tokens wanted, a count or a percentage; None: the router decides.
            features: the other inputs of a model that takes more than an image, by name, each with a batch of one.
        """
        with self._request():
            started = time.perf_counter()
            laid = self._lay_out(request, text, features, budget)
            if laid is not None:
                return self._serve_laid(laid, started)
            seen = [self._prepare(request, features)]
            (choice,) = self._choose(seen, [text], [budget])
            batch = min(self._graphs[choice.tokens])
            (outputs,) = self._infer(self._graphs[choice.tokens][batch], seen)
            self._recorder.count(choice.tokens, 1, time.perf_counter() - started)
            return choice.answer(outputs)

    def infer_batch(
        self,
        requests: Sequence[Request],
        texts: Sequence[str | None] | None = None,
        *,
        features: Sequence[Mapping[str, Array] | None] | None = None,
        budget: int | str | Sequence[int | str | None] | None = None,
    ) -> list[Answer]:
        """Serve several requests, those of one bucket together in its largest batches; answers keep the order.

        An image in slices or tiles, and a text in strips, is a batch by itself.

        Args:
            requests, texts, features: as in a call, one for each.
            budget: for all of them, or one for each.
        """
        if isinstance(requests, (str, bytes, Mapping)) or not isinstance(requests, (Sequence, np.ndarray)):
            raise InvalidSpec(
                f"requests are of type {type(requests).__name__}; give a list, one image or mapping of inputs for each"
            )
        count = len(requests)
        one_budget = budget is None or isinstance(budget, (int, str, np.integer))
        budgets = _one_each("budgets", [budget] * count if one_budget else budget, count)
        asked, given = _one_each("texts", texts, count), _one_each("features", features, count)
        if not count:
            return []
        with self._request():
            started = time.perf_counter()
            laid = [self._lay_out(*one) for one in zip(requests, asked, given, budgets, strict=True)]
            alone = [self._serve_laid(one, started) for one in laid if one is not None]
            rest = [place for place, one in enumerate(laid) if one is None]
            chosen = [[values[place] for place in rest] for values in (requests, asked, given, budgets)]
            others = iter(self._serve_all(*chosen)) if rest else iter(())
            apart = iter(alone)
            return [next(others if one is None else apart) for one in laid]

    def _serve_all(
        self, requests: Sequence[Request], texts: list[Any], given: list[Any], budgets: list[Any]
    ) -> list[Answer]:
        count = len(requests)
        started = time.perf_counter()
        seen = [self._prepare(*one) for one in zip(requests, given, strict=True)]
        choices = self._choose(seen, texts, budgets)
        answers: dict[int, Answer] = {}
        for tokens in dict.fromkeys(choice.tokens for choice in choices):
            waiting = [place for place, choice in enumerate(choices) if choice.tokens == tokens]
            for bucket, places in _in_batches(waiting, self._graphs[tokens]):
                outputs = self._infer(bucket, [seen[place] for place in places])
                self._recorder.count(tokens, len(places), time.perf_counter() - started)
                answers.update({p: choices[p].answer(out) for p, out in zip(places, outputs, strict=True)})
        return [answers[place] for place in range(count)]

    def stats(self) -> Stats:
        """Return what was counted: requests, shares and latencies of each bucket."""
        with self._lock:
            resident = list(self._loaded)
        held = {b.budget.tokens_out for b in self._bundle.manifest.buckets if b.model in resident}
        return self._recorder.stats(sorted(held))

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._recorder.reset()

    def close(self) -> None:
        """Take no more requests, and free the graphs when those under way have ended. Closing twice is no error."""
        with self._lock:
            self._closed = True
            self._free()

    def __enter__(self) -> Model:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Count a request that is under way; after `close` there are no more."""
        with self._lock:
            if self._closed:
                raise RunError(f"the model of {self._bundle.path} is closed; load the bundle again")
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                self._free()

    def _free(self) -> None:
        """Let go of the graphs of a closed model that serves nothing any more; the lock is held."""
        if self._closed and not self._under_way:
            self._loaded.clear()
            self._shared.clear()

    def _lay_out(self, request: Request, text: Any, features: Any, budget: Any) -> LaidOut | None:
        """Lay out a request that a graph does not take as it is."""
        if text is not None and not isinstance(text, str):
            raise InvalidSpec(f"text {text!r} is of type {type(text).__name__}; give the question as a str, or None")
        laid = lay_out(self._bundle, request, text=text, budget=budget, font=self._font)
        if laid is not None and features is not None:
            raise InvalidSpec(f"features were given beside a request that {self._bundle.path} lays out; drop them")
        return laid

    def _serve_laid(self, laid: LaidOut, started: float) -> Answer:
        graph, seen, tokens = laid.bucket, dict(laid.inputs), laid.bucket.budget.tokens_out
        if graph.stem:
            stem = self._session(self._stems[graph.stem])
            seen.update(stem.infer({name: seen[name] for name in stem.input_names}))
        session = self._session(graph)
        outputs = laid.real(session.infer({name: seen[name] for name in session.input_names}))
        self._recorder.count(tokens, 1, time.perf_counter() - started)
        return Answer(outputs, tokens, laid.reason, layout=laid.layout)

    # -- the parts of a request -----------------------------------------------------------------------

    def _choose(
        self, seen: list[dict[str, Array]], texts: Sequence[str | None], budgets: Sequence[int | str | None]
    ) -> list[_Choice]:
        """Return the bucket that serves each request; what the router had to run is added to `seen`."""
        reads_words = self._router is not None and self._router.reads_words
        if not reads_words and any(text is not None for text in texts):
            raise InvalidSpec(
                f"a text was given, and nothing in {self._bundle.path} reads words; drop it, or export with a router "
                "that does (difficulty, detail)"
            )
        asking = [place for place, budget in enumerate(budgets) if budget is None]
        routed = self._route([seen[p] for p in asking], [texts[p] or "" for p in asking]) if asking else []
        found = dict(zip(asking, routed, strict=True))
        return [found[p] if budget is None else self._serving(budget) for p, budget in enumerate(budgets)]

    def _serving(self, budget: int | str) -> _Choice:
        """Return the bucket that serves a budget."""
        tokens = suffices(self._bundle, budget)
        tokens_in = self._bundle.manifest.buckets[0].budget.tokens_in
        wanted = read_count(budget, tokens_in=tokens_in) if isinstance(budget, str) else int(budget)
        return _Choice(tokens, f"the smallest that keeps {wanted}")

    def _route(self, seen: list[dict[str, Array]], texts: Sequence[str]) -> list[_Choice]:
        """Return what the router says of each request."""
        record, buckets = self._router, self.buckets
        if record is None:
            return [_Choice(buckets[-1], "no budget was given: the largest")] * len(seen)
        if record.fixed:
            return [_Choice(record.fixed, "router fixed")] * len(seen)
        thresholds = np.asarray([record.thresholds], np.float32)
        choices: list[_Choice] = []
        took = 0.0
        for graph, places in _in_batches(range(len(seen)), self._routers):
            requests = [seen[place] for place in places]
            self._run_stem(graph, requests)
            started = time.perf_counter()
            for place in places:
                seen[place]["thresholds"] = thresholds
                if record.reads_words:
                    seen[place]["words"] = read_words(texts[place])
            found = self._infer(graph, requests)
            took += time.perf_counter() - started
            for outputs in found:
                bucket, need = int(outputs["bucket"][0]), tuple(float(value) for value in outputs["need"][0])
                if not 0 <= bucket < len(buckets):
                    raise RunError(
                        f"router {record.name} names bucket {bucket}, and there are {len(buckets)}; export again"
                    )
                signals = dict(zip(record.signals, map(float, outputs["signals"][0]), strict=True))
                choices.append(_Choice(buckets[bucket], _why(record, bucket, need), need, signals))
        self._recorder.count_route(len(seen), took)
        return choices

    def _infer(self, graph: Graph, seen: list[dict[str, Array]]) -> list[dict[str, Array]]:
        """Run a graph on requests, after its stem where that has not run on them; `seen` holds what it handed over."""
        self._run_stem(graph, seen)
        session = self._session(graph)
        if graph.batch == 1:
            return [session.infer({name: one[name] for name in session.input_names}) for one in seen]
        rows = [*seen, *seen[-1:] * (graph.batch - len(seen))]  # the last one again, where a batch is not full
        outputs = session.infer({name: np.concatenate([one[name] for one in rows]) for name in session.input_names})
        return [{name: array[row : row + 1] for name, array in outputs.items()} for row in range(len(seen))]

    def _run_stem(self, graph: Graph, seen: list[dict[str, Array]]) -> None:
        """Add what a graph's stem hands over, where it has one that has not run yet."""
        if not graph.stem:
            return
        stem = self._stems[graph.stem]
        if any(spec.name not in one for one in seen for spec in stem.outputs):
            for one, outputs in zip(seen, self._infer(stem, seen), strict=True):
                one.update(outputs)

    def _prepare(self, request: Request, features: Mapping[str, Array] | None) -> dict[str, Array]:
        """Return the inputs of one request, with a batch of one."""
        if isinstance(request, Mapping):
            inputs = dict(request)
        else:
            first, *others = self._inputs
            several = first.shape[1] if first.kind == "image" and len(first.shape) == _IMAGE_RANK + 1 else 0
            if first.kind != "image" or len(first.shape) != _IMAGE_RANK + bool(several):
                raise RunError(
                    f"{self._bundle.path} takes {', '.join(map(str, self._inputs))}: give a mapping with these names, "
                    "not an image"
                )
            if several and not (isinstance(request, (list, tuple)) and len(request) == several):
                raise RunError(
                    f"{self._bundle.path} takes {several} images in a request: give a list of so many, or a mapping "
                    "with its inputs"
                )
            if others and features is None:
                raise RunError(
                    f"{self._bundle.path} takes {', '.join(map(str, others))} beside the image; give features, a "
                    "mapping with these names"
                )
            if several:
                pixels = [self._pixels(one, first.shape[2:], first.dtype) for one in request]  # type: ignore[union-attr]
                inputs = {first.name: np.stack(pixels, axis=1)}
            else:
                inputs = {first.name: self._pixels(request, first.shape[1:], first.dtype)}
        if features is not None and not isinstance(features, Mapping):
            raise InvalidSpec(f"features are of type {type(features).__name__}; give a mapping from names to arrays")
        inputs.update(features or {})
        for name, value in inputs.items():
            if not isinstance(value, np.ndarray):
                raise RunError(f"input {name!r} is of type {type(value).__name__}; give a numpy array")
        require_inputs(inputs, self._inputs, "the request")
        return inputs

    def _pixels(self, image: Any, shape: tuple[int, ...], dtype: str) -> Array:
        if isinstance(image, np.ndarray) and image.shape == shape and image.dtype == np.dtype(dtype):
            return image[None]
        if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
            raise RunError(
                f"an image of shape {image.shape} and type {image.dtype} is neither uint8 (H, W, 3) nor "
                f"{dtype} {shape}, as the graph takes it"
            )
        return image_pixels(self._bundle, to_image(image), "uint8" if dtype == "uint8" else "float32")

    def _session(self, graph: Graph) -> Runner:
        """Return the graph's session, loading it where it is not in memory."""
        is_bucket = isinstance(graph, Bucket)
        with self._lock:
            held = self._loaded if is_bucket else self._shared
            session = held.get(graph.model)
            if session is None:
                session = open_runner(
                    self._runner,
                    self._bundle.path / graph.model,
                    threads=self._threads,
                    takes_turns=self._takes_turns,
                    share_weights=self._share_weights,
                )
                held[graph.model] = session
                if is_bucket:
                    self._recorder.count_load()
            if is_bucket:
                self._loaded.move_to_end(graph.model)
                while self._resident is not None and len(self._loaded) > self._resident:
                    self._loaded.popitem(last=False)  # freed when the last request that runs in it ends
            return session


class RoutedRunner:
    """A model as a runner of batch 1: each run is a request that the router sends to a bucket; `served` lists them.

    Args:
        texts: questions that the requests carry in turn; none: they have no words.
    """

    def __init__(self, model: Model, texts: Sequence[str] = ()) -> None:
        self.model, self.texts = model, texts
        self.name, self.version = "routed", ""
        first = model.bundle.manifest.buckets[0]
        self.input_names = tuple(spec.name for spec in first.inputs)
        self.output_names = tuple(spec.name for spec in first.outputs)
        self.served: list[int] = []

    def __enter__(self) -> RoutedRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the model."""
        self.model.close()

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Serve one request."""
        text = self.texts[len(self.served) % len(self.texts)] if self.texts else None
        answer = self.model(inputs, text)
        self.served.append(answer.budget)
        return answer.outputs


def _one_each(what: str, values: Any, count: int) -> list[Any]:
    """Return one value for each request, or None for each where there are none."""
    if values is None:
        return [None] * count
    if isinstance(values, (str, bytes, Mapping)):
        raise InvalidSpec(
            f"{what} are a single {type(values).__name__} for {count} requests; give a list, one for each"
        )
    try:
        found = list(values)
    except TypeError:
        raise InvalidSpec(f"{what} {values!r} are no list; give one for each request") from None
    if len(found) != count:
        raise InvalidSpec(f"{len(found)} {what} for {count} requests; give one for each")
    return found


def _in_batches(places: Sequence[int], graphs: Mapping[int, AnyGraph]) -> Iterator[tuple[AnyGraph, Sequence[int]]]:
    """Cut places into the largest batches that they fill, the rest into the smallest; each with its graph."""
    while places:
        batch = max((size for size in graphs if size <= len(places)), default=min(graphs))
        yield graphs[batch], places[:batch]
        places = places[batch:]


def _why(record: RouterRecord, bucket: int, need: Sequence[float]) -> str:
    """Say on which side of which thresholds a request fell."""
    reached = [value >= cut for value, cut in zip(need, record.thresholds, strict=True)]
    if reached != [True] * bucket + [False] * (len(need) - bucket):  # it may, where each bucket has a need of its own
        return f"router {record.name}: {bucket} of {len(need)} thresholds are reached"
    over = [f"{need[k]:.3f} reaches {record.thresholds[k]:.3f}" for k in range(len(need)) if k == bucket - 1]
    under = [f"{need[k]:.3f} is below {record.thresholds[k]:.3f}" for k in range(len(need)) if k == bucket]
    trained = " (untrained)" if record.weights is not None and record.weights.kind == "random" else ""
    return f"router {record.name}{trained}: need {' and '.join((*over, *under))}"
