"""The passes over factors and scores: chunks do not matter, and what a merge need not form is not formed."""

from __future__ import annotations

import pytest
import torch
from builders import gain_and_cost, random_adapter, relative_error

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors, stacks
from sstmerge.errors import AdapterError, InputError
from sstmerge.fisher import Fisher
from sstmerge.gevp import score_matrix, solve
from sstmerge.gevp.score_matrix import ScoreMatrix
from sstmerge.merging import Selection, merge_cores


@pytest.fixture(scope="module")
def model(pico_llama):
    return pico_llama()


@pytest.fixture(scope="module")
def space(model):
    return CoreSpace.of(
        [random_adapter(model, name, rank=2 + i, seed=i) for i, name in enumerate(("utility", "safety"))]
    )


@pytest.mark.parametrize("entries", [1, 700, 10**6])
def test_layers_per_chunk_do_not_change_grams_and_products(monkeypatch, space, entries):
    monkeypatch.setitem(stacks._ENTRIES_PER_CHUNK, "cpu", entries)
    for group in space.groups:
        for stack, transform in ((group.outputs, group.output_transform), (group.inputs, group.input_transform)):
            fresh = stacks.FactorStack(stack.factors, stack.transposed)
            dense = torch.stack(
                [
                    torch.cat([(f.mT if stack.transposed else f).double() for f in of_layer], dim=1)
                    for of_layer in zip(*stack.factors, strict=True)
                ]
            )
            torch.testing.assert_close(fresh.gram, dense.mT @ dense)
            torch.testing.assert_close(fresh.combine(transform, torch.float64), dense @ transform)
            rows = fresh.combine(transform, torch.float32, rows=True)
            assert rows.is_contiguous()
            torch.testing.assert_close(rows, (dense @ transform).mT.float())


def test_a_merge_with_fishers_at_hand_never_forms_the_bases(model, space):
    rebuilt = CoreSpace.from_basis(space.adapters, space.basis_description(), space.basis_tensors())
    utility, safety = rebuilt.core("utility"), rebuilt.core("safety")
    fishers = (
        Fisher(f.structure, rebuilt, f.statistics, f.counts, f.metadata) for f in gain_and_cost(model, space, "kfac")
    )
    merged = merge_cores(solve(*fishers), utility, safety, selection=Selection(top=3))
    rebuilt.to_adapter(merged.core, name="merged")
    assert not any({"U", "V"} & set(vars(group)) for group in rebuilt.groups)
    # Nor passes over the factors more than once: Gram matrices are for the making of a basis.
    assert not any("gram" in vars(stack) for group in rebuilt.groups for stack in (group.outputs, group.inputs))
    assert rebuilt.groups[0].U.shape[0] == len(rebuilt.groups[0].names)
    assert "U" in vars(rebuilt.groups[0])


def test_cores_are_projections_onto_the_bases(space):
    for group in space.groups:
        for index, adapter in enumerate(space.adapters):
            for core, name in zip(group.core({index: 1.0}), group.names, strict=True):
                i, factors = group.names.index(name), adapter.layers[name]
                projected = group.U[i].double().mT @ factors.delta().double() @ group.V[i].double()
                assert relative_error(core, projected) < 1e-6


