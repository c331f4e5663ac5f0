"""`evaluate()` and `log()` before `train()` do not affect the training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

from hf_ebft import EBFTTrainer
from tests.support.tiny import assert_same_tensors, config, texts, tiny_llama, weights_of


@pytest.mark.parametrize("first", ["evaluate", "log"])
def test_curves_are_written_to_output_dir_also_after_an_evaluation(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Born from runs whose curves went to ./runs, where `evaluate()` had opened the writer."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    trainer = EBFTTrainer(
        tiny_llama(),
        config(tmp_path / "out", max_steps=1, report_to=["tensorboard"]),
        train_dataset=texts(20, 20),
        eval_dataset=texts(20),
    )
    if first == "evaluate":
        trainer.evaluate()
    else:
        trainer.log({"mine": 1.0})
    trainer.train()
    trainer.evaluate()
    assert not (tmp_path / "runs").exists()
    tags = set()
    for folder in (tmp_path / "out" / "runs").iterdir():
        events = EventAccumulator(str(folder))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert {"train/loss", "train/ebft/mean_reward", "eval/loss"} <= tags
    assert first == "evaluate" or "train/mine" in tags


def test_a_folder_that_the_user_chose_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    args = config(tmp_path / "out", report_to=["tensorboard"])
    EBFTTrainer(tiny_llama(), args, eval_dataset=texts(20)).evaluate()
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "out" / "runs").exists()


def test_mixed_precision_is_removed_after_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in one of several processes; `train()` puts it on a second time otherwise."""
    monkeypatch.setattr(Accelerator, "use_distributed", property(lambda _: True))
    model = tiny_llama()
    before = dict(model.__dict__)
    trainer = EBFTTrainer(model, config(tmp_path, bf16=True), eval_dataset=texts(20))
    seen = []
    monkeypatch.setattr(
        trainer,
        "prediction_step",
        lambda model, *_, **__: seen.append(model.forward) or (None,) * 3,
    )
    trainer.evaluate()
    assert hasattr(seen[0], "__wrapped__")
    assert {"forward", "_original_forward", "_is_accelerate_prepared"}.isdisjoint(model.__dict__)
    assert before.keys() == model.__dict__.keys()
    assert trainer.model_wrapped is model
    assert not trainer.accelerator._models


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_does_not_round_the_weights(
    option: str, adapters: bool, tmp_path: Path
) -> None:
    """`Trainer` leaves them cast; the base is the feature network, too, where adapters train."""

    def make(**settings: Any) -> EBFTTrainer:
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear") if adapters else None
        rows = texts(24, 24)
        args = config(tmp_path, max_steps=1, **settings)
        return EBFTTrainer(
            tiny_llama(), args, train_dataset=rows, eval_dataset=rows, peft_config=lora
        )

    plain, evaluated = make(), make(**{option: True})
    seen = []
    step = evaluated.prediction_step
    evaluated.prediction_step = lambda model, *args, **kwargs: (  # type: ignore[method-assign]
        seen.append(next(model.parameters()).dtype) or step(model, *args, **kwargs)
    )
    before = copy.deepcopy(evaluated.model.state_dict())
    evaluated.evaluate()
    assert seen == [getattr(torch, {"b": "bfloat16", "f": "float16"}[option[0]])]
    assert_same_tensors(evaluated.model.state_dict(), before, relative=0)
    plain.train()
    evaluated.train()
    assert_same_tensors(weights_of(evaluated.model), weights_of(plain.model), relative=0)


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_keeps_the_gradient_hooks_of_ddp(option: str, tmp_path: Path) -> None:
    """Between two trainings, say: without them each process would train on its own gradients."""
    rows = texts(20)
    model = tiny_llama(tie_word_embeddings=True)
    trainer = EBFTTrainer(model, config(tmp_path, **{option: True}), eval_dataset=rows)
    reached = []
    accumulators = []
    for name, weight in model.named_parameters():
        # As DDP does it: torch keeps no other reference to the node.
        node = weight.expand_as(weight).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, name=name: reached.append(name))
        accumulators.append(node)
    trainer.evaluate()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([rows[0]["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert sorted(reached) == sorted(name for name, _ in model.named_parameters())
