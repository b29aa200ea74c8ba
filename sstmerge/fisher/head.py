"""The language-model head, in chunks: label scores at the logits in closed form.

The score of a label y at logits z is ∂ log p(y) / ∂z = onehot(y) − softmax(z). Only the hidden states of response
positions pass through the head, a few rows at a time, so that a vocabulary of 128k never meets all tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sstmerge.errors import InputError
from sstmerge.fisher.placement import input_device, uncompiled

# Entries of the largest logits matrix that is held at once: 2**24 float32 numbers are 64 MiB.
LOGITS_CHUNK = 2**24


class Head:
    """The output head of a causal language model: hidden states (N, d) to logits (N, vocabulary)."""

    def __init__(self, model: nn.Module) -> None:
        model = uncompiled(model)
        base = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            raise InputError(
                f"{type(base).__name__} is an encoder-decoder model; sstmerge measures causal language models only "
                "(AutoModelForCausalLM)."
            )
        get_head = getattr(base, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if head is None:
            raise InputError(
                f"{type(base).__name__} has no output embeddings, so it gives no token probabilities; sstmerge needs a "
                "causal language model (AutoModelForCausalLM)."
            )
        self.module: nn.Module = head
        self._postprocess = _logit_postprocessing(base)
        self.vocabulary = int(next(head.parameters()).shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits, shape (N, vocabulary), at least float32, for hidden states of shape (N, d)."""
        logits = self._postprocess(self.module(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @contextmanager
    def capturing(self, hidden_states: list[Tensor]) -> Iterator[None]:
        """Catch the hidden states that reach the head, and let only the first position pass through it.

        Args:
            hidden_states: The hidden states of every forward pass are appended here, shape (B, S, d).

        Yields:
            None.
        """

        def keep_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            hidden_states.append(args[0])
            # Detached, so that this one position is no part of the graph; contiguous, because torch multiplies a strided
            # (B, 1, d) by copying the head's whole weight B times.
            return (args[0][:, :1].detach().contiguous(),)

        handle = self.module.register_forward_pre_hook(keep_first)
        try:
            yield
        finally:
            handle.remove()

    def check_causal(self, model: nn.Module) -> None:
        """Check, by a pass of two tokens, that no position sees a later one.

        Args:
            model: The model that this is the head of.

        Raises:
            InputError: If one does: the model is an encoder, and no sequence has a probability under it.
        """
        captured: list[Tensor] = []
        ids = torch.tensor([[0, 0], [0, 1]], device=input_device(model))
        with torch.no_grad(), self.capturing(captured):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        first, other = captured[0][:, 0].float()
        # Far above rounding (8-bit layers round by what else is in the batch), far below what an encoder does.
        if float((first - other).norm()) > 1e-2 * float(first.norm()):
            raise InputError(
                f"In {type(uncompiled(model)).__name__} a position depends on later ones, so it is no causal language "
                "model, and its token probabilities are not those of a response; load a decoder (AutoModelForCausalLM)."
            )

    def check(self, hidden: Tensor, logits: Tensor) -> None:
        """Check that `logits` reproduces what the model itself computes.

        Args:
            hidden: Captured hidden states, shape (B, S, d).
            logits: The model's own logits at the first position, shape (B, 1, vocabulary).

        Raises:
            InputError: If the model changes its logits in a way that is not known here.
        """
        with torch.no_grad():
            ours = self.logits(hidden[:, 0].detach())
        expected = logits[:, 0].detach().to(ours.dtype)
        tolerance = 16 * torch.finfo(hidden.dtype).eps * float(expected.abs().max())
        if ours.shape != expected.shape or float((ours - expected).abs().max()) > tolerance:
            raise InputError(
                "This model changes its logits after the output embeddings in a way that sstmerge does not know "
                "(known: final_logit_softcapping, logit_scale, logits_scaling); please report the model's name."
            )


def label_scores(
    head: Head, hidden: Tensor, draw: Callable[[Tensor, slice], Tensor], weight: Tensor, *, draws: int = 1
) -> Tensor:
    """Return the gradients of Σ w log p(label) with respect to the hidden states, one per draw of the labels.

    Args:
        head: The head.
        hidden: Hidden states of the positions that predict a response token, shape (N, d).
        draw: Function of float32 probabilities (n, vocabulary) and the slice of rows they belong to, which returns the
            labels of every draw, shape (draws, n).
        weight: Factor of every row, shape (N,).
        draws: Number of draws K.

    Returns:
        Gradients, shape (K, N, d).
    """
    gradients = torch.empty((draws, *hidden.shape), dtype=hidden.dtype, device=hidden.device)
    rows_per_chunk = max(1, LOGITS_CHUNK // head.vocabulary)
    for start in range(0, hidden.shape[0], rows_per_chunk):
        rows = slice(start, min(start + rows_per_chunk, hidden.shape[0]))
        with torch.enable_grad():
            chunk = hidden[rows].detach().requires_grad_()
            logits = head.logits(chunk)
        probability = torch.softmax(logits.detach(), dim=-1)
        labels = draw(probability, rows)
        picked = labels.mT  # (n, K)
        for k in range(draws):
            last = k == draws - 1
            score = probability.neg_() if last else -probability
            score.scatter_add_(1, picked[:, k : k + 1], torch.ones_like(score[:, :1]))
            score *= weight[rows, None]
            (gradients[k, rows],) = torch.autograd.grad(logits, chunk, score, retain_graph=not last)
    return gradients


def _logit_postprocessing(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what the model does to its logits after the output embeddings (Gemma 2, Cohere, Granite)."""
    config = getattr(model, "config", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)

    def postprocess(logits: Tensor) -> Tensor:
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    return postprocess
