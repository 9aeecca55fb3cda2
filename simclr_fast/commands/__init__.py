"""The commands of simclr-fast, one module each: a frozen dataclass of options, and `run`."""
