"""Timings of models, operators, loaders and other runtimes, and the GPU report."""
