"""Fishers against brute force: per-example autograd through densely changed weights, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from builders import (
    GPT2_TARGETS,
    brute_force_scores,
    dense_fisher,
    dense_weights,
    enumerated_labels,
    layer_slices,
    log_likelihood,
    random_adapter,
    random_batch,
    relative_error,
)
from torch.func import functional_call

from sstmerge.adapters import CoreSpace
from sstmerge.fisher import KroneckerBasis, collect_fisher
from sstmerge.gevp import solve

TARGETS = {
    "llama": (("q_proj", "v_proj", "down_proj"), ("q_proj", "o_proj", "gate_proj")),
    "llama_head": (("q_proj", "lm_head"), ("lm_head", "k_proj")),
    "gpt2": (GPT2_TARGETS, ("c_attn", "c_proj")),
    "tied": (("up_proj", "lm_head"), ("v_proj",)),
}
# Llama's norms and rotations are computed in float32 whatever the model's dtype.
TOLERANCE = {"llama": 1e-4, "llama_head": 1e-4, "gpt2": 1e-6, "tied": 1e-4}


@pytest.fixture
def case(request, pico_llama, pico_gpt2, pico_tied):
    """Return (model in float64, space of two adapters "a" and "b", tolerance)."""
    build = {"llama": pico_llama, "llama_head": pico_llama, "gpt2": pico_gpt2, "tied": pico_tied}[request.param]
    model = build().double()
    first, second = TARGETS[request.param]
    a = random_adapter(model, "a", targets=first, rank=2, seed=1)
    b = random_adapter(model, "b", targets=second, rank=1, seed=2, scaling=1.0)
    return model, CoreSpace.of([a, b]), TOLERANCE[request.param]


every_model = pytest.mark.parametrize("case", list(TARGETS), indirect=True)
gpt2_and_head = pytest.mark.parametrize("case", ["gpt2", "llama_head"], indirect=True)
gpt2_only = pytest.mark.parametrize("case", ["gpt2"], indirect=True)
BATCH = random_batch([8, 5, 7, 6], response=[3, 2, 4, 1], weight=[1.0, 4.0, 0.25, 2.25])
POINTS = {"base": (0.0, 0.0), "b": (0.0, 1.0), "a+0.5*b": (1.0, 0.5)}


def point(space, reference):
    first, second = POINTS[reference]
    return first * space.core("a") + second * space.core("b")


def weighted(scores, batch=BATCH):
    return scores * batch.weight.double().sqrt()[:, None]


@every_model
@pytest.mark.parametrize("reference", POINTS)
def test_global_scores_are_those_of_autograd(case, reference):
    model, space, tolerance = case
    fisher = collect_fisher(model, [BATCH], space, structure="global", reference=reference)
    expected = brute_force_scores(model, space, point(space, reference), BATCH)
    assert relative_error(fisher.statistics["scores"], weighted(expected)) < tolerance
    tokens = float((BATCH.weight * BATCH.loss_mask.sum(dim=1)).sum())
    assert fisher.tokens == pytest.approx(tokens)
    mean = (BATCH.weight.double()[:, None] * expected).sum(dim=0) / tokens
    assert relative_error(fisher.mean_score(), mean) < tolerance
    assert relative_error(dense_fisher(fisher), weighted(expected).mT @ weighted(expected) / tokens) < tolerance


@every_model
def test_block_and_diagonal_are_moments_of_the_scores(case):
    model, space, tolerance = case
    scores = weighted(brute_force_scores(model, space, point(space, "a+0.5*b"), BATCH))
    outer = scores.mT @ scores
    mask = torch.zeros_like(outer)
    for where in layer_slices(space).values():
        mask[where, where] = 1.0
    block = collect_fisher(model, [BATCH], space, structure="block", reference="a+0.5*b")
    assert relative_error(dense_fisher(block) * block.tokens, outer * mask) < tolerance
    diagonal = collect_fisher(model, [BATCH], space, structure="diagonal", reference="a+0.5*b")
    assert relative_error(diagonal.diagonal() * diagonal.tokens, outer.diagonal()) < tolerance
    assert torch.equal(block.mean_score(), diagonal.mean_score())


def tokenwise_projections(model, space, core, batch, row):
    """Return per layer x̃ (S, R_i) and δ̃ (S, R_o) of one sequence, from our own hooks; of response positions at the head."""
    modules, caught, handles = dict(model.named_modules()), {}, []
    for path in space.layer_names:

        def hook(module, args, output, path=path):
            output.retain_grad()
            caught[path] = (args[0], output)

        handles.append(modules[path].register_forward_hook(hook))
    length = int(batch.attention_mask[row].sum())
    ids, mask = batch.input_ids[row : row + 1, :length], batch.loss_mask[row, 1:length]
    weights = dense_weights(model, space, core.clone().requires_grad_())
    logits = functional_call(model, weights, kwargs={"input_ids": ids}, tie_weights=False).logits[0, :-1]
    logits.double().log_softmax(dim=-1).gather(1, ids[0, 1:, None])[mask].sum().backward()
    for handle in handles:
        handle.remove()
    result = {}
    for group in space.groups:
        for j, path in enumerate(group.names):
            x, output = caught[path]
            chosen = mask.nonzero()[:, 0] if path == "lm_head" else slice(None)
            x_tilde = x.detach()[0].double() @ group.V[j].double()
            result[path] = (x_tilde[chosen], (output.grad[0].double() @ group.U[j].double())[chosen])
    return result


@every_model
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_is_its_definition(case, sharing):
    model, space, tolerance = case
    core, tokens = point(space, "a+0.5*b"), float((BATCH.weight * BATCH.loss_mask.sum(dim=1)).sum())
    fisher = collect_fisher(model, [BATCH], space, structure="kfac", reference="a+0.5*b", weight_sharing=sharing)
    projections = [tokenwise_projections(model, space, core, BATCH, row) for row in range(4)]
    for group, (X, D) in zip(space.groups, fisher.kronecker_factors(), strict=True):
        for j, path in enumerate(group.names):
            inputs = outputs = count = 0.0
            for weight, sequence in zip(BATCH.weight.tolist(), projections, strict=True):
                x, delta = sequence[path]
                if sharing == "reduce":
                    x, delta = x.mean(dim=0, keepdim=True), delta.sum(dim=0, keepdim=True)
                inputs, outputs = inputs + weight * x.mT @ x, outputs + weight * delta.mT @ delta
                count += weight * len(x)
            assert relative_error(X[j], inputs / count) < tolerance, path
            assert relative_error(D[j], outputs / tokens) < tolerance, path


@pytest.mark.parametrize("case", ["llama_head"], indirect=True)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_is_exact_for_one_token(case, sharing):
    """One sequence whose loss reaches one position of the output head: E[xxᵀ ⊗ δδᵀ] has a single term."""
    model, space, _ = case
    batch = random_batch([5], response=1, seed=4)
    block, kfac = (
        collect_fisher(model, [batch], space, structure=s, weight_sharing=sharing) for s in ("block", "kfac")
    )
    head = layer_slices(space)["lm_head"]
    assert relative_error(dense_fisher(kfac)[head, head], dense_fisher(block)[head, head]) < 1e-6


def own_basis(kfac):
    """Return the orthonormal eigenbasis of a K-FAC Fisher."""
    factors = kfac.kronecker_factors()
    return KroneckerBasis(
        P=tuple(torch.linalg.eigh(X).eigenvectors for X, _ in factors),
        Q=tuple(torch.linalg.eigh(D).eigenvectors for _, D in factors),
    )


@gpt2_and_head
def test_ekfac_squares_are_those_of_rotated_scores(case):
    model, space, tolerance = case
    gain = collect_fisher(model, [random_batch([6, 6, 7], seed=8)], space, structure="kfac")
    cost = collect_fisher(model, [BATCH], space, structure="kfac")
    basis = solve(gain, cost).basis
    fisher = collect_fisher(model, [BATCH], space, structure="ekfac", basis=basis)
    rotated = torch.zeros(space.size, dtype=torch.float64)
    for score in weighted(brute_force_scores(model, space, space.zero(), BATCH)):
        cores = zip(space.split(score), basis.P, basis.Q, strict=True)
        rotated += space.join([Q.mT @ core @ P for core, P, Q in cores]).square()
    assert relative_error(fisher.diagonal(), rotated / fisher.tokens) < tolerance


@gpt2_only
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ekfac_is_closer_to_block_than_kfac(case, seed):
    model, space, _ = case
    data = [random_batch([6] * 12, response=2, seed=seed)]
    kfac, block = (collect_fisher(model, data, space, structure=s) for s in ("kfac", "block"))
    ekfac = collect_fisher(model, data, space, structure="ekfac", basis=own_basis(kfac))
    exact = dense_fisher(block)
    for where in layer_slices(space).values():
        error_k, error_e = (float((dense_fisher(f) - exact)[where, where].norm()) for f in (kfac, ekfac))
        assert error_e < error_k


@every_model
def test_mean_score_is_the_gradient_of_the_log_likelihood(case):
    model, space, _ = case
    fisher = collect_fisher(model, [BATCH], space, structure="diagonal", reference="a+0.5*b")
    core = point(space, "a+0.5*b")
    direction = torch.randn(space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mean(step):
        terms = [
            w * log_likelihood(model, space, core + step * direction, BATCH, i) for i, w in enumerate(BATCH.weight)
        ]
        return float(sum(terms)) / fisher.tokens

    step = 1e-3
    slope = (mean(step) - mean(-step)) / (2 * step)
    assert slope == pytest.approx(float(fisher.mean_score() @ direction), rel=1e-3)


@gpt2_only
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "global"])
def test_path_is_the_mean_over_its_points(case, structure):
    model, space, _ = case
    path = collect_fisher(model, [BATCH], space, structure=structure, reference="path:a:a+b:2")
    a, b = space.core("a"), space.core("b")
    points = [collect_fisher(model, [BATCH], space, structure=structure, reference=a + x * b) for x in (0.25, 0.75)]
    assert path.tokens == points[0].tokens + points[1].tokens
    assert torch.equal(path.counts.sequences, points[0].counts.sequences + points[1].counts.sequences)
    if structure == "kfac":  # factors are averaged, not their products
        for mine, first, second in zip(*(f.kronecker_factors() for f in (path, *points)), strict=True):
            for k in (0, 1):
                torch.testing.assert_close(mine[k], (first[k] + second[k]) / 2)
    else:
        mean = (dense_fisher(points[0]) + dense_fisher(points[1])) / 2
        assert relative_error(dense_fisher(path), mean) < 1e-6
    assert relative_error(path.mean_score(), (points[0].mean_score() + points[1].mean_score()) / 2) < 1e-10


# ---- sampled labels ------------------------------------------------------------------------------------------------


@gpt2_and_head
def test_sampled_labels_follow_the_model(case):
    """Each sampled score is that of some label, and labels come with the model's probabilities."""
    model, space, _ = case
    batch, draws = random_batch([5, 7], response=1, seed=5), 150
    core = space.core("a")
    prompts = [batch.input_ids[0, :4], batch.input_ids[1, :6]]
    exact_batches = enumerated_labels(model, space, core, prompts)
    exact = collect_fisher(model, exact_batches, space, structure="global", reference=core)
    assert exact.tokens == pytest.approx(2.0, abs=1e-5)
    assert float(exact.mean_score().norm()) < 1e-4 * float(exact.scores().norm())

    sampled = collect_fisher(model, [batch], space, structure="global", labels="sampled", reference=core, draws=draws)
    assert sampled.tokens == 2 * draws
    for row in (0, 1):
        mine = sampled.statistics["scores"].double()[sampled.statistics["score_half"] == row]
        probability = exact_batches[row].weight.double()
        every = exact.statistics["scores"][row * 100 : (row + 1) * 100].double() / probability.sqrt()[:, None]
        distance, label = torch.cdist(mine, every).min(dim=1)
        assert float(distance.max()) < 1e-4 * float(every.norm(dim=1).mean())
        observed = torch.bincount(label, minlength=100).double()
        common = probability * draws >= 5
        bins = [(observed[common], draws * probability[common])]
        bins.append((observed[~common].sum()[None], draws * probability[~common].sum()[None]))
        chi2 = float(sum(((o - e).square() / e.clamp_min(1e-9)).sum() for o, e in bins))
        freedom = int(common.sum())
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


