"""Run folders: their files, checkpoints, resuming, loading trained models, and passes of a model with their cache."""
