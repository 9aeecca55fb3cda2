"""simclr_fast: the parts of SimCLR, each fast, exact and usable alone."""

__version__ = "0.1.0"
