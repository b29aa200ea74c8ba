"""The AlignGuard regulariser against a dense NumPy transcription, its gradients, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sstmerge import alignguard
from sstmerge.adapters import LoraFactors
from sstmerge.adapters.live import live_layers
from sstmerge.alignguard import AlignGuardRegularizer, SafetyCurvature, layer_terms, safety_curvatures
from sstmerge.errors import AdapterError, InputError

D_OUT, D_IN, R, M = 9, 7, 3, 4


def case(seed=0):
    """Return A, B, U, eigenvalues and the diagonal of H, NumPy float64."""
    random = np.random.default_rng(seed)
    U = np.linalg.qr(random.normal(size=(D_OUT, M)))[0]
    values = np.sort(random.uniform(0.1, 2.0, size=M))[::-1].copy()
    return (
        random.normal(size=(R, D_IN)),
        random.normal(size=(D_OUT, R)),
        U,
        values,
        random.uniform(0.2, 3.0, size=D_OUT),
    )


def terms(A, B, U, values, H, scaling=0.5, steepness=4.0, threshold=0.01):
    A, B, U, values, H = (torch.as_tensor(x) for x in (A, B, U, values, H))
    return layer_terms(LoraFactors(A, B, scaling), SafetyCurvature(U, values), H, steepness, threshold)


def dense_terms(A, B, U, values, H, scaling=0.5, steepness=4.0, threshold=0.01):
    """The four terms from full matrices."""
    delta = scaling * B @ A
    P = U @ U.T
    F_root = U @ np.diag(np.sqrt(values)) @ U.T
    H_root = np.diag(np.sqrt(H))
    aligned, task = P @ delta, delta - P @ delta
    eta = 1 + steepness / (1 + np.exp(-(np.abs(delta) - threshold)))
    inner = np.trace(aligned.T @ H_root @ H_root @ task)
    norms = np.linalg.norm(H_root @ aligned) ** 2 * np.linalg.norm(H_root @ task) ** 2
    return np.array(
        [
            np.linalg.norm(F_root @ aligned) ** 2,
            np.linalg.norm(H_root @ task) ** 2,
            np.mean(eta * np.abs(aligned * task)),
            inner**2 / norms,
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_terms_equal_a_dense_transcription(seed):
    np.testing.assert_allclose(terms(*case(seed)).numpy(), dense_terms(*case(seed)), rtol=1e-10)


def test_chunks_change_nothing(monkeypatch):
    whole = terms(*case())
    monkeypatch.setattr(alignguard, "_ENTRIES_PER_CHUNK", 2 * D_IN)
    torch.testing.assert_close(terms(*case()), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [2**22, 2 * D_IN])
def test_gradients_are_right(monkeypatch, chunk):
    monkeypatch.setattr(alignguard, "_ENTRIES_PER_CHUNK", chunk)
    A, B, U, values, H = (torch.as_tensor(x) for x in case())
    A.requires_grad_(), B.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: terms(a, b, U, values, H), (A, B))


def test_the_terms_belong_to_the_weight_change_and_not_to_its_factors():
    A, B, *rest = case()
    N = np.random.default_rng(9).normal(size=(R, R))
    np.testing.assert_allclose(terms(np.linalg.solve(N, A), B @ N, *rest), terms(A, B, *rest), rtol=1e-9)


def test_the_overlap_is_zero_where_nothing_overlaps():
    A, B, U, values, H = case()
    ones = np.ones(D_OUT)
    for part in (U @ (U.T @ B), B - U @ (U.T @ B)):
        riemannian, geodesic = terms(A, part, U, values, ones)[2:]
        assert float(riemannian) == pytest.approx(0, abs=1e-14)
        assert float(geodesic) == pytest.approx(0, abs=1e-14)
    # Rows of U and of the rest do not meet: no entry of ΔW belongs to both, whatever H is.
    axis = np.eye(D_OUT)[:, :M]
    np.testing.assert_allclose(terms(A, B, axis, values, H)[2:], 0, atol=1e-14)
    # An orthogonal split has no Euclidean overlap, but one in another metric.
    assert float(terms(A, B, U, values, ones)[3]) == pytest.approx(0, abs=1e-20)
    assert float(terms(A, B, U, values, H)[3]) > 1e-4


def test_at_the_start_of_training_everything_is_zero_and_differentiable():
    A, B, U, values, H = (torch.as_tensor(x) for x in case())
    A.requires_grad_()
    zero = torch.zeros_like(B, requires_grad=True)
    result = terms(A, zero, U, values, H)
    assert result.tolist() == [0.0] * 4
    result.sum().backward()
    assert bool(torch.isfinite(A.grad).all())
    assert bool(torch.isfinite(zero.grad).all())


# ---- on a live model -------------------------------------------------------------------------------------------------


def batch(seed, rows=3, width=8, response=4):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 100, (rows, width), generator=generator)
    labels = ids.clone()
    labels[:, : width - response] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.fixture
def live(pico_llama):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    return get_peft_model(pico_llama(), config)


def move(model, seed=3):
    """Give every lora_B a value, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for _, factors in live_layers(model).values():
        factors.B.data.copy_(0.1 * torch.randn(factors.B.shape, generator=generator))
    return model


