"""Sketches of a base model: exact where the rank suffices, linear in the data, independent of padding and batches."""

from __future__ import annotations

import json
import random
import signal
import time
from itertools import count

import pytest
import torch
from builders import GPT2_TARGETS, random_adapter, random_batch, relative_error, rows
from collection_cases import sketch_into, sketch_together, sketched
from peft import LoraConfig, get_peft_model
from processes import start, start_together, together, wait_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as recompute

from sstmerge import collect_fisher, collect_sketch, load_sketch, save_sketch, solve
from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError, Interrupted
from sstmerge.fisher import sketch_collect
from sstmerge.fisher.checkpoint import Checkpoint
from sstmerge.fisher.sketch_plan import plan_sketch
from sstmerge.fisher.sketch_sums import MomentSums, RandomSigns, ScoreSums, nystrom_factor, product_of, score_core

TARGETS = ("q_proj", "k_proj", "up_proj", "down_proj")
FULL = 64  # no layer of the pico models is wider than 48, but for GPT-2's c_attn
BATCH = random_batch([7, 5, 9, 6, 8, 4], seed=3, weight=[1.0, 2.0, 0.5, 1.0, 1.0, 1.5])


@pytest.fixture(scope="module")
def model(pico_llama):
    return pico_llama().double()


@pytest.fixture(scope="module")
def space(model):
    return CoreSpace.of(
        [random_adapter(model, "a", targets=TARGETS, seed=1), random_adapter(model, "b", targets=("q_proj",), seed=2)]
    )


def assert_same_tensors(one, other, tolerance=0.0):
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        if tolerance:
            assert relative_error(other.tensors[name], tensor) <= tolerance, name
        else:
            assert torch.equal(other.tensors[name], tensor), name


def assert_projections_agree(one, other, space, tolerance):
    """Factors of equal products need not be equal, so what they stand for is compared."""
    one, other = one.project(space), other.project(space)
    for name in ("input_covariance", "output_covariance", "input_count", "score_sum"):
        for mine, theirs in zip(one.sums(name), other.sums(name), strict=True):
            assert (mine - theirs).abs().max() <= tolerance * mine.abs().max(), name


# ---- the sums --------------------------------------------------------------------------------------------------------


