"""What `furiosa_llm.runtime` exports, for type checkers; `__init__.py` imports a name when it is asked for."""

from .adapters.adapter import LoRARequest as LoRARequest
from .artifact.reader import Artifact as Artifact
from .artifact.reader import open_artifact as open_artifact
from .async_engine import AsyncLLMEngine as AsyncLLMEngine
from .engine.buckets import Bucket as Bucket
from .engine.buckets import BucketConfig as BucketConfig
from .engine.engine_args import AsyncEngineArgs as AsyncEngineArgs
from .engine.engine_args import EngineArgs as EngineArgs
from .engine.engine_args import SchedulerConfig as SchedulerConfig
from .errors import EngineDeadError as EngineDeadError
from .errors import InputError as InputError
from .errors import ReplicaError as ReplicaError
from .execution.executor import Executor as Executor
from .llm import LLM as LLM
from .llm_engine import LLMEngine as LLMEngine
from .requests.outputs import CompletionOutput as CompletionOutput
from .requests.outputs import RequestOutput as RequestOutput
from .tokens.sampling_params import RequestOutputKind as RequestOutputKind
from .tokens.sampling_params import SamplingParams as SamplingParams
from .tokens.sampling_params import SamplingType as SamplingType
from .tokens.structured_outputs import StructuredOutputsParams as StructuredOutputsParams
from .verification.parity import verify_against as verify_against

__all__: list[str]
