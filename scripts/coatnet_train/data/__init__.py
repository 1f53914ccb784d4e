"""Image datasets and their loaders."""
