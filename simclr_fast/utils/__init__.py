"""What every part uses: checkpoints, groups of processes, signals, locks, optional packages."""