def decaying_rows(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 ** -torch.arange(size, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) * scales


def test_random_signs_are_signs_nested_and_fixed():
    signs = RandomSigns(6, seed=3)
    like = torch.zeros(1, 20, dtype=torch.float64)
    matrix = signs.matrix(like)
    assert matrix.shape == (20, 6)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(RandomSigns(4, seed=3).matrix(like), matrix[:, :4])
    assert not torch.equal(RandomSigns(6, seed=4).matrix(like), matrix)
    assert signs.matrix(torch.zeros(1, 6)) is None  # the identity
    # A file made today must be addable to one made by a later version: these bits are part of the format.
    assert matrix[:8, 5].tolist() == [-1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0]


def test_nystrom_lies_between_zero_and_the_whole_and_agrees_on_the_test_matrix():
    data, signs = decaying_rows(50, 20), RandomSigns(8, seed=0)
    sums = MomentSums(20, signs, torch.float64, torch.device("cpu"))
    sums.add(0, data)
    whole = data.mT @ data
    factor = nystrom_factor(sums.product, signs)[0]
    low_rank = factor @ factor.mT
    assert torch.linalg.eigvalsh(whole - low_rank).min() > -1e-10 * whole.trace()
    assert relative_error(product_of(factor, signs), sums.product[0]) < 1e-10
    torch.testing.assert_close(sums.diagonal[0], whole.diagonal())
    # Eigenvalues fall by four, so that eight columns leave little.
    assert relative_error(low_rank, whole) < 5e-2
    assert relative_error(low_rank, whole) > 0
    assert sums.product[1].abs().max() == 0


@pytest.mark.parametrize("size", [4, 8, 20])
def test_data_of_low_rank_are_kept_exactly(size):
    """Rank 3 data under 8 columns; also where the test matrix is the identity."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(30, 3, generator=generator).double() @ torch.randn(3, size, generator=generator).double()
    signs = RandomSigns(8, seed=0)
    sums = MomentSums(size, signs, torch.float64, torch.device("cpu"))
    sums.add(1, data, copies=2)
    factor = nystrom_factor(sums.product, signs)
    assert relative_error(factor[1] @ factor[1].mT, 2 * data.mT @ data) < 1e-10
    assert factor[0].abs().max() == 0


@pytest.mark.parametrize(("outputs", "inputs"), [(20, 30), (6, 30), (30, 3), (5, 4)])
def test_scores_of_low_rank_are_kept_exactly(outputs, inputs):
    delta, x = decaying_rows(3, outputs, seed=1), decaying_rows(3, inputs, seed=2)
    signs = RandomSigns(8, seed=0)
    moments = MomentSums(outputs, signs, torch.float64, torch.device("cpu"))
    sums = ScoreSums(outputs, inputs, signs, torch.float64, torch.device("cpu"))
    sums.add(delta, moments.add(0, delta), x)
    expected = delta.mT @ x
    if sums.right.shape[1] == outputs:
        found = sums.right.mT
    elif sums.left.shape[1] == inputs:
        found = sums.left
    else:
        found = sums.left @ score_core(sums.left, signs) @ sums.right.mT
    assert relative_error(found, expected) < 1e-6


# ---- against the exact Fisher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "draws"), [("data", 1), ("sampled", 1), ("sampled", 3)])
def test_full_rank_is_the_kfac_fisher_at_the_base_model(model, space, labels, draws):
    exact = collect_fisher(model, [BATCH], space, structure="kfac", labels=labels, draws=draws, seed=5)
    fisher = collect_sketch(model, [BATCH], rank=FULL, labels=labels, draws=draws, seed=5).project(space)
    for name in ("input_covariance", "output_covariance", "input_count"):
        for i in range(len(space.groups)):
            assert relative_error(fisher.statistics[f"{name}.{i}"], exact.statistics[f"{name}.{i}"]) < 1e-10
    for name in ("sequences", "tokens", "positions", "squared_weights"):
        assert torch.equal(getattr(fisher.counts, name), getattr(exact.counts, name))
    expected = exact.mean_score() if labels == "data" else space.zero()
    torch.testing.assert_close(fisher.mean_score(), expected, rtol=1e-8, atol=1e-10)
    assert fisher.metadata["model"] == exact.metadata["model"]
    assert fisher.metadata["data"] == exact.metadata["data"]


def test_conv1d_layers(pico_gpt2):
    model = pico_gpt2().double()
    space = CoreSpace.of([random_adapter(model, "a", targets=GPT2_TARGETS)])
    exact = collect_fisher(model, [BATCH], space, structure="kfac")
    sketch = collect_sketch(model, [BATCH], rank=96)
    for mine, theirs in zip(sketch.project(space).kronecker_factors(), exact.kronecker_factors(), strict=True):
        assert relative_error(mine[0], theirs[0]) < 1e-10
        assert relative_error(mine[1], theirs[1]) < 1e-10


def test_low_rank_errs_less_with_every_column_and_keeps_the_diagonal(model, space):
    exact = collect_fisher(model, [BATCH], space, structure="kfac").kronecker_factors()
    errors = []
    for rank in (4, 12, 24):
        sketch = collect_sketch(model, [BATCH], rank=rank)
        found = sketch.project(space).kronecker_factors()
        errors.append(
            sum(
                float((a - b).norm() / b.norm())
                for f, e in zip(found, exact, strict=True)
                for a, b in zip(f, e, strict=True)
            )
        )
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    # In a space whose bases are unit vectors nothing but the diagonal counts, and that is exact at any rank.
    adapter = random_adapter(model, "e", targets=("o_proj",), rank=1)
    for factors in adapter.layers.values():
        factors.A[:], factors.B[:] = 0.0, 0.0
        factors.A[0, 3], factors.B[5, 0] = 1.0, 1.0
    units = CoreSpace.of([adapter])
    sketch = collect_sketch(model, [BATCH], rank=4)
    exact = collect_fisher(model, [BATCH], units, structure="kfac").kronecker_factors()
    for mine, theirs in zip(sketch.project(units).kronecker_factors(), exact, strict=True):
        assert relative_error(mine[0], theirs[0]) < 1e-6
        assert relative_error(mine[1], theirs[1]) < 1e-6


def test_no_direction_is_free_and_the_pair_solves(model, space):
    gain = collect_sketch(model, [BATCH], rank=4, labels="data").project(space)
    cost = collect_sketch(model, [random_batch([6, 5, 7, 4], seed=8)], rank=4, labels="sampled").project(space)
    for X, D in cost.kronecker_factors():
        assert torch.linalg.eigvalsh(X).min() > 0
        assert torch.linalg.eigvalsh(D).min() > 0
    spectrum = solve(gain, cost)
    assert spectrum.complete
    assert bool(torch.isfinite(spectrum.eigenvalues).all())


# ---- data: padding, batches, sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [8, FULL])
def test_padding_and_batches_do_not_change_a_sketch(model, space, rank):
    expected = collect_sketch(model, [BATCH], rank=rank)
    padded = collect_sketch(model, [rows(BATCH, slice(None), width=14)], rank=rank)
    single = collect_sketch(model, [rows(BATCH, [i]) for i in (3, 0, 5, 2, 1, 4)], rank=rank)
    for other in (padded, single):
        assert_projections_agree(expected, other, space, 1e-8)
        assert other.metadata["data"] == expected.metadata["data"]


@pytest.mark.parametrize("rank", [8, FULL])
def test_the_sum_of_two_sketches_is_the_sketch_of_both_data_sets(model, space, rank):
    parts = [collect_sketch(model, [rows(BATCH, chosen)], rank=rank) for chosen in ([0, 3], [1, 2, 4, 5])]
    whole = collect_sketch(model, [BATCH], rank=rank)
    both = parts[0] + parts[1]
    # Half of the data at a time is not known better than all: the products add up, the approximations need not.
    assert_projections_agree(whole, both, space, 1e-7)
    assert torch.equal(both.counts.tokens, whole.counts.tokens)
    assert both.metadata["data"] == [part.metadata["data"] for part in parts]


def test_a_sum_of_different_draws_does_not_overstate_its_sequences(model, space):
    few, many = (collect_sketch(model, [BATCH], rank=8, labels="sampled", draws=draws) for draws in (1, 3))
    for total in (few + many, many + few):
        assert total.metadata["draws"] == 3
        assert total.project(space).effective_sequences <= 2 * few.project(space).effective_sequences


def test_split_halves_are_even_and_odd_sequences(model, space):
    sketch = collect_sketch(model, [BATCH], rank=FULL).project(space)
    even = collect_sketch(model, [rows(BATCH, [0, 2, 4])], rank=FULL).project(space)
    for mine, theirs in zip(sketch.half(0).kronecker_factors(), even.kronecker_factors(), strict=True):
        assert relative_error(mine[0], theirs[0]) < 1e-10
        assert relative_error(mine[1], theirs[1]) < 1e-10


# ---- models ------------------------------------------------------------------------------------------------------------


def test_layers_that_read_one_tensor_share_its_sketch(model):
    plan = plan_sketch(model, [BATCH], rank=8)
    owners = {name: layer.input_of for name, layer in plan.layers.items()}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert {owners[f"{attention}.{name}"] for name in ("q_proj", "k_proj", "v_proj")} == {f"{attention}.q_proj"}
    assert owners[f"{attention}.o_proj"] == f"{attention}.o_proj"
    assert owners[f"{mlp}.up_proj"] == owners[f"{mlp}.gate_proj"]
    assert len(plan.layers) == 14
    assert not plan.left_out


def test_the_plan_knows_the_memory(model):
    for scores, labels in ((False, "sampled"), (True, "data")):
        plan = plan_sketch(model, [BATCH], rank=8, scores=scores)
        sketch = collect_sketch(model, [BATCH], rank=8, labels=labels)
        kept = {n: t for n, t in sketch.tensors.items() if not n.startswith(("input_count", "score_core"))}
        assert plan.bytes == sum(t.numel() * t.element_size() for t in kept.values())


def test_a_module_that_is_called_twice_shares_with_nobody_and_sums_both_calls(pico_llama):
    model = pico_llama().double()
    model.model.layers[1].mlp.gate_proj = model.model.layers[0].mlp.gate_proj
    space = CoreSpace.of([random_adapter(model, "a", targets=("gate_proj", "up_proj"), seed=3)])
    exact = collect_fisher(model, [BATCH], space, structure="kfac")
    sketch = collect_sketch(model, [BATCH], rank=FULL)
    assert sketch.layers["model.layers.0.mlp.up_proj"].input_of == "model.layers.0.mlp.up_proj"
    for name in ("input_covariance", "output_covariance", "input_count"):
        assert relative_error(sketch.project(space).sums(name)[0], exact.sums(name)[0]) < 1e-10


def test_checkpointed_activations_count_once(model, space, pico_llama):
    recomputing = pico_llama().double()
    for layer in recomputing.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, f=forward: recompute(f, x, use_reentrant=False)
    assert_projections_agree(
        collect_sketch(model, [BATCH], rank=8), collect_sketch(recomputing, [BATCH], rank=8), space, 1e-9
    )


def test_peft_model_is_its_base_and_is_restored(pico_llama):
    expected = collect_sketch(pico_llama(), [BATCH], rank=8, targets=("q_proj", "down_proj"))
    wrapped = get_peft_model(
        pico_llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    before = {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}
    sketch = collect_sketch(wrapped, [BATCH], rank=8, targets=("q_proj", "down_proj"))
    assert_same_tensors(expected, sketch)
    assert sketch.metadata["model"] == expected.metadata["model"]
    assert {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()} == before
    assert not any(module._forward_hooks for module in wrapped.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_nearly_the_same(pico_llama, space, dtype):
    exact = collect_sketch(pico_llama(), [BATCH], rank=FULL)
    rounded = collect_sketch(pico_llama().to(dtype), [BATCH], rank=FULL)
    assert rounded.tensors["input_factor.model.layers.0.mlp.down_proj"].dtype == torch.float32
    assert_projections_agree(exact, rounded, space, 40 * torch.finfo(dtype).eps)


# ---- interruption --------------------------------------------------------------------------------------------------------


BATCHES = [rows(BATCH, chosen) for chosen in ([5, 1], [3], [0, 4], [2])]


@pytest.mark.parametrize(("labels", "draws", "stop"), [("data", 1, 1), ("data", 1, 3), ("sampled", 2, 2)])
def test_an_interrupted_collection_goes_on_to_the_same_bits(pico_llama, tmp_path, monkeypatch, labels, draws, stop):
    model, options = pico_llama(), {"rank": 8, "labels": labels, "draws": draws}
    unbroken = collect_sketch(model, BATCHES, **options)

    def interrupt(done, total):
        if done >= sum(len(b.index) for b in BATCHES[:stop]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_sketch(model, BATCHES, checkpoint=Checkpoint(tmp_path, batches=1), progress=interrupt, **options)
    collected, add_to = [], sketch_collect._SketchedBatch.add_to
    monkeypatch.setattr(
        sketch_collect._SketchedBatch, "add_to", lambda self, *a: collected.append(self.batch) or add_to(self, *a)
    )
    resumed = collect_sketch(model, BATCHES, checkpoint=Checkpoint(tmp_path), **options)
    assert_same_tensors(unbroken, resumed)
    assert resumed.counts.tokens.tolist() == unbroken.counts.tokens.tolist()
    assert len(collected) == len(BATCHES) - stop  # what was done is not done again


def test_a_signal_ends_with_the_batch_and_saves_it(pico_llama, tmp_path):
    unbroken = collect_sketch(pico_llama(), BATCHES, rank=8)

    model = pico_llama()

    def stop_in_the_third_batch(module, args):
        if args[0].shape[:2] == BATCHES[2].input_ids.shape:
            signal.raise_signal(signal.SIGTERM)

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop_in_the_third_batch)
    with pytest.raises(Interrupted, match="SIGTERM"):
        collect_sketch(model, BATCHES, rank=8, checkpoint=Checkpoint(tmp_path, minutes=None))
    handle.remove()
    assert len(list(tmp_path.iterdir())) == 1
    assert_same_tensors(unbroken, collect_sketch(model, BATCHES, rank=8, checkpoint=Checkpoint(tmp_path)))


def test_killed_sketches_end_with_the_same_bits(tmp_path):
    """In the middle of a leaf, in the middle of a saving, before the first one, by one process after another."""
    unbroken, chance, out = sketched(), random.Random(0), tmp_path / "s.safetensors"
    for kills in count():
        process = start(tmp_path / "process", sketch_into, out, 0.02)
        if kills < 6:
            time.sleep(chance.uniform(0.0, 0.15))
            process.kill(signal.SIGKILL)
        outcome = process.join()
        if outcome["exit"] == 0:
            break
        assert outcome["exit"] == -9, outcome
    assert kills >= 2
    assert_same_tensors(unbroken, load_sketch(out))
    assert not out.with_name("s.safetensors.checkpoint").exists()


@pytest.mark.parametrize("size", [2, 3])
def test_the_bits_of_a_sketch_do_not_depend_on_the_number_of_processes(tmp_path, size):
    outcomes = together(tmp_path, size, sketch_together, tmp_path)
    assert all(outcome["value"] for outcome in outcomes)
    for rank in range(size):  # all of them get the sketch
        assert_same_tensors(sketched(), load_sketch(tmp_path / f"{rank}.safetensors"))


def test_another_number_of_processes_goes_on_with_a_sketch(tmp_path):
    out = tmp_path / "s.safetensors"
    started, store = start_together(tmp_path, 2, sketch_into, out, 0.05)
    folder = tmp_path / "s.safetensors.checkpoint"
    wait_until(lambda: len(list(folder.glob("sketch/start-*.safetensors"))) == 2)
    started[1].kill(signal.SIGKILL)
    started[0].kill(signal.SIGKILL)
    assert -9 in [process.join()["exit"] for process in started]
    del store
    assert start(tmp_path / "last", sketch_into, out).join()["value"]
    assert_same_tensors(sketched(), load_sketch(out))


def test_a_checkpoint_of_something_else_is_refused(pico_llama, tmp_path):
    model = pico_llama()
    collect_sketch(model, BATCHES, rank=8, checkpoint=Checkpoint(tmp_path, batches=1))
    changes = {
        "rank": {"rank": 9},
        "seed": {"seed": 1},
        "labels": {"labels": "sampled"},
        "layers": {"targets": ("q_proj",)},
    }
    for word, change in changes.items():
        with pytest.raises(FisherError, match=f"belongs to another collection: .*{word} is "):
            collect_sketch(model, BATCHES, checkpoint=Checkpoint(tmp_path), **{"rank": 8, **change})
    others = {"batches": (BATCHES[::-1], model), "data": (BATCHES[:2], model), "model": (BATCHES, pico_llama(seed=1))}
    for word, (batches, model_) in others.items():
        with pytest.raises(FisherError, match=f"belongs to another collection: .*{word} is "):
            collect_sketch(model_, batches, rank=8, checkpoint=Checkpoint(tmp_path))


# ---- files and refusals --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sketch(model):
    return collect_sketch(model, [BATCH], rank=8, metadata={"response_tokens": 3})


def test_save_and_load_keep_every_bit(sketch, tmp_path):
    save_sketch(sketch, tmp_path / "s.safetensors")
    again = load_sketch(tmp_path / "s.safetensors")
    assert_same_tensors(sketch, again)
    assert again.layers == sketch.layers
    assert again.metadata == sketch.metadata
    assert (again.signs.rank, again.signs.seed) == (8, 0)
    assert torch.equal(again.counts.positions, sketch.counts.positions)
    assert list(tmp_path.iterdir()) == [tmp_path / "s.safetensors"]


def test_files_that_are_no_sketch_are_refused(sketch, space, tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FisherError, match="not a readable safetensors file"):
        load_sketch(tmp_path / "text")
    sketch.project(space).save(tmp_path / "fisher")
    with pytest.raises(FisherError, match="not a sketch that sstmerge wrote"):
        load_sketch(tmp_path / "fisher")


def test_an_altered_sketch_is_named(sketch, tmp_path):
    path = tmp_path / "s.safetensors"
    save_sketch(sketch, path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(FisherError, match=r"s.safetensors' was altered or damaged: its contents do not match its hash"):
        load_sketch(path)


def test_damaged_sketches_are_refused(sketch, space, tmp_path):
    path = tmp_path / "s.safetensors"
    save_sketch(sketch, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    factor = "output_factor.model.layers.0.self_attn.q_proj"

    def written(tensors, **changes):
        header = {**json.loads(metadata["sstmerge_sketch"]), **changes}
        save_file(tensors, path, metadata={"sstmerge_sketch": json.dumps(header)})
        return path

    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with pytest.raises(FisherError, match=rf"expected '{factor}' of shape \(2, 32, 8\), but found none"):
        load_sketch(written({name: tensor for name, tensor in whole.items() if name != factor}))
    with pytest.raises(FisherError, match=r"but found \(2, 32, 7\)"):
        load_sketch(written(whole | {factor: whole[factor][:, :, :7].contiguous()}))
    for changes in ({"rank": "8"}, {"layers": [1]}, {"layers": {"a": [1, 2]}}, {"metadata": None}, {"rank": 0}):
        with pytest.raises(FisherError, match="description cannot be read"):
            load_sketch(written(whole, **changes))
    with pytest.raises(FisherError, match="has sketch format 7"):
        load_sketch(written(whole, format=7))
    whole[factor][0, 3, 2] = float("nan")
    with pytest.raises(FisherError, match="holds NaN or Inf"):
        load_sketch(written(whole)).project(space)


def test_adapters_that_do_not_fit_are_refused(model, sketch, pico_gpt2, pico_llama):
    few = collect_sketch(model, [BATCH], rank=8, targets=("q_proj", "v_proj"))
    assert len(few.layers) == 4
    with pytest.raises(FisherError, match=r"lacks 2 of the adapters' 4 layers, such as 'model.layers.0.mlp.down_proj'"):
        few.project(CoreSpace.of([random_adapter(model, "a", targets=("q_proj", "down_proj"))]))
    with pytest.raises(FisherError, match="belong to another base model"):
        sketch.project(CoreSpace.of([random_adapter(pico_gpt2(), "a", targets=GPT2_TARGETS)]))
    other = random_adapter(model, "a", targets=("up_proj",))
    widened = {
        name: type(f)(A=torch.cat([f.A, f.A], dim=1), B=f.B, scaling=f.scaling) for name, f in other.layers.items()
    }
    with pytest.raises(FisherError, match="maps 32 to 48 features in the sketched model, but 64 to 48 in the adapters"):
        sketch.project(CoreSpace.of([type(other)("a", widened)]))


def test_sketches_that_do_not_fit_are_not_added(model, sketch, pico_llama):
    options = {"rank": 8, "metadata": {"response_tokens": 3}}
    for other, words in (
        (collect_sketch(model, [BATCH], **options | {"rank": 9}), "their test matrices differ"),
        (collect_sketch(model, [BATCH], **options, seed=1), "their test matrices differ"),
        (collect_sketch(model, [BATCH], **options, labels="sampled"), "labels"),
        (collect_sketch(model, [BATCH], rank=8), "response_tokens"),
        (collect_sketch(model, [BATCH], **options, targets=("q_proj",)), "different layers"),
        (collect_sketch(pico_llama(seed=1).double(), [BATCH], **options), "model"),
    ):
        with pytest.raises(FisherError, match=words):
            sketch + other


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "at least 1, but is 0"),
        ({"labels": "guessed"}, "Unknown labels"),
        ({"draws": 2}, "more only for sampled labels"),
        ({"targets": ("lm_head",)}, "output head is never sketched"),
        ({"targets": ("banana_proj",)}, "'banana_proj' is no linear layer"),
    ],
)
def test_unusable_options_are_refused(model, options, words):
    with pytest.raises(InputError, match=words):
        collect_sketch(model, [BATCH], **options)


def test_unusable_data_and_models_are_refused(model, pico_llama):
    with pytest.raises(InputError, match="no response token"):
        collect_sketch(model, [random_batch([4, 4], response=0)])
    with pytest.raises(InputError, match="no response token"):
        collect_sketch(model, [])
    broken = pico_llama()
    broken.model.layers[0].mlp.up_proj.weight.data[:] = 1e30
    with pytest.raises(FisherError, match="not finite"):
        collect_sketch(broken, [BATCH], rank=8)
