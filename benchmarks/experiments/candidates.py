"""What is compared: every method of the registry, SST in its structures and rules, and the controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from workbench import SAME_AS_TASK_ARITHMETIC, chosen_methods

from sstmerge import available_methods
from sstmerge.adapters import Adapter
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging import Rule, Selection, merge_cores
from sstmerge.merging.methods.aligned_pair import AlignedPair
from sstmerge.merging.methods.statistics import FisherStatistics, GainAndCost
from sstmerge.pipeline.method_merge import Statistics, merge_adapters
from sstmerge.pipeline.roles import Roles

# So large that F_cost + damping · scale · I is the identity but for its unit, which changes no order of directions.
IDENTITY = 1e9
# A direction's gain over its gain and cost: Wiener's signal over signal and noise, so that nothing has to be chosen.
WIENER = 1.0
STRICT_WIENER = 10.0
# Weight of the refusals of benign prompts in F_cost, and the name of the spectrum that has them.
REFUSAL_WEIGHT = 1.0
REFUSALS = "kfac, refusals"
MASK = "fisher_ratio_mask"
# The rule that asks the model at every step takes minutes, so it is run in one structure.
REFIT, REFITTED = "refit", "kfac"
# The path of `joint` is its μ. In these structures it has come near the adapters at scale 1, so its unit is smaller there;
# in `block` and `global` most directions have no gain.
EARLY, EARLY_STRETCH = ("kfac", "ekfac", "diagonal"), 0.5
# What refuses benign prompts is most of the adapter, so little of it is left at scale 1: the units of the sweeps, by μ and
# exponent.
REFUSALS_STRETCH = {(STRICT_WIENER, 1.0): 8.0, (30.0, 1.0): 20.0, (3.0, 3.0): 25.0}
# What averages or flattens refuses .3 to .6 of the harmful prompts at scale 2; SafeMERGE takes a fifth of the adapter.
METHODS_STRETCH = {"iso_c": 2.0, "iso_cts": 2.0, "regmean": 2.0, "peft_ties": 2.0, "safe_merge": 5.0}


@dataclass(frozen=True)
class Candidate:
    """One method of the comparison.

    Attributes:
        name: Its name in tables.
        kind: "method" (of the registry), "sst" or "control".
        settings: The method's name in the registry; or structure, rule, μ, exponent and damping metric of SST.
        stretch: Unit of its sweep: what keeps little of the adapter needs larger scales.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    stretch: float = 1.0


def candidates(methods: Sequence[str] | None, structures: Sequence[str], rules: Sequence[str]) -> list[Candidate]:
    """Return everything that is compared.

    Args:
        methods: Methods of the registry; None or ("all",) for all.
        structures: Structures of SST.
        rules: Rules of SST.

    Returns:
        The candidates, task arithmetic first.

    Raises:
        DataError: There is no method of a name.
    """
    rivals = [name for name in available_methods() if name not in SAME_AS_TASK_ARITHMETIC]
    chosen = chosen_methods(methods, rivals)
    listed = [Candidate(name, "method", {"method": name}, METHODS_STRETCH.get(name, 1.0)) for name in chosen]
    listed += [
        Candidate(f"sst {structure} {rule}", "sst", {"structure": structure, "rule": rule}, _stretch(structure, rule))
        for structure in structures
        for rule in rules
        if rule != REFIT or structure == REFITTED
    ]
    if "wiener" in rules and "kfac" in structures:
        strict = {"structure": "kfac", "rule": "wiener", "mu": STRICT_WIENER}
        listed.append(Candidate(f"sst kfac wiener, μ = {STRICT_WIENER:g}", "sst", strict, stretch=2.0))
        for (mu, exponent), stretch in REFUSALS_STRETCH.items():
            settings = {**strict, "mu": mu, "spectrum": REFUSALS}
            name = f"sst kfac wiener, μ = {mu:g}"
            if exponent != 1.0:
                settings, name = {**settings, "exponent": exponent}, f"{name}, exponent {exponent:g}"
            listed.append(Candidate(f"{name}, refusals as cost", "sst", settings, stretch))
        if MASK in chosen:  # the one rival that can be given the same
            listed.append(Candidate(f"{MASK}, refusals as cost", "method", {"method": MASK, "spectrum": REFUSALS}))
    if "global" in structures:
        damped = {"structure": "global", "rule": "project", "damping_metric": "kronecker"}
        listed.append(Candidate("sst global project, Kronecker damping", "sst", damped, stretch=2.0))
    first = structures[0]
    listed += [
        Candidate("control: random directions", "control", {"structure": first, "control": "random"}),
        Candidate("control: F_cost = I", "control", {"structure": first, "control": "identity"}),
        Candidate("control: permuted labels", "control", {"structure": first, "control": "permuted"}),
    ]
    return listed


def _stretch(structure: str, rule: str) -> float:
    """Return the unit of a sweep."""
    return EARLY_STRETCH if rule == "joint" and structure in EARLY else 1.0


