"""Core coordinates: exactness, ranks, gauges, write-back."""

from __future__ import annotations

import pytest
import torch
from builders import adapter_deltas, dense_deltas, random_adapter, regauged, relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.adapters.core import _largest_rank, _singular_triplets
from sstmerge.errors import AdapterError, InputError

CHOICES = (("q_proj", "v_proj"), ("q_proj", "down_proj"), ("v_proj",), ("q_proj", "v_proj", "lm_head"))


@pytest.fixture(scope="module")
def model(pico_llama):
    return pico_llama()


def some_adapters(model, count, seed=0):
    return [
        random_adapter(model, f"a{t}", targets=CHOICES[t], rank=1 + t, scaling=0.3 + t, size=0.1 + t, seed=seed + t)
        for t in range(count)
    ]


def layer_ranks(space):
    return {name: g.core_shape[1:] for g in space.groups for name in g.names}


def assert_same_change(deltas, expected, tolerance=1e-6):
    for path, delta in deltas.items():
        assert relative_error(delta, expected.get(path, torch.zeros_like(delta))) < tolerance, path
    assert set(expected) <= set(deltas)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_adapter_is_represented_exactly(model, count):
    adapters = some_adapters(model, count)
    space = CoreSpace.of(adapters)
    for adapter in adapters:
        deltas, expected = dense_deltas(space, space.core(adapter.name)), adapter_deltas(adapter)
        for path, delta in deltas.items():
            if path in expected:
                assert relative_error(delta, expected[path]) < 1e-6
            else:
                assert not delta.any()
    for group in space.groups:
        for basis in (group.U, group.V):
            identity = torch.eye(basis.shape[2]).expand(len(group.names), -1, -1)
            assert relative_error(basis.mT @ basis, identity) < 1e-6
    assert space.size == sum(rows * columns for rows, columns in layer_ranks(space).values())


@given(seed=st.integers(0, 1000), exponent=st.floats(-14, 14))
@example(seed=0, exponent=-14.0)
@example(seed=0, exponent=14.0)
@settings(max_examples=20, deadline=None)
def test_adapters_of_very_different_size_are_each_exact(model, seed, exponent):
    a = random_adapter(model, "a", seed=seed)
    b = random_adapter(model, "b", seed=seed + 1, rank=3, size=10.0 ** (exponent / 2))
    space = CoreSpace.of([a, b])
    for adapter in (a, b):
        assert_same_change(dense_deltas(space, space.core(adapter.name)), adapter_deltas(adapter), 1e-5)


def test_bases_stay_orthonormal_where_singular_values_fall_steeply(model):
    a = random_adapter(model, "a", targets=("q_proj",), rank=6)
    steep = torch.logspace(0, -5.5, 6, dtype=torch.float64)
    layers = {path: LoraFactors(f.A, f.B * steep, f.scaling) for path, f in a.layers.items()}
    space = CoreSpace.of([Adapter("a", layers)])
    (group,) = space.groups
    assert group.core_shape == (2, 6, 6)
    for basis in (group.U, group.V):
        assert (
            relative_error(basis.double().mT @ basis.double(), torch.eye(6).expand(2, -1, -1)) < 1.2e-7
        )  # rounding of float32
    assert_same_change(dense_deltas(space, space.core("a")), adapter_deltas(Adapter("a", layers)))


def test_same_adapter_twice_has_the_rank_of_one(model):
    a = random_adapter(model, "a", rank=3)
    twice = Adapter("b", {p: LoraFactors(f.A, f.B, 2 * f.scaling) for p, f in a.layers.items()})
    space = CoreSpace.of([a, twice])
    assert set(layer_ranks(space).values()) == {(3, 3)}
    torch.testing.assert_close(space.core("b"), 2 * space.core("a"))


def test_tied_and_zero_factors_have_the_right_ranks(model):
    a = random_adapter(model, "a", targets=("q_proj", "v_proj"), rank=2)
    layers = dict(random_adapter(model, "b", targets=("q_proj", "v_proj"), rank=2, seed=1).layers)
    paths = sorted(layers)  # layers 0 and 1, q_proj and v_proj of each
    layers[paths[0]] = LoraFactors(A=a.layers[paths[0]].A, B=layers[paths[0]].B, scaling=1.0)  # shared A
    layers[paths[1]] = LoraFactors(A=layers[paths[1]].A, B=0 * layers[paths[1]].B, scaling=1.0)  # zero B
    repeated = layers[paths[2]].B[:, :1].expand(-1, 2).contiguous()
    layers[paths[2]] = LoraFactors(A=layers[paths[2]].A, B=repeated, scaling=1.0)  # rank 1
    space = CoreSpace.of([a, Adapter("b", layers)])
    expected = {paths[0]: (4, 2), paths[1]: (2, 2), paths[2]: (3, 3), paths[3]: (4, 4)}
    assert layer_ranks(space) == expected
    assert_same_change(dense_deltas(space, space.core("b")), adapter_deltas(Adapter("b", layers)))


