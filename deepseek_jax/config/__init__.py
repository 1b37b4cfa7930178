"""All settings of an experiment, in frozen dataclasses that check themselves (no jax here).

    python -m deepseek_jax.config       prints the reference page of all keys
"""

from deepseek_jax.config.load import Config, as_dict, default_config, freeze, load_config, named_configs
from deepseek_jax.config.mesh import MeshConfig, PipelineConfig
from deepseek_jax.config.model import GROUP_LIMITED, PARTS, FP8Config, ModelConfig, Yarn
from deepseek_jax.config.posttraining import DistillConfig, GrpoConfig, LoraConfig, PreferenceConfig, RolloutConfig
from deepseek_jax.config.presets import PRESETS, model_config
from deepseek_jax.config.schema import Checked, ConfigError, build, did_you_mean, key, shown, usable_path
from deepseek_jax.config.training import BalanceConfig, DataConfig, InitConfig, OptimizerConfig, TrainConfig

__all__ = ["GROUP_LIMITED", "PARTS", "PRESETS", "BalanceConfig", "Checked", "Config", "ConfigError", "DataConfig",
           "DistillConfig", "FP8Config", "GrpoConfig", "InitConfig", "LoraConfig", "MeshConfig", "ModelConfig",
           "OptimizerConfig", "PipelineConfig", "PreferenceConfig", "RolloutConfig", "TrainConfig", "Yarn", "as_dict",
           "build", "default_config", "did_you_mean", "freeze", "key", "load_config", "model_config", "named_configs",
           "shown", "usable_path"]
