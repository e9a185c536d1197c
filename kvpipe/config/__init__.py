"""The configuration: pydantic models are the single source of keys, types, defaults and their documentation.

`config/schema.json` and `config/README.md` are generated from them (`make config`), the shipped YAML files are validated
against them by a test, and the Snakefile validates before any job starts.
"""

from kvpipe.config.alignment import LayerConfig, Reading, TimeConfig
from kvpipe.config.arms import Arm, OnPolicyConfig
from kvpipe.config.data import Chat, DataConfig, EmbeddedData, FileData, HubData, RowData, ShortReasoning, Template
from kvpipe.config.fusions import FusionSettings
from kvpipe.config.kinds import ENGINES, FUSIONS, PROJECTORS, TERMS
from kvpipe.config.loading import load, lock_path, overridden, parse, read, with_lock
from kvpipe.config.models import (
    HubModel,
    Loading,
    LocalModel,
    LockedFile,
    LockedRepo,
    Model,
    PretrainModel,
    PrunedModel,
    RandomModel,
    Recipe,
    ScratchModel,
    TokenizerRecipe,
)
from kvpipe.config.presets import PRESETS
from kvpipe.config.projection import FitConfig, ProjectorSettings
from kvpipe.config.schema import Config
from kvpipe.config.section import ConfigError
from kvpipe.config.settings import (
    GENERATED,
    LOSS_ON,
    EvaluateConfig,
    LoraConfig,
    LossOn,
    SandboxConfig,
    ScoringConfig,
    StatsConfig,
    StoreConfig,
    TeacherTextConfig,
    TrainConfig,
)
from kvpipe.config.terms import ScheduleConfig, TermSettings
