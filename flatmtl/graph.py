"""Which parameters an autograd graph reaches, found by walking it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from flatmtl.losses import Output

# DistributedDataParallel(find_unused_parameters=True) ties all its outputs together in one node, which
# hands every gradient on as it is.
_SINK = "_DDPSinkBackward"
Place = Node | tuple[Node, int]  # a node; of a sink one output


def _place(node: Node, output: int) -> Place:
    return (node, output) if node.name() == _SINK else node


def _origin(output: Output) -> tuple[Node | None, Tensor | None]:
    """The node that made ``output``; or ``output`` itself where it is a leaf."""
    if isinstance(output, GradientEdge):
        return output.node, None
    return output.grad_fn, output if output.grad_fn is None else None


def reached(
    outputs: Sequence[Output], params: Sequence[Tensor], stop: Collection[Node] = ()
) -> list[set[int]]:
    """Positions of the parameters that each output depends on.

    Args:
        outputs: graph outputs.
        params: leaves.
        stop: nodes that are not entered.

    Returns:
        A set for each output.
    """
    bit = {id(p): 1 << k for k, p in enumerate(params)}
    masks: dict[Place, int] = dict.fromkeys(
        stop, 0
    )  # holds the nodes, so that they stay themselves

    def walk(start: Place) -> int:
        # Depth first; a node is finished once all that it leads to are.
        waiting = [start]
        while waiting:
            place = waiting[-1]
            if place in masks:
                waiting.pop()
                continue
            node, output = place if isinstance(place, tuple) else (place, None)
            if node.name() == "torch::autograd::AccumulateGrad":
                masks[node] = bit.get(id(node.variable), 0)  # type: ignore[attr-defined]
                continue
            edges = node.next_functions if output is None else [node.next_functions[output]]
            onward = [_place(n, k) for n, k in edges if n is not None]
            missing = [n for n in onward if n not in masks]
            if missing:
                waiting.extend(missing)
                continue
            mask = 0
            for n in onward:
                mask |= masks[n]
            masks[place] = mask
        return masks[start]

    found = []
    for output in outputs:
        node, leaf = _origin(output)
        number = output.output_nr
        mask = bit.get(id(leaf), 0) if node is None else walk(_place(node, number))
        found.append({k for k in range(len(params)) if mask >> k & 1})
    return found


def leading_to(outputs: Sequence[Output], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of ``tensors`` that some output depends on."""
    seen = _nodes(outputs)
    return [t for t in tensors if t.grad_fn in seen]


def check_checkpoints(outputs: Sequence[Output]) -> None:
    """Refuses reentrant activation checkpoints, below which torch.autograd.grad finds nothing.

    Raises:
        RuntimeError: there is one.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes(outputs)):
        raise RuntimeError(
            "closure must use torch.utils.checkpoint with use_reentrant=False: a reentrant checkpoint "
            "gives no gradient to what it holds unless backward() runs over the whole graph"
        )


def _nodes(outputs: Sequence[Output]) -> set[Node]:
    seen: set[Node] = set()
    waiting = [node for node, _ in map(_origin, outputs) if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(n for n, _ in node.next_functions if n is not None)
    return seen
