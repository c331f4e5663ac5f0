"""phi, the frozen feature network, and its forward pass over packed rows.

It needs no head and no layer above the highest feature layer, and keeps hidden states only at the
positions that the pooling reads. `FrozenNetwork` has everything that does not depend on the shape
of the rows; structured mode uses it, too.

Dimension letters: B rows, R packed row, P places kept, m layers, H hidden width, T token positions
that the pooling reads, F = m * H, D embedding width, V vocabulary, J lengths of rollouts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_ebft.config import EmbedMethod, FeatureNormalization
from hf_ebft.feature_network.shared_base import adapters_off
from hf_ebft.objective.duplicates import first_equal_rollouts, with_equal_features
from hf_ebft.objective.features import normalize_layers, pool, token_positions
from hf_ebft.packed.compiled_layers import CompileOptions
from hf_ebft.packed.forward import PackedForward, evaluation_mode, states_in
from hf_ebft.packed.fsdp import is_sharded
from hf_ebft.packed.model_parts import (
    backbone,
    cache_argument,
    decoder_layers,
    keeping_every_state,
    vocabulary_size,
)
from hf_ebft.packed.sampling import Rollouts
from hf_ebft.packed.targets import TokenLogProbs
from hf_ebft.rows.chunks import block_chunks, tokens_without_gradient
from hf_ebft.rows.documents import Documents
from hf_ebft.rows.layout import PackedLayout, PackedPart

# Number of tokens that are embedded at once in `token_features`, each as its own document.
TABLE_ROWS = 1024


class _TopLayerReached(Exception):
    """Ends a forward pass after the highest layer whose hidden states are wanted."""


@dataclass(frozen=True)
class FeaturePass:
    """The results of the feature network for a batch.

    Attributes:
        generated: (B, n, K, D) float32 embeddings of the rollouts.
        ground_truth: (B, K, D) float32 embeddings of the windows; zero for missing blocks.
        reference_log_probs: (B, n, K, G) float32 log-probabilities of the rollout tokens, or None.
        states: (B, n, K, G, r) float32, features of the token before each rollout token, projected
            on a given basis, or None.
    """

    generated: Tensor
    ground_truth: Tensor
    reference_log_probs: Tensor | None
    states: Tensor | None = None


class FrozenNetwork:
    """A frozen causal language model whose hidden states can be read at chosen places.

    It is deliberately not an `nn.Module`: a trainer that has one as an attribute does not wrap,
    optimize or save it.

    Args:
        model: the network. It is put into evaluation mode and frozen, in place, unless it is
            shared.
        feature_layers: fractions of depth; layer index `int(fraction * L)` into transformers'
            `hidden_states` (0 is the embedding output, L the last one, after the final norm).
        normalization: see `hf_ebft.objective.features.normalize_layers`.
        shared: whether `model` is the policy, a PEFT model whose base serves as the network. It is
            then not changed, and runs with its adapters switched off.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        feature_layers: Sequence[float],
        normalization: FeatureNormalization,
        shared: bool = False,
    ) -> None:
        self.model = model if shared else model.eval().requires_grad_(False)
        self.backbone = backbone(model)
        self.layers = decoder_layers(model)
        self.layer_indices = [int(fraction * len(self.layers)) for fraction in feature_layers]
        self.normalization = normalization
        self.shared = shared

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Switch off gradients; run a shared policy without adapters, and restore it afterwards."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self.shared:
                stack.enter_context(evaluation_mode(self.model))
                stack.enter_context(adapters_off(self.model))
            yield

    def _read_layers(
        self, run: Callable[[], Any], places: Tensor, *, to_the_end: bool
    ) -> list[Tensor]:
        """Hidden states (B, P, H) of every feature layer at `places` (B, P) of a forward pass.

        Args:
            run: makes the forward pass over B rows.
            places: (B, P) int64.
            to_the_end: whether the pass must go on after the highest feature layer.
        """
        rows = torch.arange(places.shape[0], device=places.device)[:, None]
        kept: dict[int, Tensor] = {}
        stop_early = not to_the_end and len(self.layers) not in self.layer_indices
        with (
            self._capture(kept, rows, places, stop_early=stop_early),
            contextlib.suppress(_TopLayerReached),
        ):
            run()
        return [kept[index] for index in self.layer_indices]

    @contextlib.contextmanager
    def _capture(
        self, kept: dict[int, Tensor], rows: Tensor, places: Tensor, *, stop_early: bool
    ) -> Iterator[None]:
        """Keep the wanted hidden states at `places` by hooks; with `stop_early`, end the pass then.

        Hooks on the layers get the same values as transformers' `hidden_states`. The last entry of
        those is taken after the final norm, so it is read from the backbone's output.
        """
        n_layers, top = len(self.layers), max(self.layer_indices)

        def keep(index: int, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if index in self.layer_indices:
                kept[index] = state[rows, places]
            if stop_early and index == top:
                raise _TopLayerReached

        def embedding_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(0, args[0] if args else kwargs["hidden_states"])

        def layer_hook(index: int) -> Any:
            return lambda _module, _args, output: keep(index, output)

        def last_hook(_module: nn.Module, _args: Any, output: Any) -> None:
            keep(n_layers, output.last_hidden_state)

        hooks = [self.layers[0].register_forward_pre_hook(embedding_hook, with_kwargs=True)]
        hooks += [
            layer.register_forward_hook(layer_hook(index))
            for index, layer in enumerate(self.layers, start=1)
            if index < n_layers
        ]
        hooks.append(self.backbone.register_forward_hook(last_hook))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class FeatureNetwork(FrozenNetwork):
    """A `FrozenNetwork` that embeds rollouts and ground truth of packed rows.

    Args:
        model, feature_layers, normalization, shared: see `FrozenNetwork`.
        embed_method: pooling over the tokens of a block.
        packed_attention: attention implementation for the packed row.
        chunk_size: rollout tokens whose activations exist at once, see
            `hf_ebft.rows.chunks.block_chunks`.
        device_type, compiler: see `PackedForward.for_model`.

    Raises:
        ValueError: the network cannot be exact on packed rows.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        feature_layers: Sequence[float],
        embed_method: EmbedMethod,
        normalization: FeatureNormalization,
        packed_attention: str = "auto",
        chunk_size: int | None = None,
        shared: bool = False,
        device_type: str | None = None,
        compiler: CompileOptions | None = None,
    ) -> None:
        self.forward = PackedForward.for_model(
            model, packed_attention, device_type=device_type, compiler=compiler
        )
        super().__init__(
            model, feature_layers=feature_layers, normalization=normalization, shared=shared
        )
        self.embed_method = embed_method
        self.chunk_size = chunk_size

    @classmethod
    def from_policy(cls, policy: nn.Module, **settings: Any) -> FeatureNetwork:
        """A frozen copy of the policy as it is now (adapters of a PEFT model included)."""
        return cls(copy.deepcopy(policy), **settings)

    def embed(
        self, rollouts: Rollouts, score: Callable[..., TokenLogProbs] | None = None
    ) -> FeaturePass:
        """Embed rollouts and their ground-truth windows.

        Token ids and layout are moved to the network's device, and embeddings back. Rollouts of one
        block with equal tokens get the same embedding, to the bit.

        Args:
            rollouts: the batch and its sampled tokens.
            score: `packed_log_probs` with its settings, if the network's log-probabilities of the
                rollouts are wanted, too (for a KL penalty).

        Raises:
            ValueError: a document or the packed row is too long for the network.
        """
        length = rollouts.layout.length
        pooling = _Pooling(self.embed_method, (length,))
        return self._embed(rollouts, pooling, score)[length]

    def embed_beginnings(
        self, rollouts: Rollouts, lengths: Sequence[int]
    ) -> dict[int, FeaturePass]:
        """Embed the beginnings of rollouts and windows, for several lengths in one causal pass.

        A token never attends to a later one, so the pass over the whole rollouts contains the
        states of all their beginnings.

        Args:
            rollouts: the batch and its sampled tokens.
            lengths: lengths of the beginnings, from 1 to the rollouts' own length.

        Returns:
            Length -> the result of `embed` for rollouts and windows cut to it, up to rounding.

        Raises:
            ValueError: a length is out of range, or a row is too long for the network.
        """
        longest = rollouts.layout.length
        if not lengths or min(lengths) < 1 or max(lengths) > longest:
            raise ValueError(
                f"lengths={list(lengths)} must lie between 1 and {longest}, the length of these "
                "rollouts: leave out the others, or sample longer rollouts."
            )
        return self._embed(rollouts, _Pooling(self.embed_method, lengths), None)

    def embed_with_states(
        self,
        rollouts: Rollouts,
        basis: Tensor,
        score: Callable[..., TokenLogProbs] | None = None,
    ) -> FeaturePass:
        """`embed` by the last token, with the network's states before every rollout token.

        Args:
            rollouts, score: see `embed`.
            basis: (F, r), on the network's device; the states are projected on it.

        Raises:
            ValueError: as `embed`.
        """
        length, (width, rank) = rollouts.layout.length, basis.shape
        found = self._embed(rollouts, _WithStates(length, basis), score)[length]
        generated, own = found.generated.split([width, length * rank], dim=-1)
        ground_truth, before = found.ground_truth.split([width, length * rank], dim=-1)
        first = before[:, None, :, None, :rank].expand(*generated.shape[:3], 1, rank)
        states = torch.cat([first, own.unflatten(-1, (length, rank))[..., :-1, :]], dim=-2)
        return FeaturePass(generated, ground_truth, found.reference_log_probs, states)

    def token_features(self, size: int) -> Tensor:
        """(size, F) float32: features of the tokens 0, 1, ..., each without context.

        They are zero for ids that the network does not have.
        """
        known = min(size, vocabulary_size(self.model))
        ids = torch.arange(known, device=self.device)[:, None]
        rows, pooling = [], _Pooling("last_token", (1,))
        for some in ids.split(TABLE_ROWS):
            documents = Documents.from_inputs({"input_ids": some})
            layout = PackedLayout.without_rollouts(documents)
            nothing = some.new_zeros(layout.rollout_shape)
            alone = Rollouts(nothing, layout.blocks.exists, layout)
            first = torch.zeros_like(some)[..., None]
            with self._reading():
                features, _ = self._pass(alone, layout.document_part, first, pooling, None)
            rows.append(features[:, 0, 0])
        return torch.cat([*rows, rows[0].new_zeros(size - known, rows[0].shape[1])])

    def _embed(
        self,
        rollouts: Rollouts,
        pooling: _Pooling,
        score: Callable[..., TokenLogProbs] | None,
    ) -> dict[int, FeaturePass]:
        self.forward.limits.check(rollouts.layout)
        device = self.device
        policy_device = rollouts.layout.documents.input_ids.device
        exists = rollouts.exists
        moved = Rollouts(rollouts.tokens.to(device), exists.to(device), rollouts.layout.to(device))
        chunks = self._chunks(moved.layout)
        with self._reading():
            if len(chunks) == 1:
                found = self._in_one_pass(moved, pooling, score)
            else:
                found = self._in_chunks(moved, pooling, chunks, score)
        reference = found.reference_log_probs
        reference = None if reference is None else reference.to(policy_device)
        passes = {}
        for index, length in enumerate(pooling.lengths):
            # The pooling reads no later tokens, so they do not matter.
            read = rollouts.tokens[..., : token_positions(pooling.embed_method, length)[-1] + 1]
            generated = with_equal_features(
                found.generated[..., index, :].to(policy_device), first_equal_rollouts(read)
            )
            truth = found.ground_truth[..., index, :].to(policy_device)
            passes[length] = FeaturePass(
                generated=generated * exists[:, None, :, None],
                ground_truth=truth * exists[:, :, None],
                reference_log_probs=reference,
            )
        return passes

    def _chunks(self, layout: PackedLayout) -> tuple[slice, ...]:
        """Chunks of the blocks; a single one if the network cannot continue from a cache."""
        # FSDP2 would gather all parameters for every chunk.
        if is_sharded(self.model) or not self.forward.has_plain_cache:
            return (slice(0, layout.rollout_shape[2]),)
        size = self.chunk_size or tokens_without_gradient(self.device)
        equal = self.forward.compiles_by_shape
        return block_chunks(layout, size, tokens_fed=layout.length, equal=equal)

    def _in_one_pass(
        self,
        rollouts: Rollouts,
        pooling: _Pooling,
        score: Callable[..., TokenLogProbs] | None,
    ) -> FeaturePass:
        """Run the whole packed row at once; embeddings (..., J, D)."""
        layout = rollouts.layout
        of_rollouts, windows = pooling.rollout_places(layout), pooling.window_places(layout)
        # Sample by sample, then the windows: (B, (n + 1) * K, T).
        places = torch.cat([of_rollouts.flatten(1, 2), windows], dim=1)
        embedded, reference = self._pass(rollouts, layout.row_part, places, pooling, score)
        n_generated = embedded.shape[1] - windows.shape[1]
        return FeaturePass(
            generated=embedded[:, :n_generated].unflatten(1, of_rollouts.shape[1:3]),
            ground_truth=embedded[:, n_generated:],
            reference_log_probs=reference,
        )

    def _in_chunks(
        self,
        rollouts: Rollouts,
        pooling: _Pooling,
        chunks: Sequence[slice],
        score: Callable[..., TokenLogProbs] | None,
    ) -> FeaturePass:
        """Run the documents, then the rollouts of some blocks at a time, with a cache of them."""
        layout, cache = rollouts.layout, self.forward.new_cache()
        ground_truth, first = self._pass(
            rollouts, layout.document_part, pooling.window_places(layout), pooling, score, cache
        )
        states = states_in(cache)
        generated, later = [], []
        for chunk in chunks:
            some = rollouts.select_blocks(chunk)
            part, places = some.layout.rollouts_part, pooling.rollout_places(some.layout)
            cache = self.forward.new_cache(states)
            embedded, reference = self._pass(some, part, places, pooling, score, cache)
            generated.append(embedded)
            if reference is not None:
                later.append(reference)
        n_blocks = layout.rollout_shape[2]  # the last chunk may reach beyond
        of_rollouts = None
        if first is not None:
            of_rollouts = torch.cat([first, torch.cat(later, dim=2)[:, :, :n_blocks]], dim=-1)
        embeddings = torch.cat(generated, dim=2)[:, :, :n_blocks]
        return FeaturePass(embeddings, ground_truth, of_rollouts)

    def _pass(
        self,
        rollouts: Rollouts,
        part: PackedPart,
        places: Tensor,
        pooling: _Pooling,
        score: Callable[..., TokenLogProbs] | None,
        cache: DynamicCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One forward pass over a part of the packed row.

        Args:
            rollouts: the batch and its sampled tokens.
            part: the part of the row.
            places: (B, ..., T) places in the row whose hidden states are pooled.
            pooling: pools these T states.
            score: see `embed`.
            cache: keys and values of earlier tokens, extended in place.

        Returns:
            (B, ..., J, D) float32, and the log-probabilities of the rollout tokens that the part
            predicts, if `score` asks for them.
        """
        index = part.index_of[places]
        # FSDP2 requires every pass to go through its root and to the end.
        whole = score is not None or is_sharded(self.model)
        reference: Tensor | None = None

        def run() -> None:
            nonlocal reference
            if score is not None:
                scored = score(self.model, self.forward, rollouts, part=part, cache=cache)
                reference = scored.rollout
            elif whole:
                first = index.flatten()[:1]
                self.forward.logits(self.model, rollouts.input_ids(part), part, first)
            else:
                input_ids = rollouts.input_ids(part)
                self.backbone(
                    input_ids=input_ids,
                    position_ids=part.queries.position,
                    attention_mask=self.forward.recipe.masks_for(part),
                    use_cache=cache is not None,
                    **{cache_argument(self.backbone): cache},
                    **keeping_every_state(self.backbone, input_ids),
                )

        hidden = self._read_layers(run, index.flatten(1), to_the_end=whole)
        features = normalize_layers(hidden, self.normalization).unflatten(1, index.shape[1:])
        return pooling.pool(features), reference


class _Pooling:
    """The tokens of rollouts and windows that one pass keeps, and their pooling at several lengths.

    Args:
        embed_method: the pooling, at every length.
        lengths: J lengths.
    """

    def __init__(self, embed_method: EmbedMethod, lengths: Sequence[int]) -> None:
        self.embed_method, self.lengths = embed_method, tuple(lengths)
        by_length = [token_positions(embed_method, length) for length in lengths]
        self.positions = sorted({position for read in by_length for position in read})
        # For each length, the indices into the kept positions.
        self.indices = [[self.positions.index(position) for position in read] for read in by_length]

    def rollout_places(self, layout: PackedLayout) -> Tensor:
        """(B, n, K, T) places in the row of the kept tokens of every rollout."""
        slots = layout.coordinates.slot[:, layout.document_width :]
        return layout.from_row(slots)[..., self.positions]

    def window_places(self, layout: PackedLayout) -> Tensor:
        """(B, K, T) places in the row of the kept tokens of every ground-truth window."""
        return layout.window[..., self.positions]

    def pool(self, features: Tensor) -> Tensor:
        """(..., T, F) features of the kept tokens -> (..., J, D), one embedding for each length."""
        pooled = [pool(features[..., kept, :], self.embed_method) for kept in self.indices]
        return torch.stack(pooled, dim=-2)


class _WithStates(_Pooling):
    """The last token's feature, followed by all tokens' in a basis: J = 1, D = F + G * r.

    For windows, the state at the end of their prefix takes the place of their tokens' states.

    Args:
        length: G.
        basis: (F, r).
    """

    def __init__(self, length: int, basis: Tensor) -> None:
        super().__init__("last_token", (length,))
        self.basis = basis
        self.positions = [*range(length), length - 1]

    def window_places(self, layout: PackedLayout) -> Tensor:
        """(B, K, G + 1): G times the end of the prefix, then the window's last token."""
        ends = layout.predictor[:, 0, :, :1].expand(-1, -1, layout.length)
        return torch.cat([ends, layout.window[..., -1:]], dim=-1)

    def pool(self, features: Tensor) -> Tensor:
        """(..., G + 1, F) -> (..., 1, F + G * r)."""
        in_basis = (features[..., :-1, :] @ self.basis).flatten(-2)
        return torch.cat([features[..., -1, :], in_basis], dim=-1)[..., None, :]
