"""torch.fx's tracer, for one thread and one context.

While it traces, torch.fx replaces functions of nn.Module in the whole process. So two traces must
not overlap, and the modules that other threads call meanwhile must not be traced.
"""

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from simclr_fast.large_batch.refusals import context, refuse_context

_ONE_AT_A_TIME = threading.RLock()


class Tracer(fx.Tracer):
    """Traces calls of the thread that made it.

    Raises:
        ValueError: the forward switches gradients or autocast on or off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context, self.thread = context(), threading.get_ident()

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        with _ONE_AT_A_TIME:
            return super().trace(*args, **kwargs)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        refuse_context(self.context)
        return super().create_proxy(*args, **kwargs)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
