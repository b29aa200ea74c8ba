"""What the experiments share: the model, the kept stages, adapters and Fishers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure
from prompts import DataSets, Prompts, Sizes, draw_prompts
from safetensors.torch import save_file
from stages import Stages, digest, file_digest, versions

from sstmerge.adapters import Adapter, CoreSpace, load_adapter
from sstmerge.atomic import atomic_file
from sstmerge.demo.train_adapters import ALL_LINEAR, Recipe, fit_adapter
from sstmerge.errors import DataError, FisherError, SSTMergeError
from sstmerge.fisher import Fisher, collect_fisher
from sstmerge.merging.methods.aligned_pair import AlignedPair
from sstmerge.pipeline.calibration import CollectionOptions, batches_of, collect_pair, refused
from sstmerge.pipeline.evaluate import write_json
from sstmerge.pipeline.models import load_model, load_tokenizer
from sstmerge.prompts import Example, encode

sys.path.append(str(Path(__file__).parents[1]))  # what all benchmarks share
from measuring import machine

ALL = "all"  # the methods
SAME_AS_TASK_ARITHMETIC = ("cat",)  # the exact sum, written in another way
ROLES = ("utility", "safety")
LONGEST = 256  # tokens of a training sequence
PAIR = ("gain", "cost")
OWN_FISHER = "own-fisher-"  # how the stages' names begin
Folders = Mapping[str, Path]


@dataclass(frozen=True)
class Training:
    """How the utility and the safety adapter of an experiment are trained.

    Attributes:
        epochs: Passes over the utility adapter's rows.
        safety_epochs: Passes over the safety adapter's rows.
        learned_tokens: Response tokens that the safety adapter learns; None for all.
        learning_rate: Peak learning rate of both.
        safety: "mixed": refusals and as many ordinary answers; or "refusal-only".
    """

    epochs: int = 2
    safety_epochs: int = 2
    learned_tokens: int | None = None
    learning_rate: float = 7e-4
    safety: str = "mixed"

    def sequences(self, sizes: Sizes, tasks: int) -> int:
        """Return how many sequences the training sees."""
        return 2 * sizes.safety * self.safety_epochs + tasks * sizes.utility * self.epochs


FULL_TRAINING = Training()
SHORT_TRAINING = Training(safety_epochs=1, learned_tokens=32)


class Workbench:
    """A model with the stages that are kept for it.

    Attributes:
        model: The base model.
        tokenizer: Its tokenizer.
        data: The data sets.
        model_key: What tells the model from others: hashes of its weight files, or its hub id.
        stages: The stages.
    """

    def __init__(self, model: str, data: DataSets, out: Path, say: Callable[[str], None]) -> None:
        self._name, self.data, self._say = model, data, say
        self.stages = Stages(out / "stages", say)
        self.tokenizer, self.model = load_tokenizer(model), load_model(model)
        weights = sorted(Path(model).glob("*.safetensors"))
        self.model_key = {path.name: file_digest(path) for path in weights} if weights else {"hub": model}

    def prompts(self, tasks: Sequence[str], sizes: Sizes, seed: int) -> Prompts:
        """Draw the prompts of a seed."""
        return draw_prompts(self.data, tasks, sizes, seed)

    def train(
        self,
        role: str,
        rows: list[Example],
        seed: int,
        *,
        epochs: int,
        learning_rate: float,
        response_tokens: int | None = None,
    ) -> Path:
        """Train the adapter of a role on the first tokens of the responses; its directory is the folder's `role`."""
        recipe = Recipe(role, (), 8, 16, ALL_LINEAR, learning_rate=learning_rate, epochs=epochs)

        def compute(folder: Path) -> None:
            encoded = encode(rows, self.tokenizer, max_length=LONGEST, response_tokens=response_tokens)
            padding = self.tokenizer.pad_token_id
            model = load_model(self._name)
            # On a CPU the backward pass of the fused bfloat16 attention alone costs a fifth of a step.
            model.set_attn_implementation("eager")
            fit_adapter(model, encoded, recipe, folder, pad_token_id=padding, seed=seed, overwrite=True)

        inputs = {"model": self.model_key, "recipe": asdict(recipe), "rows": rows_key(rows), "seed": seed}
        if response_tokens is not None:
            inputs["response_tokens"] = response_tokens
        return self.stages.run(f"adapter-{role}", inputs, compute)

    def train_roles(self, prompts: Prompts, training: Training, seed: int) -> dict[str, Path]:
        """Train the utility and the safety adapter."""
        rate = training.learning_rate
        learned = prompts.safety if training.safety == "mixed" else prompts.refusals
        return {
            "utility": self.train("utility", prompts.utility, seed, epochs=training.epochs, learning_rate=rate),
            "safety": self.train(
                "safety",
                learned,
                seed,
                epochs=training.safety_epochs,
                learning_rate=rate,
                response_tokens=training.learned_tokens,
            ),
        }

    def adapters(self, folders: Folders) -> dict[str, Adapter]:
        """Load the adapters that `train` wrote."""
        return {role: load_adapter(folder / role, name=role) for role, folder in folders.items()}

    @contextmanager
    def aligned_pair(self, adapters: Mapping[str, Adapter]) -> Iterator[AlignedPair]:
        """Open the model and what the safety adapter makes of it, as the two checkpoints that SafeLoRA's family compares.

        The safety adapter is what aligns the model here. The files, in float32, are gone afterwards.

        Args:
            adapters: Adapters by role.

        Yields:
            The pair.
        """
        modules = dict(self.model.named_modules())
        layers = dict.fromkeys(layer for adapter in adapters.values() for layer in adapter.layers)
        base = {f"{layer}.weight": modules[layer].weight.detach().float().cpu() for layer in layers}
        aligned = dict(base)
        for layer, factors in adapters["safety"].layers.items():
            aligned[f"{layer}.weight"] = (base[f"{layer}.weight"] + factors.delta()).float()
        with TemporaryDirectory() as folder:
            files = Path(folder) / "aligned.safetensors", Path(folder) / "base.safetensors"
            save_file(aligned, files[0])
            save_file(base, files[1])
            yield AlignedPair(*files, list(adapters.values()))

    def pair(
        self, gain: list[Example], cost: list[Example], options: CollectionOptions, space: CoreSpace, folders: Folders
    ) -> tuple[Fisher, Fisher]:
        """Collect F_gain and F_cost, or load them."""

        def compute(folder: Path) -> None:
            batches = [batches_of(self.model, self.tokenizer, rows, options) for rows in (gain, cost)]
            for name, fisher in zip(PAIR, collect_pair(self.model, space, *batches, options), strict=True):
                fisher.save(folder / f"{name}.safetensors")

        inputs = {
            "options": _described(options),
            "gain": rows_key(gain),
            "cost": rows_key(cost),
            "adapters": stage_names(folders),
        }
        folder = self.stages.run(f"fishers-{options.structure}", inputs, compute)
        gain_fisher, cost_fisher = (_kept(folder, name, space) for name in PAIR)
        return gain_fisher, cost_fisher

    def refusal_fisher(
        self, gain: list[Example], benign: list[Example], options: CollectionOptions, space: CoreSpace, folders: Folders
    ) -> Fisher:
        """Collect the empirical Fisher of the refusals as responses to benign prompts, or load it."""
        rows = refused(benign, gain, options)

        def compute(folder: Path) -> None:
            batches = batches_of(self.model, self.tokenizer, rows, options)
            collect_fisher(
                self.model,
                batches,
                space,
                structure=options.structure,
                labels="data",
                reference=options.reference,
                seed=options.seed,
                metadata={"response_tokens": options.response_tokens},
            ).save(folder / "refusals.safetensors")

        inputs = {
            "options": _described(options),
            "weight": options.refusal_weight * options.draws,
            "rows": rows_key(rows),
            "adapters": stage_names(folders),
        }
        folder = self.stages.run(f"refusal-fisher-{options.structure}", inputs, compute)
        return _kept(folder, "refusals", space)

    def fisher_stages(self, beginnings: str | tuple[str, ...], folders: Folders) -> list[str]:
        """Return the names of the stages of Fishers of these adapters that were asked for, by how the names begin."""
        names, records = stage_names(folders), self.stages.records
        return [
            name for name in records if name.startswith(beginnings) and records[name]["inputs"]["adapters"] == names
        ]

    def own_fisher(
        self,
        role: str,
        rows: list[Example],
        structure: str,
        space: CoreSpace,
        folders: Folders,
        seed: int,
        *,
        reference: str | None = None,
    ) -> Fisher:
        """Collect the Fisher of an adapter's own data, at the adapter itself or at a reference, or load it."""

        def compute(folder: Path) -> None:
            batches = batches_of(self.model, self.tokenizer, rows, CollectionOptions(max_length=LONGEST))
            collect_fisher(
                self.model,
                batches,
                space,
                structure=structure,
                labels="sampled",
                reference=reference or role,
                seed=seed,
            ).save(folder / "own.safetensors")

        inputs = {
            "structure": structure,
            "rows": rows_key(rows),
            "adapters": stage_names(folders),
            "reference": reference or role,
            "seed": seed,
        }
        folder = self.stages.run(OWN_FISHER + role, inputs, compute)
        return _kept(folder, "own", space)

    def manifest(self, experiment: str, config: Any, **more: Any) -> dict[str, Any]:
        """Return what made a result: model, options, machine, versions and stages."""
        if others := self.stages.of_other_source:
            self._say(
                f"{len(others)} of {len(self.stages.records)} stages were computed by other source code than today's; the "
                "manifest lists them. Delete those that the change concerns, and run again."
            )
        return {
            "experiment": experiment,
            "model": self.model_key,
            "config": asdict(config),
            "machine": machine(self.model.device),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            **more,
            "stages of other source code": self.stages.of_other_source,
            "stages": self.stages.records,
        }

    def seconds_per_row(self, rows: list[Example]) -> float:
        """Return the seconds of a forward pass per sequence, measured on these rows after a warm-up."""
        batches = batches_of(self.model, self.tokenizer, rows, CollectionOptions(max_length=LONGEST))
        elapsed = 0.0
        for _ in range(2):
            started = time.perf_counter()
            with torch.no_grad():
                for batch in batches:
                    self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            elapsed = time.perf_counter() - started
        return elapsed / len(rows)


