"""Command lines, files, devices and provenance; nothing here knows images or models."""
