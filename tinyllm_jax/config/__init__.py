"""Every setting of the toolkit: its default, unit, range and the rules between settings.

Defaults live here and nowhere else. Presets are TOML files in `configs/`; the command line goes
over them (`--section.key VALUE`).
"""

from tinyllm_jax.config.commands import (
    EvaluateConfig,
    EvaluationConfig,
    EvaluationDataConfig,
    GenerateConfig,
    ServeConfig,
    TalkConfig,
    TalkSamplingConfig,
    TerminalConfig,
)
from tinyllm_jax.config.data import ChatConfig, DataConfig, TokenizerConfig
from tinyllm_jax.config.devices import DistributedConfig, ParallelConfig
from tinyllm_jax.config.loading import (
    config_from_table,
    config_to_table,
    data_dir,
    load_config,
    merge_settings,
    mode_names,
    preset_names,
    presets_dir,
    read_preset,
)
from tinyllm_jax.config.mode_rules import READ_BY
from tinyllm_jax.config.model import ModelConfig, divisors
from tinyllm_jax.config.modes import ALL_PROJECTIONS, LoraConfig, PreferenceConfig, RlhfConfig
from tinyllm_jax.config.run import Config, RunConfig
from tinyllm_jax.config.serving import EngineConfig, SamplingConfig, ServerConfig
from tinyllm_jax.config.training import (
    LOGGERS,
    CheckpointConfig,
    LoggingConfig,
    MonitorConfig,
    OptimizerConfig,
    TrainConfig,
    is_span,
)

__all__ = [
    "ALL_PROJECTIONS",
    "LOGGERS",
    "READ_BY",
    "ChatConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "EvaluationDataConfig",
    "GenerateConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreferenceConfig",
    "RlhfConfig",
    "RunConfig",
    "SamplingConfig",
    "ServeConfig",
    "ServerConfig",
    "TalkConfig",
    "TalkSamplingConfig",
    "TerminalConfig",
    "TokenizerConfig",
    "TrainConfig",
    "config_from_table",
    "config_to_table",
    "data_dir",
    "divisors",
    "is_span",
    "load_config",
    "merge_settings",
    "mode_names",
    "preset_names",
    "presets_dir",
    "read_preset",
]
