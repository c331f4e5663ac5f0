"""Pictures in TensorBoard: rollouts as text, histograms, and a map of rewards by position.

Dimension letters: B documents, n samples, K blocks, G rollout length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from hf_ebft.training.metric_table import PHASES, PREFIX
from hf_ebft.watching.charts import heat_map, require_matplotlib, to_pixels

if TYPE_CHECKING:
    from hf_ebft.training.outputs import EBFTOutput

# Prefix of training metrics in TensorBoard: `Trainer` adds `train/`.
TAG = f"train/{PREFIX}"
# Number of tokens shown of a prefix: its end, where the rollouts begin.
PREFIX_TOKENS = 48
# Advantages above these shares of the largest one shown get two and three squares.
TWO_SQUARES, THREE_SQUARES = 1 / 3, 2 / 3
# Unicode has a symbol for every control character; two of them get better known symbols.
_SIGNS = {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421}
_SIGNS |= {ord("\n"): 0x23CE, ord("\t"): 0x2192}

#: Charts of TensorBoard's "Custom Scalars" tab.
CHARTS = {
    "EBFT": {
        "seconds by phase (of a micro-batch)": ["Multiline", [f"train/{name}" for name in PHASES]],
        "CFM loss": ["Multiline", [f"train/{PREFIX}cfm_loss", f"eval/{PREFIX}cfm_loss"]],
        "reward and its parts": [
            "Multiline",
            [f"{TAG}{name}" for name in ("mean_reward", "alignment", "diversity")],
        ],
        "rollouts that teach nothing": [
            "Multiline",
            [f"{TAG}{name}" for name in ("duplicate_rollouts", "zero_advantage_groups")],
        ],
    }
}


@dataclass(frozen=True)
class ShownRollout:
    """A rollout as text, with its reward and advantage."""

    text: str
    reward: float
    advantage: float


@dataclass(frozen=True)
class ShownGroup:
    """The rollouts of one block, with the end of its prefix and its ground truth."""

    prefix: str
    ground_truth: str
    rollouts: list[ShownRollout]


class RewardMap:
    """Mean reward by position in the document and training step, in a bounded number of cells.

    Cells begin at the finest size, and become twice as wide whenever a position or a step does not
    fit.

    Args:
        spacing: positions per finest cell, such as the stride; a smaller number leaves rows empty.
        rows: largest number of bins of positions; even.
        columns: largest number of bins of steps; even.
    """

    def __init__(self, spacing: int, rows: int = 32, columns: int = 64) -> None:
        self._sums = np.zeros((2, rows, columns))  # of rewards, and their number
        self._positions, self._steps = spacing, 1  # width of a cell
        self._first_step: int | None = None

    def add(self, step: int, positions: NDArray[np.int64], rewards: NDArray[np.float64]) -> None:
        """Add rewards (N,) of rollouts that start at positions (N,) of their documents.

        Steps must not decrease.
        """
        if positions.size == 0:
            return
        if self._first_step is None:
            self._first_step = step
        _, rows, columns = self._sums.shape
        while int(positions.max()) >= rows * self._positions:
            self._sums = _merge_pairs(self._sums, axis=1)
            self._positions *= 2
        while step - self._first_step >= columns * self._steps:
            self._sums = _merge_pairs(self._sums, axis=2)
            self._steps *= 2
        column = (step - self._first_step) // self._steps
        np.add.at(self._sums[0, :, column], positions // self._positions, rewards)
        np.add.at(self._sums[1, :, column], positions // self._positions, 1.0)

    def means(self) -> NDArray[np.float64]:
        """(rows in use, columns in use), NaN where no block started."""
        sums, counts = self._sums
        used = counts > 0
        if not used.any():
            return np.empty((0, 0))
        last_row, last_column = np.nonzero(used.any(axis=1))[0][-1], np.nonzero(used.any(0))[0][-1]
        means = np.full(sums.shape, np.nan)
        np.divide(sums, counts, out=means, where=used)
        return means[: last_row + 1, : last_column + 1]

    def edges(self) -> tuple[list[int], list[int]]:
        """Positions and steps at which the cells of `means` begin, and the end of the last."""
        rows, columns = self.means().shape
        first = self._first_step or 0
        return (
            [row * self._positions for row in range(rows + 1)],
            [first + column * self._steps for column in range(columns + 1)],
        )


@dataclass
class _Collected:
    """The data that one process has collected since the last pictures."""

    steps: list[tuple[int, NDArray[np.int64], NDArray[np.float64]]] = field(default_factory=list)
    rewards: list[NDArray[np.float64]] = field(default_factory=list)
    advantages: list[NDArray[np.float64]] = field(default_factory=list)
    groups: list[ShownGroup] = field(default_factory=list)


class PicturesCallback(TrainerCallback):
    """Writes pictures of the rollouts to TensorBoard, at regular optimizer steps.

    - text: prefixes with their rollouts, rewards and advantages, and the ground truth;
    - histograms of the rewards and advantages of that step, over all processes;
    - a heat map of the mean reward by document position and training step, all steps included;
    - charts that put seconds by phase, and other metrics that belong together, into one picture
      (the "Custom Scalars" tab).

    `EBFTConfig(log_pictures_steps=...)` adds it. Every step costs a copy of the (B, n, K) rewards
    to the CPU. A step with pictures also costs gathering and drawing them.

    Args:
        trainer: the trainer, whose TensorBoard writer and tokenizer are used.
        every: number of optimizer steps between pictures.
        stride: tokens between blocks: the finest cell of the heat map.
        n_groups: number of prefixes to show.

    Raises:
        ValueError: a number is below 1; or, when training begins, there is no TensorBoard.
        ImportError: when training begins, matplotlib is not installed.
    """

    def __init__(self, trainer: Trainer, every: int, *, stride: int = 8, n_groups: int = 4) -> None:
        for name, value in (("every", every), ("n_groups", n_groups)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self._trainer = trainer
        self._every = every
        self._stride = stride
        self._n_groups = n_groups
        self._start()

    def _start(self) -> None:
        self._map = RewardMap(self._stride)
        self._collected = _Collected()
        self._wrote_charts = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Clear everything; raise if there is no TensorBoard callback or no matplotlib."""
        self._tensorboard()
        require_matplotlib(f"The reward map of log_pictures_steps={self._every}")
        self._start()

    def on_ebft_outputs(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        outputs: EBFTOutput,
        **kwargs: Any,
    ) -> None:
        """Keep the data of a micro-batch that the pictures need."""
        step = state.global_step + 1  # which this micro-batch is a part of
        exists = outputs.rollouts.exists
        rewards = outputs.rewards.reward
        positions = outputs.rollouts.layout.blocks.position[exists]
        mean_rewards = rewards.mean(dim=1)[exists]
        self._collected.steps.append((step, _numpy(positions), _numpy(mean_rewards.double())))
        if step % self._every:
            return
        for kept, values in (
            (self._collected.rewards, rewards),
            (self._collected.advantages, outputs.advantages),
        ):
            kept.append(_numpy(values.transpose(1, 2)[exists].flatten().double()))
        if not self._collected.groups:
            self._collected.groups = show_groups(outputs, decoder_of(self._trainer), self._n_groups)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Gather the data from all processes, and write pictures in the main process."""
        if state.global_step % self._every:
            return
        everything: list[_Collected] = gather_object([self._collected])
        self._collected = _Collected()
        if state.is_world_process_zero:
            self._write(everything, state.global_step)

    def _write(self, everything: Sequence[_Collected], step: int) -> None:
        writer = self._tensorboard().tb_writer
        if not self._wrote_charts:
            writer.add_custom_scalars(CHARTS)
            self._wrote_charts = True
        for name in ("rewards", "advantages"):
            parts = [part for collected in everything for part in getattr(collected, name)]
            values = np.concatenate([np.empty(0), *parts])
            if values.size:  # TensorBoard raises for an empty histogram
                writer.add_histogram(TAG + name, values, step)
        groups = [
            group for together in _rounds([c.groups for c in everything]) for group in together
        ]
        if groups:
            writer.add_text(f"{TAG}rollouts", markdown_of(groups[: self._n_groups]), step)
        batches = [batch for collected in everything for batch in collected.steps]
        for seen, positions, rewards in sorted(batches, key=lambda batch: batch[0]):
            self._map.add(seen, positions, rewards)
        means = self._map.means()
        if means.size:
            positions_at, steps_at = self._map.edges()
            picture = heat_map(
                "Mean reward by position and step",
                means,
                x_edges=steps_at,
                y_edges=positions_at,
                x_label="training step",
                y_label="start of the rollout in its document, in tokens",
            )
            tag = f"{TAG}reward_by_position"
            writer.add_image(tag, to_pixels(picture), step, dataformats="HWC")
        writer.flush()

    def _tensorboard(self) -> TensorBoardCallback:
        # Use its writer, not our own: TensorBoard follows one live event file per folder.
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                return callback
        raise ValueError(
            f"log_pictures_steps={self._every} draws for TensorBoard, but report_to="
            f"{self._trainer.args.report_to} does not include it; add 'tensorboard' to report_to, "
            "or set log_pictures_steps=0."
        )


def decoder_of(trainer: Trainer) -> Callable[[list[int]], str]:
    """A function from token ids to text, by the trainer's tokenizer; to numbers if it has none."""
    decode = getattr(trainer.processing_class, "decode", None)
    return (lambda ids: " ".join(map(str, ids))) if decode is None else decode


