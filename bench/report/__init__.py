"""Tables and figures of the committed results, in README.md and docs/: ``python -m bench.report``."""
