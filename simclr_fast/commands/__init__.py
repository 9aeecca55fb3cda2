"""The commands of simclr-fast: each module's `run(arguments)` returns the exit status."""