def _kept(folder: Path, name: str, space: CoreSpace) -> Fisher:
    """Load a stage's Fisher; refuse one in other bases than the space's, whose coordinates would mean something else."""
    try:
        return Fisher.load(folder / f"{name}.safetensors", space.adapters).in_space(space)
    except FisherError as error:
        raise DataError(
            f"The Fisher that is kept in '{folder}' does not fit the adapters' space (was it computed by other code or on "
            f"another machine?); delete that folder and run again. {error}"
        ) from error


def _described(options: CollectionOptions) -> dict[str, Any]:
    """Return all options but the weight of refusals, whose Fisher is a stage of its own."""
    return {name: value for name, value in asdict(options).items() if name != "refusal_weight"}


def rows_key(rows: Sequence[Example]) -> str:
    """Return a hash of prompts and responses."""
    return digest([[list(row.messages), row.response] for row in rows])


def stage_names(folders: Folders) -> dict[str, str]:
    """Return the names of stages' folders, which hold the hashes of what they depend on."""
    return {role: folder.name for role, folder in folders.items()}


def write_outputs(
    folder: Path, names: tuple[str, str, str], numbers: Mapping[str, Any], figure: Figure, page: Sequence[str]
) -> None:
    """Write numbers, picture and page of one run: all three are there before the first takes the place of an older one.

    Args:
        folder: Folder to write into.
        names: Names of the JSON file, the PNG picture and the Markdown page.
        numbers: The numbers.
        figure: The picture.
        page: Lines of the page.
    """
    with ExitStack() as files:
        json_file, png, markdown = (files.enter_context(atomic_file(folder / name)) for name in names)
        write_json(numbers, json_file)
        figure.savefig(png, dpi=150, format="png")
        markdown.write_text("\n".join(page) + "\n", encoding="utf-8")


