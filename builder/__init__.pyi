"""What `furiosa_llm.builder` exports, for type checkers; `__init__.py` imports a name when it is asked for."""

from .artifact_builder import ArtifactBuilder as ArtifactBuilder
from .errors import BuildError as BuildError
from .errors import ModelLoadError as ModelLoadError
from .errors import OptionError as OptionError
from .errors import OutputError as OutputError
from .errors import PlanError as PlanError
from .errors import ShapeError as ShapeError
from .errors import UnsupportedModelError as UnsupportedModelError
from .model_plan import plan_model as plan_model
from .plan.tactics import Tactics as Tactics
from .plan.tactics import read_tactics as read_tactics
from .plan_figures import ModelPlan as ModelPlan
from .reshard import reshard as reshard
from .reuse import build_by_plan_of as build_by_plan_of
from .write.build_report import BuildReport as BuildReport
from .write.build_report import Decision as Decision

__all__: list[str]
