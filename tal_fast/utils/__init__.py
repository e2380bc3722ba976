"""Helpers without knowledge of the project: files, processes, signals."""
