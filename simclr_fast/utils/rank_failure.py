"""The error of a run whose other ranks died. Without torch: the command line knows it too."""


class RankFailure(RuntimeError):
    """Another rank died or stalled; the message names it and the step."""
