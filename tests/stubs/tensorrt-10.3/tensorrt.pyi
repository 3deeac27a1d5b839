"""TensorRT 10.3 of JetPack 6: what edgecomp calls, from NVIDIA's Python API reference, and what 11 removed.

Written by hand, and no more than needed. A test's stand-in for the module has these names alone.
"""

from typing import ClassVar

__version__: str

class _Enum:
    name: str
    def __int__(self) -> int: ...

class BuilderFlag(_Enum):
    FP16: ClassVar[BuilderFlag]
    BF16: ClassVar[BuilderFlag]
    INT8: ClassVar[BuilderFlag]
    FP8: ClassVar[BuilderFlag]
    INT4: ClassVar[BuilderFlag]
    OBEY_PRECISION_CONSTRAINTS: ClassVar[BuilderFlag]
    PREFER_PRECISION_CONSTRAINTS: ClassVar[BuilderFlag]
    DEBUG: ClassVar[BuilderFlag]
    GPU_FALLBACK: ClassVar[BuilderFlag]
    REFIT: ClassVar[BuilderFlag]
    DISABLE_TIMING_CACHE: ClassVar[BuilderFlag]
    TF32: ClassVar[BuilderFlag]
    SPARSE_WEIGHTS: ClassVar[BuilderFlag]
    STRIP_PLAN: ClassVar[BuilderFlag]

class NetworkDefinitionCreationFlag(_Enum):
    EXPLICIT_BATCH: ClassVar[NetworkDefinitionCreationFlag]
    STRONGLY_TYPED: ClassVar[NetworkDefinitionCreationFlag]

class ProfilingVerbosity(_Enum):
    LAYER_NAMES_ONLY: ClassVar[ProfilingVerbosity]
    NONE: ClassVar[ProfilingVerbosity]
    DETAILED: ClassVar[ProfilingVerbosity]

class MemoryPoolType(_Enum):
    WORKSPACE: ClassVar[MemoryPoolType]
    DLA_MANAGED_SRAM: ClassVar[MemoryPoolType]
    DLA_LOCAL_DRAM: ClassVar[MemoryPoolType]
    DLA_GLOBAL_DRAM: ClassVar[MemoryPoolType]
    TACTIC_DRAM: ClassVar[MemoryPoolType]
    TACTIC_SHARED_MEMORY: ClassVar[MemoryPoolType]

class TacticSource(_Enum):
    CUBLAS: ClassVar[TacticSource]
    CUBLAS_LT: ClassVar[TacticSource]
    CUDNN: ClassVar[TacticSource]
    EDGE_MASK_CONVOLUTIONS: ClassVar[TacticSource]
    JIT_CONVOLUTIONS: ClassVar[TacticSource]

class LayerInformationFormat(_Enum):
    ONELINE: ClassVar[LayerInformationFormat]
    JSON: ClassVar[LayerInformationFormat]

class DataType(_Enum):
    FLOAT: ClassVar[DataType]
    HALF: ClassVar[DataType]
    INT8: ClassVar[DataType]
    INT32: ClassVar[DataType]
    BOOL: ClassVar[DataType]
    UINT8: ClassVar[DataType]
    FP8: ClassVar[DataType]
    BF16: ClassVar[DataType]
    INT64: ClassVar[DataType]
    INT4: ClassVar[DataType]

class LayerType(_Enum):
    CONVOLUTION: ClassVar[LayerType]
    CAST: ClassVar[LayerType]
    ACTIVATION: ClassVar[LayerType]
    DECONVOLUTION: ClassVar[LayerType]
    ELEMENTWISE: ClassVar[LayerType]
    SHUFFLE: ClassVar[LayerType]
    CONSTANT: ClassVar[LayerType]
    MATRIX_MULTIPLY: ClassVar[LayerType]
    EINSUM: ClassVar[LayerType]
    NORMALIZATION: ClassVar[LayerType]
    SOFTMAX: ClassVar[LayerType]
    QUANTIZE: ClassVar[LayerType]
    DEQUANTIZE: ClassVar[LayerType]
    PLUGIN_V3: ClassVar[LayerType]

