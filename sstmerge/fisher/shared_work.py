"""What surrounds the loop over batches: this process's share, checkpoints, signals, the other processes, the sum of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic

from torch import Tensor

from sstmerge.errors import PeerError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.checkpoint import Checkpoint
from sstmerge.fisher.distributed import Ranks
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.interruption import held_back, interrupted_by
from sstmerge.fisher.partial_sums import PairwiseSum, Part
from sstmerge.fisher.work import Collected, Item, SumsT, sequences_of, share


class SharedWork(Generic[SumsT]):
    """One process's part of a collection.

    Args:
        items: All items of the collection.
        batches: The batches.
        new_accumulator: Makes an empty accumulator.
        ranks: The processes.
        checkpoint: Where to save and to go on from, if anywhere.
        configuration: All that decides the result, by name; JSON. Asked for only where it is compared.

    Attributes:
        items: This process's items.
        collected: What it has collected.
    """

    def __init__(
        self,
        items: Sequence[Item],
        batches: Sequence[Batch],
        new_accumulator: Callable[[], SumsT],
        *,
        ranks: Ranks,
        checkpoint: Checkpoint | None,
        configuration: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._ranks, self._checkpoint, self._batches = ranks, checkpoint, batches
        begun: dict[int, Part] = {}
        done: frozenset[int] = frozenset()
        if checkpoint is not None or ranks.size > 1:
            described = configuration()
            ranks.require_same(described)
            if checkpoint is not None:
                checkpoint.begin(described, ranks)
                done = checkpoint.done
        own = share(items, batches, done, ranks.rank, ranks.size)
        self.items = own
        if checkpoint is not None:
            begun = {leaf: checkpoint.unfinished(leaf) for leaf in {i.leaf for i in own} if checkpoint.begun(leaf)}
            self.items = [item for item in own if item.place >= checkpoint.begun(item.leaf)]
        self.collected = Collected(new_accumulator, begun)
        self._total = sequences_of(items, batches)
        self._before = sequences_of((item for item in items if item.leaf in done), batches)
        self._count = ranks.counter()
        self._count(sequences_of(own, batches) - sequences_of(self.items, batches))

    def signals_held_back(self) -> AbstractContextManager[Callable[[], int | None]]:
        """Return a context in which signals wait for the end of a batch, if there is a checkpoint to save then."""
        return nullcontext(lambda: None) if self._checkpoint is None else held_back()

    def items_in_turn(
        self, signalled: Callable[[], int | None], progress: Callable[[int, int], None] | None
    ) -> Iterator[Item]:
        """Yield this process's items; whoever asks for the next one has added the one before.

        Args:
            signalled: Returns the signal that came, or None.
            progress: Called with the numbers of sequences done and in all.

        Yields:
            The items.
        """
        for item in self.items:
            yield item
            self._after_batch(signalled())
            done = self._count(len(self._batches[item.batch].index))
            if progress is not None:
                progress(self._before + done, self._total)
        if self.items:
            self._save()  # other processes, or what follows this collection, may fail yet

    def total(self, progress: Callable[[int, int], None] | None) -> tuple[dict[str, Tensor], Counts]:
        """Return the statistics and counts of all processes and all starts, to every process.

        Args:
            progress: Told that everything is done when the last process is.
        """
        own, tensors = dict(self.collected.sum.nodes), dict[str, Tensor]()
        if self._checkpoint is not None:
            own |= self._checkpoint.earlier()
        for (level, index), part in own.items():
            tensors |= part.to_tensors(f"{level}.{index}/")
        everything = PairwiseSum()
        for received in self._ranks.gather(tensors):
            for node in sorted({name.split("/")[0] for name in received}):
                level, index = map(int, node.split("."))
                everything.add((level, index), Part.from_tensors(received, f"{node}/"))
        if self._ranks.size == 1:
            whole = everything.total()
            return whole.statistics(), whole.counts
        whole_tensors = {}
        if self._ranks.first:
            whole = everything.total()
            whole_tensors = Part(whole.statistics(), whole.counts).to_tensors("")
        whole = Part.from_tensors(self._ranks.broadcast(whole_tensors), "")
        if progress is not None:
            progress(self._total, self._total)
        return whole.sums, whole.counts

    def _after_batch(self, signal: int | None) -> None:
        try:
            self._ranks.check()
        except PeerError:
            self._save()
            raise
        if signal is not None or (self._checkpoint is not None and self._checkpoint.due()):
            self._save()
        if signal is not None:
            raise interrupted_by(signal)

    def _save(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.save(self.collected)
