"""Helpers for the tests of several folders: commands and processes, generated images, tiny runs, a loopback Hub."""
