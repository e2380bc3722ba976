"""Run folders: checkpoints, resuming, and loading trained models."""
