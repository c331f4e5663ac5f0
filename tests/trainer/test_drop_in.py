"""`Trainer(` becomes `EBFTTrainer(` in a script, and the script works as before.

The yardstick is a language-modeling script of the usual kind (`run_clm`), run once with each class.
"""

import copy
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_ebft import EBFTConfig, EBFTTrainer
from tests.support.tiny import (
    PrefixRollouts,
    assert_same_tensors,
    batch_of,
    config,
    gradients,
    logged,
    source_text,
    texts,
    tiny_llama,
    tiny_tokenizer,
    weights_of,
)

datasets = pytest.importorskip("datasets")

CURVES = (
    "alignment",
    "diversity",
    "mean_reward",
    "cfm_loss",
    "energy_score",
    "excess_over_spread",
    "rl_loss",
    "advantages_std",
    "entropy",
    "duplicate_rollouts",
    "zero_advantage_groups",
    "blocks_per_document",
    "documents_without_blocks",
    "seconds_rollout",
    "seconds_features",
    "seconds_training",
)
# Evaluation has no policy gradient, and its cross-entropy is eval_loss.
EVALUATION_CURVES = (
    "alignment",
    "diversity",
    "mean_reward",
    "cfm_loss",
    "energy_score",
    "excess_over_spread",
    "advantages_std",
    "duplicate_rollouts",
    "zero_advantage_groups",
    "blocks_per_document",
    "documents_without_blocks",
)


# ---- A language-modeling script -------------------------------------------------------------


def run_clm(trainer_class: type[Trainer], folder: Path) -> SimpleNamespace:
    """Fine-tune on text: tokenize, cut into rows, train, evaluate, save. Knows nothing of EBFT."""
    tokenizer = tiny_tokenizer(eos_token="<eos>")
    model = tiny_llama(vocabulary=len(tokenizer))
    raw = datasets.Dataset.from_dict({"text": source_text()})
    raw = raw.train_test_split(test_size=0.2, seed=0)
    block_size = 48

    def tokenize(examples: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(examples["text"]))

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        rows = {}
        for name, lists in examples.items():
            stream = [value for values in lists for value in values]
            whole = len(stream) // block_size * block_size
            rows[name] = [stream[at : at + block_size] for at in range(0, whole, block_size)]
        return rows | {"labels": copy.deepcopy(rows["input_ids"])}

    rows = raw.map(tokenize, batched=True, remove_columns=["text"]).map(group_texts, batched=True)

    def preprocess_logits_for_metrics(logits: Any, labels: Tensor) -> Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits.mean())}

    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        report_to=["tensorboard"],
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
    )
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    before = trainer.evaluate()
    untrained = trainer.predict(rows["test"])
    result = trainer.train(resume_from_checkpoint=None)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-generation", dataset="a library's source")
    return SimpleNamespace(
        trainer=trainer,
        before=before,
        untrained=untrained,
        result=result,
        metrics=metrics,
        folder=folder,
        model=model,
    )


def run_in(folder: Path, trainer_class: type[Trainer]) -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as environment:
        # Evaluated before it is trained, Trainer would write event files to the working directory.
        environment.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "runs"))
        return run_clm(trainer_class, folder)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return run_in(tmp_path_factory.mktemp("plain"), Trainer)


@pytest.fixture(scope="module")
def ebft_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return run_in(tmp_path_factory.mktemp("ebft"), EBFTTrainer)


def files_of(run: SimpleNamespace) -> set[str]:
    """Every file that a run wrote, without the names that TensorBoard makes up."""
    paths = (path.relative_to(run.folder) for path in run.folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != "runs"}


def test_the_script_evaluates_to_the_same_metrics(
    plain_run: SimpleNamespace, ebft_run: SimpleNamespace
) -> None:
    plain, ebft = plain_run.before, ebft_run.before
    assert ebft["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)
    assert ebft["eval_accuracy"] == plain["eval_accuracy"]
    added = {name for name in ebft.keys() - plain.keys() if not name.startswith("eval_ebft/")}
    assert not added
    assert plain.keys() <= ebft.keys()


def test_the_script_predicts_the_same(
    plain_run: SimpleNamespace, ebft_run: SimpleNamespace
) -> None:
    plain, ebft = plain_run.untrained, ebft_run.untrained
    np.testing.assert_array_equal(ebft.predictions, plain.predictions)
    np.testing.assert_array_equal(ebft.label_ids, plain.label_ids)
    assert ebft.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], abs=1e-6)
    assert "test_ebft/cfm_loss" in ebft.metrics


