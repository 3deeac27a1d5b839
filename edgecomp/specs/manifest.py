"""What a bundle's manifest says: its graphs, its router, its files. `docs/bundle.md` documents every field."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edgecomp.specs.budget import TokenBudget
from edgecomp.specs.order import Prefix
from edgecomp.specs.origin import WeightsOrigin
from edgecomp.specs.precision import Rest, WrittenPrecision
from edgecomp.specs.preprocess import Preprocess
from edgecomp.specs.recipe import Recipe, Source
from edgecomp.specs.site import Output, Placement
from edgecomp.specs.tensor import TensorSpec

__all__ = [
    "Bucket",
    "Calibration",
    "Graph",
    "Handed",
    "Joint",
    "Manifest",
    "PartGraph",
    "PlainGraph",
    "RouterGraph",
    "RouterRecord",
    "Samples",
    "StoredFile",
    "ThenRecord",
]


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in the bundle's root."""

    name: str
    role: Literal["model", "plain", "stem", "router", "weights", "golden"]
    size: int
    sha256: str


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A static graph at one batch size.

    Attributes:
        model: file name of the graph.
        inputs, outputs: of stem and graph in a row, where it has a stem.
        flops: of one run at this batch, the stem's with it; 2 for a multiply-add of matrix products and convolutions.
        ops: how often each op occurs in the file.
        stem: file name of the graph whose outputs this one reads; "" where it is whole.
        precision: what the graph computes in; a router, and a graph that computes nothing, are in fp32 in any bundle.
        islands: name of each node that stays in fp32, and why; in a quantised graph, products that are left, too.
        quantized: names of the nodes that compute on int8 or fp8 numbers.
    """

    model: str
    batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    flops: int
    ops: dict[str, int]
    stem: str = ""
    precision: WrittenPrecision = "fp32"
    islands: dict[str, str] = {}
    quantized: tuple[str, ...] = ()


class Handed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the first of two methods hands to the second within one graph.

    Attributes:
        spec: as a stem would give it.
        value: what the graph calls it.
    """

    spec: TensorSpec
    value: str


class Joint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where two methods in one graph meet.

    Attributes:
        reads: names of the inputs that the first takes.
        hands: what goes from it to the second, and past the second.
    """

    reads: tuple[str, ...]
    hands: tuple[Handed, ...]


class Bucket(Graph, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The graph of a budget.

    Attributes:
        own_bytes: of weights and constants in the shared file that no other budget reads.
        joint: of two methods in one graph; none elsewhere.
    """

    budget: TokenBudget
    own_bytes: int = 0
    joint: Joint | None = None

    @property
    def golden_part(self) -> str:
        """Whose outputs the golden file holds under its name."""
        return f"m{self.budget.tokens_out}"

    @property
    def choice_part(self) -> str:
        """Whose choices the golden file holds under its name."""
        return self.golden_part


class PlainGraph(Graph, frozen=True, forbid_unknown_fields=True):
    """The model without its compressor."""

    @property
    def golden_part(self) -> str:
        """Whose outputs the golden file holds under its name."""
        return "plain"


