"""Which attention runs packed rows: decided from facts that every process agrees on.

Nothing here touches a model: facts go in, a decision with its reason comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_ebft.packed.flex import FLEX
from hf_ebft.packed.masks import SPLIT

# Widths of heads that flex_attention's kernels take. torch's tiles for wider ones (at 512, in
# bfloat16: 64 queries, and three times 32 keys and values) need 256 KiB of shared memory, and an
# H100 has 227.
LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 256
# By the names of `packed_attention`.
NAMED = {"split": SPLIT, "flex_attention": FLEX}


@dataclass(frozen=True)
class AttentionFacts:
    """What decides how a model attends on packed rows.

    Attributes:
        device: type of the device on which it will compute ("cuda", "cpu", ...), wherever its
            weights are now: other processes than the main one may hold none yet.
        before: the implementation that it was loaded with.
        supports_sdpa: whether its code takes sdpa.
        takes_flex: whether its code is known to work with flex_attention.
        head_dim: least width of its heads.
        widest_head: largest width of its heads.
        dropout: of its attention in training; 0 for a network that is not trained.
        trains: whether it is trained.
        has_triton: whether Triton is installed, which flex_attention's kernels are written in.
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
        """Why flex_attention cannot serve; None if it can."""
        if not self.takes_flex:
            return "its code is not known to work with flex_attention"
        if self.dropout > 0:
            return f"flex_attention knows no dropout, and its attention has {self.dropout:g}"
        if self.device == "cpu":
            return "flex_attention cannot train on a CPU" if self.trains else None
        if self.head_dim < LEAST_HEAD_DIM:
            return (
                f"its heads are {self.head_dim} wide, and flex_attention needs {LEAST_HEAD_DIM} or "
                "more"
            )
        if self.widest_head > MOST_HEAD_DIM:
            return (
                f"its widest heads are {self.widest_head} wide, and flex_attention's kernels take "
                f"at most {MOST_HEAD_DIM}"
            )
        return None if self.has_triton else "flex_attention needs Triton, which is not installed"


@dataclass(frozen=True)
class AttentionChoice:
    """What to try, in this order, by transformers' names.

    Attributes:
        candidates: implementations; the model's own code has the last word.
        reason: why flex_attention is not among them although it would be the choice; None if there
            is nothing to say.
    """

    candidates: tuple[str, ...]
    reason: str | None = None


def choose_attention(choice: str, facts: AttentionFacts) -> AttentionChoice:
    """What `packed_attention` means for a model.

    - "auto" on CUDA: flex_attention where it can serve, else a dense mask by sdpa. Its kernels read
      only what is visible, in one launch.
    - "auto" elsewhere: split attention, or a dense mask where layers are compiled, since
      TorchDynamo cannot carry what split attention hands through the model.
    - "auto" for a model that was loaded with eager attention although it has sdpa: eager.

    Args:
        choice: "auto", "split", "sdpa", "eager" or "flex_attention".
        facts: about model and machine.

    Raises:
        ValueError: flex_attention was asked for and cannot serve.
    """
    if choice == "flex_attention" and (reason := facts.why_not_flex):
        raise ValueError(
            f"packed_attention='flex_attention' cannot serve this model: {reason}. Use 'auto', "
            "which takes what can."
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
