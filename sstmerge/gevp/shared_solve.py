"""Many small eigenproblems, solved by one process or shared among several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sstmerge.fisher.distributed import Ranks
from sstmerge.ops import GeneralizedEigh, generalized_eigh_mixed


def solve_batches(
    pairs: Sequence[tuple[Tensor, Tensor]], names: Sequence[Sequence[str]], device: torch.device, ranks: Ranks
) -> list[GeneralizedEigh]:
    """Solve batches of problems a v = λ b v on a device, all of one size in one call.

    Sharing pays for all sizes: a problem of size n takes about 20 n³ operations and its solution 8 n² bytes.

    Args:
        pairs: Batches (a, b), each (L, n, n), float64; L and n may differ from batch to batch.
        names: Names of the problems, per batch.
        device: Where this process solves.
        ranks: The processes; process r solves the problems r, r + size, … of every batch.

    Returns:
        One solution per batch, to every process, where the problems lie.

    Raises:
        SolverError: If a problem could not be solved; the message names it.
    """
    own = [(a[ranks.rank :: ranks.size], b[ranks.rank :: ranks.size]) for a, b in pairs]
    present = [i for i, (a, _) in enumerate(own) if len(a)]
    solved = generalized_eigh_mixed([(own[i][0].to(device), own[i][1].to(device)) for i in present]) if present else []
    solutions = {
        i: GeneralizedEigh(*(field.to(pairs[i][0].device) for field in _fields(s)))
        for i, s in zip(present, solved, strict=True)
    }
    if ranks.size > 1:
        solutions = _of_all(solutions, [len(a) for a, _ in pairs], ranks)
    for i, members in enumerate(names):
        solutions[i].raise_on_failure(members)
    return [solutions[i] for i in range(len(pairs))]


def _of_all(own: dict[int, GeneralizedEigh], lengths: Sequence[int], ranks: Ranks) -> dict[int, GeneralizedEigh]:
    """Return the solutions of all processes in the order of the problems."""
    parts = ranks.gather(
        {f"{i}/{j}": tensor for i, solution in own.items() for j, tensor in enumerate(_fields(solution))}
    )
    whole: dict[str, Tensor] = {}
    for rank, part in enumerate(parts):
        for name, tensor in part.items():
            length = lengths[int(name.split("/")[0])]
            whole.setdefault(name, tensor.new_empty(length, *tensor.shape[1:]))[rank :: ranks.size] = tensor
    shared = ranks.broadcast(whole)
    return {i: GeneralizedEigh(*(shared[f"{i}/{j}"] for j in range(3))) for i in range(len(lengths))}


def _fields(solution: GeneralizedEigh) -> tuple[Tensor, Tensor, Tensor]:
    return solution.eigenvalues, solution.eigenvectors, solution.status
