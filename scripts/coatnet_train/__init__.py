"""What the commands of scripts/ share: see docs/architecture.md for the order of the sub-packages."""