def test_layers_that_nobody_changes_are_left_out(model):
    a = random_adapter(model, "a", targets=("q_proj", "v_proj"))
    dead = "model.layers.1.self_attn.v_proj"
    layers = {**a.layers, dead: LoraFactors(a.layers[dead].A, 0 * a.layers[dead].B, 1.0)}
    assert set(CoreSpace.of([Adapter("a", layers)]).layer_names) == set(layers) - {dead}
    with pytest.raises(AdapterError, match="change no layer"):
        CoreSpace.of([Adapter("a", {dead: layers[dead]})])


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_cores_do_not_depend_on_the_gauge(model, condition):
    a, b = random_adapter(model, "a", rank=3, seed=1), random_adapter(model, "b", rank=2, seed=2)
    space = CoreSpace.of([a, b])
    other = CoreSpace.of([regauged(a, condition, seed=5), regauged(b, condition, seed=6)])
    assert other.layer_names == space.layer_names
    for group, again in zip(space.groups, other.groups, strict=True):
        for basis, basis_again in ((group.U, again.U), (group.V, again.V)):
            assert relative_error(basis_again @ basis_again.mT, basis @ basis.mT) < 1e-5
    for name in ("a", "b"):
        assert relative_error(other.core(name).abs(), space.core(name).abs()) < 1e-5


def test_order_of_adapters_does_not_matter(model):
    adapters = some_adapters(model, 4)
    space, turned = CoreSpace.of(adapters), CoreSpace.of(adapters[::-1])
    mix = [0.5, -1.0, 2.0, 0.1]
    forward = sum(w * space.core(a.name) for w, a in zip(mix, adapters, strict=True))
    backward = sum(w * turned.core(a.name) for w, a in zip(mix, adapters, strict=True))
    assert_same_change(dense_deltas(turned, backward), dense_deltas(space, forward))
    assert space.fingerprint == turned.fingerprint


# ---- writing back ----------------------------------------------------------------------------------------------------


def test_write_back_is_lossless(model):
    adapters = some_adapters(model, 3)
    space = CoreSpace.of(adapters)
    vector = space.core("a0") - 0.4 * space.core("a1") + 2 * space.core("a2")
    merged = space.to_adapter(vector, name="merged")
    assert_same_change(adapter_deltas(merged), dense_deltas(space, vector))
    assert {f.rank for f in merged.layers.values()} == {4}  # v_proj: 1 + 3, down_proj: 2, q_proj: 1 + 2
    assert {f.scaling for f in merged.layers.values()} == {1.0}
    assert {f.rank for f in space.to_adapter(space.core("a1"), name="one").layers.values()} == {2}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_rank_limited_write_back_is_the_truncated_svd_of_the_dense_change(model, rank):
    space = CoreSpace.of(some_adapters(model, 3))
    vector = space.core("a0") + space.core("a1") - space.core("a2")
    for path, delta in adapter_deltas(space.to_adapter(vector, name="merged", rank=rank)).items():
        left, values, right = torch.linalg.svd(dense_deltas(space, vector)[path], full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert relative_error(delta, best) < 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (9, 5), (5, 9)])
