"""The same prefixes across steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ebft import EBFTTrainer
from hf_ebft.evaluation.callbacks import WATCHED_FILE, RolloutWatcher
from tests.support.tiny import config, texts, tiny_llama, tiny_tokenizer, weights_of

ROWS = texts(20, 5, 17, seed=4)  # the second has no room


def make_trainer(folder: Path, *, watched: bool = True, **settings: Any) -> EBFTTrainer:
    values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = EBFTTrainer(
        tiny_llama(vocabulary=300),
        config(folder, **(values | settings)),
        train_dataset=texts(21, 18, 30, 14),
        processing_class=tiny_tokenizer(pad_token="<pad>"),
    )
    if watched:
        trainer.watcher = RolloutWatcher(trainer, ROWS, every_steps=3)
        trainer.add_callback(trainer.watcher)
    return trainer


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / WATCHED_FILE).read_text().splitlines()]


def test_prefixes_are_continued_every_so_many_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    seen = lines(tmp_path)
    # Before training, every third step, and the last weights.
    assert [(line["step"], line["row"]) for line in seen] == [
        (step, row) for step in (0, 3, 4) for row in (0, 2)
    ]
    tokenizer = trainer.processing_class
    ids = ROWS[0]["input_ids"]
    # Context 4, stride 4, length 3: prefixes of 4, 8, 12 and 16 tokens; the middle one has 12.
    assert seen[0]["prefix"] == tokenizer.decode(ids[:12])
    assert seen[0]["ground_truth"] == tokenizer.decode(ids[12:15])
    assert {line["prefix"] for line in seen if line["row"] == 0} == {seen[0]["prefix"]}
    for line in seen:
        assert len(line["rollouts"]) == 3
        for rollout in line["rollouts"]:
            assert rollout["reward"] == pytest.approx(rollout["alignment"] - rollout["diversity"])
    assert seen[0]["rollouts"] != seen[-2]["rollouts"]
    assert [group.row for group in trainer.watcher.latest] == [0, 2]


def test_the_same_weights_write_the_same(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    first = trainer.watcher.look()
    torch.rand(5)
    assert trainer.watcher.look() == first


@pytest.mark.parametrize("whitening_space", ["feature", "corpus"])
def test_training_does_not_notice(tmp_path: Path, whitening_space: str) -> None:
    runs = [
        make_trainer(tmp_path / str(watched), watched=watched, whitening_space=whitening_space)
        for watched in (False, True)
    ]
    for trainer in runs:
        trainer.train()
    plain, watched = (weights_of(trainer.model) for trainer in runs)
    assert all(torch.equal(plain[name], weight) for name, weight in watched.items())


def test_a_resumed_run_goes_on_in_the_file(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    whole = lines(tmp_path)
    make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = lines(tmp_path)
    # It looks at what it resumes from, too; everything else is as it was.
    assert [line for line in resumed if line["step"] != 2] == whole
    assert [line["row"] for line in resumed if line["step"] == 2] == [0, 2]


def test_lengths_and_numbers_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, watched=False)
    groups = RolloutWatcher(trainer, ROWS, every_steps=1, n_samples=5, length=6).look()
    assert all(len(group.rollouts) == 5 for group in groups)
    assert all(len(ids) == 6 for group in groups for ids in [*group.rollouts, group.ground_truth])
    assert groups[0].to_dict()["prefix"] == groups[0].prefix
    with pytest.raises(ValueError, match="every_steps=0"):
        RolloutWatcher(trainer, ROWS, every_steps=0)
