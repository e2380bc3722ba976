"""Run folders: their files, checkpoints, resuming, and loading trained models."""