def common_arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of what every experiment takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="base model: directory or hub id")
    parser.add_argument("--data", type=Path, help="folder with the data sets' files (default: from the hub)")
    parser.add_argument(
        "--missing-from-hub", action="store_true", help="fetch the data sets that the folder does not hold from the hub"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for stages and report")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed and few prompts: proves the way, no more")
    size.add_argument("--short", action="store_true", help="three seeds, fewer prompts, methods and scales: some hours")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: those of the configuration)")
    parser.add_argument("--estimate-only", action="store_true", help="say how long it would take, and stop")
    return parser


def chosen_methods(methods: Sequence[str] | None, offered: Sequence[str]) -> list[str]:
    """Return the methods that a configuration names.

    Args:
        methods: Names, ("all",) or None for all.
        offered: What the experiment can run.

    Returns:
        The names, in the order of those offered.

    Raises:
        DataError: A name is not among them.
    """
    if methods is None or tuple(methods) == (ALL,):
        return list(offered)
    if unknown := sorted({*methods} - {*offered}):
        raise DataError(f"This experiment has no methods {unknown}; expected '{ALL}' or some of {list(offered)}.")
    return [name for name in offered if name in methods]


def data_sets(arguments: argparse.Namespace) -> DataSets:
    """Return the data sets that the command line names."""
    return DataSets(arguments.data, arguments.missing_from_hub)


def stopwatch() -> Callable[[str], None]:
    """Return a function that prints a line with the seconds since now."""
    started = time.perf_counter()

    def say(words: str) -> None:
        print(f"{time.perf_counter() - started:7.0f} s  {words}", flush=True)

    return say


def in_words(run: Callable[[], None]) -> None:
    """Run, and end with the sentence of an expected error instead of a traceback."""
    try:
        run()
    except SSTMergeError as error:
        raise SystemExit(str(error)) from error