def test_the_script_trains_by_ebft(plain_run: SimpleNamespace, ebft_run: SimpleNamespace) -> None:
    trainer = ebft_run.trainer
    assert trainer.state.global_step == 3
    assert len(logged(trainer, "ebft/mean_reward")) == 3
    # While training and after it; train() starts a new history.
    assert len(logged(trainer, "eval_ebft/cfm_loss")) == 2
    # A plain TrainingArguments gets the paper's settings.
    assert logged(trainer, "ebft/blocks_per_document") == [(48 - 8 - 8) // 8 + 1] * 3
    assert ebft_run.metrics["eval_loss"] != ebft_run.before["eval_loss"]
    assert ebft_run.metrics["eval_loss"] != plain_run.metrics["eval_loss"]
    assert ebft_run.result.metrics.keys() == plain_run.result.metrics.keys()


def test_the_script_leaves_the_same_files(
    plain_run: SimpleNamespace, ebft_run: SimpleNamespace
) -> None:
    """Nothing of the feature network is saved; beside each model lies what people read."""
    plain = files_of(plain_run)
    models = {Path(name).parent for name in plain if Path(name).name == "model.safetensors"}
    for_people = {
        str(folder / name) for folder in models for name in ("README.md", "training_args.json")
    }
    assert files_of(ebft_run) == plain | for_people
    for name in ("model.safetensors", "checkpoint-3/model.safetensors"):
        sizes = [(run.folder / name).stat().st_size for run in (plain_run, ebft_run)]
        assert sizes[0] == sizes[1]
    state = json.loads((ebft_run.folder / "trainer_state.json").read_text())
    assert "ebft/mean_reward" in state["log_history"][0]
    card = (ebft_run.folder / "README.md").read_text()
    assert "a library's source" in card


def test_the_saved_model_is_the_trained_policy(ebft_run: SimpleNamespace) -> None:
    for folder in (ebft_run.folder, ebft_run.folder / "checkpoint-3"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert_same_tensors(weights_of(loaded), weights_of(ebft_run.model), relative=0)
        assert type(loaded) is type(ebft_run.model)


def test_tensorboard_shows_every_curve(
    plain_run: SimpleNamespace, ebft_run: SimpleNamespace
) -> None:
    """Read back from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curves(run: SimpleNamespace) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        files = (run.folder / "runs").rglob("events.*")
        for file in sorted(files, key=lambda path: path.stat().st_mtime):
            events = EventAccumulator(str(file))
            events.Reload()
            for tag in events.Tags()["scalars"]:
                scalars = [(event.step, event.value) for event in events.Scalars(tag)]
                found[tag] = found.get(tag, []) + scalars
        return found

    ours = curves(ebft_run)
    expected = {f"train/ebft/{name}" for name in CURVES}
    expected |= {f"eval/ebft/{name}" for name in EVALUATION_CURVES}
    assert {tag for tag in ours if "ebft" in tag} == expected
    assert ours.keys() - expected == curves(plain_run).keys()
    for name in CURVES:
        steps, values = zip(*ours[f"train/ebft/{name}"], strict=True)
        assert steps == (1, 2, 3)
        assert values == pytest.approx(logged(ebft_run.trainer, f"ebft/{name}"))
    for name in EVALUATION_CURVES:
        steps, values = zip(*ours[f"eval/ebft/{name}"], strict=True)
        assert steps == (0, 3, 3)
        before = ebft_run.before[f"eval_ebft/{name}"]
        after = logged(ebft_run.trainer, f"eval_ebft/{name}")
        assert values == pytest.approx([before, *after])


def test_losses_that_are_asked_for_are_logged(tmp_path: Path) -> None:
    """Cross-entropy and KL have a curve where they have a weight."""
    args = config(tmp_path, max_steps=1, ce_coef=0.1, kl_coef=0.1)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 20))
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert {f"ebft/{name}" for name in (*CURVES, "ce_loss", "kl")} == {
        name for name in entry if name.startswith("ebft/")
    }


# ---- Collators ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_collator_for_language_modeling(tmp_path: Path, side: str) -> None:
    """Rows of different lengths, padded by the tokenizer on its side, masked labels at padding."""
    tokenizer = tiny_tokenizer(pad_token="<pad>")
    tokenizer.padding_side = side
    rows = texts(20, 13, 31, vocabulary=len(tokenizer))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([dict(row) for row in rows])
    assert (batch["attention_mask"][1] == 0).sum() == 18
    trainer = PrefixRollouts(
        tiny_llama(vocabulary=len(tokenizer)),
        config(tmp_path, ce_coef=0.2, max_steps=2, per_device_train_batch_size=3),
        train_dataset=rows,
        data_collator=collator,
    )
    expected_loss, expected = gradients(trainer, batch_of(rows))
    loss, actual = gradients(trainer, batch)
    torch.testing.assert_close(loss, expected_loss)
    assert_same_tensors(actual, expected, relative=2e-5)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(float(expected_loss), abs=1e-5)


def test_the_default_collator_and_labels_of_the_user(tmp_path: Path) -> None:
    """default_data_collator on rows of one length, with prompts masked by -100."""
    rows: list[dict[str, Any]] = texts(24, 24)
    for row in rows:
        row["labels"] = [-100] * 9 + row["input_ids"][9:]
    trainer = EBFTTrainer(
        tiny_llama(),
        config(tmp_path, max_steps=1, ce_coef=0.1),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train()
    # Anchors at 9, 13, 17 and 21 of 24 tokens, three tokens to a window.
    assert logged(trainer, "ebft/blocks_per_document") == [4.0]


@pytest.mark.parametrize("seq_idx", [False, True])
def test_a_collator_that_packs(tmp_path: Path, seq_idx: bool) -> None:
    """Rows flattened into one, told apart by position ids that restart."""
    rows = texts(20, 13, 31)
    packed = DataCollatorWithFlattening(return_seq_idx=seq_idx)([dict(row) for row in rows])
    assert packed["input_ids"].shape == (1, 64)
    trainer = PrefixRollouts(tiny_llama(), config(tmp_path, ce_coef=0.2))
    expected_loss, expected = gradients(trainer, batch_of(rows))
    loss, actual = gradients(trainer, packed)
    torch.testing.assert_close(loss, expected_loss)
    assert_same_tensors(actual, expected, relative=2e-5)


def test_a_custom_collator(tmp_path: Path) -> None:
    """Any mapping with input_ids will do, from rows of any kind."""
    calls: list[int] = []

    def collate(rows: list[str]) -> dict[str, Tensor]:
        calls.append(len(rows))
        return {"input_ids": torch.tensor([[ord(letter) % 61 for letter in row] for row in rows])}

    args = config(tmp_path, max_steps=1, remove_unused_columns=False)
    lines = ["for row in rows: print(row)", "while True: wait(seconds=3)"]
    trainer = EBFTTrainer(
        tiny_llama(), args, train_dataset=lines, eval_dataset=lines, data_collator=collate
    )
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert calls == [2, 2]


# ---- Datasets -------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style dataset of dicts."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: torch.tensor(values) for name, values in self.rows[index].items()}


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """An endless dataset without a length."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.rows


def test_every_kind_of_dataset_trains_the_same(tmp_path: Path) -> None:
    rows = texts(20, 26, 17, 31)
    kinds: list[Any] = [
        rows,
        Rows(rows),
        Stream(rows),
        datasets.Dataset.from_list(rows),
        datasets.Dataset.from_list(rows).to_iterable_dataset(),
    ]
    losses = []
    for kind in kinds:
        # All four rows in one batch, so that their order does not matter.
        args = config(tmp_path, max_steps=1, per_device_train_batch_size=4)
        trainer = PrefixRollouts(tiny_llama(), args, train_dataset=kind)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses == pytest.approx([losses[0]] * len(kinds), abs=1e-5)


@pytest.mark.parametrize("peft", [False, True])
def test_columns_that_ebft_understands_are_kept(tmp_path: Path, peft: bool) -> None:
    """remove_unused_columns drops what neither the model nor EBFT takes, and only that."""
    rows = [row | {"prompt_length": 9, "text": "some text", "source": 3} for row in texts(24, 24)]
    seen: list[dict[str, Any]] = []

    class Watch(EBFTTrainer):
        def sample_rollouts(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
            seen.append(inputs)
            return super().sample_rollouts(model, inputs)

    def watched(rows: list[dict[str, Any]], dataset: bool) -> EBFTTrainer:
        trainer = Watch(
            tiny_llama(),
            config(tmp_path, max_steps=1),
            train_dataset=datasets.Dataset.from_list(rows) if dataset else rows,
            peft_config=LoraConfig(target_modules=["q_proj"]) if peft else None,
        )
        trainer.train()
        return trainer

    for dataset in (False, True):
        trainer = watched(rows, dataset)
        assert seen.pop().keys() == {"input_ids", "attention_mask", "prompt_length"}
        assert logged(trainer, "ebft/blocks_per_document") == [4.0]
        packed = [row | {"document_ids": [0] * 10 + [1] * 14} for row in texts(24, 24)]
        trainer = watched(packed, dataset)
        assert seen.pop().keys() == {"input_ids", "attention_mask", "document_ids"}
        assert logged(trainer, "ebft/blocks_per_document") == [(1 + 2) / 2]


# ---- Evaluation -----------------------------------------------------------------------------


def evaluated(
    trainer_class: type[Trainer], folder: Path, rows: Any, collator: Any = None, **settings: Any
) -> Any:
    """evaluate() and predict() of the same untrained model."""
    args: TrainingArguments = config(folder, per_device_eval_batch_size=3, **settings)
    trainer = trainer_class(
        tiny_llama(), args, eval_dataset=rows, data_collator=collator or batch_of
    )
    return trainer.evaluate(), trainer.predict(rows)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_is_that_of_trainer(tmp_path: Path, side: str, bf16: bool) -> None:
    rows: list[dict[str, Any]] = texts(20, 13, 31, 9, 16)
    for row in rows:
        row["labels"] = [-100] * 4 + row["input_ids"][4:]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return batch_of(rows, side=side)

    plain, plain_prediction = evaluated(Trainer, tmp_path, rows, collate, bf16=bf16)
    ebft, ebft_prediction = evaluated(EBFTTrainer, tmp_path, rows, collate, bf16=bf16)
    assert ebft["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)
    np.testing.assert_array_equal(ebft_prediction.predictions, plain_prediction.predictions)
    np.testing.assert_array_equal(ebft_prediction.label_ids, plain_prediction.label_ids)


def test_rows_without_labels_are_their_own_labels(tmp_path: Path) -> None:
    """Trainer has no loss for them; EBFT takes every token for a target."""
    rows = texts(20, 13, 31)
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    with_labels, with_predictions = evaluated(Trainer, tmp_path, labelled)
    without, predictions = evaluated(EBFTTrainer, tmp_path, rows)
    assert without["eval_loss"] == pytest.approx(with_labels["eval_loss"], abs=1e-6)
    real = np.asarray([[column < len(row["input_ids"]) for column in range(31)] for row in rows])
    np.testing.assert_allclose(
        predictions.predictions[real], with_predictions.predictions[real], atol=1e-5
    )


def test_prompts_do_not_count_for_the_evaluation_loss(tmp_path: Path) -> None:
    rows = texts(20, 13, 31)
    by_labels = [row | {"labels": [-100] * 7 + row["input_ids"][7:]} for row in rows]
    expected, _ = evaluated(Trainer, tmp_path, by_labels)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return batch_of(rows) | {"prompt_length": torch.full((len(rows),), 7)}

    actual, _ = evaluated(EBFTTrainer, tmp_path, rows, collate)
    assert actual["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("labels", [False, True])
def test_packed_rows_are_evaluated_document_by_document(tmp_path: Path, labels: bool) -> None:
    """The loss of a packed row is that of its documents in rows of their own."""
    first, second = texts(20, 13)
    packed: dict[str, Any] = {
        "input_ids": first["input_ids"] + second["input_ids"],
        "document_ids": [0] * 20 + [1] * 13,
    }
    alone = [row | {"labels": row["input_ids"]} for row in (first, second)]
    if labels:
        packed["labels"] = packed["input_ids"]
    expected, _ = evaluated(Trainer, tmp_path, alone)
    actual, _ = evaluated(EBFTTrainer, tmp_path, [packed])
    assert actual["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


def test_several_evaluation_sets(tmp_path: Path) -> None:
    trainer = EBFTTrainer(
        tiny_llama(),
        config(tmp_path),
        eval_dataset={"code": texts(20, 25), "prose": texts(30, seed=1)},
    )
    metrics = trainer.evaluate()
    for name in ("code", "prose"):
        assert {f"eval_{name}_loss", f"eval_{name}_ebft/cfm_loss"} <= metrics.keys()
    assert metrics["eval_code_ebft/cfm_loss"] != metrics["eval_prose_ebft/cfm_loss"]
    alone = trainer.evaluate(texts(30, seed=1))
    assert alone["eval_ebft/cfm_loss"] == metrics["eval_prose_ebft/cfm_loss"]
    other = trainer.evaluate(texts(30, seed=1), metric_key_prefix="held_out")
    assert other["held_out_ebft/cfm_loss"] == metrics["eval_prose_ebft/cfm_loss"]


@pytest.mark.parametrize("several_sets", [False, True], ids=["one-set", "several-sets"])
def test_the_best_model_by_cfm_loss_is_loaded_at_the_end(
    tmp_path: Path, several_sets: bool
) -> None:
    metric = "eval_a_ebft/cfm_loss" if several_sets else "eval_ebft/cfm_loss"
    held_out = texts(30, 24)
    args = config(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        learning_rate=0.3,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=False,
    )
    trainer = EBFTTrainer(
        tiny_llama(),
        args,
        train_dataset=texts(20, 25, 30),
        eval_dataset={"a": held_out, "b": texts(26, 28, seed=1)} if several_sets else held_out,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=4)],
    )
    trainer.train()
    losses = logged(trainer, metric)
    assert len(set(losses)) == 4
    best = losses.index(min(losses)) + 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert_same_tensors(weights_of(trainer.model), weights_of(loaded), relative=0)
    assert trainer.evaluate()[metric] == pytest.approx(min(losses), abs=1e-6)


def test_callbacks_see_the_metrics(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {"on_log": [], "on_evaluate": [], "on_predict": []}

    class Watch(TrainerCallback):
        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen["on_log"].append(set(logs))

        def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            seen["on_evaluate"].append(set(metrics))

        def on_predict(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            seen["on_predict"].append(set(metrics))

    rows = texts(20, 25)
    args = config(tmp_path, max_steps=1, eval_strategy="epoch")
    trainer = EBFTTrainer(
        tiny_llama(), args, train_dataset=rows, eval_dataset=rows, callbacks=[Watch()]
    )
    trainer.train()
    trainer.predict(rows)
    assert {"loss", "ebft/mean_reward"} <= seen["on_log"][0]
    assert "eval_ebft/cfm_loss" in seen["on_evaluate"][0]
    assert "test_ebft/cfm_loss" in seen["on_predict"][0]


# ---- Precision ------------------------------------------------------------------------------


def test_bf16_autocast(tmp_path: Path) -> None:
    """Weights and optimizer stay in float32, the gradient points where float32's does."""
    rows = texts(40, 40)
    flat: list[Tensor] = []
    for bf16 in (False, True):
        kept: list[dict[str, Tensor]] = []

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(
                self, *args: Any, model: nn.Module, kept: list[Any] = kept, **kwargs: Any
            ) -> None:
                kept.append({name: w.grad.clone() for name, w in model.named_parameters()})

        args = config(tmp_path, max_steps=1, bf16=bf16, ce_coef=0.1)
        trainer = PrefixRollouts(tiny_llama(), args, train_dataset=rows, callbacks=[Keep()])
        trainer.train()
        assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())
        flat.append(torch.cat([gradient.flatten() for gradient in kept[0].values()]))
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert 0.98 < float(cosine) < 1.0 - 1e-7


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=2, kl_coef=0.1, ce_coef=0.1, verify_packing=True)
    model = tiny_llama().bfloat16()
    trainer = EBFTTrainer(model, args, train_dataset=texts(40, 40), eval_dataset=texts(30))
    trainer.train()
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_evaluation_with_bf16_full_eval(tmp_path: Path, attention: str) -> None:
    """bf16_full_eval casts the policy: figures near those of float32, and it trains on."""
    rows = texts(30, 24)
    metrics = []
    for full in (False, True):
        args = config(tmp_path, bf16_full_eval=full, max_steps=1, packed_attention=attention)
        trainer = EBFTTrainer(tiny_llama(), args, train_dataset=rows, eval_dataset=rows)
        metrics.append(trainer.evaluate())
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], abs=0.1)
    assert metrics[1]["eval_ebft/cfm_loss"] != metrics[0]["eval_ebft/cfm_loss"]
    trainer.train()


def test_fp16_on_a_cpu_does_what_it_does_in_trainer(tmp_path: Path) -> None:
    """Whether this release of transformers trains or says why not."""
    outcomes: list[str] = []
    for trainer_class in (Trainer, EBFTTrainer):
        try:
            rows = [row | {"labels": row["input_ids"]} for row in texts(20, 20)]
            args = TrainingArguments(
                str(tmp_path),
                fp16=True,
                use_cpu=True,
                max_steps=1,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = trainer_class(
                tiny_llama(), args, train_dataset=rows, data_collator=default_data_collator
            )
            trainer.train()
            assert math.isfinite(trainer.state.log_history[0]["loss"])
            outcomes.append("trained")
        except (ValueError, RuntimeError, ImportError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_activation_checkpointing(tmp_path: Path, name: str) -> None:
    """The old one is deprecated: its notice is for the user, ours must be no other."""
    if name not in TrainingArguments.__dataclass_fields__:
        pytest.skip(f"this release of transformers has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = config(tmp_path, max_steps=1, **{name: True})
    recomputed: list[int] = []
    model = tiny_llama()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = EBFTTrainer(
            model,
            args,
            train_dataset=texts(20, 20),
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )
        hook = model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, _: recomputed.append(1) if module.training else None
        )
        trainer.train()
        hook.remove()
    assert len(recomputed) == 2  # forward, and again in backward
    ours = [str(w.message) for w in caught if "hf_ebft" in w.filename]
    assert not ours
    assert logged(trainer, "grad_norm")[0] > 0


# ---- PEFT -----------------------------------------------------------------------------------


def saved_base(folder: Path) -> Path:
    """A model on disk, so that its adapters know what they belong to."""
    tiny_llama().save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("wrapped_by_user", [False, True])
def test_adapters_are_trained_saved_and_loaded(
    tmp_path: Path, use_dora: bool, wrapped_by_user: bool
) -> None:
    adapters = LoraConfig(
        target_modules=["q_proj", "v_proj"], use_dora=use_dora, task_type="CAUSAL_LM"
    )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path))
    base = weights_of(model)
    args = config(
        tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2, learning_rate=0.1
    )
    trainer = EBFTTrainer(
        get_peft_model(model, adapters) if wrapped_by_user else model,
        args,
        train_dataset=texts(20, 25, 30),
        peft_config=None if wrapped_by_user else adapters,
    )
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([texts(20)[0]["input_ids"]])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(input_ids=ids).logits
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        names = {path.name for path in folder.iterdir() if path.suffix == ".safetensors"}
        assert names == {"adapter_model.safetensors"}
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
            with loaded.disable_adapter():
                assert not torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-3)
        on_disk = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
            for name, weight in weights_of(loaded).items()
            if "lora_" not in name
        }
        assert_same_tensors(on_disk, base, relative=0)


