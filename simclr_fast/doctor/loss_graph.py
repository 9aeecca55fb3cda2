"""Read the autograd graph between a loss and the embeddings."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


@dataclass
class LossGraph:
    """What lies between a loss and the nearest outputs of modules.

    outputs: those outputs, in the order in which they were made. leaves: matrices that require a
    gradient and are neither parameters nor outputs. divisors: numbers by which matrices are
    divided. twice: divisors that occur twice on the way to one output, at least once after the
    matrix product. half: dtypes of 16 bits in which similarities or softmax were computed.
    """

    outputs: list[Any] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    divisors: list[float] = field(default_factory=list)
    twice: list[float] = field(default_factory=list)
    half: set[torch.dtype] = field(default_factory=set)


# Divisor → how often it occurs on one path: before and after the matrix product.
_Path = dict[float, tuple[int, int]]


# A node of the graph and the number of its output: `next_functions` has such pairs.
Edge = tuple[Any, int]


def edge_of(value: Tensor) -> Edge:
    return value.grad_fn, value.output_nr


def read_graph(root: Tensor, outputs: Mapping[Edge, Any], parameters: Set[int]) -> LossGraph:
    """Walk from `root` to the edges in `outputs`. parameters: ids of those of the model."""
    graph = LossGraph()
    found: set[Edge] = set()
    # For each finished node: the divisors on the way below it, and whether a matrix product is.
    paths: dict[Any, tuple[_Path, bool]] = {}
    stack = [(edge_of(root), False)]
    while stack:
        edge, below_done = stack.pop()
        node, _ = edge
        if edge in outputs:
            found.add(edge)
            continue
        if node is None or node in paths:
            continue
        if not node.next_functions:
            paths[node] = ({}, False)
            leaf = getattr(node, "variable", None)
            free = isinstance(leaf, Tensor) and not isinstance(leaf, torch.nn.Parameter)
            if leaf is not None and free and leaf.dim() == 2 and id(leaf) not in parameters:
                graph.leaves.append(leaf)
        elif not below_done:
            stack.append((edge, True))
            stack += [(below, False) for below in node.next_functions]
        else:
            ends = [e for e in node.next_functions if e not in outputs and e[0] in paths]
            paths[node] = _join(node, graph, [paths[end] for end, _ in ends])
    graph.outputs = [output for edge, output in outputs.items() if edge in found]
    path = paths.get(root.grad_fn, ({}, False))[0]
    graph.twice = [c for c, (before, after) in path.items() if after > 1 or (after and before)]
    return graph


def _join(node: Any, graph: LossGraph, below: list[tuple[_Path, bool]]) -> tuple[_Path, bool]:
    path: _Path = {}
    for one, _ in below:
        for c, (before, after) in one.items():
            old = path.get(c, (0, 0))
            path[c] = max(old[0], before), max(old[1], after)
    name, multiplied = node.name(), any(product for _, product in below)
    saved = [_saved(node, field) for field in ("_saved_self", "_saved_other", "_saved_mat2")]
    product = any(word in name for word in ("MmBackward", "mmBackward"))
    product = product or (name.startswith("MulBackward") and all(_is_matrix(t) for t in saved[:2]))
    if product or "LogSoftmax" in name or "Logsumexp" in name:
        kept = [*saved, _saved(node, "_saved_result")]
        graph.half |= {t.dtype for t in kept if _is_matrix(t) and t.dtype in _HALF}
    if (divisor := _divisor(node, name, saved[1])) is not None:
        before, after = path.get(divisor, (0, 0))
        path[divisor] = (before, after + 1) if multiplied else (before + 1, after)
        if divisor not in graph.divisors:
            graph.divisors.append(divisor)
    return path, multiplied or product


def _divisor(node: Any, name: str, other: Any) -> float | None:
    """The number by which this node divides a matrix, or None."""
    if not isinstance(other, Tensor) or other.numel() != 1 or len(_shape(node)) < 2:
        return None
    value = float(other.detach())
    if value <= 0 or value == 1:
        return None
    if name.startswith("DivBackward"):
        return round(value, 9)
    return round(1 / value, 9) if name.startswith("MulBackward") else None


def _shape(node: Any) -> tuple[int, ...]:
    metadata = getattr(node, "_input_metadata", None)
    return tuple(metadata[0].shape) if metadata else ()


def _saved(node: Any, field: str) -> Any:
    try:
        return getattr(node, field, None)
    except RuntimeError:
        # The graph was freed, or the tensor was changed in place.
        return None


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def parameters_below(node: Any) -> set[int]:
    """Ids of the leaves that a gradient at `node` reaches."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        stack += [parent for parent, _ in node.next_functions]
    return found
