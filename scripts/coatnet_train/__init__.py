"""Modules that the commands of scripts/ share; docs/architecture.md gives the order of the sub-packages."""
