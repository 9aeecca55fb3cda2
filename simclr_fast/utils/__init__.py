"""What every part leans on: checkpoints, ranks, signals, file locks, optional packages."""