# ---- Models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_model_init(tmp_path: Path, attention: str) -> None:
    """Every train() starts from a new model, with the attention and the feature network for it."""
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        made.append(tiny_llama(attn_implementation="eager"))
        return made[-1]

    args = config(tmp_path, max_steps=2, packed_attention=attention, learning_rate=0.1)
    rows = texts(20, 25)
    trainer = EBFTTrainer(model_init=model_init, args=args, train_dataset=rows)
    trainer.train()
    first = logged(trainer, "loss"), weights_of(trainer.model)
    trainer.train()
    assert len(made) == 3
    assert trainer.model is made[2]
    assert trainer.model.config._attn_implementation == attention
    assert logged(trainer, "loss") == first[0]
    assert_same_tensors(weights_of(trainer.model), first[1], relative=0)
    # phi is a copy of the newest model at its start, not of the one that it replaced.
    start = weights_of(tiny_llama())
    assert_same_tensors(weights_of(trainer.feature_network.model), start, relative=0)

    model = tiny_llama(attn_implementation=attention)
    expected = EBFTTrainer(model, args, train_dataset=rows)
    expected.train()
    assert first[0] == pytest.approx(logged(expected, "loss"), abs=1e-5)


def test_model_init_with_adapters(tmp_path: Path) -> None:
    """The feature network shares the base of the model that is trained, not of an earlier one."""

    def model_init() -> nn.Module:
        return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))

    args = config(tmp_path, max_steps=1, feature_placement="shared")
    trainer = EBFTTrainer(model_init=model_init, args=args, train_dataset=texts(20, 25))
    trainer.train()
    assert trainer.feature_network.model is trainer.model


