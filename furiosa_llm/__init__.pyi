"""The public names, for type checkers; `__init__.py` imports one when it is asked for."""

from .builder import ArtifactBuilder as ArtifactBuilder
from .builder import BuildReport as BuildReport
from .builder import ModelPlan as ModelPlan
from .builder import plan_model as plan_model
from .runtime import LLM as LLM
from .runtime import AsyncEngineArgs as AsyncEngineArgs
from .runtime import AsyncLLMEngine as AsyncLLMEngine
from .runtime import Bucket as Bucket
from .runtime import BucketConfig as BucketConfig
from .runtime import CompletionOutput as CompletionOutput
from .runtime import EngineArgs as EngineArgs
from .runtime import EngineDeadError as EngineDeadError
from .runtime import LLMEngine as LLMEngine
from .runtime import LoRARequest as LoRARequest
from .runtime import ReplicaError as ReplicaError
from .runtime import RequestOutput as RequestOutput
from .runtime import RequestOutputKind as RequestOutputKind
from .runtime import SamplingParams as SamplingParams
from .runtime import SchedulerConfig as SchedulerConfig
from .runtime import StructuredOutputsParams as StructuredOutputsParams
from .runtime.artifact.errors import ArtifactError as ArtifactError
from .runtime.artifact.errors import FuriosaLLMError as FuriosaLLMError
from .version import __full_version__ as __full_version__
from .version import __version__ as __version__

__all__: list[str]
