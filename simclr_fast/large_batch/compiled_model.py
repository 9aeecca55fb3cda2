"""A whole model's forward through `torch.compile`, for memory plain and grad-cache.

The compiled function stands beside the model and not in its place: its modules, their names and
hooks stay, so checkpoints, averages of the weights and other users of the model see no difference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast.large_batch.compiled_regions import compile_failures


class CompiledModel:
    """Calls `model`, compiled.

    Each shape of a view has at most two graphs: one for the number of rows that came first, such as
    a batch, and one for all other numbers, such as a last batch. (Numbers below 2, which
    torch.compile always takes as constants, have their own.)
    """

    def __init__(self, model: nn.Module) -> None:
        def run(views: Tensor) -> Any:
            return model(views)

        # A code object of its own: torch.compile keeps the graphs of a code object together, also
        # those for other models, and makes only a few.
        run.__code__ = run.__code__.replace()
        self._function = torch.compile(run)
        self._rows: dict[torch.Size, int] = {}

    def __call__(self, views: Tensor) -> Any:
        rows = len(views)
        first = self._rows.setdefault(views.shape[1:], rows)
        # The marks are for this call, so not on the caller's tensor.
        marked = views.view_as(views)
        torch._dynamo.mark_static(marked, list(range(1, views.dim())))
        if rows == first or rows < 2:
            torch._dynamo.mark_static(marked, 0)
        else:
            torch._dynamo.maybe_mark_dynamic(marked, 0)
        with compile_failures():
            return self._function(marked)
