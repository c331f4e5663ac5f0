"""Chooses the attention implementation for packed rows, from facts on which all processes agree.

No code here touches a model: the input is a set of facts, the output a choice with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.masks import SPLIT

# Head widths that flex_attention's kernels accept. torch's tiles for wider heads (at 512, in
# bfloat16: 64 queries, and three times 32 keys and values) need 256 KiB of shared memory, and an
# H100 has 227.
LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 256
# Values of the setting `packed_attention` -> transformers' names, where the two differ.
NAMED = {"split": SPLIT, "flex_attention": FLEX}


@dataclass(frozen=True)
class AttentionFacts:
    """The facts about a model and a machine that decide which attention packed rows use.

    Attributes:
        device: type of the device on which the model will compute ("cuda", "cpu", ...). It may
            differ from where the weights are now: processes other than the main one may have no
            weights yet.
        before: the implementation that the model was loaded with.
        supports_sdpa: whether the model's code supports sdpa.
        takes_flex: whether the model's code is known to work with flex_attention.
        head_dim: smallest width of its heads.
        widest_head: largest width of its heads.
        dropout: dropout rate of its attention in training; 0 for a network that is not trained.
        trains: whether it is trained.
        has_triton: whether Triton is installed, in which flex_attention's kernels are written.
        compiles: whether TorchDynamo compiles its layers.
    """

    device: str
    before: str
    supports_sdpa: bool
    takes_flex: bool
    head_dim: int
    widest_head: int
    dropout: float
    trains: bool
    has_triton: bool
    compiles: bool

    @property
    def why_not_flex(self) -> str | None:
        """Why the model cannot use flex_attention; None if it can."""
        if not self.takes_flex:
            return "its code is not known to work with flex_attention"
        if self.dropout > 0:
            return (
                f"its attention has dropout {self.dropout:g}, which flex_attention does not support"
            )
        if self.device == "cpu":
            return "flex_attention cannot train on a CPU" if self.trains else None
        if self.head_dim < LEAST_HEAD_DIM:
            return (
                f"its heads are {self.head_dim} wide, and flex_attention needs at least "
                f"{LEAST_HEAD_DIM}"
            )
        if self.widest_head > MOST_HEAD_DIM:
            return (
                f"its widest heads are {self.widest_head} wide, and flex_attention's kernels take "
                f"at most {MOST_HEAD_DIM}"
            )
        return None if self.has_triton else "flex_attention needs Triton, which is not installed"


@dataclass(frozen=True)
class AttentionChoice:
    """The implementations to try, in order.

    Attributes:
        candidates: implementations by transformers' names. The first one that the model can be
            switched to is used.
        reason: why flex_attention is not a candidate on a device where it is preferred; None: it is
            a candidate, or it is not preferred.
    """

    candidates: tuple[str, ...]
    reason: str | None = None


def choose_attention(choice: str, facts: AttentionFacts) -> AttentionChoice:
    """Turn the setting `packed_attention` into implementations to try.

    - "auto" on CUDA: flex_attention if the model can use it, otherwise sdpa with a dense mask.
      flex_attention's kernels read only the visible keys, in one launch.
    - "auto" elsewhere: split attention. If layers are compiled, sdpa with a dense mask, because
      TorchDynamo cannot trace the object that split attention passes through the model.
    - "auto" for a model that supports sdpa but was loaded with eager attention: eager.

    Args:
        choice: "auto", "split", "sdpa", "eager" or "flex_attention".
        facts: facts about the model and the machine.

    Raises:
        ValueError: `choice` is "flex_attention", and the model cannot use it.
    """
    if choice == "flex_attention" and (reason := facts.why_not_flex):
        raise ValueError(
            f"packed_attention='flex_attention' does not work for this model: {reason}. Use "
            "'auto', which chooses an attention that works."
        )
    if choice != "auto":
        return AttentionChoice((NAMED.get(choice, choice),))
    dense = ("sdpa", "eager")
    if facts.before == "eager" and facts.supports_sdpa:
        return AttentionChoice(("eager", "sdpa"))
    if facts.before == "eager":
        dense = ("eager", "sdpa")
    if facts.device == "cuda":
        if facts.why_not_flex is None:
            return AttentionChoice((FLEX, *dense))
        return AttentionChoice(dense, facts.why_not_flex)
    return AttentionChoice(dense if facts.compiles else (SPLIT, *dense))
