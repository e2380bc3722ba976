"""Run configurations: typed dataclasses, YAML files and presets."""
