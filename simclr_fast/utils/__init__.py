"""Shared by all packages: checkpoints, process groups, signals, locks, optional packages."""
