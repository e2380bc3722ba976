"""Run configurations: typed dataclasses, YAML files and presets."""

from tal_fast.config.parse import load_config, preset_names
from tal_fast.config.schema import Config, DataConfig, MethodConfig, ModelConfig, OptimConfig

__all__ = ["Config", "DataConfig", "MethodConfig", "ModelConfig", "OptimConfig", "load_config", "preset_names"]
