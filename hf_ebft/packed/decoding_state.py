"""What is learned of a policy's decoding in one batch and holds for the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_ebft.packed.cuda_graphs import StepGraphs


@dataclass
class Decoding:
    """What is known of how a policy decodes, from batch to batch.

    Attributes:
        grows: why keys and values have to grow; None where they need not, or it is not known yet.
        works: whether a step against fixed places has run.
        static: whether shapes come in few sizes, see `hf_ebft.packed.decoding.StaticDecoder`;
            None: where the device is not a CPU.
        graphs: captured steps.
    """

    grows: str | None = None
    works: bool = False
    static: bool | None = None
    graphs: StepGraphs = field(default_factory=StepGraphs)
