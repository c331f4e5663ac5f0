"""The card beside a saved model: what it says, and whose it is."""

import ast
import json
import re
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import TrainingArguments

import hf_ebft
from hf_ebft import EBFTConfig, EBFTTrainer
from hf_ebft.watching import model_card
from hf_ebft.watching.curves import Series
from hf_ebft.watching.model_card import (
    ARGUMENTS,
    CITATION,
    MARK,
    CardOptions,
    hub_name,
    may_write_card,
    sparkline,
    write_arguments,
    write_card,
)
from hf_ebft.watching.tensorboard import ShownGroup, ShownRollout
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
    metadata = card.data.to_dict()
    (entry,) = metadata.pop("model-index")
    assert entry["name"] == tmp_path.name
    assert metadata == {
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


def test_the_index_holds_the_last_evaluation(tmp_path: Path) -> None:
    """As the hub reads it; a value that is no number would make the metadata invalid."""
    args = config(tmp_path)
    log = [
        {"step": 1, "eval_loss": 3.0, "eval_ebft/cfm_loss": 0.5},
        {"step": 2, "eval_loss": 2.5, "eval_ebft/cfm_loss": float("nan")},
    ]
    options = CardOptions(dataset_tags="user/data", dataset="The data")
    write_card(tmp_path, tiny_llama(), args, args, log, options)
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (result.metric_type, result.metric_value) == ("cross_entropy", 2.5)
    assert (result.dataset_type, result.dataset_name) == ("user/data", "The data")
    assert yaml.safe_load(card_in(tmp_path).split("---")[1])["model-index"][0]["results"]


def test_the_card_shows_curves_and_rollouts(tmp_path: Path) -> None:
    """The best rollout of each group, whatever signs the text has."""
    args = config(tmp_path)
    log = [{"step": step, "ebft/alignment": float(step)} for step in range(1, 9)]
    rollouts = [ShownRollout(text, reward, 0.0) for text, reward in (("worse", 0.1), ("best", 0.9))]
    hostile = "---\n```\n{{ title }} | <b>\t"
    groups = [ShownGroup(hostile, "truth", rollouts), ShownGroup("second", hostile, rollouts)]
    write_card(tmp_path, tiny_llama(), args, args, log, CardOptions(), samples=groups)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["ebft", "generated_from_trainer", "hf_ebft"]
    shown = "---\u23ce```\u23ce{{ title }} | <b>\u2192"
    assert f"````text\nprefix   {shown}\ntruth    truth\nrollout  best\n````" in card.text
    assert f"````text\nprefix   second\ntruth    {shown}\nrollout  best\n````" in card.text
    assert "worse" not in card.text
    # The prompt of the example is a literal that Python reads, whatever its text has.
    (literal,) = re.findall(r"print\(generate\((.*), max_new_tokens", card.text)
    assert ast.literal_eval(literal) == hostile
    assert "| \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588 |" in card.text
    assert "\n\n\n" not in card.text


def test_a_curve_goes_from_its_lowest_to_its_highest_value() -> None:
    steps = tuple(range(8))
    assert (
        sparkline(Series(steps, tuple(7.0 - s for s in steps)))
        == "\u2588\u2587\u2586\u2585\u2584\u2583\u2582\u2581"
    )
    assert sparkline(Series(steps, (2.0,) * 8)) == "\u2581" * 8
    assert sparkline(Series((1,), (2.0,))) == ""
    assert len(sparkline(Series(tuple(range(500)), (1.0, 2.0) * 250))) == 24


def test_rollouts_of_a_run_are_in_its_card_unless_they_are_not_wanted(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "with", max_steps=2)
    trainer.train()
    trainer.save_model()
    assert card_in(tmp_path / "with").count("```text") == 2
    trainer = trainer_in(tmp_path / "without", max_steps=2)
    trainer.card_samples = 0
    trainer.train()
    trainer.save_model()
    assert "```text" not in card_in(tmp_path / "without")


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("name", ["README.md", "training_args.json"])
def test_what_people_read_cannot_cost_the_model(
    tmp_path: Path, name: str, peft: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in the file's place stands for a full disk; PEFT writes its card before weights."""
    trainer = trainer_in(tmp_path, peft_config=LORA if peft else None)
    (tmp_path / name).mkdir()
    trainer.save_model()
    weights = "adapter_model" if peft else "model"
    assert (tmp_path / f"{weights}.safetensors").is_file()
    # Where a README.md is that is not ours nothing of ours is written, so nothing fails.
    assert ("could not be written" in caplog.text) == (peft or name != "README.md")
    trainer.create_model_card()


def test_a_tree_that_is_not_installed_has_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version was looked up after training, and its absence ended the run."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(model_card, "version", missing)
    trainer_in(tmp_path).save_model()
    assert f"- hf_ebft {hf_ebft.__version__}\n- transformers (not inst" in card_in(tmp_path)


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


def test_the_citation_is_that_of_the_docs() -> None:
    words = " ".join(CITATION.split())
    assert words in " ".join((ROOT / "docs" / "paper.md").read_text(encoding="utf-8").split())
