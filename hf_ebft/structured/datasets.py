"""Checks data sets of prompts and ground truths before training, and renames their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, cast

from hf_ebft.data.special_tokens import added_bos
from hf_ebft.structured.columns import WITHHELD_COLUMN, ground_truth_column

if TYPE_CHECKING:
    from hf_ebft.structured.config import EBFTGRPOConfig

# Name of the ground-truth column during training, if TRL does not pass on its own name.
GROUND_TRUTH = "ground_truth"

# Columns that have a meaning elsewhere but cannot be used in structured mode.
_OF_TOKENS = (
    "marks tokens of a tokenized row, but structured mode tokenizes prompt and answer itself"
)
_BY_ROLLOUTS = "is passed to the reward by a rollout function and cannot be a column of the dataset"
_ARGUMENT = "is an argument that TRL itself passes to reward functions"
_IMAGES = "holds images, but the feature network reads text only"
REFUSED_COLUMNS: Mapping[str, str] = {
    "assistant_masks": _OF_TOKENS,
    "attention_mask": _OF_TOKENS,
    "chat_template_kwargs": (
        "would have no effect by row; the setting chat_template_kwargs holds for all rows"
    ),
    "completion_mask": _OF_TOKENS,
    "completions": _ARGUMENT,
    "env_mask": _BY_ROLLOUTS,
    "environment": "chooses one of TRL's environments, which change the prompt while sampling",
    "image": _IMAGES,
    "images": _IMAGES,
    "input_ids": _OF_TOKENS,
    "labels": _OF_TOKENS,
    "log_extra": _ARGUMENT,
    "log_metric": _ARGUMENT,
    "prompts": _ARGUMENT,
    "rollout_prompt_ids": _BY_ROLLOUTS,
    "tools": "holds tools, which would not be rendered into the prompt; render them yourself",
    "trainer_state": _ARGUMENT,
}


def prepare_dataset(
    dataset: Any, args: EBFTGRPOConfig, name: str, wanted: str | None = None
) -> tuple[str, Any]:
    """Find the ground-truth column, and give it a name that TRL passes to rewards.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, or a list of rows as dictionaries.
        args: the configuration, with `ground_truth_column`.
        name: name of the dataset, for messages.
        wanted: new name of the column. Default: its own name, if TRL passes that on.

    Returns:
        The name of the column, and the dataset.

    Raises:
        ValueError: there are no rows, a column is missing or cannot be used, or a row of a list is
            not a dictionary of texts.
    """
    if dataset is None:
        raise ValueError(f"{name} is missing: EBFT needs prompts with ground truths; pass it.")
    if isinstance(dataset, (list, tuple)):
        dataset = _from_rows(dataset, name)
    columns = _columns(dataset, name)
    try:
        if "prompt" not in columns:
            raise ValueError(f"There is no column 'prompt', only {sorted(columns)}.")
        column = ground_truth_column(columns, args.ground_truth_column)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    refuse_columns(columns, name)
    _refuse_rows_without(dataset, column, name)
    wanted = wanted or (GROUND_TRUTH if column == WITHHELD_COLUMN else column)
    if column == wanted:
        return column, dataset
    if wanted in columns:
        raise ValueError(
            f"{name}: the column {column!r} must be renamed to {wanted!r} for training (TRL does "
            f"not pass {WITHHELD_COLUMN!r} to rewards, and all datasets need the same name), but "
            "there is a column of that name already; remove one of the two."
        )
    return wanted, dataset.rename_column(column, wanted)


def _refuse_rows_without(dataset: Any, column: str, name: str) -> None:
    """Raise, before training, if a row has no prompt or no ground truth.

    Rows of a stream cannot be checked in advance.
    """
    if not isinstance(dataset, Sized):
        return
    for wanted in ("prompt", column):
        missing = [
            number
            for number, value in enumerate(cast(Any, dataset)[wanted])
            if not isinstance(value, (str, list)) or value == []
        ]
        if missing:
            first = cast(Any, dataset)[missing[0]][wanted]
            listed = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{name}: {len(missing)} of {len(dataset)} rows have no text and no messages in "
                f"{wanted!r}: {listed} (row {missing[0]} has {first!r}). Fill them in, or remove "
                f"them: dataset.filter(lambda row: row[{wanted!r}])."
            )


def prepare_evaluation(dataset: Any, args: EBFTGRPOConfig, column: str) -> Any:
    """Call `prepare_dataset` on an evaluation set, or on each of a dictionary; None stays None."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {
            name: prepare_dataset(one, args, f"eval_dataset[{name!r}]", column)[1]
            for name, one in dataset.items()
        }
    return prepare_dataset(dataset, args, "eval_dataset", column)[1]


