"""Core coordinates: the space in which every merge happens.

For a layer with adapters ΔW_t = s_t B_t A_t, let U (d_out, R_o) be an orthonormal basis of the columns of all B_t and
V (d_in, R_i) one of the rows of all A_t. Then ΔW_t = U C_t Vᵀ exactly, with the small core C_t = s_t (Uᵀ B_t)(A_t V).
A merged layer is a core matrix; no d_out x d_in matrix is ever formed. (Core space: Panariello et al. 2025,
https://arxiv.org/abs/2509.17786.)

The bases are the singular vectors of the stacked weight changes [ΔW_1 … ΔW_T], each scaled to unit Frobenius norm. They
depend on the weight changes alone and not on how a weight change is split into factors (the gauge B N, N⁻¹ A), so even
methods that look at single entries of a core are gauge-invariant.

A vector of the space is one flat float64 tensor of shape (D,), D = Σ_layers R_o R_i, so that merging is plain tensor
arithmetic; `CoreSpace.split` views it as batches of matrices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sstmerge.adapters.adapter import (
    Adapter,
    LoraFactors,
    check_names,
    check_same_base,
    common_dtype,
    merged_config,
    natural_order,
)
from sstmerge.adapters.basis import RANK_TOLERANCE, LayerGroup, Members, build_groups, stack_group, stackable_layers
from sstmerge.errors import AdapterError, InputError
from sstmerge.ops import eigh


class CoreSpace:
    """The common space of several adapters of one base model.

    Attributes:
        adapters: The adapters, in the order they were given.
        groups: The layers, batched by shape.
        size: Dimension D of the space.
    """

    def __init__(self, adapters: Sequence[Adapter], groups: Sequence[LayerGroup]) -> None:
        self.adapters = tuple(adapters)
        self.groups = tuple(groups)
        self.size = sum(group.size for group in groups)
        self._cores: dict[str, Tensor] = {}

    @classmethod
    def of(
        cls, adapters: Sequence[Adapter], *, tolerance: float = RANK_TOLERANCE, ignore_base_name: bool = False
    ) -> CoreSpace:
        """Build the space of the given adapters.

        Layers that only some adapters have take part with the adapters they have; layers that no adapter changes are
        left out.

        Args:
            adapters: Adapters of one base model, with distinct names.
            tolerance: Directions below this share of the Frobenius norm of every ΔW_t are left out, so each ΔW_t is
                represented to this relative accuracy.
            ignore_base_name: Accept adapters whose base model names differ.

        Returns:
            The space.

        Raises:
            AdapterError: If the adapters do not fit together.
        """
        check_names(adapters)
        check_same_base(adapters, ignore_base_name=ignore_base_name)
        groups: list[LayerGroup] = []
        for (members, _), names in stackable_layers(adapters).items():
            groups.extend(build_groups(adapters, members, names, tolerance))
        if not groups:
            raise AdapterError("The adapters change no layer at all; there is nothing to merge.")
        return cls(adapters, groups)

    def core(self, name: str) -> Tensor:
        """Return the coordinates of an adapter.

        Args:
            name: The adapter's name.

        Returns:
            Flat cores, shape (D,), float64.

        Raises:
            InputError: If the space has no adapter of that name.
        """
        if name not in self._cores:
            self._cores[name] = self.combination({name: 1.0})
        return self._cores[name].clone()

    def combination(self, weights: Mapping[str, float]) -> Tensor:
        """Return the coordinates of a weighted sum of adapters, without those of each.

        Args:
            weights: Weight of every adapter that has a part, by name.

        Returns:
            Σ_t w_t C_t as flat cores, shape (D,), float64; zero without adapters.

        Raises:
            InputError: If the space has no adapter of a name.
        """
        positions = {adapter.name: position for position, adapter in enumerate(self.adapters)}
        for name in weights:
            if name not in positions:
                raise InputError(f"The space holds the adapters {sorted(positions)}, but not '{name}'.")
        by_position = {positions[name]: weight for name, weight in weights.items()}
        return torch.cat([group.core(by_position).reshape(-1) for group in self.groups])

    def zero(self) -> Tensor:
        """Return the coordinates of the base model, shape (D,), float64."""
        return self.groups[0].output_transform.new_zeros(self.size)

    def split(self, vector: Tensor) -> list[Tensor]:
        """View a vector as one batch of cores per group.

        Args:
            vector: Coordinates, shape (..., D).

        Returns:
            Views of shape (..., L, R_o, R_i), one per group.

        Raises:
            InputError: If the last size is not D.
        """
        if vector.shape[-1] != self.size:
            raise InputError(f"A vector of this space has {self.size} coordinates, but got {tuple(vector.shape)}.")
        parts = vector.split([group.size for group in self.groups], dim=-1)
        return [p.unflatten(-1, group.core_shape) for p, group in zip(parts, self.groups, strict=True)]

    def join(self, cores: Iterable[Tensor]) -> Tensor:
        """Flatten one batch of cores per group into a vector; the inverse of `split`.

        Args:
            cores: Batches of shape (..., L, R_o, R_i), one per group.

        Returns:
            Coordinates, shape (..., D).
        """
        return torch.cat([core.flatten(-3) for core in cores], dim=-1)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Module paths in the order of the flat vector."""
        return tuple(name for group in self.groups for name in group.names)

    def layer_sums(self, vector: Tensor) -> Tensor:
        """Sum a vector's entries per layer.

        Args:
            vector: Shape (..., D).

        Returns:
            Shape (..., number of layers), in the order of `layer_names`.
        """
        return torch.cat([part.sum(dim=(-2, -1)) for part in self.split(vector)], dim=-1)

    def check_rank(self, rank: int | None) -> None:
        """Refuse a rank limit that `to_adapter` could not meet.

        Args:
            rank: Rank limit; None is no limit.

        Raises:
            InputError: If the rank is below 1 or above the largest core.
        """
        largest = max(min(group.core_shape[1:]) for group in self.groups)
        if rank is not None and not 1 <= rank <= largest:
            raise InputError(
                f"The rank limit is {rank}, but the cores of these adapters have rank {largest} at most; give a rank "
                f"from 1 to {largest}, or none for a lossless result."
            )

    def to_adapter(
        self, vector: Tensor, *, name: str, rank: int | None = None, dtype: torch.dtype | None = None
    ) -> Adapter:
        """Write coordinates back as LoRA factors of one uniform rank with scaling 1.

        Each core is split by its singular value decomposition M = P S Qᵀ into B = U P √S and A = √S Qᵀ Vᵀ; layers of
        lower rank are padded with zeros.

        Args:
            vector: Coordinates, shape (D,).
            name: Name of the new adapter.
            rank: Rank limit; None keeps the weight change without loss.
            dtype: Dtype of the factors; the common dtype of the space's adapters by default.

        Returns:
            The adapter.

        Raises:
            InputError: If the rank is below 1 or above the largest core, or the vector is not finite.
        """
        if not bool(torch.linalg.vector_norm(vector, ord=torch.inf).isfinite()):
            raise InputError("The merged coordinates hold NaN or Inf; no adapter was written.")
        self.check_rank(rank)
        factored = [_singular_triplets(core.double()) for core in self.split(vector)]
        rank = rank or _largest_rank([values for _, values, _ in factored])
        dtype = dtype or common_dtype(self.adapters)
        layers: dict[str, LoraFactors] = {}
        for group, (left, values, right) in zip(self.groups, factored, strict=True):
            # Layers of lower rank are padded with zeros.
            root = _pad(values[:, None, :rank].sqrt(), rank)
            left, right = _pad(left[:, :, :rank], rank) * root, _pad(right[:, :, :rank], rank) * root
            pairs = zip(
                group.names,
                group.in_inputs(right, dtype).unbind(),
                group.in_outputs(left, dtype).unbind(),
                strict=True,
            )
            layers |= {path: LoraFactors(A=a, B=b, scaling=1.0) for path, a, b in pairs}
        ordered = {path: layers[path] for path in sorted(layers, key=natural_order)}
        bases = [adapter.base_model for adapter in self.adapters if adapter.base_model]
        return Adapter(
            name=name,
            layers=ordered,
            base_model=bases[0] if bases else None,
            config=merged_config(self.adapters, self.layer_names),
            source="a merge by sstmerge",
        )

    def beyond_rank(self, vector: Tensor, rank: int) -> float:
        """Return the Frobenius norm of what `to_adapter` cuts off a vector (D,) by a rank limit."""
        cut = [torch.linalg.svdvals(core.double())[:, rank:].square().sum() for core in self.split(vector)]
        return math.sqrt(sum(map(float, cut)))

    def restrict(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> CoreSpace:
        """Return the subspace of some layers and, in each of them, some basis vectors.

        Args:
            outputs: Indices of the output basis vectors that are kept, shape (k_o,), by layer; equally many in all layers
                of a group. Layers that are not named are left out.
            inputs: The same for input basis vectors, shape (k_i,).

        Returns:
            The subspace; an adapter's coordinates in it are those of its orthogonal projection.
        """
        groups = []
        for group in self.groups:
            kept = [i for i, name in enumerate(group.names) if name in outputs]
            if not kept:
                continue
            rows = torch.stack([outputs[group.names[i]] for i in kept])[:, None, :]
            columns = torch.stack([inputs[group.names[i]] for i in kept])[:, None, :]
            groups.append(
                LayerGroup(
                    names=tuple(group.names[i] for i in kept),
                    members=group.members,
                    outputs=group.outputs.of_layers(kept),
                    inputs=group.inputs.of_layers(kept),
                    scaling=group.scaling[kept],
                    output_transform=_gather(group.output_transform[kept], rows),
                    input_transform=_gather(group.input_transform[kept], columns),
                )
            )
        return CoreSpace(self.adapters, groups)

    def embed(self, vector: Tensor, other: CoreSpace) -> Tensor:
        """Express a vector of another space of the same adapters in this one.

        Args:
            vector: Coordinates in `other`.
            other: The other space: a subspace of this one, or one that this is a subspace of.

        Returns:
            Coordinates here of its orthogonal projection, shape (D,); exact if `other` is a subspace.
        """
        place = {name: (g, i) for g, group in enumerate(self.groups) for i, name in enumerate(group.names)}
        cores = [core.clone() for core in self.split(self.zero())]
        for group, part in zip(other.groups, other.split(vector.double()), strict=True):
            shared: dict[int, list[tuple[int, int]]] = {}
            for i, name in enumerate(group.names):
                if name in place:
                    shared.setdefault(place[name][0], []).append((place[name][1], i))
            for g, pairs in shared.items():
                here, there = (list(indices) for indices in zip(*pairs, strict=True))
                cores[g][here] = _change_of_basis(self.groups[g], here, group, there, part[there])
        return self.join(cores)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the adapters' contents, in any order."""
        return hashlib.sha256("".join(sorted(a.fingerprint for a in self.adapters)).encode()).hexdigest()

    def basis_tensors(self) -> dict[str, Tensor]:
        """Return what, with the adapters, determines the bases bit for bit (kilobytes; see `from_basis`)."""
        tensors = {}
        for i, group in enumerate(self.groups):
            tensors[f"basis.output.{i}"] = group.output_transform
            tensors[f"basis.input.{i}"] = group.input_transform
        return tensors

    def basis_description(self) -> str:
        """Return the JSON text that goes with `basis_tensors`: adapters by fingerprint, layers and members per group."""
        return json.dumps(
            {
                "adapters": [{"name": a.name, "fingerprint": a.fingerprint} for a in self.adapters],
                "groups": [{"names": g.names, "members": g.members} for g in self.groups],
            }
        )

    @classmethod
    def from_basis(cls, adapters: Sequence[Adapter], description: str, tensors: Mapping[str, Tensor]) -> CoreSpace:
        """Rebuild the very space that statistics were collected in.

        Singular vectors are unique only up to sign (and rotation, where singular values coincide), so a space that is
        computed anew on another machine need not have the same coordinates.

        Args:
            adapters: The same adapters (by content), in any order and under any names.
            description: What `basis_description` returned.
            tensors: What `basis_tensors` returned.

        Returns:
            The space; its adapters have the names given now.

        Raises:
            AdapterError: If an adapter is missing or has other contents.
        """
        recorded = json.loads(description)
        given, wanted = [a.fingerprint for a in adapters], [entry["fingerprint"] for entry in recorded["adapters"]]
        missing = [entry["name"] for entry in recorded["adapters"] if entry["fingerprint"] not in given]
        if sorted(given) != sorted(wanted):
            raise AdapterError(
                f"The statistics were collected for the adapters {[e['name'] for e in recorded['adapters']]}, and "
                f"{missing or 'none of them'} is missing or different among those given "
                f"({[a.name for a in adapters]}). Give the same adapter files, or collect the statistics anew."
            )
        # Adapters of equal content are told apart by their order.
        by_fingerprint = {f: iter([a for a in adapters if a.fingerprint == f]) for f in given}
        ordered = [next(by_fingerprint[fingerprint]) for fingerprint in wanted]
        groups = []
        for i, entry in enumerate(recorded["groups"]):
            members = tuple((int(index), int(rank)) for index, rank in entry["members"])
            names = tuple(entry["names"])
            _check_members(ordered, members, names)
            stacked = stack_group(ordered, members, names)
            transforms = [tensors[f"basis.{side}.{i}"].to(stacked[2].device) for side in ("output", "input")]
            groups.append(LayerGroup(names, members, *stacked, *transforms))
        return cls(ordered, groups)


def _check_members(adapters: Sequence[Adapter], members: Members, names: Sequence[str]) -> None:
    """Refuse a recorded group that the adapters do not have, or whose layers differ in shape."""
    shapes = set()
    for index, rank in members:
        for name in names:
            factors = adapters[index].layers.get(name)
            shapes.add(None if factors is None else factors.shape)
            if factors is None or factors.rank != rank or len(shapes) > 1:
                raise AdapterError(
                    f"The statistics name layer '{name}' with rank {rank} for adapter '{adapters[index].name}', which has "
                    "no such layer: the file is damaged; collect the statistics anew."
                )


def _singular_triplets(cores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, σ and Q of every core M = P diag(σ) Qᵀ from the eigenvectors of MᵀM (or M Mᵀ, if that is smaller).

    Much faster than a singular value decomposition, and as good here: eigenvectors V of any accuracy are orthonormal, so
    M = (M V) Vᵀ holds to rounding. Only where σ is below 1e-8 of the largest do single triplets mean nothing.

    Args:
        cores: Shape (L, R_o, R_i), float64.

    Returns:
        Shapes (L, R_o, k), (L, k) and (L, R_i, k); σ falls, up to rounding.
    """
    if cores.shape[1] < cores.shape[2]:
        left, values, right = _singular_triplets(cores.mT)
        return right, values, left
    vectors = eigh(cores.mT @ cores)[1].flip(-1)
    image = cores @ vectors
    values = image.norm(dim=1)
    return image / torch.where(values > 0, values, 1.0)[:, None, :], values, vectors


def _largest_rank(singular_values: Sequence[Tensor]) -> int:
    """Return the largest numerical rank of all cores, at least 1; float32 bases carry 1e-7 of rounding."""
    largest = 1
    for values in singular_values:
        counted = (values > 1e-7 * values.amax(dim=1, keepdim=True)).any(dim=0).nonzero()
        largest = max(largest, int(counted[-1]) + 1 if len(counted) else 1)
    return largest


def _change_of_basis(to: LayerGroup, here: list[int], group: LayerGroup, there: list[int], cores: Tensor) -> Tensor:
    """Return U_toᵀ U C Vᵀ V_to for cores (k, R_o, R_i) of some layers of a group, which are other layers of `to`."""
    if to.members != group.members:
        raise InputError("One of two spaces of the same adapters must be a part of the other, but they stack others.")
    left = to.output_transform[here].mT @ to.outputs.gram[here] @ group.output_transform[there]
    right = to.input_transform[here].mT @ to.inputs.gram[here] @ group.input_transform[there]
    return left @ cores @ right.mT


def _gather(bases: Tensor, columns: Tensor) -> Tensor:
    """Pick columns (L, 1, k) of a batch of matrices (L, n, R)."""
    return bases.gather(2, columns.expand(-1, bases.shape[1], -1)).contiguous()


def _pad(columns: Tensor, count: int) -> Tensor:
    """Append columns of zeros to a batch of matrices (L, n, k) up to a number of them."""
    return torch.nn.functional.pad(columns, (0, count - columns.shape[2]))
