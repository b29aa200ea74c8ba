"""What a merging method is: a row of data over a pure function.

A function acts on one of three things:

    core      the cores of a batch of layers of one shape, in orthonormal bases: ΔW_t = U C_t Vᵀ. Whatever a method says
              about singular values and vectors of ΔW holds for C, so nothing of size d_out × d_in is formed.
    delta     the dense weight changes of one layer. For methods that look at single entries of ΔW; the result is truncated
              to a rank afterwards.
    factors   lora_A and lora_B of one layer, as PEFT's linear, ties and dare_* do. The result depends on how a weight change
              is split into factors; these methods exist for compatibility and say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from sstmerge.errors import InputError

ActsOn = Literal["core", "delta", "factors"]
# The rank of the result where the user names none: enough for every digit, or the largest rank among the adapters.
DefaultRank = Literal["lossless", "largest"]
# What a method needs beside the adapters and their weights.
Need = Literal["safety", "fishers", "gain", "gain_and_cost", "aligned_pair"]


@dataclass(frozen=True)
class CoreBatch:
    """Layers of one shape, as a core method sees them.

    Attributes:
        names: Module paths of the L layers.
        U: Orthonormal output bases, shape (L, d_out, R_o), float32.
        V: Orthonormal input bases, shape (L, d_in, R_i), float32.
        cores: C_t of every adapter, shape (T, L, R_o, R_i), float64.
        weights: Weight of every adapter, shape (T,), float64.
        adapters: Names of the T adapters.
        group: Index of this batch in the core space, by which statistics are found.
        safety: Index of the safety adapter among the T, for methods that need one; None where the merge has none.
    """

    names: tuple[str, ...]
    U: Tensor
    V: Tensor
    cores: Tensor
    weights: Tensor
    adapters: tuple[str, ...]
    group: int
    safety: int | None = None


@dataclass(frozen=True)
class RebasedCores:
    """Merged cores whose columns leave the span of the batch's U: ΔW = U' M Vᵀ.

    Attributes:
        U: Orthonormal output bases, shape (L, d_out, R'), float32.
        cores: M, shape (L, R', R_i), float64.
    """

    U: Tensor
    cores: Tensor


@dataclass(frozen=True)
class DeltaLayer:
    """One layer, as a delta method sees it.

    Attributes:
        name: Module path.
        deltas: ΔW_t of every adapter that has the layer, shape (T, d_out, d_in), float32.
        weights: Weight of every adapter, shape (T,), float32.
        adapters: Names of the T adapters.
        index: Position of the layer among all layers.
    """

    name: str
    deltas: Tensor
    weights: Tensor
    adapters: tuple[str, ...]
    index: int


@dataclass(frozen=True)
class FactorLayer:
    """One layer, as a factor method sees it.

    Attributes:
        name: Module path.
        A: lora_A of every adapter that has the layer, each (r_t, d_in), in the adapter's dtype.
        B: lora_B of every adapter, each (d_out, r_t).
        scalings: PEFT's scaling of every adapter.
        weights: Weight of every adapter, shape (T,), float64.
        adapters: Names of the T adapters.
    """

    name: str
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scalings: tuple[float, ...]
    weights: Tensor
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class LowRank:
    """Merged weight changes as factors, ΔW = B A, for results that leave the span of the batch's V.

    Attributes:
        B: Shape (..., d_out, k).
        A: Shape (..., k, d_in).
    """

    B: Tensor
    A: Tensor


class Layers(Protocol):
    """All layers of a merge, for methods that must see them together before the first is merged.

    Iterating yields the batches (`CoreBatch` or `DeltaLayer`) that the function will be given, in the same order; it can
    be done more than once, and holds only one batch at a time.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of all layers."""

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: Its name, in Python and, with dashes, on the command line.
        kind: Its type: float, int, str or bool.
        default: Its value where the user gives none.
        help: One sentence, with the symbol that it has in the paper.
        low: Smallest value allowed, for numbers.
        high: Largest value allowed, for numbers.
        low_is_allowed: Whether `low` itself is allowed.
        choices: The values allowed, for strings.
    """

    name: str
    kind: type
    default: float | int | str | bool
    help: str
    low: float = -math.inf
    high: float = math.inf
    low_is_allowed: bool = True
    choices: tuple[str, ...] = ()

    def check(self, value: Any) -> Any:
        """Return a value as the option's type.

        Args:
            value: What the user gave.

        Returns:
            The value.

        Raises:
            InputError: It is of another type or out of range.
        """
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.kind) or (self.kind is int and isinstance(value, bool)):
            raise InputError(f"{self.name} must be of type {self.kind.__name__}, but is {value!r}.")
        if self.choices and value not in self.choices:
            raise InputError(f"{self.name} must be one of {list(self.choices)}, but is {value!r}.")
        if self.kind in (int, float) and isinstance(value, int | float):
            inside = self.low < value <= self.high or (value == self.low and self.low_is_allowed)
            if not inside:  # NaN is not inside either
                left = "[" if self.low_is_allowed and self.low > -math.inf else "("
                raise InputError(f"{self.name} must lie in {left}{self.low}, {self.high}], but is {value!r}.")
        return value

    def parse(self, text: str) -> Any:
        """Read a value that was written as text.

        Args:
            text: Such as `0.2` or, for bool, `true` or `false`.

        Returns:
            The value, checked.

        Raises:
            InputError: It is of another type or out of range.
        """
        value: Any = text
        if self.kind is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif self.kind is not str:
            try:
                value = self.kind(text)
            except ValueError:
                value = text
        return self.check(value)


@dataclass(frozen=True)
class Method:
    """One merging method.

    Attributes:
        name: Its name, in Python and on the command line.
        title: Its name in words.
        function: `function(batch_or_layer, **options)`; with statistics, `function(batch, statistics, **options)`. Returns
            merged cores (L, R_o, R_i), `RebasedCores` or `LowRank` for a batch of cores; a merged delta (d_out, d_in); or,
            for factors, a `LowRank`.
        acts_on: What the function acts on.
        formula: The formula, in one or two lines of plain text.
        paper: URL of the paper.
        options: Its options.
        needs: What it needs beside the adapters.
        note: What a user should know before choosing it; may be empty.
        rank: Rank of the result where the user names none.
        prepare: `prepare(layers, **options)`, called once before the first layer is merged; what it returns is given to
            `function` as further keyword arguments.
    """

    name: str
    title: str
    function: Callable[..., Any]
    acts_on: ActsOn
    formula: str
    paper: str
    options: tuple[Option, ...] = ()
    needs: tuple[Need, ...] = ()
    note: str = ""
    rank: DefaultRank = "lossless"
    prepare: Callable[..., Mapping[str, Any]] | None = None

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in defaults and check what the user gave.

        Args:
            given: Values by option name.

        Returns:
            A value for every option.

        Raises:
            InputError: An option is unknown, of another type or out of range.
        """
        known = {option.name: option for option in self.options}
        for name in given:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise InputError(f"Method '{self.name}' has no option '{name}'; {has}.")
        return {name: option.check(given.get(name, option.default)) for name, option in known.items()}


@dataclass
class Registry:
    """The methods by name, in the order in which they were added."""

    methods: dict[str, Method] = field(default_factory=dict)

    def add(self, methods: Sequence[Method]) -> None:
        """Add methods.

        Args:
            methods: The rows.

        Raises:
            InputError: A name is taken.
        """
        for method in methods:
            if method.name in self.methods:
                raise InputError(f"There are two methods of the name '{method.name}'.")
            self.methods[method.name] = method

    def find(self, name: str) -> Method:
        """Return the method of a name.

        Args:
            name: The name.

        Returns:
            The method.

        Raises:
            InputError: There is none; the message lists those there are.
        """
        if name not in self.methods:
            raise InputError(f"Unknown method '{name}'; expected one of {', '.join(sorted(self.methods))}.")
        return self.methods[name]
