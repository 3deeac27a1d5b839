"""A loaded bundle: which graph serves a request, and the graphs that are held in memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Union

import msgspec
import numpy as np

from edgecomp.bundle import Bucket, Bundle, open_bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.images import read_image, to_pixels
from edgecomp.inputs import require_inputs
from edgecomp.runners import Array, Runner, open_runner
from edgecomp.serving.stats import Recorder, Stats
from edgecomp.specs.budget import read_count

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Answer", "Model", "load"]

#: An image's path or the image itself, one request's pixels as the graph takes them, or its inputs by name.
Request = Union[str, Path, "Image.Image", Array, Mapping[str, Array]]


class Answer(msgspec.Struct, frozen=True):
    """What one request got.

    Attributes:
        outputs: by name, with a batch of one.
        budget: tokens kept by the bucket that served it.
        reason: why that bucket.
    """

    outputs: dict[str, Array]
    budget: int
    reason: str

    def __getitem__(self, name: str) -> Array:
        """Return an output."""
        return self.outputs[name]


def load(bundle: str | Path, *, runner: str = "onnxruntime", threads: int = 0, resident: int | None = None) -> Model:
    """Load a bundle as one object; needs neither torch nor the compressors.

        import edgecomp

        with edgecomp.load("attention-pruning-cls") as model:
            answer = model("photo.jpg", budget=49)
            print(answer["kept"].shape, answer.budget, answer.reason)
            print(model.stats())

    Args:
        bundle: the folder; it is verified once, here.
        runner: `onnxruntime`, or `onnxruntime-cuda`.
        threads: for the CPU; 0: as many as the runtime chooses.
        resident: graphs held in memory at most; the one used longest ago goes first. None: all that were asked for.

    Raises:
        BundleError: the bundle is not whole. InvalidSpec: `resident` is below 1.
    """
    return Model(open_bundle(Path(bundle)), runner=runner, threads=threads, resident=resident)


class Model:
    """A bundle that serves requests; safe to call from several threads. `load` makes one.

    A graph is loaded when a request first needs it, and requests of other threads wait meanwhile. A budget is served by
    the smallest bucket that keeps at least so many tokens; without a budget by the largest.
    """

    def __init__(self, bundle: Bundle, *, runner: str, threads: int, resident: int | None) -> None:
        if resident is not None and resident < 1:
            raise InvalidSpec(f"resident={resident}: at least one graph has to be in memory; give 1 or more")
        self._bundle, self._runner, self._threads, self._resident = bundle, runner, threads, resident
        self._graphs: dict[int, dict[int, Bucket]] = {}
        for bucket in bundle.manifest.buckets:
            self._graphs.setdefault(bucket.budget.tokens_out, {})[bucket.batch] = bucket
        self._loaded: OrderedDict[str, Runner] = OrderedDict()  # by file, used longest ago first
        self._lock = threading.Lock()
        self._recorder = Recorder()
        self._closed = False

    @property
    def buckets(self) -> tuple[int, ...]:
        """Tokens that each bucket keeps, ascending."""
        return tuple(sorted(self._graphs))

    def __call__(self, request: Request, *, budget: int | str | None = None) -> Answer:
        """Serve one request.

        Args:
            request: an image (path, Pillow image, or an array: uint8 (H, W, 3), or pixels as the graph takes them
                without the batch), or the inputs by name, each with a batch of one.
            budget: tokens wanted, a count or a percentage.
        """
        started = time.perf_counter()
        tokens, reason = self._choose(budget)
        batch = min(self._graphs[tokens])
        bucket = self._graphs[tokens][batch]
        inputs = self._prepare(request, bucket)
        if batch > 1:
            inputs = {name: np.repeat(array, batch, axis=0) for name, array in inputs.items()}
        outputs = self._session(bucket).infer(inputs)
        if batch > 1:
            outputs = {name: array[:1] for name, array in outputs.items()}
        self._recorder.count(tokens, 1, time.perf_counter() - started)
        return Answer(outputs, tokens, reason)

    def infer_batch(
        self, requests: Sequence[Request], *, budget: int | str | Sequence[int | str | None] | None = None
    ) -> list[Answer]:
        """Serve several requests, those of one bucket together in its largest batches; answers keep the order.

        Args:
            requests: as in a call.
            budget: for all of them, or one for each.
        """
        budgets = [budget] * len(requests) if budget is None or isinstance(budget, (int, str)) else list(budget)
        if len(budgets) != len(requests):
            raise InvalidSpec(f"{len(budgets)} budgets for {len(requests)} requests; give one, or one for each")
        choices = [self._choose(one) for one in budgets]
        answers: dict[int, Answer] = {}
        for tokens in dict.fromkeys(tokens for tokens, _ in choices):
            waiting = [place for place, (chosen, _) in enumerate(choices) if chosen == tokens]
            while waiting:
                batch = self._batch_for(tokens, len(waiting))
                places, waiting = waiting[:batch], waiting[batch:]
                found = self._serve_together([requests[place] for place in places], tokens, batch)
                for place, outputs in zip(places, found, strict=True):
                    answers[place] = Answer(outputs, tokens, choices[place][1])
        return [answers[place] for place in range(len(requests))]

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
        """Free the graphs; a request that is under way still ends. Closing twice is no error."""
        with self._lock:
            self._closed = True
            self._loaded.clear()

    def __enter__(self) -> Model:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # -- the parts of a request -----------------------------------------------------------------------

    def _choose(self, budget: int | str | None) -> tuple[int, str]:
        """Return the bucket that serves a budget, and why."""
        if budget is None:
            return self.buckets[-1], "no budget was given: the largest"
        tokens_in = self._bundle.manifest.buckets[0].budget.tokens_in
        wanted = budget if isinstance(budget, int) else read_count(budget, tokens_in=tokens_in)
        if wanted < 1 or wanted > self.buckets[-1]:
            raise InvalidSpec(
                f"budget {budget} is not between 1 and {self.buckets[-1]}, the largest bucket of {self._bundle.path}; "
                f"it has {', '.join(map(str, self.buckets))}"
            )
        chosen = next(tokens for tokens in self.buckets if tokens >= wanted)
        return chosen, f"the smallest that keeps {wanted}"

    def _batch_for(self, tokens: int, waiting: int) -> int:
        """Return the largest batch that the waiting requests fill, or the smallest there is."""
        sizes = sorted(self._graphs[tokens])
        return max((size for size in sizes if size <= waiting), default=sizes[0])

    def _serve_together(self, requests: Sequence[Request], tokens: int, batch: int) -> list[dict[str, Array]]:
        started = time.perf_counter()
        bucket = self._graphs[tokens][batch]
        prepared = [self._prepare(request, bucket) for request in requests]
        prepared += prepared[-1:] * (batch - len(prepared))  # the last one again, where a batch is not full
        inputs = {spec.name: np.concatenate([one[spec.name] for one in prepared]) for spec in bucket.inputs}
        outputs = self._session(bucket).infer(inputs)
        self._recorder.count(tokens, len(requests), time.perf_counter() - started)
        return [{name: array[row : row + 1] for name, array in outputs.items()} for row in range(len(requests))]

    def _prepare(self, request: Request, bucket: Bucket) -> dict[str, Array]:
        """Return the inputs of one request, with a batch of one."""
        specs = [spec.with_batch(1) for spec in bucket.inputs]
        if isinstance(request, Mapping):
            inputs = dict(request)
        else:
            first, *others = specs
            if first.kind != "image" or others:
                raise RunError(
                    f"{bucket.model} takes {', '.join(map(str, specs))}: give a mapping with these names, not an image"
                )
            inputs = {first.name: self._pixels(request, first.shape[1:], first.dtype)}
        require_inputs(inputs, specs, "the request")
        return inputs

    def _pixels(self, image: str | Path | Image.Image | Array, shape: tuple[int, ...], dtype: str) -> Array:
        if isinstance(image, np.ndarray) and image.shape == shape and image.dtype == np.dtype(dtype):
            return image[None]
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise RunError(
                    f"an image of shape {image.shape} and type {image.dtype} is neither uint8 (H, W, 3) nor "
                    f"{dtype} {shape}, as the graph takes it"
                )
            from PIL import Image

            image = Image.fromarray(image)
        elif isinstance(image, (str, Path)):
            image = read_image(image)
        preprocess = self._bundle.manifest.preprocess
        assert preprocess is not None, "a bundle that takes images says how they are prepared"
        return to_pixels(image, preprocess, "uint8" if dtype == "uint8" else "float32")

    def _session(self, bucket: Bucket) -> Runner:
        """Return the graph's session, loading it where it is not in memory."""
        with self._lock:
            if self._closed:
                raise RunError(f"the model of {self._bundle.path} is closed; load the bundle again")
            session = self._loaded.get(bucket.model)
            if session is None:
                session = open_runner(self._runner, self._bundle.path / bucket.model, threads=self._threads)
                self._loaded[bucket.model] = session
                self._recorder.count_load()
            self._loaded.move_to_end(bucket.model)
            while self._resident is not None and len(self._loaded) > self._resident:
                self._loaded.popitem(last=False)  # freed when the last request that runs in it ends
            return session
