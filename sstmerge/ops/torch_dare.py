"""DARE with the random numbers of torch's own generator, for results that equal PEFT's entry by entry."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sstmerge import reference
from sstmerge.errors import BackendError, InputError
from sstmerge.ops.backends import BackendName, choose_backend
from sstmerge.ops.extension import load_extension
from sstmerge.ops.validation import as_tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATE_BYTES = 5056


def torch_dare(
    values: Sequence[Tensor],
    density: float,
    *,
    generator: torch.Generator | None = None,
    in_place: bool = False,
    backend: BackendName = "auto",
) -> list[Tensor]:
    """Keep entries at random, each with probability `density`, and divide them by it, as PEFT does.

    Draws what `torch.bernoulli` draws for one tensor after the other, in row-major order, and leaves the generator in the
    same state. `ops.dare` is the better choice wherever numbers need not be torch's: its do not depend on an order.

    Args:
        values: Tensors of any shapes on one device; float32, float64, bfloat16 or float16; any strides.
        density: Probability that an entry is kept, in (0, 1]; rounded to the tensor's dtype, as in PEFT, before an entry is
            drawn, but not in the division.
        generator: The generator of the tensors' device that is drawn from; the default is torch's global one.
        in_place: Whether the values may be overwritten.
        backend: A name that `backends` lists; "auto" takes the compiled code on a CPU and torch's own functions elsewhere.
            Torch's functions are also taken, with a warning, where the layout of its generator's state is not the known one.

    Returns:
        Contiguous tensors of the same shapes and dtypes; new ones, unless the values may be overwritten. A dropped entry is
        0 · value.

    Raises:
        InputError: A dtype, the density or a name is unusable.
        BackendError: The backend asked for is not available.
    """
    given: Any = values
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise InputError(
            f"values must be a list of tensors, not {type(given).__name__}: give a single tensor as [tensor]"
        )
    tensors = [as_tensor(f"values[{i}]", value) for i, value in enumerate(given)]
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in _DTYPES:
            raise InputError(f"values[{i}] must be float32, float64, bfloat16 or float16, not {tensor.dtype}")
        if tensor.device != tensors[0].device:
            raise InputError(
                f"values[{i}] (on {tensor.device}) must be on the device of values[0] ({tensors[0].device})"
            )
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 < density <= 1.0:
        raise InputError(f"density must lie in (0, 1], not be {density!r}: it is the probability that an entry is kept")
    device = tensors[0].device if tensors else torch.device("cpu")
    if not isinstance(generator, torch.Generator | None):
        raise InputError(f"generator must be a torch.Generator or None, not {type(generator).__name__}")
    if generator is not None and generator.device.type != device.type:
        raise InputError(f"generator (on {generator.device}) must be on the device of values[0] ({device})")
    chosen = choose_backend("torch_dare", backend, device)
    problem = generator_problem() if chosen == "cpu_compiled" else ""
    if problem and backend == "cpu_compiled":
        raise BackendError(f"backend 'cpu_compiled' has no torch_dare here: {problem}")
    if problem:
        warnings.warn(f"DARE draws through torch's own functions, several times slower: {problem}", stacklevel=2)
    if chosen != "cpu_compiled" or problem:
        return reference.torch_dare(tensors, density, generator=generator)
    return _compiled(tensors, density, generator or torch.default_generator, in_place=in_place)


@functools.cache
def generator_problem() -> str:
    """Compare the compiled generator with torch's, once per process, on a generator of its own.

    Returns:
        Why the compiled generator cannot take the place of torch's, in words; "" if it can.
    """
    generator = torch.Generator().manual_seed(7)
    if generator.get_state().numel() != _STATE_BYTES:
        return f"the state of torch's CPU generator has {generator.get_state().numel()} bytes, not {_STATE_BYTES}"
    tests = [torch.ones(1000), torch.ones(1000, dtype=torch.float64), torch.ones(1000)]
    expected = reference.torch_dare(tests, 0.3, generator=generator)
    after = generator.get_state()
    try:
        found = _compiled(tests, 0.3, generator.manual_seed(7))
    except ValueError as error:
        return str(error)
    same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if not same or not torch.equal(generator.get_state(), after):
        return f"the CPU generator of torch {torch.__version__} draws other numbers than the one that is known"
    return ""


def _compiled(
    tensors: Sequence[Tensor], density: float, generator: torch.Generator, *, in_place: bool = False
) -> list[Tensor]:
    extension: Any = load_extension()[0]
    state = generator.get_state()
    results = []
    for tensor in tensors:
        values = tensor.contiguous()
        output = values if in_place else torch.empty_like(values)
        dtype = str(values.dtype).removeprefix("torch.")
        probability = reference.probability_in(values.dtype, density)
        addresses = values.data_ptr(), output.data_ptr(), values.numel()
        extension.torch_dare(dtype, *addresses, probability, density, state.data_ptr())
        results.append(output)
    generator.set_state(state)
    return results
