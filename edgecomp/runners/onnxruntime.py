"""ONNX Runtime as a runner: one provider, asked for by name and never exchanged in silence."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from edgecomp.errors import MissingDependency, RunError
from edgecomp.runners import Array

__all__ = ["OnnxRuntimeRunner"]

_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": 0}}  # fp32 means fp32; ONNX Runtime's default would round to tf32


class OnnxRuntimeRunner:
    """An ONNX Runtime session.

    Args:
        model: the ONNX file; its external data lies beside it.
        name: the runner's name, for reports.
        provider: the execution provider; RunError where it does not come up.
        threads: intra-op threads on the CPU; 0: ONNX Runtime's choice.
        takes_turns: threads rest as soon as a run ends, where else they spin for a while and take cores from others.
        share_weights: matrices stay where their file is mapped, where else each session packs its own copies.
        weights: folder of the external data; none: it lies beside the model.
    """

    def __init__(
        self,
        model: Path,
        *,
        name: str,
        provider: str,
        threads: int,
        takes_turns: bool,
        share_weights: bool,
        weights: Path | None = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            extra = "gpu" if provider == "CUDAExecutionProvider" else "ort"
            raise MissingDependency("onnxruntime", needed_for=f"the runner {name!r}", extra=extra) from error
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise RunError(
                f"ONNX Runtime {onnxruntime.__version__} here has no {provider}, only {', '.join(available)}; "
                "install onnxruntime-gpu (`edgecomp doctor` says how) or use --runner onnxruntime"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Where the CPU has no VNNI, sums of two int8 products would saturate at 16 bits, and the numbers be wrong.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if takes_turns:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if share_weights:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if weights is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(model) if weights is None else model.read_bytes(),
                options,
                providers=[(provider, _OPTIONS.get(provider, {}))],
            )
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no public base class
            first = str(error).strip().splitlines()[0]
            raise RunError(
                f"ONNX Runtime cannot load {model}: {first}; `edgecomp inspect` shows what it holds"
            ) from None
        if self._session.get_providers()[0] != provider:
            raise RunError(
                f"ONNX Runtime runs {model.name} on {self._session.get_providers()[0]} where {provider} was asked for; "
                "check the CUDA and cuDNN libraries with `edgecomp doctor`"
            )
        self.name = name
        self.version = f"{name} {onnxruntime.__version__}"
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())
        self.inputs = tuple((item.name, tuple(item.shape), str(item.type)) for item in self._session.get_inputs())

    def __enter__(self) -> OnnxRuntimeRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the session."""
        self._session = None

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the model once; a wrong name, shape or type is an error that names it."""
        try:
            outputs = self._session.run(None, inputs)
        except Exception as error:  # noqa: BLE001 - as above
            first = str(error).strip().splitlines()[0]
            raise RunError(
                f"ONNX Runtime could not run the model: {first}; check the inputs' names and shapes"
            ) from None
        return dict(zip(self.output_names, outputs, strict=True))