def primary(listed: Sequence[Candidate]) -> tuple[str, ...]:
    """Return the names of the SST whose leads are reported: those chosen on other prompts than the test's (dev/LOG.md)."""
    sst = [candidate.name for candidate in listed if candidate.kind == "sst"]
    return tuple(name for name in sst if "μ = " in name) or tuple(sst[:1])


@dataclass
class Merger:
    """Merges any candidate at any scale.

    Attributes:
        adapters: "utility" and "safety".
        roles: The same in their core space.
        spectra: Solved pairs by structure; "permuted" for the control, REFUSALS for refusals as cost.
        own: K-FAC Fisher of each adapter on its own data.
        aligned: Opens the model and what the safety adapter makes of it, for the methods that need an aligned pair.
        seed: Seed of whatever is random.
        refit: The rule `refit`: from a solved pair and a scale to the merged point.
    """

    adapters: Mapping[str, Adapter]
    roles: Roles
    spectra: Mapping[str, Spectrum]
    own: FisherStatistics
    aligned: Callable[[], AbstractContextManager[AlignedPair]]
    seed: int
    refit: Callable[[Spectrum, float], Tensor]

    def merge(self, candidate: Candidate, scale: float) -> Tensor | Adapter:
        """Return the merged model: a point (D,) of the roles' space, or an adapter.

        Args:
            candidate: What to merge by.
            scale: Factor of the safety adapter.
        """
        if candidate.kind == "method":
            return self._method(candidate.settings["method"], candidate.settings.get("spectrum", "kfac"), scale)
        settings = candidate.settings
        control = settings.get("control")
        spectrum = self.spectra[
            "permuted" if control == "permuted" else settings.get("spectrum", settings["structure"])
        ]
        if control == "identity":
            spectrum = solve(spectrum.gain, spectrum.cost, damping=IDENTITY)
        if "damping_metric" in settings:
            spectrum = solve(spectrum.gain, spectrum.cost, damping_metric=settings["damping_metric"])
        if control == "random":
            return self.roles.utility + scale * self._random_directions(spectrum)
        filtered = Selection(mu=settings.get("mu", WIENER), exponent=settings.get("exponent", 1.0))
        return self._sst(spectrum, settings.get("rule", "project"), scale, filtered)

    def _method(self, name: str, spectrum: str, scale: float) -> Adapter:
        needs, pair = available_methods()[name].needs, self.spectra[spectrum]
        if "aligned_pair" in needs:
            with self.aligned() as aligned:
                return self._merged_by(name, aligned, scale)
        if "fishers" in needs:
            return self._merged_by(name, self.own, scale)
        if "gain_and_cost" in needs:
            return self._merged_by(name, GainAndCost(pair.gain, pair.cost), scale)
        return self._merged_by(name, GainAndCost(pair.gain) if "gain" in needs else None, scale)

    def _merged_by(self, name: str, statistics: Statistics | None, scale: float) -> Adapter:
        return merge_adapters(
            list(self.adapters.values()),
            [1.0, scale],
            name,
            safety="safety" if "safety" in available_methods()[name].needs else None,
            statistics=statistics,
            dtype=torch.float32,
            seed=self.seed,
        )

    def _sst(self, spectrum: Spectrum, rule: str, scale: float, filtered: Selection) -> Tensor:
        roles = self.roles
        if rule == REFIT:
            return self.refit(spectrum, scale)
        if rule == "project":
            return merge_cores(spectrum, roles.utility, roles.safety, rule=Rule.PROJECT, scale=scale).core
        if rule == "wiener":
            return merge_cores(
                spectrum, roles.utility, roles.safety, rule=Rule.WIENER, scale=scale, selection=filtered
            ).core
        cutoff = self._cutoff(spectrum)
        # The path of `joint` is its μ: a hundred times the cutoff at scale 0.5, a hundredth at 1.5.
        path = Selection(mu=cutoff * 10 ** (4 * (1 - scale)))
        return merge_cores(spectrum, roles.utility, roles.safety, rule=Rule.JOINT, selection=path).core

    def _kept(self, spectrum: Spectrum) -> int:
        merged = merge_cores(spectrum, self.roles.utility, self.roles.safety, rule=Rule.PROJECT)
        return max(1, merged.report.directions)

    def _cutoff(self, spectrum: Spectrum) -> float:
        """Return the smallest λ among the directions that `project` keeps."""
        return float(spectrum.eigenvalues.sort(descending=True).values[self._kept(spectrum) - 1])

    def _random_directions(self, spectrum: Spectrum) -> Tensor:
        """Keep as many directions as `project` does, drawn at random."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.zeros_like(spectrum.eigenvalues)
        weights[torch.randperm(len(weights), generator=generator)[: self._kept(spectrum)]] = 1.0
        return spectrum.apply_filter(self.roles.safety, weights, 0.0)
