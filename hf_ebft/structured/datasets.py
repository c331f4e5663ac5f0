"""Data sets of prompts and ground truths: accepted, renamed and checked before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, cast

from hf_ebft.data.special_tokens import added_bos
from hf_ebft.structured.columns import WITHHELD_COLUMN, ground_truth_column

if TYPE_CHECKING:
    from hf_ebft.structured.config import EBFTGRPOConfig

# What the ground truth is called while training, if TRL withholds its own column.
GROUND_TRUTH = "ground_truth"

# Columns that stand for something elsewhere, and that structured mode cannot honour.
_OF_TOKENS = (
    "marks tokens of a tokenized row, and structured mode tokenizes prompt and answer itself"
)
_BY_ROLLOUTS = "is what a rollout function hands to the reward, not a column of the dataset"
_ARGUMENT = "is an argument that TRL itself gives to reward functions"
_IMAGES = "holds images, and the feature network reads text only"
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
    "tools": "holds tools, which would not reach the prompt; render them into it",
    "trainer_state": _ARGUMENT,
}


def prepare_dataset(
    dataset: Any, args: EBFTGRPOConfig, name: str, wanted: str | None = None
) -> tuple[str, Any]:
    """The column of the ground truth, and the dataset with it under a name that TRL passes on.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, or a list of rows as dictionaries.
        args: with `ground_truth_column`.
        name: of the dataset, for messages.
        wanted: what the column is to be called; default: what it is called, if TRL passes that on.

    Raises:
        ValueError: no rows, a column that is missing or cannot be honoured, or a row of a list
            that is no dictionary of texts.
    """
    if dataset is None:
        raise ValueError(f"{name} is missing: EBFT learns from prompts and their ground truths.")
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
            f"{name}: the column {column!r} has to be called {wanted!r} while training (TRL keeps "
            f"{WITHHELD_COLUMN!r} from rewards, and all datasets need one name), but that name is "
            "taken; remove one of the two columns."
        )
    return wanted, dataset.rename_column(column, wanted)


def _refuse_rows_without(dataset: Any, column: str, name: str) -> None:
    """Raise for rows without a prompt or a ground truth, before one of them is drawn.

    Rows of a stream are not known yet.
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
                f"{wanted!r}: {listed} (row {missing[0]} has {first!r}). Fill them in, or take "
                f"them out: dataset.filter(lambda row: row[{wanted!r}])."
            )


def prepare_evaluation(dataset: Any, args: EBFTGRPOConfig, column: str) -> Any:
    """`prepare_dataset` for an evaluation set, or a dictionary of them; None and names stay."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {
            name: prepare_dataset(one, args, f"eval_dataset[{name!r}]", column)[1]
            for name, one in dataset.items()
        }
    return prepare_dataset(dataset, args, "eval_dataset", column)[1]


def refuse_too_few_prompts(dataset: Any, args: EBFTGRPOConfig) -> None:
    """Refuse a training set that cannot fill one generation batch: no step would be made.

    Raises:
        ValueError: with the number of prompts that it takes.
    """
    assert args.generation_batch_size is not None and args.num_generations is not None
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Sized) and len(dataset) < needed:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, and one generation batch takes {needed}: "
            f"generation_batch_size={args.generation_batch_size} completions (batch size of a "
            "device times processes times steps_per_generation) over "
            f"num_generations={args.num_generations}. TRL leaves out batches that are not full, "
            f"so there would be no step at all. Give {needed} prompts or more, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps."
        )


def refuse_chats_without_template(dataset: Any, tokenizer: Any) -> None:
    """Refuse chat messages that the tokenizer cannot write as text, before the first step does.

    Raises:
        ValueError: with what to do instead.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        return
    if not isinstance(dataset, Sized) or len(dataset) == 0:  # a stream shows it when it is read
        return
    prompt = cast(Any, dataset)[0].get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        raise ValueError(
            "train_dataset's prompts are chat messages, and the tokenizer has no chat template: "
            "the model was not trained on chats. Choose a chat model, set tokenizer.chat_template, "
            "or give the prompts as text."
        )


def refuse_partial_groups(args: EBFTGRPOConfig) -> None:
    """Refuse evaluation batches that hold no whole groups of completions.

    Raises:
        ValueError: with both numbers.
    """
    group = args.num_generations_eval or args.num_generations
    assert group is not None
    rows = args.eval_batch_size * args.world_size
    if rows % group != 0:
        raise ValueError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} on {args.world_size} "
            f"process(es) makes batches of {rows} completions, which are no whole groups of "
            f"{group} (num_generations_eval, or num_generations without it). Make it a multiple."
        )


def with_one_bos(dataset: Any, tokenizer: Any) -> Any:
    """The dataset without the BOS that rendered prompts begin with, if the tokenizer adds another.

    Args:
        dataset: as `prepare_dataset` returns it; None and dictionaries of datasets are taken too.
        tokenizer: the policy's.
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
            f"{name}: its rows do not make a table, every column needs one type: {error}"
        ) from error


def _refuse_lone_surrogates(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{value[error.start]!r} at character {error.start} is half of a UTF-16 pair and "
                "no character; repair the text, or drop the row"
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
    """Refuse columns that stand for something elsewhere and would have no effect here.

    Raises:
        ValueError: the first of them, with the reason.
    """
    for column in columns:
        if column in REFUSED_COLUMNS:
            raise ValueError(
                f"{name}: the column {column!r} {REFUSED_COLUMNS[column]}. Remove or rename it."
            )