def test_a_feature_network_given_by_name(tmp_path: Path) -> None:
    """As the checkpoint of a warm-started policy's base."""
    base = saved_base(tmp_path)
    rows = texts(20, 25)
    losses = []
    for by_name in (False, True):
        args = config(
            tmp_path,
            max_steps=2,
            feature_model_name_or_path=str(base) if by_name else None,
            verify_packing=True,
        )
        trainer = EBFTTrainer(
            tiny_llama(seed=1),
            args,
            train_dataset=rows,
            feature_network=None if by_name else tiny_llama(),
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_custom_optimizer(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    args = config(tmp_path, max_steps=1)
    trainer = EBFTTrainer(
        model, args, train_dataset=texts(20, 25), optimizers=(optimizer, schedule)
    )
    before = weights_of(model)
    trainer.train()
    assert logged(trainer, "learning_rate") == [0.1]
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_positional_arguments_as_in_trainer(tmp_path: Path) -> None:
    rows = texts(20, 25)
    args = config(tmp_path, max_steps=1)
    trainer = EBFTTrainer(tiny_llama(), args, default_data_collator, rows, rows[:1])
    assert trainer.data_collator is default_data_collator
    assert trainer.train_dataset is rows
    assert len(trainer.eval_dataset) == 1


def test_without_arguments_there_are_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = EBFTTrainer(tiny_llama())
    assert isinstance(trainer.args, EBFTConfig)
    assert trainer.args.output_dir == "tmp_trainer"


# ---- Hub ------------------------------------------------------------------------------------


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that Trainer makes, on files that are the policy and nothing else."""
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **_: Any) -> SimpleNamespace:
            calls.append(("create", name))
            return SimpleNamespace(repo_id=f"someone/{name}")

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> str:
            calls.append(("upload", (repo_id, {path.name for path in Path(folder_path).iterdir()})))
            return "done"

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    args = config(tmp_path / "my-model", max_steps=1, push_to_hub=True, hub_strategy="end")
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 25))
    trainer.train()
    assert trainer.push_to_hub(commit_message="Trained", tags="ebft") == "done"
    assert calls[0] == ("create", "my-model")
    repository, files = calls[-1][1]
    assert repository == "someone/my-model"
    assert {"config.json", "model.safetensors", "README.md", "training_args.bin"} <= files
    weights = [name for name in files if name.endswith((".safetensors", ".bin"))]
    assert sorted(weights) == ["model.safetensors", "training_args.bin"]
    assert "ebft" in (tmp_path / "my-model" / "README.md").read_text()


def test_the_arguments_saved_with_a_model_can_be_loaded(tmp_path: Path) -> None:
    args = config(tmp_path, stride=5)
    trainer = EBFTTrainer(tiny_llama(), args)
    trainer.save_model()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.stride == 5
    assert loaded.to_dict() == args.to_dict()


def test_messages_are_not_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A quiet run: nothing to warn of, no warning from us."""
    args = config(tmp_path, max_steps=2, verify_packing=True)
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        trainer = EBFTTrainer(
            tiny_llama(), args, train_dataset=texts(20, 25), eval_dataset=texts(20)
        )
        trainer.train()
        trainer.evaluate()
    assert not [record for record in caplog.records if record.name.startswith("hf_ebft")]