def show_groups(
    outputs: EBFTOutput, decode: Callable[[list[int]], str], most: int
) -> list[ShownGroup]:
    """Groups of a micro-batch as text, spread evenly over its blocks.

    Args:
        outputs: outputs of the micro-batch.
        decode: converts token ids to text.
        most: largest number of groups.
    """
    layout, tokens = outputs.rollouts.layout, outputs.rollouts.tokens
    blocks = outputs.rollouts.exists.nonzero().tolist()
    most = min(most, len(blocks))
    shown = []
    for number in range(most):
        row, block = blocks[(2 * number + 1) * len(blocks) // (2 * most)]
        ids = layout.documents.input_ids[row].tolist()
        end = int(layout.blocks.column[row, block])
        start = end - min(int(layout.blocks.position[row, block]), PREFIX_TOKENS)
        shown.append(
            ShownGroup(
                prefix=decode(ids[start:end]),
                ground_truth=decode(ids[end : end + layout.length]),
                rollouts=[
                    ShownRollout(
                        text=decode(tokens[row, sample, block].tolist()),
                        reward=float(outputs.rewards.reward[row, sample, block]),
                        advantage=float(outputs.advantages[row, sample, block]),
                    )
                    for sample in range(layout.n_samples)
                ],
            )
        )
    return shown


def markdown_of(groups: Sequence[ShownGroup]) -> str:
    """The groups as Markdown, with one table each.

    Squares show advantages: blue above 0, orange below; more squares for larger ones.
    """
    largest = max((abs(r.advantage) for group in groups for r in group.rollouts), default=0.0)
    parts = []
    for group in groups:
        rows = [
            f"| {_squares(r.advantage, largest)} | {r.advantage:+.3f} | {r.reward:.3f} | "
            f"{_code(r.text)} |"
            for r in sorted(group.rollouts, key=lambda r: -r.advantage)
        ]
        parts.append(
            "\n".join(
                [
                    f"**prefix** {_code(group.prefix)}",
                    "",
                    "| | advantage | reward | rollout |",
                    "|---|---|---|---|",
                    *rows,
                    f"| | | truth | {_code(group.ground_truth)} |",
                ]
            )
        )
    return "\n\n---\n\n".join(parts)


def visible(text: str) -> str:
    """The text on one line, with symbols for line ends, tabs and other control characters."""
    return text.translate(_SIGNS)


def _squares(advantage: float, largest: float) -> str:
    share = abs(advantage) / largest if largest else 0.0
    number = 1 + (share >= TWO_SQUARES) + (share >= THREE_SQUARES)
    if share == 0.0:
        return "\u2b1c"  # white
    return ("\U0001f7e6" if advantage > 0 else "\U0001f7e7") * number


def _code(text: str) -> str:
    # Every character with a meaning in Markdown or HTML becomes an entity; spaces, too, since
    # browsers would join them.
    signs = (c if c.isalnum() or ord(c) > 127 else f"&#{ord(c)};" for c in visible(text))
    return "<code>" + "".join(signs).replace("&#32;", "&#160;") + "</code>"


def _merge_pairs(sums: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Sums of neighbouring pairs along an axis, filled up with zeros to the old length."""
    length = sums.shape[axis]
    halved = np.add.reduceat(sums, np.arange(0, length, 2), axis=axis)
    missing = [(0, 0)] * sums.ndim
    missing[axis] = (0, length - halved.shape[axis])
    return np.pad(halved, missing)


def _rounds(lists: Sequence[Sequence[ShownGroup]]) -> list[list[ShownGroup]]:
    """The first of every list, then the second of every list, and so on."""
    longest = max((len(groups) for groups in lists), default=0)
    return [[groups[i] for groups in lists if i < len(groups)] for i in range(longest)]


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
