"""Evaluation of one and several data sets: names of metrics, the best model, whole groups."""

import json

import numpy as np
import pytest

from tests.support.tiny_structured import RecordedEBFT, config, policy, rows, tokenizer


def build(folder, evaluation, **settings):
    return RecordedEBFT(
        policy(),
        config(folder, **({"per_device_eval_batch_size": 4, "ce_coef": 0.1} | settings)),
        train_dataset=rows(),
        eval_dataset=evaluation,
        processing_class=tokenizer(),
    )


def test_each_set_has_metrics_of_its_own(tmp_path):
    """All sets wrote to `eval_ebft/...`, the last one over the others."""
    other = rows(8).select([5, 6]).rename_column("ground_truth", "completion")
    sets = {"a": rows(3), "b": other}
    found = build(tmp_path, sets).evaluate()
    for name, data in sets.items():
        alone = build(tmp_path, data).evaluate()
        for metric, value in alone.items():
            renamed = metric.replace("eval_", f"eval_{name}_", 1)
            assert renamed in found, metric
            if "ebft/" in metric and "seconds" not in metric:
                assert found[renamed] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    assert "eval_ebft/alignment" not in found
    assert found["eval_a_ebft/alignment"] != found["eval_b_ebft/alignment"]


def test_log_history_has_every_set(tmp_path):
    trainer = build(
        tmp_path, {"a": rows(3), "b": rows(2)}, max_steps=1, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    for name in ("a", "b"):
        entry = next(e for e in trainer.state.log_history if f"eval_{name}_loss" in e)
        for metric in ("ebft/cfm_loss", "ebft/ce_loss", "reward", "completions/mean_length"):
            assert np.isfinite(entry[f"eval_{name}_{metric}"])


def test_best_model_is_found_by_the_metric_of_one_set(tmp_path):
    trainer = build(
        tmp_path,
        {"a": rows(3), "b": rows(2)},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_a_ebft/alignment",
        greater_is_better=True,
    )
    trainer.train()
    values = {
        entry["step"]: entry["eval_a_ebft/alignment"]
        for entry in trainer.state.log_history
        if "eval_a_ebft/alignment" in entry
    }
    assert len(values) == 3
    best = max(values, key=values.get)
    assert trainer.state.best_metric == values[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    state = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_metric"] == values[best]


def test_prediction_has_the_metrics_of_an_evaluation_and_leaves_none_behind(tmp_path):
    """TRL keeps them for the next log, which is that of the next evaluation."""
    trainer = build(tmp_path, rows(2))
    other = rows(8).select([6, 7]).to_list()
    before, expected = trainer.evaluate(), trainer.evaluate(other)
    found = trainer.predict(other).metrics
    after = trainer.evaluate()
    for name in ("ebft/alignment", "ebft/ce_loss", "completions/mean_length"):
        assert found[f"test_{name}"] == pytest.approx(expected[f"eval_{name}"])
        assert after[f"eval_{name}"] == pytest.approx(before[f"eval_{name}"])
    assert found["test_ebft/ce_loss"] != pytest.approx(after["eval_ebft/ce_loss"])


def test_batch_that_holds_no_whole_groups_is_refused(tmp_path):
    """TRL checks this only where a strategy of evaluation is set; else a reshape failed."""
    message = r"batches of 6 .*, which do not divide into groups of 4 .* Make it a multiple"
    with pytest.raises(ValueError, match="must be divisible by the number of generations"):
        build(tmp_path, rows(3), per_device_eval_batch_size=6, eval_strategy="epoch")
    trainer = build(tmp_path, rows(3), per_device_eval_batch_size=6)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate()
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(rows(2))
    assert np.isfinite(
        build(tmp_path, rows(3), per_device_eval_batch_size=6, num_generations_eval=3).evaluate()[
            "eval_ebft/alignment"
        ]
    )


def test_set_given_to_evaluate_may_name_its_ground_truth_otherwise(tmp_path):
    trainer = build(tmp_path, rows(3))
    renamed = rows(3).rename_column("ground_truth", "completion")
    assert trainer.evaluate(renamed)["eval_ebft/alignment"] == pytest.approx(
        trainer.evaluate()["eval_ebft/alignment"]
    )