def refuse_too_few_prompts(dataset: Any, args: EBFTGRPOConfig) -> None:
    """Raise if a training set cannot fill one generation batch, so that no step would be made.

    Raises:
        ValueError: naming the number of prompts that are needed.
    """
    assert args.generation_batch_size is not None and args.num_generations is not None
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Sized) and len(dataset) < needed:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, but one generation batch needs {needed}: "
            f"generation_batch_size={args.generation_batch_size} completions (batch size of a "
            "device times processes times steps_per_generation) over "
            f"num_generations={args.num_generations}. TRL drops batches that are not full, so no "
            f"step would be made. Use {needed} prompts or more, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps."
        )


def refuse_chats_without_template(dataset: Any, tokenizer: Any) -> None:
    """Raise, before the first step, for chat messages without a chat template.

    Raises:
        ValueError: saying what to do instead.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        return
    if not isinstance(dataset, Sized) or len(dataset) == 0:  # rows of a stream are checked later
        return
    prompt = cast(Any, dataset)[0].get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        raise ValueError(
            "train_dataset's prompts are chat messages, but the tokenizer has no chat template. "
            "Use a chat model, set tokenizer.chat_template, or give the prompts as text."
        )


def refuse_partial_groups(args: EBFTGRPOConfig) -> None:
    """Raise if evaluation batches do not consist of whole groups of completions.

    Raises:
        ValueError: naming both numbers.
    """
    group = args.num_generations_eval or args.num_generations
    assert group is not None
    rows = args.eval_batch_size * args.world_size
    if rows % group != 0:
        raise ValueError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} on {args.world_size} "
            f"process(es) makes batches of {rows} completions, which do not divide into groups of "
            f"{group} (num_generations_eval, or num_generations if unset). Make it a multiple."
        )


def with_one_bos(dataset: Any, tokenizer: Any) -> Any:
    """Remove the BOS with which rendered prompts begin, if the tokenizer adds one.

    Args:
        dataset: a dataset from `prepare_dataset`, a dictionary of them, or None.
        tokenizer: the policy's tokenizer.
    """
    if isinstance(dataset, dict):
        return {name: with_one_bos(one, tokenizer) for name, one in dataset.items()}
    if dataset is None or not added_bos(tokenizer):
        return dataset
    bos = tokenizer.bos_token
    if hasattr(dataset, "__len__"):
        is_chat = isinstance(dataset[0]["prompt"], list)
        if is_chat or not any(prompt.startswith(bos) for prompt in dataset["prompt"]):
            return dataset
    return dataset.map(_cut_bos, fn_kwargs={"bos": bos})


def _cut_bos(row: dict[str, Any], bos: str) -> dict[str, Any]:
    prompt = row["prompt"]
    return {"prompt": prompt.removeprefix(bos) if isinstance(prompt, str) else prompt}


def _from_rows(rows: Sequence[Any], name: str) -> Any:
    from datasets import Dataset

    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{name}: row {number} is a {type(row).__name__}; give dictionaries with 'prompt' "
                "and a ground truth, or a datasets.Dataset."
            )
        for column, value in row.items():
            try:
                _refuse_lone_surrogates(value)
            except ValueError as error:
                raise ValueError(f"{name}: row {number}, {column!r}: {error}") from error
    try:
        return Dataset.from_list([dict(row) for row in rows])
    except (TypeError, ValueError) as error:  # pyarrow's, for columns of mixed types
        raise ValueError(
            f"{name}: its rows do not form a table; every column needs one type: {error}"
        ) from error


def _refuse_lone_surrogates(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{value[error.start]!r} at character {error.start} is a lone surrogate (half of a "
                "character); repair the text, or drop the row"
            ) from error
    elif isinstance(value, Mapping):
        for part in value.values():
            _refuse_lone_surrogates(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _refuse_lone_surrogates(part)


def _columns(dataset: Any, name: str) -> list[str]:
    if not hasattr(dataset, "column_names"):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}; give a datasets.Dataset, an IterableDataset or "
            "a list of rows."
        )
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise ValueError(
            f"{name} is empty: there is nothing to sample from. Check the path, the split and any "
            "filter."
        )
    if dataset.column_names:
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} is an empty stream: there is nothing to sample from.")
    return list(first)


def refuse_columns(columns: Sequence[str], name: str) -> None:
    """Raise for columns that have a meaning elsewhere and would have no effect here.

    Raises:
        ValueError: naming the first of them and the reason.
    """
    for column in columns:
        if column in REFUSED_COLUMNS:
            raise ValueError(
                f"{name}: the column {column!r} {REFUSED_COLUMNS[column]}. Remove or rename it."
            )