class PartGraph(Graph, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One of two methods in a row, by itself; no manifest holds it.

    Attributes:
        part: whose outputs the golden file holds under its name.
        label: what reports call it.
        choice_part: whose choices the golden file holds under its name.
        half: of one graph for both, the half that is cut out; "" where the part is a file of the bundle.
        joint: where such a graph is cut.
    """

    part: str
    label: str
    choice_part: str
    half: Literal["", "first", "second"] = ""
    joint: Joint | None = None

    @property
    def golden_part(self) -> str:
        """Whose outputs the golden file holds under its name."""
        return self.part


class RouterGraph(Graph, frozen=True, forbid_unknown_fields=True):
    """The graph that names a bucket."""

    @property
    def golden_part(self) -> str:
        """Whose outputs the golden file holds under its name."""
        return "router"


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the thresholds of a router were set with.

    Attributes:
        target: what was asked for, for example `mean tokens 98`.
        data: name of the folder, never its path.
        sha256: over the images, prepared and in their order, each with its question where there was one.
        images: how many.
        mean_tokens: kept on these images.
        agreement: with the largest bucket on these images, 0 to 1; `agreement_of` says of what.
    """

    target: str
    data: str
    sha256: str
    images: int
    mean_tokens: float
    agreement: float
    agreement_of: str


class ThenRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The second of two methods in a row.

    Attributes:
        method, preset: its recipe's names.
        params: all its parameters.
        between: tokens that the first hands it.
        weights: where its weights come from.
        source: of its recipe.
    """

    method: str
    preset: str
    params: dict[str, Any]
    between: int
    weights: WeightsOrigin
    source: Source


class RouterRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which router a bundle has.

    Attributes:
        name: of the router.
        params: its parameters.
        reads_words: whether the words of a request take part.
        signals: names of what it tells of a request.
        thresholds: one for each bucket but the largest: a request whose need reaches it goes above that bucket.
        weights: where its weights come from; none where it has none.
        graphs: one for each batch; none of `fixed`.
        fixed: tokens kept by the bucket of `fixed`; 0 for all others.
        calibration: what set the thresholds; none: they are the router's own.
    """

    name: str
    params: dict[str, Any]
    reads_words: bool
    signals: tuple[str, ...]
    thresholds: tuple[float, ...]
    weights: WeightsOrigin | None
    graphs: tuple[RouterGraph, ...]
    fixed: int = 0
    calibration: Calibration | None = None


class Samples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a precision was calibrated with.

    Attributes:
        source: the name of a folder, never its path, or what was made in its place.
        count: how many inputs.
        sha256: over all of them, prepared and in their order.
    """

    source: str
    count: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle is; `docs/bundle.md` says what each field means."""

    schema: int
    kind: str
    request: str
    method: str
    preset: str
    placement: Placement
    params: dict[str, Any]
    recipe: Recipe
    backbone: str
    feature_layer: int
    num_prefix_tokens: int
    image_size: int
    input_dtype: str
    output: Output
    precision: WrittenPrecision
    opset: int
    seed: int
    weights: WeightsOrigin
    backbone_weights: WeightsOrigin | None
    unread: dict[str, str]
    parameters: int
    plain_name: str
    plain_flops: int
    preprocess: Preprocess | None
    buckets: tuple[Bucket, ...]
    plain: tuple[PlainGraph, ...]
    stem: tuple[Graph, ...]
    router: RouterRecord | None
    tools: dict[str, str]
    notes: tuple[str, ...]
    files: tuple[StoredFile, ...]
    digest: str = ""
    rest: Rest = "fp32"
    fp32: tuple[str, ...] = ()
    samples: Samples | None = None
    prefix: Prefix = ""
    then: ThenRecord | None = None

    @property
    def methods(self) -> str:
        """The method, or both methods in a row."""
        return f"{self.method} then {self.then.method}" if self.then is not None else self.method

    def parts_of(self, bucket: Bucket) -> tuple[PartGraph, ...]:
        """Return the two methods of a bucket, each by itself; none where it has one method."""
        stem = next((graph for graph in self.stem if graph.model == bucket.stem), None)
        if self.then is None:
            return ()
        if stem is None:
            return self._halves_of(bucket)
        own = tuple(spec for spec in bucket.inputs if spec.name not in {given.name for given in stem.inputs})
        first, second = f"{stem.model} ({self.method} alone)", f"{bucket.model} ({self.then.method} alone)"
        return (
            PartGraph(
                stem.model,
                stem.batch,
                stem.inputs,
                stem.outputs,
                stem.flops,
                stem.ops,
                part="stem",
                label=first,
                choice_part="stem",
            ),
            PartGraph(
                bucket.model,
                bucket.batch,
                (*stem.outputs, *own),
                bucket.outputs,
                bucket.flops - stem.flops,
                bucket.ops,
                part=bucket.golden_part,
                label=second,
                choice_part=bucket.golden_part,
            ),
        )

    def _halves_of(self, bucket: Bucket) -> tuple[PartGraph, ...]:
        """Return the halves of one graph for two methods, which are cut out of it to be judged; nothing counts them."""
        if self.then is None or bucket.joint is None:
            return ()
        handed = tuple(one.spec for one in bucket.joint.hands)
        first = tuple(spec for spec in bucket.inputs if spec.name in bucket.joint.reads)
        own = tuple(spec for spec in bucket.inputs if spec not in first)
        halves: tuple[tuple[Literal["first", "second"], str, str, str], ...] = (
            ("first", self.method, "stem", "stem"),
            ("second", self.then.method, bucket.golden_part, f"then-{bucket.golden_part}"),
        )
        return tuple(
            PartGraph(
                bucket.model,
                bucket.batch,
                first if half == "first" else (*handed, *own),
                handed if half == "first" else bucket.outputs,
                0,
                {},
                part=part,
                label=f"{bucket.model} ({method} alone)",
                choice_part=choices,
                half=half,
                joint=bucket.joint,
            )
            for half, method, part, choices in halves
        )

    @property
    def unknown_to_cpu(self) -> str:
        """The type of the graphs that ONNX Runtime's CPU kernels do not know: fp8 or bf16; "" where they know all."""
        if self.precision == "fp8":
            return "fp8"
        return "bf16" if self.rest == "bf16" else ""

    @property
    def runs_on_cpu(self) -> bool:
        """Whether ONNX Runtime's CPU kernels know all types of the graphs."""
        return not self.unknown_to_cpu

    @property
    def routers(self) -> tuple[RouterGraph, ...]:
        """The router's graphs; none without a router, and of `fixed`."""
        return self.router.graphs if self.router is not None else ()

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """All graphs: stems, router, buckets, plain."""
        return (*self.stem, *self.routers, *self.buckets, *self.plain)
