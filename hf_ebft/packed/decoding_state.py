"""The state of a policy's decoding that is kept from batch to batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_ebft.packed.cuda_graphs import StepGraphs


@dataclass
class Decoding:
    """How a policy decodes, as far as earlier batches have shown.

    Attributes:
        grows: why the cache has to grow; None: it does not have to, or this is not known yet.
        works: whether a step with a static cache has run.
        static: whether shapes are padded to few sizes, see
            `hf_ebft.packed.decoding.StaticDecoder`; None: on all devices except a CPU.
        graphs: captured steps.
    """

    grows: str | None = None
    works: bool = False
    static: bool | None = None
    graphs: StepGraphs = field(default_factory=StepGraphs)
