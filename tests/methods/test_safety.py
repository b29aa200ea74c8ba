"""SafeLoRA, SafeMERGE, SPLoRA, the AlignGuard projection and module selection, against dense NumPy transcriptions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fisher_cases import SHAPES, TOKENS, Data, adapters, assert_equal, batches, deltas_of, dense, fisher, regauged
from safetensors.torch import save_file

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.errors import AdapterError, FisherError, InputError
from sstmerge.merging import module_filter
from sstmerge.merging.methods import safety
from sstmerge.merging.methods.aligned_pair import AlignedPair
from sstmerge.merging.methods.registry import Method, RebasedCores
from sstmerge.merging.methods.statistics import GainAndCost, as_diagonal

ROWS: dict[str, Method] = {method.name: method for method in safety.METHODS}
WEIGHTS = (0.4, 1.0, 0.7)
LAYERS = list(SHAPES)


def run(name, merged, statistics, **options):
    row = ROWS[name]
    return dense(row.function, merged, statistics, **row.resolve(options))


def weights_of(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        path: scale * random.normal(size=shape) @ np.diag(0.5 ** np.arange(shape[1])) for path, shape in SHAPES.items()
    }


BASE = weights_of(1)
ALIGNED = {path: BASE[path] + change for path, change in weights_of(2, 0.1).items()}


def tensors(weights, dtype=torch.float32, transposed=False):
    changed = {f"{path}.weight": torch.from_numpy(w.T if transposed else w).to(dtype) for path, w in weights.items()}
    return {name: tensor.contiguous() for name, tensor in changed.items()} | {"model.norm.weight": torch.ones(3)}


def write(folder, weights, **options):
    folder.mkdir(parents=True)
    save_file(tensors(weights, **options), folder / "model.safetensors")
    return folder


@pytest.fixture
def models(tmp_path):
    return write(tmp_path / "aligned", ALIGNED), write(tmp_path / "base", BASE)


def projector(path):
    """C = V Vᵀ / ‖V‖_F, dense."""
    V = ALIGNED[path] - BASE[path]
    return V @ V.T / np.sqrt((V**2).sum())


def cosine(path, delta):
    changed = projector(path) @ delta
    return (changed * delta).sum() / np.sqrt((changed**2).sum() * (delta**2).sum())


# ---- SafeLoRA --------------------------------------------------------------------------------------------------------


def dense_safe_lora(members, weights, chosen):
    merged = {}
    for path in SHAPES:
        parts = [
            projector(path) @ deltas_of(a)[path] if path in chosen[a.name] else deltas_of(a)[path] for a in members
        ]
        merged[path] = sum(w * part for w, part in zip(weights, parts, strict=True))
    return merged


def test_safe_lora_equals_a_dense_transcription(models):
    members = adapters(missing={"code": "model.layers.1.q"})
    space = CoreSpace.of(members)
    cosines = {a.name: {p: cosine(p, deltas_of(a)[p]) for p in a.layers} for a in members}
    threshold = float(np.median([c for layers in cosines.values() for c in layers.values()]))
    chosen = {name: {p for p, c in layers.items() if c <= threshold} for name, layers in cosines.items()}
    assert 0 < sum(map(len, chosen.values())) < 8
    pair = AlignedPair(*models, members)
    result = run("safe_lora", batches(space, WEIGHTS), pair, threshold=threshold + 1e-6)
    assert_equal(result, dense_safe_lora(members, WEIGHTS, chosen))
    for name, layers in cosines.items():
        assert {p: c.cosine for p, c in pair.comparisons(name).items()} == pytest.approx(layers, abs=1e-5)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_safe_lora_by_number_replaces_the_lowest_cosines_of_each_adapter(models, number):
    members = adapters()
    space = CoreSpace.of(members)
    chosen = {a.name: sorted(SHAPES, key=lambda p: cosine(p, deltas_of(a)[p]))[:number] for a in members}
    result = run("safe_lora", batches(space, WEIGHTS), AlignedPair(*models, members), select="number", number=number)
    assert_equal(result, dense_safe_lora(members, WEIGHTS, chosen))


def test_safe_lora_at_its_extremes(models):
    members = adapters()
    space = CoreSpace.of(members)
    pair = AlignedPair(*models, members)
    nothing = ROWS["safe_lora"].function(batches(space, WEIGHTS)[0], pair, select="threshold", threshold=-1.0, number=1)
    assert not isinstance(nothing, RebasedCores)  # the adapters' own span is enough
    kept = run("safe_lora", batches(space, WEIGHTS), pair, threshold=-1.0)
    assert_equal(kept, dense_safe_lora(members, WEIGHTS, {a.name: () for a in members}))
    everything = run("safe_lora", batches(space, WEIGHTS), pair, threshold=1.0)
    assert_equal(everything, dense_safe_lora(members, WEIGHTS, {a.name: LAYERS for a in members}))


def test_the_bases_of_replaced_layers_are_orthonormal(models):
    members = adapters()
    pair = AlignedPair(*models, members)
    for batch in batches(CoreSpace.of(members), WEIGHTS):
        result = ROWS["safe_lora"].function(batch, pair, select="number", threshold=0.5, number=2)
        gram = result.U.mT @ result.U
        torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=1e-5, rtol=0)
        assert result.cores.dtype == torch.float64


# ---- SafeMERGE and SPLoRA --------------------------------------------------------------------------------------------


def test_safe_merge_equals_a_dense_transcription(models):
    members = adapters(("code", "safe"))
    space = CoreSpace.of(members)
    cosines = {p: cosine(p, deltas_of(members[0])[p]) for p in SHAPES}
    threshold = sorted(cosines.values())[1] + 1e-4
    expected = {}
    for path in SHAPES:
        fine_tuned, safe = 0.9 * deltas_of(members[0])[path], 1.5 * deltas_of(members[1])[path]
        expected[path] = 0.7 * fine_tuned + 0.3 * safe if cosines[path] < threshold else fine_tuned
    pair = AlignedPair(*models, members)
    options = {"threshold": threshold, "safety_share": 0.3}
    assert_equal(run("safe_merge", batches(space, (0.9, 1.5), "safe"), pair, **options), expected)
    other = CoreSpace.of(members[::-1])
    assert_equal(run("safe_merge", batches(other, (1.5, 0.9), "safe"), pair, **options), expected)


def test_safe_merge_at_its_extremes(models):
    members = adapters(("code", "safe"))
    merged, pair = batches(CoreSpace.of(members), (1.0, 1.0), "safe"), AlignedPair(*models, members)
    first, second = (deltas_of(a) for a in members)
    assert_equal(run("safe_merge", merged, pair, threshold=-1.0), first)
    assert_equal(run("safe_merge", merged, pair, threshold=1.0), {p: 0.8 * first[p] + 0.2 * second[p] for p in SHAPES})
    assert_equal(run("safe_merge", merged, pair, threshold=1.0, safety_share=1.0), second)


def e_diem(delta_of_layer):
    """(d − mean d) / (Q3 − Q1) over layers, d = root mean square of the entries of C ΔW − ΔW."""
    d = np.array([np.sqrt(np.mean((projector(p) @ x - x) ** 2)) for p, x in delta_of_layer.items()])
    q1, q3 = np.percentile(d, [25, 75])
    return dict(zip(delta_of_layer, (d - d.mean()) / (q3 - q1), strict=True))


@pytest.mark.parametrize("prune", ["lowest", "highest"])
@pytest.mark.parametrize("select", ["number", "threshold"])
def test_splora_equals_a_dense_transcription(models, prune, select):
    members = adapters()
    space = CoreSpace.of(members)
    expected = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    dropped = 0
    # Between the scores and far from zero, so that a wrong sign would drop other layers.
    threshold = 0.9 * min(max(e_diem(deltas_of(adapter)).values()) for adapter in members)
    for weight, adapter in zip(WEIGHTS, members, strict=True):
        scores = e_diem(deltas_of(adapter))
        ordered = sorted(scores, key=scores.get, reverse=prune == "highest")
        out = (
            ordered[:2]
            if select == "number"
            else [p for p in SHAPES if (scores[p] <= threshold if prune == "lowest" else scores[p] >= threshold)]
        )
        dropped += len(out)
        for path in SHAPES:
            expected[path] += weight * deltas_of(adapter)[path] * (path not in out)
    assert 0 < dropped < 9
    result = run(
        "splora",
        batches(space, WEIGHTS),
        AlignedPair(*models, members),
        select=select,
        prune=prune,
        number=2,
        threshold=threshold,
    )
    assert_equal(result, expected)


def test_splora_that_drops_nothing_is_task_arithmetic_and_one_that_drops_all_is_zero(models):
    members = adapters()
    merged, pair = batches(CoreSpace.of(members), WEIGHTS), AlignedPair(*models, members)
    total = {p: sum(w * deltas_of(a)[p] for w, a in zip(WEIGHTS, members, strict=True)) for p in SHAPES}
    assert_equal(run("splora", merged, pair, select="threshold", threshold=-100.0), total)
    assert_equal(run("splora", merged, pair, number=3), {p: np.zeros(s) for p, s in SHAPES.items()})


@pytest.mark.parametrize("name", ["safe_lora", "safe_merge", "splora"])
def test_pair_methods_do_not_depend_on_order_or_gauge(models, name):
    members = adapters(("code", "safe"))
    other = [regauged(a) for a in reversed(members)]
    options = {"select": "number", "number": 2} if name != "safe_merge" else {"threshold": 0.6}
    first = run(name, batches(CoreSpace.of(members), (0.9, 0.4), "safe"), AlignedPair(*models, members), **options)
    second = run(name, batches(CoreSpace.of(other), (0.4, 0.9), "safe"), AlignedPair(*models, other), **options)
    assert_equal(second, first)


# ---- the pair of models ----------------------------------------------------------------------------------------------


def shard(folder, weights):
    """Write two shards and their index, as transformers does."""
    folder.mkdir()
    whole, index = tensors(weights), {}
    for number, names in enumerate((list(whole)[::2], list(whole)[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: whole[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_sharded_single_and_bare_checkpoints_are_the_same_pair(models, tmp_path):
    members = adapters()
    expected = AlignedPair(*models, members).difference("model.layers.0.up")
    np.testing.assert_allclose(expected.numpy(), (ALIGNED["model.layers.0.up"] - BASE["model.layers.0.up"]), atol=1e-6)
    sharded = shard(tmp_path / "sharded", ALIGNED)
    torch.testing.assert_close(AlignedPair(sharded, models[1], members).difference("model.layers.0.up"), expected)
    file = models[0] / "model.safetensors"
    torch.testing.assert_close(AlignedPair(file, models[1], members).difference("model.layers.0.up"), expected)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors(ALIGNED).items()}
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    torch.testing.assert_close(
        AlignedPair(tmp_path / "bare", models[1], members).difference("model.layers.0.up"), expected
    )


def test_transposed_weights_are_turned(models, tmp_path):
    members = [replace(a, config={"fan_in_fan_out": True}) for a in adapters()]
    turned = [write(tmp_path / f"t{i}", w, transposed=True) for i, w in enumerate((ALIGNED, BASE))]
    for path in SHAPES:
        torch.testing.assert_close(
            AlignedPair(*turned, members).difference(path), AlignedPair(*models, adapters()).difference(path)
        )
    with pytest.raises(AdapterError, match=r"has shape \(7, 9\).*changes a weight of shape \(9, 7\)"):
        AlignedPair(*turned, adapters())


def test_unusable_pairs_are_refused_when_they_are_put_together(models, tmp_path):
    members = adapters()
    aligned, base = models
    with pytest.raises(InputError, match="Found no safetensors weights of the aligned model"):
        AlignedPair(tmp_path / "nowhere", base, members)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"base model .* is not a readable safetensors file"):
        AlignedPair(aligned, tmp_path / "damaged", members)
    smaller = {p: w[:, :-1] for p, w in BASE.items()}
    with pytest.raises(
        AdapterError, match=r"has shape \(9, 6\) in the base model .* changes a weight of shape \(9, 7\)"
    ):
        AlignedPair(aligned, write(tmp_path / "smaller", smaller), members)
    fewer = {p: BASE[p] for p in LAYERS[:2]}
    with pytest.raises(InputError, match=r"has no tensor 'model.layers.0.up.weight'"):
        AlignedPair(aligned, write(tmp_path / "fewer", fewer), members)
    (tmp_path / "index").mkdir()
    index = tmp_path / "index" / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(InputError, match="cannot be read as an index of shards"):
        AlignedPair(tmp_path / "index", base, members)
    wrong = shard(tmp_path / "wrong", BASE) / "model.safetensors.index.json"
    listed = json.loads(wrong.read_text())
    listed["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    wrong.write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"says that .* holds 'model.extra.weight', but it does not"):
        AlignedPair(tmp_path / "wrong", base, members)
    with pytest.raises(InputError, match="none was given"):
        AlignedPair(aligned, base, [])


def test_unusable_weights_and_unknown_adapters_are_refused(models, tmp_path):
    members = adapters()
    merged = batches(CoreSpace.of(members), WEIGHTS, "safe")
    same = {**ALIGNED, LAYERS[2]: BASE[LAYERS[2]]}
    with pytest.raises(InputError, match=r"have the same weight 'model.layers.0.up'"):
        run("safe_lora", merged, AlignedPair(write(tmp_path / "same", same), models[1], members))
    broken = {p: np.where(np.arange(w.size).reshape(w.shape) == 3, np.nan, w) for p, w in ALIGNED.items()}
    with pytest.raises(InputError, match="holds NaN or Inf"):
        run("splora", merged, AlignedPair(write(tmp_path / "nan", broken), models[1], members), number=1)
    with pytest.raises(InputError, match="quantised weights"):
        run("safe_lora", merged, AlignedPair(write(tmp_path / "int", ALIGNED, dtype=torch.int8), models[1], members))
    with pytest.raises(InputError, match="was built for the adapters"):
        run("safe_lora", merged, AlignedPair(*models, members[:2]))
    with pytest.raises(InputError, match="number is 9, but the adapter changes 3 layers only"):
        run("safe_lora", merged, AlignedPair(*models, members), select="number", number=9)
    with pytest.raises(InputError, match="merges one fine-tuned adapter with the safety adapter"):
        run("safe_merge", merged, AlignedPair(*models, members))
    with pytest.raises(InputError, match="name which of"):
        run("safe_merge", batches(CoreSpace.of(members), WEIGHTS), AlignedPair(*models, members))


def test_layers_that_an_adapter_does_not_change_are_not_compared(models):
    (member,) = adapters(("math",))
    zero = LoraFactors(member.layers[LAYERS[0]].A, 0 * member.layers[LAYERS[0]].B, 0.5)
    partly = Adapter("math", {**member.layers, LAYERS[0]: zero})
    assert set(AlignedPair(*models, [partly]).comparisons("math")) == set(LAYERS[1:])


# ---- AlignGuard projection -------------------------------------------------------------------------------------------


def dense_top(space, data, structure, directions):
    """P_A as a matrix on the stacked full weight changes of all layers, from the dense Fisher of the span."""
    blocks = []
    for group in space.groups:
        for j, path in enumerate(group.names):
            U, V = group.U[j].double().numpy(), group.V[j].double().numpy()
            blocks.append((np.kron(U, V), data.gradients(path).reshape(len(data.gradients(path)), -1), path, U, V))
    basis = np.zeros((sum(b[0].shape[0] for b in blocks), sum(b[0].shape[1] for b in blocks)))
    F = np.zeros((basis.shape[1],) * 2)
    row = column = 0
    scores = np.hstack([b[1] @ b[0] for b in blocks])
    for span, _, path, U, V in blocks:
        basis[row : row + span.shape[0], column : column + span.shape[1]] = span
        where = slice(column, column + span.shape[1])
        part = scores[:, where]
        if structure == "kfac":
            x, delta = data.x[path] @ V, data.delta[path] @ U
            F[where, where] = np.kron(delta.T @ delta, x.T @ x) / TOKENS**2
        elif structure == "diagonal":
            F[where, where] = np.diag((part**2).sum(0)) / TOKENS
        else:
            F[where, where] = part.T @ part / TOKENS
        row, column = row + span.shape[0], column + span.shape[1]
    if structure == "global":
        F = scores.T @ scores / TOKENS
    _, vectors = np.linalg.eigh(F)
    top = basis @ vectors[:, -directions:]
    return top @ top.T, [b[2] for b in blocks]


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "global"])
@pytest.mark.parametrize("directions", [1, 6])
def test_the_alignguard_projection_equals_a_dense_transcription(structure, directions):
    members = adapters()
    space = CoreSpace.of(members)
    data = Data.random(30)
    statistics = GainAndCost(fisher(space, data, structure))
    result = run("agl_merge", batches(space, WEIGHTS, "safe"), statistics, directions=directions)
    P, order = dense_top(space, data, structure, directions)
    utility = np.concatenate([(0.4 * deltas_of(members[0])[p] + deltas_of(members[1])[p]).ravel() for p in order])
    left = utility - P @ utility
    expected, offset = {}, 0
    for path in order:
        size = np.prod(SHAPES[path])
        expected[path] = left[offset : offset + size].reshape(SHAPES[path]) + 0.7 * deltas_of(members[2])[path]
        offset += size
    assert_equal(result, expected)
    assert not np.allclose(left, utility, atol=1e-2)


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "block", "global"])
def test_the_alignguard_projection_does_not_depend_on_order_or_gauge(structure):
    members = adapters()
    space, other = CoreSpace.of(members), CoreSpace.of([regauged(a) for a in reversed(members)])
    data = Data.random(30)
    first = run("agl_merge", batches(space, WEIGHTS, "safe"), GainAndCost(fisher(space, data, structure)), directions=4)
    second = run(
        "agl_merge", batches(other, WEIGHTS[::-1], "safe"), GainAndCost(fisher(other, data, structure)), directions=4
    )
    assert_equal(second, first, tolerance=1e-4)


def test_projecting_on_everything_leaves_the_safety_adapter():
    members = adapters()
    space = CoreSpace.of(members)
    statistics = GainAndCost(fisher(space, Data.random(30), "kfac"))
    result = run("agl_merge", batches(space, WEIGHTS, "safe"), statistics, directions=space.size)
    assert_equal(result, {p: 0.7 * deltas_of(members[2])[p] for p in SHAPES})


def test_the_alignguard_projection_refuses_what_it_cannot_do():
    space = CoreSpace.of(adapters())
    merged = batches(space, WEIGHTS, "safe")
    with pytest.raises(FisherError, match="eigenvectors of an 'ekfac' Fisher are not known"):
        run("agl_merge", merged, GainAndCost(fisher(space, Data.random(30), "ekfac")))
    with pytest.raises(InputError, match="has only 10 eigenvalues above zero"):
        run("agl_merge", merged, GainAndCost(fisher(space, Data.random(30), "global")), directions=11)
    with pytest.raises(InputError, match="'agl_merge' treats one adapter as the safety adapter"):
        run("agl_merge", batches(space, WEIGHTS), GainAndCost(fisher(space, Data.random(30), "global")))


# ---- module selection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "block", "global"])
def test_modules_are_kept_by_their_trace_ratio(structure):
    members = adapters()
    space = CoreSpace.of(members)
    gain, cost = (fisher(space, Data.random(seed), structure) for seed in (40, 41))
    traces = []
    for value in (gain, cost):
        quadratic = torch.tensor([value.quadratic(row) for row in torch.eye(space.size).double()])
        traces.append(space.layer_sums(quadratic).numpy())
    ratio = traces[0] / (traces[1] + 0.01 * traces[1].mean())
    kept = [space.layer_names[i] for i in np.argsort(-ratio)[:2]]
    expected = {
        p: 0.4 * deltas_of(members[0])[p] + deltas_of(members[1])[p] + 0.7 * (p in kept) * deltas_of(members[2])[p]
        for p in SHAPES
    }
    assert_equal(run("vila_pilot", batches(space, WEIGHTS, "safe"), GainAndCost(gain, cost), modules=0.5), expected)
    assert list(module_filter(as_diagonal(gain), as_diagonal(cost), modules=0.5).layers) == kept
    total = {p: sum(w * deltas_of(a)[p] for w, a in zip(WEIGHTS, members, strict=True)) for p in SHAPES}
    assert_equal(run("vila_pilot", batches(space, WEIGHTS, "safe"), GainAndCost(gain, cost), modules=1.0), total)


def test_every_row_is_complete():
    assert list(ROWS) == ["safe_lora", "safe_merge", "splora", "agl_merge", "vila_pilot"]
    for row in ROWS.values():
        assert row.paper.startswith("https://arxiv.org/abs/")
        assert row.formula
        assert row.needs
    assert "our own adaptation" in ROWS["agl_merge"].note
    assert "Imp(B) Imp(A)" in ROWS["vila_pilot"].note
    for name, option, value in [
        ("safe_lora", "threshold", 1.5),
        ("safe_lora", "number", 0),
        ("safe_merge", "safety_share", -0.1),
        ("splora", "prune", "both"),
        ("agl_merge", "directions", 0),
        ("vila_pilot", "modules", 0.0),
    ]:
        with pytest.raises(InputError, match=option):
            ROWS[name].resolve({option: value})
