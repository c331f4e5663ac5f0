"""Features of whole sequences, prompt + completion, from the frozen feature network.

Dimension letters: N sequences, B rows of one pass, L tokens of a row, T positions read in a row, H
hidden width, F = layers * H, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import gather
from torch import Tensor, nn

from hf_ebft.config import EmbedMethod, FeatureNormalization
from hf_ebft.feature_network.network import FrozenNetwork
from hf_ebft.objective.features import normalize_layers, pool, token_positions
from hf_ebft.packed.fsdp import is_sharded
from hf_ebft.packed.model_parts import bare_model
from hf_ebft.packed.supported import sequence_limit


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and a completion, sampled or true, as token ids.

    Attributes:
        prompt_ids: token ids of the prompt.
        completion_ids: token ids of the completion.
        not_averaged: positions in the completion that `completion_mean` leaves out, since they are
            not the policy's (messages of the user between replies).
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    not_averaged: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


class SequenceFeatureNetwork(FrozenNetwork):
    """A `FrozenNetwork` that embeds sequences.

    The embedding of a sequence is that of a plain forward pass over the sequence alone: rows are
    padded on the right, where a causal model never looks, and positions count from the first token.

    Args:
        model, feature_layers, normalization, shared: see `FrozenNetwork`.
        embed_method: `last_token` takes the last token of the completion: the end-of-sequence
            token, or the last token before the limit if the completion was cut.
            `completion_mean` averages the completion's tokens, `mean_pooling` also the prompt's,
            `concat` joins the tokens at 25, 50 and 75 % of the whole.
        batch_tokens: largest number of tokens, including padding, of one forward pass.
        autocast: a context for the forward passes.

    Raises:
        ValueError: the model reads in both directions.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        feature_layers: Sequence[float],
        embed_method: EmbedMethod,
        normalization: FeatureNormalization,
        batch_tokens: int,
        shared: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        _refuse_bidirectional(model)
        super().__init__(
            model, feature_layers=feature_layers, normalization=normalization, shared=shared
        )
        self.embed_method = embed_method
        self.batch_tokens = batch_tokens
        self.autocast = autocast
        self.limit = sequence_limit(model)

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids that the network can read."""
        embedding = cast(nn.Embedding, bare_model(self.model).get_input_embeddings())
        return embedding.num_embeddings

    def embed(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Embed sequences; equal sequences are read once and get the same embedding, to the bit.

        Under FSDP2 every process must call this together.

        Args:
            sequences: N of them, each with at least one completion token.

        Returns:
            (N, D) float32, on the network's device.

        Raises:
            ValueError: a completion is empty, or a sequence is too long for the network.
            FloatingPointError: features are not finite.
        """
        if any(not sequence.completion_ids for sequence in sequences):
            raise ValueError(
                "A completion has no tokens and so no features. A finished completion contains at "
                "least its end-of-sequence token: the rollout function must return it, too."
            )
        distinct = sorted(set(sequences), key=len)
        refuse_longer(len(distinct[-1]), self.limit, "A prompt with its completion")
        batches = _batches(distinct, self.batch_tokens)
        with self._reading(), self.autocast():
            embedded = [self._embed_batch(batch) for batch in self._in_step(batches)]
        place = {sequence: index for index, sequence in enumerate(distinct)}
        # Dummy passes keep the processes in step; their results are discarded.
        rows = torch.tensor([place[sequence] for sequence in sequences], device=self.device)
        features = torch.cat(embedded)[rows]
        if not bool(torch.isfinite(features).all()):
            raise FloatingPointError(
                "The feature network computes features that are not finite; if it is in float16, "
                "load it in bfloat16 or float32 (feature_dtype)."
            )
        return features

    def _in_step(self, batches: list[list[TokenSequence]]) -> list[list[TokenSequence]]:
        """The batches; under FSDP2, all processes get as many as the one with the most."""
        if not is_sharded(self.model):
            return batches
        most = int(gather(torch.tensor([len(batches)], device=self.device)).max())
        return batches + [batches[0]] * (most - len(batches))

    def _embed_batch(self, batch: list[TokenSequence]) -> Tensor:
        """(B, D) float32."""
        width = max(len(sequence) for sequence in batch)
        input_ids_BL = torch.zeros(len(batch), width, dtype=torch.long)
        attends_BL = torch.zeros(len(batch), width, dtype=torch.long)
        for row, sequence in enumerate(batch):
            tokens = torch.tensor(sequence.prompt_ids + sequence.completion_ids)
            input_ids_BL[row, : len(tokens)] = tokens
            attends_BL[row, : len(tokens)] = 1
        places = [_places(sequence, self.embed_method) for sequence in batch]
        most = max(len(read) for read in places)
        places_BT = torch.tensor([read + [0] * (most - len(read)) for read in places])
        read_BT = torch.tensor(
            [[True] * len(read) + [False] * (most - len(read)) for read in places]
        )

        device = self.device
        hidden = self._read_layers(
            lambda: self._forward(input_ids_BL.to(device), attends_BL.to(device)),
            places_BT.to(device),
            to_the_end=is_sharded(self.model),
        )
        features_BTF = normalize_layers(hidden, self.normalization)
        if self.embed_method in ("last_token", "concat"):
            return pool(features_BTF, self.embed_method)
        read_BT = read_BT.to(device)
        summed_BF = (features_BTF * read_BT[..., None]).sum(dim=1)
        return summed_BF / read_BT.sum(dim=1, keepdim=True)

    def _forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        # FSDP2 requires every pass to go through its root.
        (self.model if is_sharded(self.model) else self.backbone)(**arguments)


def refuse_longer(tokens: int, limit: tuple[int, str] | None, what: str) -> None:
    """Raise if a row is too long for a model, or if its result would depend on its batch.

    Args:
        tokens: number of tokens of the row.
        limit: the model's limit, from `hf_ebft.packed.supported.sequence_limit`.
        what: name of the row, for the message.

    Raises:
        ValueError: with the reason and what to shorten.
    """
    if limit is not None and tokens > limit[0]:
        raise ValueError(
            f"{what} has {tokens} tokens, but {limit[1]} beyond {limit[0]} tokens. Filter out "
            "longer prompts and ground truths, or lower max_completion_length."
        )


def _places(sequence: TokenSequence, embed_method: EmbedMethod) -> list[int]:
    """Positions of the tokens that the pooling reads."""
    if embed_method == "completion_mean":
        start, length = len(sequence.prompt_ids), len(sequence.completion_ids)
        return [start + place for place in range(length) if place not in sequence.not_averaged]
    return token_positions(embed_method, len(sequence))


def _batches(by_length: list[TokenSequence], batch_tokens: int) -> list[list[TokenSequence]]:
    """Batches of sequences of similar length, of at most `batch_tokens` tokens when padded."""
    batches: list[list[TokenSequence]] = []
    for sequence in by_length:
        if batches and (len(batches[-1]) + 1) * len(sequence) <= batch_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


def _refuse_bidirectional(model: nn.Module) -> None:
    config = bare_model(model).config
    if config.is_encoder_decoder or getattr(config, "is_causal", True) is False:
        raise ValueError(
            f"{type(bare_model(model)).__name__} is not a causal language model: features of a "
            "token would depend on later tokens and on padding. Choose a causal model."
        )
