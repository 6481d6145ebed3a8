"""The moments of a step at which a process may hold most, from bytes that come and go in it.

A step is fullest where forward ends and all that it keeps is there, where backward begins and gradients come to that,
or where it ends and all gradients are there. Slices of weights (`layouts/fully_sharded.py`) add what is gathered of
them, and what gradients lie in on their way to slices.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flow:
    """Bytes that come and go in a step.

    kept: what forward keeps of all packs under way, of which `head` is the head's gradient, that is made there. again:
    what comes to that in the backward pass of one layer. passing: what a layer holds only while processes exchange it.
    chunk: of logits, with what multiplies it. given: the head's gradient as backward hands it on. table: the gradient
    of a table of embeddings that comes to the head's, where both are one. before: gradients of earlier packs of the
    step. late: what comes to that where most gradients of activations wait for those of weights to be made of them.
    gradients: all of them, complete. summed: of those what is copied at a time to be added up over processes.
    owned: whole weights in their owners. teacher: what comes and goes while a teacher is asked.
    """

    kept: float = 0
    again: float = 0
    passing: float = 0
    chunk: float = 0
    head: float = 0
    given: float = 0
    table: float = 0
    before: float = 0
    late: float = 0
    gradients: float = 0
    summed: float = 0
    owned: float = 0
    teacher: float = 0

    def moments(self) -> dict[str, float]:
        """Bytes at each moment, beside what is always there."""
        return {
            "the end of forward": self.before + self.kept + self.chunk,
            "the loss's backward": self.before + self.kept + self.given,
            "the first layer's backward": self.before + self.kept - self.head + self.again + self.passing + self.given,
            "the end of backward": self.gradients + self.table,
            "the gradients of weights": self.before + self.kept + self.late + self.again if self.late else 0,
            **self.beside(),
        }

    def beside(self) -> dict[str, float]:
        """Those that have nothing to do with the passes through the model."""
        return {
            "the sum of gradients": self.gradients + self.summed,
            "the optimizer's step": self.gradients + self.owned,
            "the teacher's answer": self.before + self.teacher,
        }


@dataclass(frozen=True)
class Gathering:
    """Bytes of weights in slices. around: of what stands around the blocks; block: of the largest one; blocks: of all
    that stay gathered during a step. made: of the gradients of each, as backward makes them. summed: of the same on
    their way to slices. among: slices. layers: blocks. copies: how often what is on its way is there."""

    around: float
    block: float
    blocks: float
    around_made: float
    block_made: float
    around_summed: float
    block_summed: float
    among: int
    layers: int
    copies: int

    def moments(self, flow: Flow, slices: float) -> dict[str, float]:
        """As `Flow.moments`; slices: bytes of this process's slices of the gradients of blocks.

        A block's weights are there while it computes, beside those of the one that is fetched ahead; so is what the one
        before has sent of its gradients, until the next one sends.
        """
        layers, head = max(self.layers, 1), flow.given
        kept = flow.kept - flow.head
        both = self.around + (self.blocks or self.block) + self.block
        done = max(flow.before, slices)
        begun, ended = flow.before + kept + flow.passing + head, done + kept / layers + flow.passing + head
        second = begun - kept / layers + max(0, slices / layers - flow.before)
        # A layer's activations go as the gradients of its weights come.
        within = max(flow.again + self.block_summed, flow.again / 2 + self.block_summed + self.block_made)
        sending = (self.copies + 1 / self.among) * self.block_summed - self.block
        fetching = flow.again / 2 + (self.copies - 1) * self.block
        at_end = done + self.around_made + flow.table
        return {
            "the last layer's forward": flow.before + kept + flow.passing + both,
            "the end of forward": flow.before + flow.kept + flow.chunk + both - self.block,
            "the loss's backward": flow.before + flow.kept + head + both - self.block,
            "the first layer's backward": begun + both + max(flow.again / 2 + self.block_made, flow.again, fetching),
            "the second layer's backward": second + both + max(within, sending, fetching + self.block_summed),
            "the last layer's backward": ended + both - self.block + max(within, sending),
            "the last block's sum": at_end + self.around + self.block_summed,
            "the gradients of weights": flow.before + flow.kept + flow.late + self._late(flow) if flow.late else 0,
            "the sum of what is around": max(at_end + self.around_summed, done + self.around_summed * self._sent),
            **flow.beside(),
        }

    def _late(self, flow: Flow) -> float:
        """What comes to gradients that wait, as those of a block or of what is around are made of them."""
        around = self.around + self.around_made + self.around_summed * self._sent
        return max(flow.again + self.block + self.block_made, around * bool(self.around_made))

    @property
    def buffers(self) -> float:
        """What gradients lie in on their way to slices."""
        return max(self.block_summed + self.block_made, self.around_summed * self._sent)

    @property
    def _sent(self) -> float:
        return self.copies + 1 / self.among