class ILogger:
    class Severity(_Enum):
        INTERNAL_ERROR: ClassVar[ILogger.Severity]
        ERROR: ClassVar[ILogger.Severity]
        WARNING: ClassVar[ILogger.Severity]
        INFO: ClassVar[ILogger.Severity]
        VERBOSE: ClassVar[ILogger.Severity]

    def __init__(self) -> None: ...
    def log(self, severity: ILogger.Severity, msg: str) -> None: ...

class IHostMemory:
    nbytes: int
    def __buffer__(self, flags: int, /) -> memoryview: ...

class ITensor:
    name: str
    shape: tuple[int, ...]
    dtype: DataType

class ILayer:
    name: str
    type: LayerType
    metadata: str
    num_inputs: int
    num_outputs: int
    precision: DataType
    precision_is_set: bool
    def set_output_type(self, index: int, dtype: DataType) -> None: ...
    def get_input(self, index: int) -> ITensor | None: ...
    def get_output(self, index: int) -> ITensor | None: ...

class INetworkDefinition:
    num_layers: int
    num_inputs: int
    num_outputs: int
    def get_layer(self, index: int) -> ILayer: ...
    def get_input(self, index: int) -> ITensor: ...
    def get_output(self, index: int) -> ITensor: ...
    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool: ...

class ITimingCache:
    def serialize(self) -> IHostMemory: ...
    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def reset(self) -> bool: ...

class IProgressMonitor:
    def __init__(self) -> None: ...
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step_index: int) -> bool: ...
    def phase_finish(self, phase_name: str) -> None: ...

class IInt8Calibrator: ...
class IAlgorithmSelector: ...

class IBuilderConfig:
    profiling_verbosity: ProfilingVerbosity
    builder_optimization_level: int
    max_aux_streams: int
    progress_monitor: IProgressMonitor | None
    int8_calibrator: IInt8Calibrator | None
    algorithm_selector: IAlgorithmSelector | None
    quantization_flags: int
    def set_flag(self, flag: BuilderFlag) -> None: ...
    def clear_flag(self, flag: BuilderFlag) -> None: ...
    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None: ...
    def set_tactic_sources(self, tactic_sources: int) -> bool: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache | None: ...

class IPluginRegistry:
    all_creators: list[object]
    def load_library(self, plugin_path: str) -> object: ...
    def deregister_library(self, handle: object) -> None: ...

class Builder:
    platform_has_fast_fp16: bool
    platform_has_fast_int8: bool
    def __init__(self, logger: ILogger) -> None: ...
    def create_network(self, flags: int = 0) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None: ...
    def get_plugin_registry(self) -> IPluginRegistry: ...

class ParserError:
    def code(self) -> int: ...
    def desc(self) -> str: ...
    def node(self) -> int: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...
    def local_function_stack(self) -> list[str]: ...

class OnnxParser:
    num_errors: int
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None: ...
    def parse(self, model: bytes, path: str | None = None) -> bool: ...
    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...

class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str: ...

class TensorIOMode(_Enum):
    NONE: ClassVar[TensorIOMode]
    INPUT: ClassVar[TensorIOMode]
    OUTPUT: ClassVar[TensorIOMode]

class Dims:
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...

class IProfiler:
    def __init__(self) -> None: ...
    def report_layer_time(self, layer_name: str, ms: float) -> None: ...

class IExecutionContext:
    profiler: IProfiler | None
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...

class ICudaEngine:
    num_io_tensors: int
    def create_engine_inspector(self) -> EngineInspector: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> TensorIOMode: ...
    def get_tensor_shape(self, name: str) -> Dims: ...
    def get_tensor_dtype(self, name: str) -> DataType: ...
    def create_execution_context(self) -> IExecutionContext | None: ...

class Runtime:
    def __init__(self, logger: ILogger) -> None: ...
    def deserialize_cuda_engine(self, serialized_engine: bytes | memoryview) -> ICudaEngine | None: ...
    def get_plugin_registry(self) -> IPluginRegistry: ...
