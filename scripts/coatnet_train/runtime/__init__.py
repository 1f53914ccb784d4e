"""Command lines, files, devices and provenance, independent of images and models."""