def ill_conditioned(adapter):
    """The same weight changes from factors whose columns are nearly parallel."""
    layers = {}
    for path, f in adapter.layers.items():
        mixing = torch.eye(f.rank, dtype=torch.float64) * 1e-5 + 1.0
        B = f.B.double() @ mixing
        layers[path] = LoraFactors(A=torch.linalg.solve(mixing, f.A.double()), B=B, scaling=f.scaling)
    return Adapter(adapter.name, layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_computed_in_float32_where_that_cannot_be_seen(monkeypatch, space, dtype):
    used = []
    combine = stacks.FactorStack.combine

    def noted(stack, weights, dtype, *, rows=False, working):
        used.append(working)
        return combine(stack, weights, dtype, rows=rows, working=working)

    monkeypatch.setattr(stacks.FactorStack, "combine", noted)
    point = space.core("utility") - 0.7 * space.core("safety")
    written = space.to_adapter(point, name="w", dtype=dtype)
    assert set(used) == {torch.float32}
    exact = space.to_adapter(point, name="e", dtype=torch.float64)
    assert used[-1] is torch.float64
    for path, factors in exact.layers.items():
        for found, expected in ((written.layers[path].A, factors.A), (written.layers[path].B, factors.B)):
            # Rounding alone, and a quarter of that.
            error = (found.double() - expected).norm()
            rounding = (expected.to(dtype).double() - expected).norm()
            assert error < 1.25 * rounding
    used.clear()
    hard = CoreSpace.of([ill_conditioned(a) for a in space.adapters])
    hard.to_adapter(hard.core("utility"), name="h", dtype=dtype)
    assert torch.float64 in used
    used.clear()
    torch.set_float32_matmul_precision("high")
    try:
        space.to_adapter(point, name="t", dtype=dtype)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(used) == {torch.float64}


def test_a_singular_recorded_basis_is_damage(space):
    tensors = {name: tensor.clone() for name, tensor in space.basis_tensors().items()}
    tensors["basis.input.0"][0, 0] = 0.0
    damaged = CoreSpace.from_basis(space.adapters, space.basis_description(), tensors)
    with pytest.raises(AdapterError, match=f"basis of layer '{space.groups[0].names[0]}' is singular"):
        damaged.core("utility")


def test_a_cholesky_factor_that_fails_is_replaced_by_the_symmetric_root(model):
    adapter = random_adapter(model, "a", targets=("q_proj",), rank=3)
    layers = {  # the first row of A and column of B twice
        path: LoraFactors(torch.cat([f.A, f.A[:1]]), torch.cat([f.B, f.B[:, :1]], dim=1), 1.0)
        for path, f in adapter.layers.items()
    }
    space = CoreSpace.of([Adapter("a", layers)])
    assert {group.core_shape[1:] for group in space.groups} == {(3, 3)}
    written = space.to_adapter(space.core("a"), name="w", dtype=torch.float64)
    for path, factors in layers.items():
        assert relative_error(written.layers[path].delta(), factors.delta()) < 1e-9


def test_embedding_refuses_spaces_that_stack_other_adapters(space):
    alone = CoreSpace.of(space.adapters[:1])
    with pytest.raises(InputError, match="stack others"):
        space.embed(alone.zero(), alone)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("entries", [1, 50, 10**6])
def test_columns_and_rows_at_once_do_not_change_products_of_scores(monkeypatch, model, space, entries, rows):
    monkeypatch.setattr(score_matrix, "_ROWS_PER_BLOCK", rows)
    monkeypatch.setattr(score_matrix, "ENTRIES_PER_CHUNK", entries)
    gain, cost = gain_and_cost(model, space, "global")
    G, H = (fisher.statistics["scores"].double() / fisher.tokens**0.5 for fisher in (gain, cost))
    left, right = ScoreMatrix(gain), ScoreMatrix(cost)
    for gram, expected in zip(left.grams(right, None), (G @ G.mT, G @ H.mT, H @ H.mT), strict=True):
        torch.testing.assert_close(gram, expected)
    vector, weights = torch.randn(space.size, dtype=torch.float64), torch.randn(len(G), dtype=torch.float64)
    torch.testing.assert_close(left.times(vector), G @ vector)
    torch.testing.assert_close(left.transposed_times(weights), G.mT @ weights)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_bad_number_anywhere_is_found(model, number, dtype):
    adapter = random_adapter(model, "a", dtype=dtype)
    for factors in list(adapter.layers.values())[:2]:
        for tensor in (factors.A, factors.B):
            for position in (0, tensor.numel() // 2, tensor.numel() - 1):
                kept = tensor.view(-1)[position].clone()
                tensor.view(-1)[position] = number
                with pytest.raises(AdapterError, match="NaN or Inf"):
                    adapter.validate()
                tensor.view(-1)[position] = kept
    adapter.validate()
