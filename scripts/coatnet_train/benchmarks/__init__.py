"""Timings of models, operators and loaders."""
