"""FusionBench algorithm: `_target_: sstmerge.fusion_bench_plugin.SSTAlgorithm` in a method's YAML file.

    _target_: sstmerge.fusion_bench_plugin.SSTAlgorithm
    utility: [UTILITY_ADAPTER]
    safety: SAFETY_ADAPTER
    gain: F_harm.safetensors
    cost: F_benign.safetensors
    scale: 1.0

The model pool gives the base model (`_pretrained_`); the adapters are read as PEFT directories or hub ids, because their
low-rank factors are what the method works on. FusionBench is not a dependency: install `fusion-bench` beside sstmerge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fusion_bench import BaseAlgorithm
from torch import nn

from sstmerge.adapters import changed_weight
from sstmerge.errors import AdapterError, InputError
from sstmerge.merging import Selection
from sstmerge.pipeline.merge import merge_from_fishers


class SSTAlgorithm(BaseAlgorithm):  # type: ignore[misc]  # FusionBench is untyped here
    """Merge adapters by measured effect, with Fishers that were collected before.

    Attributes:
        utility: Utility adapters: directories or hub ids.
        safety: The safety adapter.
        gain: Fisher file of harmful prompts, collected with these adapters.
        cost: Fisher file of benign prompts.
        options: Further options of `sstmerge.merge_from_fishers`, and those of `sstmerge.Selection`.
    """

    def __init__(self, utility: Sequence[str], safety: str, gain: str, cost: str, **options: Any) -> None:
        self.utility = [utility] if isinstance(utility, str) else list(utility)
        self.safety = safety
        self.gain = gain
        self.cost = cost
        self.options = options
        super().__init__()

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """Return the pool's base model with the merged adapter added to its weights.

        Args:
            modelpool: A FusionBench model pool with a `_pretrained_` model.

        Returns:
            The merged model.

        Raises:
            InputError: The pool has no pretrained model.
            AdapterError: The adapters belong to another base model.
        """
        if not modelpool.has_pretrained:
            raise InputError("SSTAlgorithm needs a model pool with a '_pretrained_' model, the base of the adapters.")
        chosen = {name: self.options[name] for name in Selection.__dataclass_fields__ if name in self.options}
        others = {name: value for name, value in self.options.items() if name not in chosen}
        adapter = merge_from_fishers(
            self.gain,
            self.cost,
            utility=self.utility,
            safety=self.safety,
            selection=Selection(**chosen),
            stability=False,
            **others,
        ).adapter
        model = modelpool.load_pretrained_model()
        parameters = dict(model.named_parameters())
        missing = [name for name in adapter.layers if f"{name}.weight" not in parameters]
        if missing:
            raise AdapterError(
                f"{len(missing)} adapted layers are not in the pool's pretrained model, such as '{missing[0]}': the "
                "adapters belong to another base model."
            )
        for name, parameter in parameters.items():
            parameter.copy_(changed_weight(parameter, adapter, name))
        return model  # type: ignore[no-any-return]
