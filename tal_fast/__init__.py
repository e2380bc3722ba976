"""Typicalness-Aware Learning, fast."""