def test_singular_triplets_of_ill_conditioned_cores(rows, columns):
    """The product holds to rounding, and singular values above 1e-8 of the largest are those of an SVD."""
    generator = torch.Generator().manual_seed(rows)
    left, right = (
        torch.linalg.qr(torch.randn(4, n, 5, generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    exact = torch.tensor([3.0, 1.0, 1e-4, 9e-7, 0.0], dtype=torch.float64)
    cores = left * exact @ right.mT
    cores[3] = 0.0
    P, values, Q = _singular_triplets(cores)
    assert (P * values[:, None, :] @ Q.mT - cores).abs().max() < 1e-15 * 3 * 5
    torch.testing.assert_close(values[:3, :4], exact[:4].expand(3, 4), rtol=1e-4, atol=0)
    assert values[:3, 4:].max() < 1e-8
    assert not values[3].any()
    assert _largest_rank([values]) == 4
    assert _largest_rank([values, torch.zeros(2, 3)]) == 4
    assert _largest_rank([torch.zeros(2, 3)]) == 1


def test_write_back_refuses_impossible_ranks_and_numbers(model):
    space = CoreSpace.of([random_adapter(model, "a", rank=2), random_adapter(model, "b", rank=3, seed=1)])
    for rank in (0, 6):
        with pytest.raises(InputError, match=f"rank limit is {rank}, but .* rank 5 at most"):
            space.to_adapter(space.core("a"), name="x", rank=rank)
    with pytest.raises(InputError, match="NaN or Inf"):
        space.to_adapter(space.core("a") * float("nan"), name="x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_of_the_inputs_is_kept(model, dtype):
    space = CoreSpace.of([random_adapter(model, n, seed=i, dtype=dtype) for i, n in enumerate("ab")])
    assert space.to_adapter(space.core("a"), name="m").dtype == dtype
    assert space.to_adapter(space.core("a"), name="m", dtype=torch.float64).dtype == torch.float64


# ---- the vector space ------------------------------------------------------------------------------------------------


def test_split_and_join_are_inverse(model):
    space = CoreSpace.of(some_adapters(model, 3))
    vector = torch.randn(2, space.size, dtype=torch.float64)
    parts = space.split(vector)
    assert [p.shape for p in parts] == [(2, *group.core_shape) for group in space.groups]
    assert torch.equal(space.join(parts), vector)
    with pytest.raises(InputError, match=f"{space.size} coordinates"):
        space.split(vector[:, 1:])


def test_layer_sums_follow_layer_names(model):
    space = CoreSpace.of(some_adapters(model, 2))
    vector = space.core("a1")
    norms = dict(zip(space.layer_names, space.layer_sums(vector.square()).sqrt().tolist(), strict=True))
    for path, delta in adapter_deltas(space.adapters[1]).items():
        assert norms[path] == pytest.approx(float(delta.norm()), rel=1e-6)


def test_combination_is_the_weighted_sum(model):
    adapters = some_adapters(model, 4)
    space = CoreSpace.of(adapters)
    mix = {adapters[3].name: 0.1, adapters[0].name: -1.5, adapters[2].name: 2.0}
    expected = sum(weight * space.core(name) for name, weight in mix.items())
    assert relative_error(space.combination(mix), expected) < 1e-14
    assert torch.equal(space.combination({adapters[1].name: 1.0}), space.core(adapters[1].name))
    assert torch.equal(space.combination({}), space.zero())
    with pytest.raises(InputError, match="nobody"):
        space.combination({"nobody": 1.0})


def test_unknown_adapter(model):
    with pytest.raises(InputError, match=r"\['a'\], but not 'b'"):
        CoreSpace.of([random_adapter(model, "a")]).core("b")


# ---- rebuilding a space from its record ------------------------------------------------------------------------------


def test_recorded_basis_gives_the_same_bits(model):
    adapters = some_adapters(model, 3)
    space = CoreSpace.of(adapters)
    renamed = [Adapter(f"new {a.name}", a.layers) for a in adapters[::-1]]
    again = CoreSpace.from_basis(renamed, space.basis_description(), space.basis_tensors())
    assert again.layer_names == space.layer_names
    for group, other in zip(space.groups, again.groups, strict=True):
        assert torch.equal(group.U, other.U)
        assert torch.equal(group.V, other.V)
    for adapter in adapters:
        assert torch.equal(again.core(f"new {adapter.name}"), space.core(adapter.name))


def test_recorded_basis_with_the_same_adapter_twice(model):
    a = random_adapter(model, "a")
    space = CoreSpace.of([a, Adapter("b", a.layers)])
    renamed = [Adapter(name, a.layers) for name in "cd"]
    again = CoreSpace.from_basis(renamed, space.basis_description(), space.basis_tensors())
    assert [adapter.name for adapter in again.adapters] == ["c", "d"]
    assert torch.equal(again.core("d"), space.core("b"))


def test_recorded_basis_of_other_adapters(model):
    a, b = some_adapters(model, 2)
    space = CoreSpace.of([a, b])
    changed = random_adapter(model, "a1", targets=CHOICES[1], rank=2, seed=77)
    for given_now in ([a], [a, changed], [a, b, changed]):
        with pytest.raises(AdapterError, match=r"collected for the adapters \['a0', 'a1'\]"):
            CoreSpace.from_basis(given_now, space.basis_description(), space.basis_tensors())
