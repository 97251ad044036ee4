"""What a step over several processes sends and keeps, as formulas, and what that would take on many GPUs.

    python -m bench.scaling_model          prints the tables of docs/scaling.md

Counts and bytes are exact: the tests compare them with the collectives of real steps. Times are predictions
of a simple model with assumed bandwidths and latencies. Nothing here was measured on a GPU.

T tasks on n ranks, e bytes an element of a row, k = 64 / e elements a cache line.

    P, O_i      elements of the shared parameters and of those that task i has for itself, each parameter
                filled up to whole cache lines
    P', O_i'    P and O_i filled up to n whole cache lines
    R, Q        FSDP2: elements of replicated parameters in P, and in all O_i

Where the formulas need O_i, they are given as the list ``own``. A call is a pair: the name of the function of
torch.distributed, and the bytes that a rank hands in. Steps are those from the third on (once all ranks know
what the tasks reach) of a model without buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Calls = list[tuple[str, int]]

DOUBLE = 8
LINE = 64


# ---------------------------------------------------------------- collectives of a step


def row(e: int, sizes: Sequence[int], n: int = 1) -> int:
    """P or O_i, elements; with ``n`` P' or O_i'."""
    k = LINE // e
    whole = sum(-(-size // k) * k for size in sizes)
    return -(-whole // (k * n)) * k * n


def losses(T: int) -> Calls:
    """Of a method that looks at losses: T losses, T counts, one mark."""
    return [("all_reduce", (2 * T + 1) * DOUBLE)]


def before_one_row(T: int) -> Calls:
    """Before one backward pass: the same, and the number of micro-batches and its square."""
    return [("all_reduce", (2 * T + 3) * DOUBLE)]


def rows(T: int, P: int, own: Sequence[int], e: int, *, perturbed: bool = False) -> Calls:
    """DDP: a message a task, of shared row, tail of one cache line, and own row. T, or 2 T of them."""
    family = [("all_reduce", (P + LINE // e + own[i]) * e) for i in range(T)]
    return 2 * family if perturbed else family


def rows_of_each(T: int, P: int, own: Sequence[int], e: int) -> Calls:
    """DDP with sync_perturbation=False: the same 2 T messages, each task's two one after the other."""
    return [call for one in rows(T, P, own, e) for call in (one, one)]


def one_row(
    T: int,
    P: int,
    own: Sequence[int],
    e: int,
    *,
    perturbed: bool = False,
    apart: bool = False,
) -> Calls:
    """One backward pass: losses, then one row and a mark; with sharpness a second such row.

    ``apart``: the first has two shared rows ("decomposed", whose weights of g and of f differ).
    """
    second = [("all_reduce", (P + sum(own) + 1) * e)]
    first = [("all_reduce", ((1 + apart) * P + sum(own) + 1) * e)]
    return before_one_row(T) + (first + second if perturbed else second)


