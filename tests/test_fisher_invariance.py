"""What must not change a Fisher: padding, batches, chunks, wrappers. And the model, which collecting must not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import GPT2_TARGETS, brute_force_scores, dense_fisher, random_adapter, random_batch, relative_error, rows
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint

from sstmerge.adapters import Adapter, CoreSpace, save_adapter
from sstmerge.errors import FisherError
from sstmerge.fisher import collect_fisher, head, installed_taps
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.fingerprints import model_fingerprint
from sstmerge.gevp import solve
from sstmerge.prompts import Example, encode, make_batches

STRUCTURES = ("diagonal", "kfac", "ekfac", "block", "global")
BATCH = random_batch([8, 5, 7, 6], response=[3, 2, 4, 1], weight=[1.0, 4.0, 0.25, 2.25])


@pytest.fixture
def model(pico_gpt2):
    return pico_gpt2().double()


@pytest.fixture
def space(model):
    a = random_adapter(model, "a", targets=GPT2_TARGETS, seed=1)
    return CoreSpace.of([a, random_adapter(model, "b", targets=("c_attn", "lm_head"), rank=1, seed=2)])


def collect(model, batches, space, structure="global", **options):
    if structure == "ekfac" and "basis" not in options:
        fixed = [random_batch([6, 6, 7], seed=8)]
        pair = [collect_fisher(model, fixed, space, structure="kfac", labels=k) for k in ("data", "sampled")]
        options["basis"] = solve(*pair).basis
    return collect_fisher(model, batches, space, structure=structure, **options)


def assert_same_fisher(fisher, expected, tolerance=1e-6):
    """Compare matrices, mean scores and counts; the order of single scores does not count."""
    assert relative_error(dense_fisher(fisher), dense_fisher(expected)) < tolerance
    assert relative_error(fisher.mean_score(), expected.mean_score()) < tolerance
    for name in fisher.counts.__dataclass_fields__:
        torch.testing.assert_close(getattr(fisher.counts, name), getattr(expected.counts, name))


# ---- how the data are cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["data", "sampled"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_padding_batches_and_their_order_change_nothing(model, space, structure, labels):
    options = {"structure": structure, "labels": labels, "reference": "a"}
    whole = collect(model, [BATCH], space, **options)
    cuts = {
        "padded": [rows(BATCH, slice(None), width=13)],
        "single": [rows(BATCH, [i]) for i in range(4)],
        "reordered": [rows(BATCH, [3, 1], width=9), rows(BATCH, [2, 0])],
    }
    for batches in cuts.values():
        assert_same_fisher(collect(model, batches, space, **options), whole)


def test_content_of_the_padding_changes_nothing(model, space):
    filled = BATCH.input_ids.masked_fill(BATCH.attention_mask == 0, 77)
    other = Batch(filled, BATCH.attention_mask, BATCH.loss_mask, BATCH.index, BATCH.weight)
    assert_same_fisher(collect(model, [other], space), collect(model, [BATCH], space))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_integer_weights_are_repetitions(model, space, structure):
    weight = torch.tensor([1.0, 3.0, 0.0, 2.0])
    heavy = Batch(BATCH.input_ids, BATCH.attention_mask, BATCH.loss_mask, BATCH.index, weight)
    repeated = rows(BATCH, [0, 1, 1, 1, 3, 3])
    plain = Batch(repeated.input_ids, repeated.attention_mask, repeated.loss_mask, repeated.index, torch.ones(6))
    one, other = collect(model, [heavy], space, structure), collect(model, [plain], space, structure)
    assert relative_error(dense_fisher(one), dense_fisher(other)) < 1e-6
    assert relative_error(one.mean_score(), other.mean_score()) < 1e-6
    assert one.effective_sequences == pytest.approx(36 / 14)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("reference", "points"), [("a", 1), ("path:base:a:4", 4)])
def test_draws_and_points_are_no_new_sequences(model, space, draws, reference, points):
    fisher = collect(model, [BATCH], space, labels="sampled", draws=draws, reference=reference)
    assert fisher.counts.sequences.sum() == 7.5 * draws * points
    assert fisher.effective_sequences == pytest.approx(7.5**2 / 22.125)
    for some in ("draws", "reference"):  # as in a file that is damaged
        damaged = replace(fisher, metadata={**fisher.metadata, some: 10**400})
        assert damaged.effective_sequences >= fisher.effective_sequences


def test_sums_of_different_draws_do_not_overstate_their_sequences(model, space):
    one = collect(model, [random_batch([5] * 4, seed=4)], space, labels="sampled")
    four = collect(model, [random_batch([5] * 6, seed=3)], space, labels="sampled", draws=4)
    for both in (one + four, four + one):
        # Every sequence weighs as much as it has draws.
        assert both.effective_sequences <= (4 + 6 * 4) ** 2 / (4 + 6 * 16)
        assert both.effective_sequences == pytest.approx(28 / 4)


def test_size_of_logits_chunks_changes_nothing(model, space, monkeypatch):
    options = {"labels": "sampled", "draws": 3, "reference": "b"}
    whole = collect(model, [BATCH], space, **options)
    for chunk in (1, 250):
        monkeypatch.setattr(head, "LOGITS_CHUNK", chunk)
        assert_same_fisher(collect(model, [BATCH], space, **options), whole)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_several_draws_are_a_mean(model, space, structure):
    """Three draws: three scores for every sequence, three times the counts, and all structures see the same labels."""
    options = {"labels": "sampled", "draws": 3}
    scores = collect(model, [BATCH], space, **options)
    assert len(scores.statistics["scores"]) == 12
    fisher = collect(model, [BATCH], space, structure, **options)
    torch.testing.assert_close(fisher.counts.tokens, 3 * collect(model, [BATCH], space).counts.tokens)
    assert relative_error(fisher.mean_score(), scores.mean_score()) < 1e-10
    if structure in ("block", "diagonal"):
        exact = dense_fisher(scores)
        mine = dense_fisher(fisher)
        assert relative_error(mine, exact * (mine != 0)) < 1e-5
    if structure == "kfac":  # inputs do not depend on the draw
        once = collect(model, [BATCH], space, structure)
        for (X, _), (X_once, _) in zip(fisher.kronecker_factors(), once.kronecker_factors(), strict=True):
            torch.testing.assert_close(X, X_once)


def test_response_tokens_cut_the_loss_and_nothing_else(model, space, pico_tokenizer):
    texts = [("Say no", "No, never."), ("And now?", "Not now.")]
    examples = [Example(({"role": "user", "content": p},), r, 1.0, "row") for p, r in texts]
    tokenizer = pico_tokenizer(chat_template=False)
    cut = make_batches(encode(examples, tokenizer, max_length=64, response_tokens=2), pad_token_id=0)
    fisher = collect(model, cut, space)
    assert fisher.tokens == 4
    (whole,) = make_batches(encode(examples, tokenizer, max_length=64), pad_token_id=0)
    first_two = whole.loss_mask & (whole.loss_mask.cumsum(dim=1) <= 2)
    masked = Batch(whole.input_ids, whole.attention_mask, first_two, whole.index, whole.weight)
    expected = collect(model, [masked], space)
    assert relative_error(fisher.statistics["scores"], expected.statistics["scores"]) < 1e-6
    assert expected.tokens == fisher.tokens


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_halves_add_up_and_sums_are_joint_collections(model, space, structure):
    basis = {}
    if structure == "ekfac":
        basis["basis"] = collect(model, [BATCH], space, "ekfac").kronecker_basis()
    whole = collect(model, [BATCH], space, structure, **basis)
    assert_same_fisher(whole.half(0) + whole.half(1), whole)
    assert_same_fisher(whole.half(0), collect(model, [rows(BATCH, [0, 2])], space, structure, **basis))
    assert_same_fisher(whole.half(1), collect(model, [rows(BATCH, [1, 3])], space, structure, **basis))
    more = random_batch([5, 6, 9], seed=9)
    both = collect(model, [BATCH, more], space, structure, **basis)
    assert_same_fisher(whole + collect(model, [more], space, structure, **basis), both)


# ---- how the model is wrapped ------------------------------------------------------------------------------------------


def test_gradient_checkpointing_counts_once(pico_gpt2, model, space):
    wrapped = pico_gpt2().double()
    for layer in wrapped.transformer.h:
        inner = layer.forward

        def recompute(*args, inner=inner, **kwargs):
            return checkpoint(inner, *args, use_reentrant=False, **kwargs)

        layer.forward = recompute
    for structure in ("global", "kfac"):
        options = {"labels": "sampled", "draws": 2, "reference": "a"}
        assert_same_fisher(
            collect(wrapped, [BATCH], space, structure, **options), collect(model, [BATCH], space, structure, **options)
        )


def test_reentrant_checkpointing_is_refused(model, space):
    for layer in model.transformer.h:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner, **kwargs: checkpoint(
            lambda *a: inner(*a, **kwargs), *args, use_reentrant=True
        )
    with pytest.raises(FisherError, match=r"received no gradient.*reentrant"):
        collect(model, [BATCH], space)


def test_only_the_output_head_adapted(pico_llama):
    """Nothing below the head needs a gradient then."""
    model = pico_llama().double()
    space = CoreSpace.of([random_adapter(model, "a", targets=("lm_head",))])
    fisher = collect(model, [BATCH], space, labels="data", reference="a")
    expected = brute_force_scores(model, space, space.core("a"), BATCH) * BATCH.weight.double().sqrt()[:, None]
    assert relative_error(fisher.statistics["scores"], expected) < 1e-5


def test_a_module_that_is_called_twice_sums_both_calls(pico_llama):
    model = pico_llama().double()
    model.model.layers[1].mlp.gate_proj = model.model.layers[0].mlp.gate_proj  # up_proj, in the same group, is not
    space = CoreSpace.of([random_adapter(model, "a", targets=("gate_proj", "up_proj"), seed=3)])
    assert len(space.groups) == 1
    fisher = collect(model, [BATCH], space, reference="a")
    expected = brute_force_scores(model, space, space.core("a"), BATCH) * BATCH.weight.double().sqrt()[:, None]
    assert relative_error(fisher.statistics["scores"], expected) < 1e-4
    kfac = collect(model, [BATCH], space, "kfac", reference="a")
    positions = float((BATCH.weight * BATCH.attention_mask.sum(dim=1)).sum())
    counts = dict(zip(space.layer_names, kfac.sums("input_count")[0].tolist(), strict=True))
    assert counts["model.layers.0.mlp.gate_proj"] == pytest.approx(2 * positions)
    assert counts["model.layers.0.mlp.up_proj"] == pytest.approx(positions)


def peft_of(adapter, model, tmp_path, **options):
    space = CoreSpace.of([adapter])
    folder = save_adapter(space.to_adapter(space.core(adapter.name), name="x"), tmp_path / "adapter")
    return PeftModel.from_pretrained(model, folder, **options)


def test_peft_model_is_its_base(pico_llama, tmp_path):
    a = random_adapter(pico_llama(), "a", dtype=torch.float32)
    space = CoreSpace.of([a])
    wrapped = peft_of(a, pico_llama(), tmp_path)
    ids = torch.arange(4, 12)[None]
    before = wrapped(ids).logits
    assert relative_error(before, pico_llama()(ids).logits) > 1e-3
    mine, expected = (collect(m, [BATCH], space, reference="0.5*a") for m in (wrapped, pico_llama()))
    assert torch.equal(mine.statistics["scores"], expected.statistics["scores"])
    assert mine.metadata["model"] == expected.metadata["model"]
    assert torch.equal(wrapped(ids).logits, before)


# ---- the model afterwards ----------------------------------------------------------------------------------------------


def state(model):
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
    }


def assert_same_state(after, before):
    weights, weights_before = after.pop("weights"), before.pop("weights")
    assert all(torch.equal(weights[n], w) for n, w in weights_before.items())
    assert after == before


@pytest.mark.parametrize("kind", ["plain", "peft for training", "peft for inference"])
def test_model_is_restored(pico_llama, tmp_path, kind):
    a = random_adapter(pico_llama(), "a", dtype=torch.float32)
    space, model = CoreSpace.of([a]), pico_llama()
    if kind != "plain":
        model = peft_of(a, model, tmp_path, is_trainable=kind == "peft for training")
    model.train()
    next(iter(model.modules())).training = True
    list(model.modules())[5].eval()
    if kind == "plain":
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = state(model)
    collect(model, [BATCH], space, labels="sampled", reference="a")
    assert_same_state(state(model), before)
    before = state(model)
    with installed_taps(model, space, space.core("a")), torch.no_grad():
        model(BATCH.input_ids)
    assert_same_state(state(model), before)


def test_model_is_restored_after_an_error(pico_llama):
    model = pico_llama()
    model.train()
    space = CoreSpace.of([random_adapter(model, "a")])
    before = state(model)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, [BATCH], space, progress=interrupt)
    assert_same_state(state(model), before)


def test_dropout_is_off(pico_gpt2, space):
    model = pico_gpt2().double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = collect(model, [BATCH], space).statistics["scores"]
    assert torch.equal(collect(model.train(), [BATCH], space).statistics["scores"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_nearly_the_same(pico_llama, dtype):
    space = CoreSpace.of([random_adapter(pico_llama(), "a")])
    exact = collect(pico_llama(), [BATCH], space, reference="a")
    rounded = collect(pico_llama().to(dtype), [BATCH], space, reference="a")
    difference = (rounded.scores() - exact.scores()).norm() / exact.scores().norm()
    assert float(difference) < 40 * torch.finfo(dtype).eps


def test_progress_counts_sequences_and_points(model, space):
    seen = []
    batches = [rows(BATCH, [0, 1, 2]), rows(BATCH, [3])]
    collect(model, batches, space, reference="path:base:a:2", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (4, 8), (7, 8), (8, 8)]


def test_fingerprint_of_a_model_ignores_adapters_and_sees_weights(pico_llama):
    model = pico_llama()
    own = model_fingerprint(model)
    assert model_fingerprint(pico_llama(seed=1)) != own
    assert model_fingerprint(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_of_a_model_sees_every_bit(pico_llama, dtype):
    # An MLP of 24 blocks and a rest, so that bits lie in all kinds of places.
    model = pico_llama().to(dtype)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(1000, 811).to(dtype))
    weight, words = model.model.layers[0].mlp.up_proj.weight, {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits, sign = weight.detach().view(words).view(-1), torch.iinfo(words).min
    seen = {model_fingerprint(model)}
    places = [0, 1, 2, 3, 100_001, 811_000 // 2, len(bits) - 2, len(bits) - 1]
    for number, place in enumerate(places):
        for flipped in (1, sign):
            with torch.no_grad():
                bits[place] ^= flipped
            seen.add(model_fingerprint(model))
        assert len(seen) == 1 + 2 * (number + 1)
    with torch.no_grad():  # two signs, which cancel out in a plain sum of words
        bits[[50_003, 50_011]] ^= sign
    assert model_fingerprint(model) not in seen
    with torch.no_grad():
        bits[[50_003, 50_011]] ^= sign
        weight[[4, 5]] = weight[[5, 4]]
    assert model_fingerprint(model) not in seen


def test_fingerprint_of_a_model_is_not_remembered_too_long(pico_llama):
    model = pico_llama()
    own = model_fingerprint(model)
    model.model.layers[0].mlp.up_proj.weight.data[:, ::3] = 0.0  # does not count as a write
    changed = model_fingerprint(model)
    assert changed != own
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
    assert model_fingerprint(model) == changed


def test_adapter_given_as_a_point(model, space):
    core = space.core("a") + 0.5 * space.core("b")
    assert_same_fisher(
        collect(model, [BATCH], space, reference=core), collect(model, [BATCH], space, reference="a+0.5*b")
    )
    renamed = CoreSpace.of([Adapter("x+y", space.adapters[0].layers), space.adapters[1]])
    named = collect(model, [BATCH], renamed, reference="x+y")
    assert_same_fisher(named, collect(model, [BATCH], space, reference="a"))


class QuantizedLinear(torch.nn.Module):
    """A frozen base layer as quantisation libraries make them: integers, a scale per row, and no float weight."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def dequantized(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dequantized().mT


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "PeftModel"])
def test_a_quantised_base_is_its_dequantised_self(pico_llama, wrapped):
    quantised, plain = pico_llama(), pico_llama()
    space = CoreSpace.of([random_adapter(plain, "a", targets=("q_proj", "down_proj"), seed=4)])
    for model in (quantised, plain):
        for layer in model.model.layers:
            for parent, child in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
                replacement = QuantizedLinear(getattr(parent, child))
                if model is quantised:
                    setattr(parent, child, replacement)
                else:
                    getattr(parent, child).weight.data = replacement.dequantized()
    if wrapped:  # PEFT wraps the layers that it knows, beside the quantised ones
        quantised = get_peft_model(quantised, LoraConfig(r=2, target_modules=["k_proj"]))

    fisher = collect(quantised, [BATCH], space, "kfac", labels="sampled", reference="a")

    assert_same_fisher(fisher, collect(plain, [BATCH], space, "kfac", labels="sampled", reference="a"), tolerance=1e-5)
