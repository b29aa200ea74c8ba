"""mergekit plug-in: the method `sst` for mergekit's YAML files (mergekit 0.1.5 and later, an optional extra).

    merge_method: sst
    base_model: BASE
    models:
      - model: BASE+UTILITY_ADAPTER
        parameters: {role: utility}
      - model: BASE+SAFETY_ADAPTER
        parameters: {role: safety}
    parameters:
      gain: F_harm.safetensors
      cost: F_benign.safetensors
      scale: 1.0
    dtype: bfloat16

mergekit hands dense tensors to a method, one at a time, while directions are selected across all layers. So the adapters are
read from the `+ADAPTER` part of the models, merged once by `merge_from_fishers`, and every tensor of the base model gets its
layer's weight change. mergekit has no entry points: `sstmerge-mergekit CONFIG OUT …` registers the method and then is
mergekit's own command; in Python, call `register()` first.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Optional

import mergekit.merge_methods
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.merge_methods import BasePolicy, InputContract, MergeMethod, PerNonBase, TensorGroup, merge_method
from mergekit.scripts import run_yaml

from sstmerge.adapters import Adapter, changed_weight
from sstmerge.errors import InputError, SSTMergeError
from sstmerge.merging import Selection
from sstmerge.pipeline.merge import merge_from_fishers

_ROLES = ("utility", "safety")


# mergekit reads the annotations at run time and knows Optional, not `| None`.
@merge_method(  # type: ignore[untyped-decorator]  # mergekit ships no types
    name="sst",
    pretty_name="SST",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
)
def sst(
    group: TensorGroup,
    gain: str,
    cost: str,
    role: PerNonBase[str],
    weight: PerNonBase[float] = 1.0,  # mergekit spreads the default over the models
    rule: str = "project",
    scale: Optional[float] = None,  # noqa: UP045
    top: Optional[int] = None,  # noqa: UP045
    fraction: Optional[float] = None,  # noqa: UP045
    energy: Optional[float] = None,  # noqa: UP045
    mu: Optional[float] = None,  # noqa: UP045
    exponent: float = 1.0,
    budget: Optional[float] = None,  # noqa: UP045
    damping: Optional[float] = None,  # noqa: UP045
) -> torch.Tensor:
    """Return the base tensor with the merged adapter's weight change.

    Args:
        group: The tensor in the base model and in every `BASE+ADAPTER`.
        gain: Fisher file of harmful prompts, collected with these adapters.
        cost: Fisher file of benign prompts.
        role: `utility` or `safety`, one per model beside the base.
        weight: Weight of every utility adapter; the safety adapter has `scale`.
        rule: As in `sstmerge merge`; so are the options after it.
        scale: Factor of the safety adapter.
        top: Number of directions.
        fraction: Share of directions.
        energy: Share of the gain energy.
        mu: Threshold of `wiener` and `joint`.
        exponent: Power of the weights of `wiener`.
        budget: Benign KL in nats per token.
        damping: Relative damping of F_cost.

    Returns:
        The merged tensor, shape and dtype of the base's.

    Raises:
        InputError: The models are not one base with adapters, or the roles do not fit.
    """
    base = group.base
    if base is None:
        raise InputError("The method 'sst' needs base_model: the model that all adapters were trained on.")
    models = [entry.id for entry in group.non_base]
    roles = [role[model] for model in models]
    adapters = [_adapter_path(model, base.id) for model in models]
    _check_roles(roles, models)
    selection = Selection(top=top, fraction=fraction, energy=energy, mu=mu, budget=budget, exponent=exponent)
    merged = _merged(
        gain,
        cost,
        tuple(path for path, kind in zip(adapters, roles, strict=True) if kind == "utility"),
        tuple(float(weight[model]) for model, kind in zip(models, roles, strict=True) if kind == "utility"),
        next(path for path, kind in zip(adapters, roles, strict=True) if kind == "safety"),
        rule,
        scale,
        selection,
        damping,
    )
    return changed_weight(base.tensor, merged, group.metadata.name or "")


@cache
def _merged(
    gain: str,
    cost: str,
    utility: tuple[str, ...],
    weights: tuple[float, ...],
    safety: str,
    rule: str,
    scale: float | None,
    selection: Selection,
    damping: float | None,
) -> Adapter:
    """Merge the adapters, once for all tensors."""
    result = merge_from_fishers(
        gain,
        cost,
        utility=utility,
        safety=safety,
        utility_weights=weights,
        rule=rule,
        scale=scale,
        selection=selection,
        damping=damping,
        stability=False,
    )
    return result.adapter


def _adapter_path(model: ModelReference, base: ModelReference) -> str:
    if model.lora is None or model.model != base.model:
        raise InputError(
            f"The method 'sst' merges adapters of one base model, so every model is written '{base.model.path}+ADAPTER'; "
            f"'{model}' is not."
        )
    return str(model.lora.path)


def _check_roles(roles: list[str], models: list[ModelReference]) -> None:
    for kind, model in zip(roles, models, strict=True):
        if kind not in _ROLES:
            raise InputError(f"The role of '{model}' is '{kind}'; expected one of {list(_ROLES)}.")
    if roles.count("safety") != 1:
        raise InputError(f"Exactly one model has 'role: safety'; {roles.count('safety')} of {len(roles)} have it.")


def register() -> MergeMethod:
    """Make `sst` known to mergekit; calling it again changes nothing.

    Returns:
        The method.
    """
    if sst not in mergekit.merge_methods.registered_methods():
        mergekit.merge_methods.register(sst)
    return sst


def main() -> None:
    """Run mergekit's `mergekit-yaml` with the method registered; unusable input ends it with a sentence and exit code 2."""
    register()
    try:
        run_yaml.main()
    except (SSTMergeError, yaml.YAMLError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        # mergekit itself raises plain errors for configurations that it cannot use.
        sys.stderr.write(f"Error: {' '.join(str(error).split()) or type(error).__name__}\n")
        sys.exit(2)
