"""The card beside a saved model: what it says, and whose it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import TrainingArguments

from hf_ebft import EBFTConfig, EBFTTrainer
from hf_ebft.watching.model_card import (
    ARGUMENTS,
    CITATION,
    MARK,
    CardOptions,
    hub_name,
    may_write_card,
    write_arguments,
    write_card,
)
from tests.support.tiny import config, texts, tiny_llama

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])


def trainer_in(folder: Path, **settings: Any) -> EBFTTrainer:
    peft_config = settings.pop("peft_config", None)
    args = config(folder, **settings)
    return EBFTTrainer(
        tiny_llama(),
        args,
        train_dataset=texts(20, 20),
        eval_dataset=texts(20),
        peft_config=peft_config,
    )


def card_in(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_says_what_was_done(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=2, ce_coef=0.03, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ebft", "generated_from_trainer", "hf_ebft"],
    }
    text = card.text
    assert text.index(MARK) < text.index(f"# {tmp_path.name}")
    for expected in (
        "wrote 3 continuations of 3 tokens",
        "at weight 0.03",
        "| CFM loss, held-out | `eval_ebft/cfm_loss` |",
        "| `ce_coef` | **`0.03`** |",
        "| `use_whitening` | `True` |",
        "- learning_rate: 0.01",
        "- max_steps: 2",
        "### Framework versions",
        CITATION,
    ):
        assert expected in text
    assert "[More Information Needed]" not in text


def test_every_save_is_described_but_a_user_s_card_is_kept(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    mine = "# My model\n\nWritten by hand."
    (tmp_path / "README.md").write_text(mine, encoding="utf-8")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset="x")
    assert card_in(tmp_path) == mine
    assert MARK in card_in(tmp_path / "checkpoint-1")
    # Ours with the mark deleted is a user's, too.
    claimed = card_in(tmp_path / "checkpoint-1").replace(MARK, "")
    (tmp_path / "README.md").write_text(claimed, encoding="utf-8")
    trainer.save_model()
    assert card_in(tmp_path) == claimed
    shutil.copy(tmp_path / "checkpoint-1" / "README.md", tmp_path)
    trainer.save_model()
    assert f"# {tmp_path.name}" in card_in(tmp_path), "ours is brought up to date"


def test_what_a_user_says_stays_for_later_saves(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.create_model_card(
        language="en", license="mit", tags="tables", model_name="A name", dataset_tags="user/data"
    )
    trainer.create_model_card(finetuned_from="someone/base")
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.language, card.data.license) == ("en", "mit")
    assert (card.data.base_model, card.data.datasets) == ("someone/base", ["user/data"])
    assert "tables" in card.data.tags
    assert "# A name" in card.text
    assert "[someone/base](https://huggingface.co/someone/base) on `user/data`" in card.text


def test_under_peft_both_have_their_say(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, peft_config=LORA)
    # What a model loaded from a folder has; PEFT would name it as the base model on the hub.
    trainer.model.config.name_or_path = str(tmp_path)
    for _ in range(2):  # the second save meets the first one's card
        trainer.save_model()
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == "peft"
        assert card.data.base_model is None
        assert {"ebft", "lora"} <= set(card.data.tags)
        assert MARK in card.text
        assert CITATION in card.text
        assert "Only adapters were trained." in card.text
        assert card.text.count("- PEFT ") == 1
        assert str(tmp_path) not in card_in(tmp_path)
        yaml.safe_load(card_in(tmp_path).split("---")[1])


def test_under_peft_a_user_s_words_are_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n\nBy hand.", encoding="utf-8")
    trainer_in(tmp_path, peft_config=LORA).save_model()
    text = card_in(tmp_path)
    assert "# Mine\n\nBy hand." in text
    assert CITATION not in text


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_in(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    trainer.save_model()
    assert not (tmp_path / "README.md").exists()
    assert not (tmp_path / "training_args.json").exists()


def test_arguments_are_readable_and_without_secrets(tmp_path: Path) -> None:
    args = config(tmp_path, hub_token="hf_secret", temperature=0.7)
    write_arguments(tmp_path, args, args)
    text = (tmp_path / "training_args.json").read_text(encoding="utf-8")
    assert "hf_secret" not in text
    read = json.loads(text)
    assert (read["temperature"], read["learning_rate"]) == (0.7, 1e-2)
    # Plain arguments have no settings of EBFT; the trainer's are added.
    trainer = EBFTTrainer(
        tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    )
    trainer.save_model()
    assert json.loads((tmp_path / "training_args.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "without a cross-entropy term"),
        ({"feature_model_name_or_path": "a/b"}, "`a/b`, frozen"),
    ],
)
def test_the_method_follows_the_settings(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    args = EBFTConfig(str(tmp_path), use_cpu=True, num_train_epochs=2, **settings)
    write_card(tmp_path, tiny_llama(), args, args, [], CardOptions())
    text = card_in(tmp_path)
    assert expected in text
    assert "- num_train_epochs: 2" in text
    assert "logged too little" in text
    assert set(ARGUMENTS) <= set(args.to_dict()) | {"world_size"}


@pytest.mark.parametrize(
    ("name", "expected"), [("a/model", "a/model"), ("", None), ("/gone/folder", None)]
)
def test_only_names_of_the_hub_are_base_models(name: str, expected: str | None) -> None:
    model = tiny_llama()
    model.config.name_or_path = name
    assert hub_name(model) == expected


def test_folders_are_no_base_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    model.config.name_or_path = "local"
    assert hub_name(model) is None
    assert may_write_card(tmp_path)


def test_the_citation_is_the_readme_s() -> None:
    words = " ".join(CITATION.split())
    assert words in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
