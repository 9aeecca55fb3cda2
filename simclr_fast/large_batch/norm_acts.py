"""Which values of a model are a batch norm with what follows it: a residual and ReLU.

A schedule keeps none of the values in between, so they are never made: one pass over memory makes
the last value from the inputs of the batch norms.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Node

from simclr_fast.large_batch.graph import Graph, Spec


@dataclass(frozen=True)
class NormAct:
    """act(norm(x) + r), with r = 0, a value, or that of another batch norm.

    reads: the nodes whose values are read: x, and the value or the input of the other norm. users:
    of each the node that reads it: its batch norm, or the sum.
    """

    reads: tuple[Node, ...]
    users: tuple[Node, ...]
    relu: bool


def norm_acts(
    graph: Graph, specs: dict[Node, Spec | None], sums: Collection[Node], held: Collection[Node]
) -> dict[Node, NormAct]:
    """For each such node what its value is. sums: the nodes that add two tensors. held: nodes
    whose values may be kept."""
    finder = _Finder(graph, specs, sums, held)
    return {node: found for node in graph.nodes if (found := finder.find(node)) is not None}


class _Finder:
    def __init__(
        self,
        graph: Graph,
        specs: dict[Node, Spec | None],
        sums: Collection[Node],
        held: Collection[Node],
    ) -> None:
        self.graph, self.specs, self.sums = graph, specs, sums
        self.wanted = {*held, *graph.outputs}

    def find(self, node: Node) -> NormAct | None:
        if node not in self.graph.relus:
            return self._sum(node)
        inner = self._inner(node, 0)
        before = None if inner is None else self._sum(inner)
        return before and NormAct(before.reads, before.users, relu=True)

    def _sum(self, node: Node) -> NormAct | None:
        """A batch norm, or a sum with one."""
        graph = self.graph
        if node in graph.norms:
            return NormAct((graph.inputs[node][0],), (node,), relu=False)
        if node not in self.sums:
            return None
        inner = [self._inner(node, i) for i in range(2)]
        users = [node if n not in graph.norms or n is None else n for n in inner]
        if users == [node, node]:
            return None
        reads = [
            given if user is node else graph.inputs[user][0]
            for given, user in zip(graph.inputs[node], users, strict=True)
        ]
        # The pass goes through memory in order.
        same = len({self.specs[n] for n in (node, *reads)}) == 1
        return NormAct(tuple(reads), tuple(users), relu=False) if same else None

    def _inner(self, node: Node, i: int) -> Node | None:
        """The batch norm or sum that a node reads as its i-th input, if nothing else needs it."""
        source = self.graph.inputs[node][i]
        while list(source.users) == [node] and source not in self.wanted:
            if source not in self.graph.identities:
                return source
            node, (source,) = source, self.graph.inputs[source]
        return None