def test_curvatures_are_the_covariance_of_output_gradients(live):
    """δ of every token by moving the layer's output by hand, one sequence at a time."""
    data = [batch(0), batch(1, rows=2)]
    path = "model.layers.0.self_attn.q_proj"
    rows = []
    for part in data:
        for row in range(len(part["input_ids"])):
            ids, labels = part["input_ids"][row : row + 1], part["labels"][row]
            shift = torch.zeros(1, ids.shape[1], 32, requires_grad=True)
            module = live.get_base_model().get_submodule(path)
            with_shift = module.register_forward_hook(lambda _m, _i, output, shift=shift: output + shift)
            live.eval()
            log_p = live(input_ids=ids).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
            log_p[labels[1:] != -100].sum().backward()
            with_shift.remove()
            rows.append(shift.grad[0].double().numpy())
    live.zero_grad()
    gathered = np.concatenate(rows)
    expected = gathered.T @ gathered / (5 * 4)
    found = safety_curvatures(live, data, normalize=False)[path]
    np.testing.assert_allclose(
        (found.vectors * found.values @ found.vectors.T).numpy(), expected, atol=1e-5 * np.abs(expected).max()
    )
    top = safety_curvatures(live, data, directions=16, normalize=False)[
        path
    ]  # 40 tokens: more rows than the sketch holds
    np.testing.assert_allclose(top.values[:4], found.values[:4], rtol=2e-2)
    assert top.vectors.shape == (32, 16)
    whole, scaled = safety_curvatures(live, data, normalize=False), safety_curvatures(live, data)
    largest = max(float(curvature.values.max()) for curvature in whole.values())
    for name, curvature in scaled.items():
        torch.testing.assert_close(curvature.values * largest, whole[name].values)


def test_collecting_leaves_the_model_as_it_was(live):
    live.train()
    before = {name: parameter.detach().clone() for name, parameter in live.named_parameters()}
    first, second = (safety_curvatures(live, [batch(0)], directions=4) for _ in range(2))
    assert live.training
    assert all(torch.equal(parameter, before[name]) for name, parameter in live.named_parameters())
    assert all(parameter.grad is None for parameter in live.parameters())
    assert not any(module._forward_hooks for module in live.modules())
    for path, curvature in first.items():  # dropout is off
        torch.testing.assert_close(curvature.values, second[path].values)


def test_the_regulariser_sums_the_layers_of_a_live_model(live):
    curvatures = safety_curvatures(live, [batch(0)], directions=4)
    generator = torch.Generator().manual_seed(1)
    task = {path: torch.rand(len(c.vectors), generator=generator) for path, c in curvatures.items()}
    weights = {"alignment_weight": 0.3, "task_weight": 0.7, "overlap_weight": 5.0, "riemannian_share": 0.4}
    regularizer = AlignGuardRegularizer(curvatures, task_curvatures=task, steepness=2.0, threshold=0.05, **weights)
    result = regularizer(move(live))
    expected = np.zeros(4)
    for path, (_, factors) in live_layers(live).items():
        A, B = (t.detach().double().numpy() for t in (factors.A, factors.B))
        c = curvatures[path]
        expected += dense_terms(
            A, B, c.vectors.double().numpy(), c.values.double().numpy(), task[path].double().numpy(), 2.0, 2.0, 0.05
        )
    found = [result.alignment, result.task, result.riemannian, result.geodesic]
    np.testing.assert_allclose([t.item() for t in found], expected, rtol=1e-4)
    total = 0.3 * expected[0] + 0.7 * expected[1] + 5.0 * (0.4 * expected[2] + 0.6 * expected[3])
    assert result.total.item() == pytest.approx(total, rel=1e-4)
    assert not list(regularizer.parameters())