def parts(T: int, P: int, own: Sequence[int], e: int, n: int, *, perturbed: bool = False) -> Calls:
    """shard_rows=True, P' and O_i' given: T + 2 collectives, or 3 T + 3 with sharpness.

    T reduce-scatters of a row each, one all-reduce of the Gram matrix and two norms a task, one all-gather of
    the update. With sharpness, before the last one, T times an all-gather of the row to perturb along and
    a reduce-scatter of the one found there, and a second Gram matrix.
    """
    c = [P // n + LINE // e + own[i] // n for i in range(T)]
    scatter = [("reduce_scatter_tensor", n * c[i] * e) for i in range(T)]
    gather = [("all_gather_into_tensor", c[i] * e) for i in range(T)]
    gram = [("all_reduce", (T * T + 2 * T) * DOUBLE)]
    found = scatter + gram
    if perturbed:
        found += [call for i in range(T) for call in (gather[i], scatter[i])] + gram
    return [*found, ("all_gather_into_tensor", (P // n + sum(own) // n) * e)]


def shards(T: int, R: int, Q: int, e: int, *, perturbed: bool = False) -> Calls:
    """FSDP2, beside its own: R (Q) elements of replicated parameters in P (in all O_i).

    One all-reduce of all rows' replicated columns if there are any, one of the Gram matrix, two norms and a
    count a task; twice with sharpness.
    """
    found = [("all_reduce", (T * R + Q) * e)] if R + Q else []
    found += [("all_reduce", (T * T + 3 * T) * DOUBLE)]
    return 2 * found if perturbed else found


def one_row_of_shards(T: int, R: int, Q: int, blocks: int, e: int) -> Calls:
    """FSDP2 with one backward pass: losses, replicated columns, a squared norm of each block's row."""
    replicated = [("all_reduce", (R + Q) * e)] if R + Q else []
    return before_one_row(T) + replicated + [("all_reduce", blocks * DOUBLE)]


def of_fsdp(
    T: int,
    units: Sequence[int],
    e: int,
    n: int,
    *,
    perturbed: bool = False,
    reshard: bool = True,
) -> Calls:
    """FSDP2's own in a step with T backward passes (2 T with sharpness), in no order.

    Args:
        T: tasks; 1: one loss.
        units: elements of each module that ``fully_shard`` was called on and that all tasks go through.
        e: bytes an element, of parameters and gradients alike.
        n: ranks.
        perturbed: T more forward and backward passes.
        reshard: ``reshard_after_forward``: each unit is gathered for the forward pass, and again for every
            backward pass. Otherwise (as for the root module, unless told) what a forward pass has gathered
            serves the first backward pass after it.
    """
    gathers = T + 1 if reshard else T
    if perturbed:
        gathers += 2 * T if reshard else T
    found: Calls = []
    for unit in units:
        found += gathers * [("all_gather_into_tensor", unit // n * e)]
        found += (2 * T if perturbed else T) * [("reduce_scatter_tensor", unit * e)]
    return found


def one_loss(P: int, own: Sequence[int], e: int) -> Calls:
    """Plain DDP with one loss, for comparison, as if all gradients were one bucket."""
    return [("all_reduce", (P + sum(own)) * e)]


# ---------------------------------------------------------------- bytes


def moved(calls: Calls, n: int) -> float:
    """Bytes that a rank sends (and receives) in them, by the algorithms that send the least."""
    return sum(
        {
            "all_reduce": 2 * size * (n - 1) / n,
            "reduce_scatter_tensor": size * (n - 1) / n,
            "all_gather_into_tensor": size * (n - 1),
        }[name]
        for name, size in calls
    )


def kept_rows(T: int, P: int, own: Sequence[int], e: int, *, perturbed: bool = False) -> int:
    """DDP: bytes of the buffers of rows on a rank."""
    return (2 if perturbed else 1) * T * (P + LINE // e + max(own, default=0)) * e


def kept_parts(
    T: int, P: int, own: Sequence[int], e: int, n: int, *, perturbed: bool = False
) -> int:
    """shard_rows=True, P' and O_i' given: the parts of rows, and two whole messages on their way out.

    With sharpness, the row to perturb along too, gathered and put in order, while its task is perturbed.
    """
    width = P // n + LINE // e + max(own, default=0) // n
    whole = 4 if perturbed else 2
    return ((2 if perturbed else 1) * T + whole * n) * width * e


def kept_shards(
    T: int, P: int, own: Sequence[int], e: int, n: int, *, perturbed: bool = False
) -> int:
    """FSDP2 with all shared parameters sharded and heads replicated: bytes of the rows on a rank."""
    return (2 if perturbed else 1) * (T * -(-P // n) + sum(own)) * e


# ---------------------------------------------------------------- time, predicted


@dataclass(frozen=True)
class Machine:
    """What is assumed of the machines; bandwidths in bytes a second and direction, latencies in seconds."""

    node: int = 8  # GPUs
    inside: float = 450e9  # NVLink, a GPU's, in a node
    between: float = 50e9  # one network card of 400 Gb/s a GPU
    hop_inside: float = 3e-6
    hop_between: float = 10e-6


def seconds(call: tuple[str, int], n: int, machine: Machine) -> float:
    """Predicted time of one collective on n ranks.

    Two levels, one after the other: in a node each GPU sums up (or puts together) an eighth of the message,
    and the GPUs of one number in all nodes go on with their eighth, each over its own card. Hops: of trees,
    2 log2, for an all-reduce; of rings, n - 1, for the other two.
    """
    name, size = call
    here = min(n, machine.node)
    nodes = -(-n // machine.node)
    whole = size * n if name == "all_gather_into_tensor" else size
    passes = 2 if name == "all_reduce" else 1
    time = passes * whole * (here - 1) / here / machine.inside
    time += passes * whole / here * (nodes - 1) / nodes / machine.between
    if name == "all_reduce":
        inside, between = 2 * math.ceil(math.log2(here)), 2 * math.ceil(math.log2(nodes))
    else:
        inside, between = here - 1, nodes - 1
    return time + inside * machine.hop_inside + between * machine.hop_between


def total(calls: Calls, n: int, machine: Machine) -> float:
    """Predicted seconds of calls that run one after the other, as those of one group do."""
    return sum(seconds(call, n, machine) for call in calls)


def left(calls: Calls, T: int, n: int, machine: Machine, backward: float) -> float:
    """Predicted seconds of a step's communication that no backward pass hides.

    Args:
        calls: of ``rows``, plain or with sharpness, or of ``parts``.
        T: tasks.
        n: ranks.
        machine: the machines.
        backward: seconds of a backward pass of the trunk.
    """
    # Families of rows of which one is on its way during the next pass. Perturbed rows in parts are none:
    # they go between the gathers of two rows that are waited for.
    end = T if calls[0][0] == "reduce_scatter_tensor" else len(calls)
    waited = total(calls[end:], n, machine)
    for first in range(0, end, T):
        late = 0.0  # from the end of a pass until all that came before it has arrived
        for call in calls[first : first + T]:
            late = max(0.0, late - backward) + seconds(call, n, machine)
        waited += late
    return waited


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Network:
    """A trunk and T heads of one linear layer; elements."""

    name: str
    T: int
    trunk: int
    head: int


NETWORKS = (
    Network("ResNet-18", 3, 11_000_000, 5_130),
    Network("ResNet-50", 8, 25_000_000, 20_490),
    Network("ViT-L", 3, 300_000_000, 10_250),
    Network("ViT-L", 8, 300_000_000, 10_250),
)
RANKS = (8, 16, 64, 256, 1024)
E = 4


def _sizes(network: Network, n: int = 1, e: int = E) -> tuple[int, int, list[int]]:
    return network.T, row(e, [network.trunk], n), network.T * [row(e, [network.head], n)]


def _fsdp(network: Network, n: int, perturbed: bool) -> Calls:
    T, P, own = _sizes(network, n)
    return of_fsdp(T, [P], E, n, perturbed=perturbed) + shards(
        T, 0, sum(own), E, perturbed=perturbed
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], text: int) -> str:
    """Markdown; the first ``text`` columns are words."""
    ruler = ["---" if k < text else "---:" for k in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ruler, *lines])


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"


def traffic(n: int) -> str:
    """GB that a rank sends in a step on n ranks."""
    head = ["network", "T", "one loss", "rows", "rows, SAM", "`shard_rows`", "`shard_rows`, SAM"]
    head += ["FSDP2, one loss", "FSDP2", "FSDP2, SAM"]
    lines = []
    for network in NETWORKS:
        T, P, own = _sizes(network)
        P_, own_ = _sizes(network, n)[1:]
        calls = [one_loss(P, own, E)]
        calls += [rows(T, P, own, E, perturbed=sam) for sam in (False, True)]
        calls += [parts(T, P_, own_, E, n, perturbed=sam) for sam in (False, True)]
        calls += [of_fsdp(1, [P_], E, n)] + [_fsdp(network, n, sam) for sam in (False, True)]
        lines.append([network.name, str(T), *(_gigabytes(moved(c, n)) for c in calls)])
    return _table(head, lines, 1)


def memory(n: int) -> str:
    """GB of rows on a rank of n."""
    head = ["network", "T", "rows", "rows, bf16", "rows, SAM", "`shard_rows`"]
    head += ["`shard_rows`, SAM", "FSDP2", "FSDP2, SAM"]
    lines = []
    for network in NETWORKS:
        T, P, own = _sizes(network)
        P_, own_ = _sizes(network, n)[1:]
        half = _sizes(network, e=2)
        sizes = [kept_rows(T, P, own, E), kept_rows(*half, 2)]
        sizes += [kept_rows(T, P, own, E, perturbed=True)]
        sizes += [kept_parts(T, P_, own_, E, n, perturbed=sam) for sam in (False, True)]
        sizes += [kept_shards(T, P, own, E, n, perturbed=sam) for sam in (False, True)]
        lines.append([network.name, str(T), *map(_gigabytes, sizes)])
    return _table(head, lines, 1)


def times(*, perturbed: bool, machine: Machine) -> str:
    """Predicted milliseconds of communication in a step."""
    head = ["network", "T", "n", "one loss", "a row", "rows: left", "all", "a part"]
    head += ["`shard_rows`: left", "all", "FSDP2, a pass", "all"]
    lines = []
    for network in NETWORKS:
        for n in RANKS:
            T, P, own = _sizes(network)
            P_, own_ = _sizes(network, n)[1:]
            columns = [total(one_loss(P, own, E), n, machine)]
            ways = (
                rows(T, P, own, E, perturbed=perturbed),
                parts(T, P_, own_, E, n, perturbed=perturbed),
            )
            for calls in ways:
                columns.append(seconds(calls[0], n, machine))
                columns.append(left(calls, T, n, machine, math.inf))
                columns.append(total(calls, n, machine))
            one_pass = [("all_gather_into_tensor", P_ // n * E), ("reduce_scatter_tensor", P_ * E)]
            columns.append(total(one_pass, n, machine))
            columns.append(total(_fsdp(network, n, perturbed), n, machine))
            cells = [f"{1e3 * column:.2f}" for column in columns]
            lines.append([network.name, str(T), str(n), *cells])
    return _table(head, lines, 1)


def main() -> None:
    """Prints the tables."""
    machine = Machine()
    print("Traffic, GB a rank and step, n = 64:\n\n" + traffic(64) + "\n")
    print("Rows in memory, GB a rank, n = 64:\n\n" + memory(64) + "\n")
    for title, sam in (("plain", False), ("with sharpness", True)):
        print(f"Predicted ms of communication in a step, {title}:\n")
        print(times(perturbed=sam, machine=machine) + "\n")


if __name__ == "__main__":
    main()
