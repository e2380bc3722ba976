"""The report as one HTML page without outside resources, written from an ``Evaluation``."""
