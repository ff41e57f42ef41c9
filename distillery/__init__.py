"""Distillery: dataset distillation as an installable, tested, resumable system."""

__version__ = "0.1.0"
