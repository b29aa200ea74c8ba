"""Layers that read one input project it in one product: found by looking, and right where the look misled."""

from __future__ import annotations

import pytest
import torch
from builders import dense_fisher, random_adapter, random_batch, relative_error

from sstmerge.adapters import CoreSpace
from sstmerge.fisher import collect_fisher
from sstmerge.fisher.taps import Tap, Taps, frozen, installed_taps

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = random_batch([8, 5, 7, 6])


@pytest.fixture
def model(pico_llama):
    return pico_llama().double()


@pytest.fixture
def space(model):
    return CoreSpace.of([random_adapter(model, "a", targets=TARGETS)])


def shared_names(model, space):
    """Return the last names of the layers that were found to share an input, without repetitions."""
    with frozen(model), installed_taps(model, space, record=True) as taps:
        taps.find_shared_inputs(lambda: model(input_ids=BATCH.input_ids[:1, :1]))
        found = {id(tap.shared): tap.shared for group in taps.groups for tap in group if tap.shared is not None}
        return [sorted(tap.name.rsplit(".", 1)[-1] for tap in shared.taps) for shared in found.values()]


def test_query_key_value_and_gate_up_are_found_in_every_block(model, space):
    assert sorted(shared_names(model, space)) == [["gate_proj", "up_proj"]] * 2 + [["k_proj", "q_proj", "v_proj"]] * 2


def test_a_layer_that_is_called_twice_shares_nothing(model, space):
    model.model.layers[1].mlp.gate_proj = model.model.layers[0].mlp.gate_proj
    space = CoreSpace.of([random_adapter(model, "a", targets=("gate_proj", "up_proj"))])
    assert shared_names(model, space) == []


def test_shared_inputs_are_multiplied_once(model, space, monkeypatch):
    products = []
    project = Tap.project
    monkeypatch.setattr(Tap, "project", lambda tap, rows, basis: products.append(1) or project(tap, rows, basis))
    collect_fisher(model, [BATCH], space, reference="a")
    blocks, one_token = 2, 7
    forward, backward = 4, 7  # q k v, o, gate up, down; every gradient is its own
    assert len(products) == blocks * (one_token + forward + backward)


@pytest.mark.parametrize("structure", ["kfac", "global"])
def test_sharing_changes_nothing(model, space, structure, monkeypatch):
    options = {"structure": structure, "labels": "sampled", "reference": "a"}
    shared = collect_fisher(model, [BATCH], space, **options)
    monkeypatch.setattr(Taps, "find_shared_inputs", lambda taps, run: None)
    alone = collect_fisher(model, [BATCH], space, **options)
    assert relative_error(dense_fisher(shared), dense_fisher(alone)) < 1e-6


def test_inputs_that_differ_later_are_projected_alone(model, space, monkeypatch):
    """The look at one token saw one tensor; for real batches the key layer gets one of its own."""

    def own_input(module, args):
        return (2 * args[0],) if args[0].shape[1] > 1 else args

    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(own_input)
    misled = collect_fisher(model, [BATCH], space, structure="global", reference="a")
    monkeypatch.setattr(Taps, "find_shared_inputs", lambda taps, run: None)
    expected = collect_fisher(model, [BATCH], space, structure="global", reference="a")
    assert relative_error(misled.statistics["scores"], expected.statistics["scores"]) < 1e-6
    assert torch.equal(misled.counts.positions, expected.counts.positions)
