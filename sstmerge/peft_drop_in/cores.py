"""Our own types: merges in core coordinates, where a weight change is U C Vᵀ exactly and nothing dense is formed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sstmerge import ops
from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.errors import AdapterError, InputError
from sstmerge.fisher import Fisher
from sstmerge.gevp import solve
from sstmerge.merging import Selection, parse_rule
from sstmerge.merging.methods import CoreBatch
from sstmerge.merging.methods.sparse import core_dare, core_dare_ties, core_ties
from sstmerge.peft_drop_in.request import Request
from sstmerge.pipeline.merge import merge_in_part
from sstmerge.pipeline.roles import Roles


def merged_adapter(
    request: Request,
    *,
    gain: Fisher | str | Path | None,
    cost: Fisher | str | Path | None,
    rule: str,
    selection: Selection,
    damping: float | None,
) -> Adapter:
    """Merge by one of our own types.

    Args:
        request: A request for one of `CORE_TYPES`.
        gain: F_gain or its file; for `sst`.
        cost: F_cost or its file; for `sst`.
        rule: Rule of `sst`.
        selection: Directions that `sst` keeps.
        damping: Relative damping of F_cost.

    Returns:
        The merged adapter; all layers have one rank and scaling 1.
    """
    adapters = [_adapter(request, name) for name in request.adapters]
    if request.kind == "sst":
        space, vector = _sst(request, adapters, gain, cost, rule, selection, damping)
    else:
        space = CoreSpace.of(adapters)
        vector = _merge(request, space)
    return space.to_adapter(vector, name=request.name, rank=request.svd_rank)


def _adapter(request: Request, name: str) -> Adapter:
    layers: dict[str, LoraFactors] = {}
    for layer in request.layers:
        if layer.has(name):
            f = layer.factors(name)
            layers[layer.path] = LoraFactors(A=f.A.cpu().contiguous(), B=f.B.cpu().contiguous(), scaling=f.scaling)
    return Adapter(name=name, layers=layers, source="a live model")


def _merge(request: Request, space: CoreSpace) -> Tensor:
    vectors = torch.stack([space.core(name) for name in request.adapters])
    weights = torch.tensor(request.weights, dtype=torch.float64)
    if request.kind == "linear_exact":
        total: Tensor = weights @ vectors
        return total
    draws = request.kind in ("core_dare_linear", "core_dare_ties")
    # From torch's global generator, so that torch.manual_seed decides, as for PEFT's own types.
    seed = int(torch.randint(2**63 - 1, ())) if draws else 0
    merged = []
    for group, (layers, cores) in enumerate(zip(space.groups, space.split(vectors), strict=True)):
        batch = CoreBatch(layers.names, layers.U, layers.V, cores.contiguous(), weights, request.adapters, group)
        merged.append(_merge_batch(request, batch, seed))
    return space.join(merged)


def _merge_batch(request: Request, batch: CoreBatch, seed: int) -> Tensor:
    density, sign = request.density, request.majority_sign_method
    if request.kind == "core_magnitude_prune":
        pruned = torch.stack([ops.magnitude_prune(cores, density) for cores in batch.cores])
        total: Tensor = torch.tensordot(batch.weights, pruned, dims=1)
        return total
    if request.kind == "core_ties":
        return core_ties(batch, density=density, majority_sign=sign, scale=1.0, trim_over="tensor")
    if request.kind == "core_dare_linear":
        return core_dare(batch, density=density, seed=seed)
    return core_dare_ties(batch, density=density, trim_density=1.0, majority_sign=sign, scale=1.0, seed=seed)


def _sst(
    request: Request,
    adapters: Sequence[Adapter],
    gain: Fisher | str | Path | None,
    cost: Fisher | str | Path | None,
    rule: str,
    selection: Selection,
    damping: float | None,
) -> tuple[CoreSpace, Tensor]:
    """Merge the last adapter into the weighted sum of the others, by measured effect."""
    fishers = []
    for role, given in (("gain", gain), ("cost", cost)):
        if given is None:
            raise InputError(
                f"combination_type 'sst' needs {role}=, the {role} Fisher of these adapters: a file that `sstmerge fisher` "
                "or Fisher.save wrote, or a Fisher."
            )
        fishers.append(given if isinstance(given, Fisher) else Fisher.load(given, adapters))
    spectrum = solve(*fishers, damping=damping)
    space = fishers[0].space
    known = {adapter.fingerprint: adapter.name for adapter in space.adapters}
    missing = [adapter.name for adapter in adapters if adapter.fingerprint not in known]
    if missing:
        raise AdapterError(
            f"The gain Fisher was collected for other adapters than {missing}: their numbers differ from those in the "
            "model. Collect it for these very adapters, in this dtype."
        )
    weights: dict[str, float] = {}  # one per adapter, which PEFT may hold under several names
    for adapter, weight in zip(adapters[:-1], request.weights[:-1], strict=True):
        name = known[adapter.fingerprint]
        weights[name] = weights.get(name, 0.0) + weight
    utility = space.combination(weights)
    safety = space.core(known[adapters[-1].fingerprint])
    last = request.weights[-1]
    roles = Roles(space, utility, safety, reference="")
    merged = merge_in_part(
        roles, spectrum, rule=parse_rule(rule), scale=None if last == 1.0 else last, selection=selection
    )
    return space, merged.core