def test_training_with_it_keeps_the_change_out_of_the_safety_directions(live):
    move(live)
    curvatures = safety_curvatures(live, [batch(0)], directions=4)
    regularizer = AlignGuardRegularizer(curvatures, alignment_weight=100.0, task_weight=0.0, overlap_weight=0.0)
    factors = [f for _, f in live_layers(live).values()]
    optimizer = torch.optim.SGD([f.B for f in factors], lr=1e-3)
    start = regularizer(live)
    for _ in range(50):
        optimizer.zero_grad()
        regularizer(live).total.backward()
        optimizer.step()
    end = regularizer(live)
    assert end.alignment.item() < 0.5 * start.alignment.item()
    assert end.task.item() == pytest.approx(start.task.item(), rel=1e-3)  # the gradient lies in the safety directions


def test_bfloat16_factors_are_computed_in_float32(live):
    curvatures = safety_curvatures(live, [batch(0)], directions=4)
    result = AlignGuardRegularizer(curvatures)(move(live).to(torch.bfloat16))
    assert result.total.dtype == torch.float32
    result.total.backward()
    assert all(f.B.grad.dtype == torch.bfloat16 for _, f in live_layers(live).values())


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused(live):
    curvatures = safety_curvatures(live, [batch(0)], directions=4)
    for options, message in [
        ({"alignment_weight": -1.0}, "alignment_weight must be a finite number >= 0"),
        ({"steepness": float("nan")}, "steepness must be a finite number >= 0"),
        ({"riemannian_share": 1.5}, r"riemannian_share must lie in \[0, 1\]"),
        ({"task_curvatures": {}}, "must name the layers of the safety curvatures"),
        ({"task_curvatures": {p: torch.ones(3) for p in curvatures}}, "must have shape"),
    ]:
        with pytest.raises(InputError, match=message):
            AlignGuardRegularizer(curvatures, **options)
    with pytest.raises(InputError, match="No safety curvature was given"):
        AlignGuardRegularizer({})
    path = next(iter(curvatures))
    for broken, message in [
        (SafetyCurvature(torch.ones(32, 2), torch.ones(2)), "are not orthonormal"),
        (SafetyCurvature(torch.eye(32)[:, :2], torch.ones(3)), r"needs vectors \(d_out, m\) and values \(m,\)"),
        (SafetyCurvature(torch.eye(32)[:, :2], -torch.ones(2)), "has negative or NaN eigenvalues"),
    ]:
        with pytest.raises(InputError, match=message):
            AlignGuardRegularizer({**curvatures, path: broken})


def test_other_models_and_other_data_are_refused(live, pico_llama):
    curvatures = safety_curvatures(live, [batch(0)], directions=4)
    with pytest.raises(AdapterError, match=r"Expected a peft.PeftModel, but got LlamaForCausalLM"):
        AlignGuardRegularizer(curvatures)(pico_llama())
    with pytest.raises(AdapterError, match=r"holds the adapters \['default'\], but no layer of 'other'"):
        AlignGuardRegularizer(curvatures, adapter_name="other")(live)
    fewer = {path: curvatures[path] for path in list(curvatures)[1:]}
    with pytest.raises(InputError, match="made for other LoRA layers than the model has"):
        AlignGuardRegularizer(fewer)(live)
    cut = {p: SafetyCurvature(torch.eye(5)[:, :2], torch.ones(2)) for p in curvatures}
    with pytest.raises(InputError, match="has 32 outputs, but its safety curvature has 5"):
        AlignGuardRegularizer(cut)(live)
    dora = get_peft_model(pico_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(AdapterError, match="is no plain linear LoRA layer"):
        live_layers(dora)
    silent = batch(0)
    silent["labels"] = torch.full_like(silent["labels"], -100)
    with pytest.raises(InputError, match="hold no response token"):
        safety_curvatures(live, [silent])
    with pytest.raises(InputError, match="directions must be at least 1"):
        safety_curvatures(live, [batch(0)], directions=0)
    for parameter in live.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="takes no part in training"):
        safety_curvatures(live, [batch(0)])