@gpt2_only
def test_sampled_fisher_is_unbiased(case):
    """Averages over draws and seeds lie within four standard errors of the exact expectation over labels."""
    model, space, _ = case
    batch = random_batch([5, 7, 4], response=1, seed=6)
    prompts = [batch.input_ids[i, : int(batch.attention_mask[i].sum()) - 1] for i in range(3)]
    exact = dense_fisher(
        collect_fisher(model, enumerated_labels(model, space, space.zero(), prompts), space, structure="global")
    )
    runs = [
        collect_fisher(model, [batch], space, structure="global", labels="sampled", draws=30, seed=seed)
        for seed in range(4)
    ]
    scores = torch.cat([run.statistics["scores"] for run in runs]).double()
    per_draw = scores.view(120, 3, space.size)
    directions = torch.randn(8, space.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for direction in directions:
        values = (per_draw @ direction).square().mean(dim=1)
        error = float(values.std()) / 120**0.5
        assert abs(float(values.mean() - direction @ exact @ direction)) < 4 * error
        slopes = (per_draw @ direction).mean(dim=1)
        assert abs(float(slopes.mean())) < 4 * float(slopes.std()) / 120**0.5
    assert relative_error(torch.stack([dense_fisher(run) for run in runs]).mean(dim=0), exact) < 0.2


@gpt2_only
def test_labels_depend_on_seed_and_index_only(case):
    model, space, _ = case
    batch = random_batch([6, 6], response=2)

    def scores(data, **options):
        found = collect_fisher(model, [data], space, structure="global", labels="sampled", **options)
        return found.statistics["scores"]

    assert torch.equal(scores(batch, seed=3), scores(batch, seed=3))
    assert not torch.equal(scores(batch, seed=3), scores(batch, seed=4))
    moved = random_batch([6, 6], response=2, first_index=2)
    assert not torch.equal(scores(batch), scores(moved))
