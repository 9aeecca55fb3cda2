"""Which layers of a model replay recomputes together."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Layers with weights per block, where a plain Sequential of layers is cut into blocks.
_LAYERS_PER_BLOCK = 2


class Block(NamedTuple):
    """Some layers that are recomputed together.

    name: as in named_modules. owner: the module, or the Sequential whose layers from `first` to
    before `last` are the block.
    """

    name: str
    owner: nn.Module
    first: int | None = None
    last: int | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All modules inside, by name."""
        if self.first is None:
            tops = [(self.name, self.owner)]
        else:
            children = list(self.owner.named_children())[self.first : self.last]
            prefix = f"{self.name}." if self.name else ""
            tops = [(f"{prefix}{name}", child) for name, child in children]
        return {name: m for top, child in tops for name, m in child.named_modules(prefix=top)}

    @property
    def forward(self) -> Callable[..., Any]:
        if self.first is None:
            return self.owner.forward
        layers = list(self.owner.children())[self.first : self.last]

        def run(x: Any) -> Any:
            for layer in layers:
                x = layer(x)
            return x

        return run


def recomputed_blocks(model: nn.Module) -> list[Block]:
    """The blocks of `model`: items of a Sequential or ModuleList with several layers inside.

    A block with more than half of all parameters counts as a wrapper: its blocks are taken. A model
    without blocks whose Sequentials hold single layers, such as VGG, is cut after every second
    layer with weights.

    Raises:
        ValueError: there are no blocks.
    """
    half = sum(p.numel() for p in model.parameters()) / 2

    def search(name: str, module: nn.Module, listed: bool) -> list[Block]:
        layers = sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())
        is_list = isinstance(module, _CONTAINERS)
        inside = [
            block
            for child_name, child in module.named_children()
            for block in search(f"{name}.{child_name}" if name else child_name, child, is_list)
        ]
        # A list that has no blocks, in a list: a Sequential of a convolution and a batch norm.
        small = isinstance(module, nn.Sequential) and not inside
        if not listed or layers < 2 or (is_list and not small):
            return inside
        if sum(p.numel() for p in module.parameters()) <= half:
            return [Block(name, module)]
        return inside or [Block(name, module)]

    found = search("", model, False) or [
        block for name, m in model.named_modules() for block in _cut(name, m)
    ]
    if not found:
        raise ValueError(
            "memory='replay' recomputes the blocks in a model's Sequential or ModuleList; "
            f"{type(model).__name__} has none; memory='plain' can run it"
        )
    return found


def _cut(name: str, module: nn.Module) -> list[Block]:
    """A Sequential of layers in blocks of `_LAYERS_PER_BLOCK` layers with weights; [] if short."""
    if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
        return []
    layers = list(module.children())
    weighted = [i for i, m in enumerate(layers) if any(p.dim() > 1 for p in m.parameters())]
    if len(weighted) <= _LAYERS_PER_BLOCK:
        return []
    starts = [0, *weighted[_LAYERS_PER_BLOCK::_LAYERS_PER_BLOCK]]
    ends = [*starts[1:], len(layers)]
    return [Block(name, module, i, j) for i, j in zip(starts, ends, strict=True)]
