"""The configuration: from a command line, from files, and what it refuses.

Every refusal names the field and its value.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_ebft import EBFTConfig
from hf_ebft.config import EBFTSettings
from tests.support.tiny import config

OWN_FIELDS = {field.name: field for field in dataclasses.fields(EBFTSettings)}

# One value for each field that differs from its default, as written on a command line.
ON_THE_COMMAND_LINE: dict[str, tuple[str, Any]] = {
    "feature_layers": ("0.5 1.0", [0.5, 1.0]),
    "feature_normalization": ("joint", "joint"),
    "feature_model_name_or_path": ("some/model", "some/model"),
    "feature_placement": ("cpu", "cpu"),
    "feature_dtype": ("bfloat16", "bfloat16"),
    "feature_quantization": ("4bit", "4bit"),
    "use_whitening": ("False", False),
    "whitening_space": ("sample", "sample"),
    "whitening_tolerance": ("1e-4", 1e-4),
    "corpus_whitening_documents": ("32", 32),
    "corpus_whitening_shrinkage": ("0.5", 0.5),
    "alignment_coef": ("0.5", 0.5),
    "diversity_coef": ("0", 0.0),
    "advantage_estimator": ("group_norm", "group_norm"),
    "ce_coef": ("0.03", 0.03),
    "ce_coef_schedule": ("linear", "linear"),
    "ce_coef_final": ("0", 0.0),
    "kl_coef": ("1e-3", 1e-3),
    "kl_coef_schedule": ("cosine", "cosine"),
    "kl_coef_final": ("0.5", 0.5),
    "kl_estimator": ("k2", "k2"),
    "stride": ("16", 16),
    "context_length": ("32", 32),
    "generate_max_len": ("5", 5),
    "embed_method": ("concat", "concat"),
    "n_samples_per_prompt": ("6", 6),
    "temperature": ("1", 1.0),
    "top_p": ("0.9", 0.9),
    "min_completion_prefix": ("3", 3),
    "document_masking": ("True", True),
    "rl_coef": ("2", 2.0),
    "rl_coef_schedule": ("cosine", "cosine"),
    "rl_coef_final": ("0.5", 0.5),
    "packed_attention": ("eager", "eager"),
    "verify_packing": ("False", False),
    "gather_params_for_sampling": ("false", "false"),
    "eval_rollouts": ("False", False),
    "rollout_batch_size": ("2", 2),
    "block_share": ("0.25", 0.25),
    "pad_to_multiple_of": ("64", 64),
    "ema_decay": ("0.9", 0.9),
    "log_pictures_steps": ("20", 20),
    "log_prob_chunk_size": ("64", 64),
    "training_chunk_size": ("256", 256),
}

# What a field needs beside it.
NEEDS = {
    "feature_quantization": ("--feature_model_name_or_path", "x"),
    **{
        f"{name}_{one}": (f"--{name}_{other}", value)
        for name in ("ce_coef", "kl_coef", "rl_coef")
        for one, other, value in (("schedule", "final", "0.1"), ("final", "schedule", "linear"))
    },
}

NOT_A_NUMBER = (math.nan, math.inf, "1e-2", None)
NO_COUNT = (0, -1, 2.5, "8", True, None)
NO_FLAG = ("no", 0, None)

NONSENSE: dict[str, tuple[Any, ...]] = {
    "feature_layers": ([], [1.5], [-0.1], [math.nan], ["0.5"], 0.5, "0.5"),
    "feature_normalization": ("layer", ""),
    "feature_dtype": ("int8", "fp32"),
    "feature_quantization": ("2bit",),
    "use_whitening": NO_FLAG,
    "whitening_space": ("features",),
    "whitening_tolerance": (0.0, 1.0, -1e-5, 1e-9, *NOT_A_NUMBER),
    "corpus_whitening_documents": NO_COUNT,
    "corpus_whitening_shrinkage": (0.0, 1.1, -0.1, *NOT_A_NUMBER),
    "alignment_coef": (-0.1, *NOT_A_NUMBER),
    "diversity_coef": (-0.1, *NOT_A_NUMBER),
    "advantage_estimator": ("ppo",),
    "ce_coef": (-0.1, *NOT_A_NUMBER),
    "ce_coef_schedule": ("quadratic", None),
    "ce_coef_final": (-0.1, *NOT_A_NUMBER[:-1]),
    "kl_coef": (-0.1, *NOT_A_NUMBER),
    "kl_coef_schedule": ("exponential", True),
    "kl_coef_final": (-0.1, *NOT_A_NUMBER[:-1]),
    "kl_estimator": ("k4",),
    "stride": NO_COUNT,
    "context_length": NO_COUNT,
    "generate_max_len": NO_COUNT,
    "embed_method": ("completion_mean", "first_token"),
    "n_samples_per_prompt": NO_COUNT,
    "temperature": (0.0, -1.0, *NOT_A_NUMBER),
    "top_p": (0.0, 1.1, *NOT_A_NUMBER),
    "min_completion_prefix": (-1, 1.5, "2", True, None),
    "document_masking": ("yes", 1),
    "rl_coef": (-1.0, *NOT_A_NUMBER),
    "rl_coef_schedule": ("", 1),
    "rl_coef_final": (-1.0, *NOT_A_NUMBER[:-1]),
    "packed_attention": ("flash_attention_2",),
    "verify_packing": NO_FLAG,
    "gather_params_for_sampling": ("yes", True),
    "eval_rollouts": NO_FLAG,
    "rollout_batch_size": NO_COUNT[:-1],
    "block_share": (0.0, 1.1, *NOT_A_NUMBER),
    "pad_to_multiple_of": NO_COUNT[:-1],
    "ema_decay": (0.0, 1.0, -0.1, math.nan, math.inf, "1e-2"),
    "log_pictures_steps": (-1, 2.5, "8", True, None),
    "log_prob_chunk_size": NO_COUNT,
    "training_chunk_size": NO_COUNT[:-1],
}
# Any text may be the name of a model or of a device; these are read when the trainer is built.
FREE_TEXT = {"feature_model_name_or_path", "feature_placement"}


def parse(*arguments: str) -> EBFTConfig:
    (parsed,) = HfArgumentParser(EBFTConfig).parse_args_into_dataclasses(
        ["--output_dir", "unused", "--use_cpu", *arguments]
    )
    assert isinstance(parsed, EBFTConfig)
    return parsed


# ---- Command line and files -----------------------------------------------------------------


def test_every_field_is_in_these_tables() -> None:
    assert ON_THE_COMMAND_LINE.keys() == OWN_FIELDS.keys()
    assert NONSENSE.keys() | FREE_TEXT == OWN_FIELDS.keys()


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_every_field_is_read_from_the_command_line(name: str) -> None:
    text, expected = ON_THE_COMMAND_LINE[name]
    extra = NEEDS.get(name, ())
    parsed = parse(f"--{name}", *text.split(), *extra)
    actual = getattr(parsed, name)
    assert actual == expected
    assert type(actual) is type(expected)
    assert getattr(parse(), name) != expected


def test_document_masking_has_three_values_on_the_command_line() -> None:
    assert parse().document_masking is None
    assert parse("--document_masking", "True").document_masking is True
    assert parse("--document_masking", "False").document_masking is False


@pytest.mark.parametrize("name", ["use_whitening", "verify_packing", "eval_rollouts"])
def test_flags_that_are_on_by_default_can_be_switched_off(name: str) -> None:
    assert getattr(parse(f"--no_{name}"), name) is False


def test_unknown_choices_are_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--advantage_estimator", "ppo")
    assert "rloo" in capsys.readouterr().err


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_every_field_has_a_help_text_of_whole_sentences(name: str) -> None:
    text = OWN_FIELDS[name].metadata["help"]
    assert len(text) > 20
    assert text.endswith(".") or text.endswith(").")


def test_validation_accepts_every_choice_that_the_parser_shows(tmp_path: Path) -> None:
    hints = get_type_hints(EBFTSettings)
    for name in OWN_FIELDS:
        for option in get_args(hints[name]):
            if isinstance(option, str):
                moves = name.endswith("_schedule") and option != "constant"
                beside: dict[str, Any] = {}
                if moves:
                    beside[name.replace("_schedule", "_final")] = 0.5
                if option == "fitted":
                    beside["use_whitening"] = False
                assert getattr(config(tmp_path, **{name: option}, **beside), name) == option


def test_a_file_and_a_command_line_give_the_same_settings(tmp_path: Path) -> None:
    values = {name: value for name, (_, value) in ON_THE_COMMAND_LINE.items()}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"output_dir": "unused", "use_cpu": True, **values}))
    (from_file,) = HfArgumentParser(EBFTConfig).parse_json_file(file)
    arguments = []
    for name, (text, _) in ON_THE_COMMAND_LINE.items():
        arguments += [f"--{name}", *text.split()]
    parsed = parse(*arguments)
    for name, value in values.items():
        assert getattr(from_file, name) == getattr(parsed, name) == value


def test_a_configuration_survives_json(tmp_path: Path) -> None:
    """`Trainer` stores it as JSON beside checkpoints and passes it to loggers."""
    original = config(
        tmp_path, feature_layers=[0.0, 1.0], document_masking=False, kl_coef=0.5, stride=11
    )
    stored = json.loads(original.to_json_string())
    for name in OWN_FIELDS:
        assert stored[name] == getattr(original, name)
    again = EBFTConfig(**{name: stored[name] for name in OWN_FIELDS}, output_dir=str(tmp_path))
    assert all(getattr(again, name) == getattr(original, name) for name in OWN_FIELDS)


def test_a_configuration_survives_a_dict_and_replace(tmp_path: Path) -> None:
    original = config(tmp_path, top_p=0.5)
    again = EBFTConfig(**original.to_dict())
    assert again.to_dict() == original.to_dict()
    changed = dataclasses.replace(original, stride=9)
    assert (changed.stride, changed.top_p) == (9, 0.5)
    with pytest.raises(ValueError, match="stride=0"):
        dataclasses.replace(original, stride=0)


def test_a_configuration_can_be_logged_by_tensorboard(tmp_path: Path) -> None:
    """TensorBoard takes only plain values as hyperparameters."""
    sanitized = config(tmp_path).to_sanitized_dict()
    assert OWN_FIELDS.keys() <= sanitized.keys()
    assert all(isinstance(value, (bool, int, float, str)) for value in sanitized.values())


#: Defaults that differ from those of `TrainingArguments`: theirs, and ours.
OTHER_DEFAULTS = {
    "learning_rate": (5e-5, None),
    "lr_scheduler_type": ("linear", "constant_with_warmup"),
    "warmup_steps": (0, 0.03),
    "adam_beta2": (0.999, 0.95),
}


def test_no_other_default_of_training_arguments_is_changed() -> None:
    plain = TrainingArguments(output_dir="unused", use_cpu=True).to_dict()
    ours = EBFTConfig(output_dir="unused", use_cpu=True).to_dict()
    changed = {name: (plain[name], ours[name]) for name in plain if plain[name] != ours[name]}
    assert changed == OTHER_DEFAULTS
    assert ours.keys() - plain.keys() == OWN_FIELDS.keys()


def test_a_configuration_from_training_arguments_keeps_their_optimizer() -> None:
    plain = TrainingArguments(output_dir="unused", use_cpu=True)
    ours = EBFTConfig(**plain.to_dict())
    assert {name: getattr(ours, name) for name in OTHER_DEFAULTS} == {
        name: theirs for name, (theirs, _) in OTHER_DEFAULTS.items()
    }


def test_defaults_are_those_of_the_paper() -> None:
    settings = EBFTSettings()
    assert (settings.stride, settings.context_length, settings.generate_max_len) == (8, 8, 8)
    assert settings.n_samples_per_prompt == 4
    assert settings.feature_layers == [0.25, 0.5, 0.75]
    assert settings.use_whitening
    assert settings.advantage_estimator == "rloo"
    assert EBFTSettings().feature_layers is not settings.feature_layers


# ---- Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values]
)
def test_nonsense_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        EBFTSettings(**{name: value})
    shown = value[0] if isinstance(value, list) and value else value
    assert re.search(re.escape(str(shown)), str(error.value))


def test_the_configuration_validates_like_the_settings() -> None:
    with pytest.raises(ValueError, match="stride=0"):
        EBFTConfig(output_dir="unused", use_cpu=True, stride=0)


@pytest.mark.parametrize("estimator", ["rloo", "group_norm"])
def test_an_estimator_with_a_baseline_needs_two_rollouts(estimator: str) -> None:
    with pytest.raises(ValueError, match=r"n_samples_per_prompt=1 .*2 or more.*reinforce"):
        EBFTSettings(n_samples_per_prompt=1, advantage_estimator=estimator, diversity_coef=0.0)


def test_diversity_needs_two_rollouts() -> None:
    with pytest.raises(ValueError, match=r"n_samples_per_prompt=1 .*diversity_coef=1.0.*=0"):
        EBFTSettings(n_samples_per_prompt=1, advantage_estimator="reinforce")
    EBFTSettings(n_samples_per_prompt=1, advantage_estimator="reinforce", diversity_coef=0.0)


def test_loss_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="rl_coef=0, ce_coef=0 and kl_coef=0 make the loss zero"):
        EBFTSettings(rl_coef=0.0)
    EBFTSettings(rl_coef=0.0, ce_coef=1.0)


def test_loss_weights_may_be_zero_at_one_end_of_a_schedule() -> None:
    """It suffices that the loss of some step is not zero."""
    EBFTSettings(rl_coef=0.0, ce_coef_schedule="linear", ce_coef_final=0.1)
    EBFTSettings(rl_coef_schedule="cosine", rl_coef_final=0.0)
    with pytest.raises(ValueError, match="rl_coef=0, ce_coef=0 and kl_coef=0 make the loss zero"):
        EBFTSettings(rl_coef=0.0, ce_coef_schedule="linear", ce_coef_final=0.0)
    with pytest.raises(ValueError, match=r"rl_coef=0.5 has no effect, since all rewards are 0"):
        EBFTSettings(
            rl_coef=0.0,
            rl_coef_schedule="linear",
            rl_coef_final=0.5,
            ce_coef=1.0,
            alignment_coef=0.0,
            diversity_coef=0.0,
        )


@pytest.mark.parametrize("name", ["ce_coef", "kl_coef", "rl_coef"])
def test_a_schedule_and_its_final_value_need_each_other(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}_schedule='cosine' needs a final value"):
        EBFTSettings(**{f"{name}_schedule": "cosine"})
    with pytest.raises(ValueError, match=rf"{name}_final=0.3 would have no effect.*'linear' or"):
        EBFTSettings(**{f"{name}_final": 0.3})


def test_rewards_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rl_coef=1.0 .*alignment_coef=0 and diversity_coef=0"):
        EBFTSettings(alignment_coef=0.0, diversity_coef=0.0)
    EBFTSettings(alignment_coef=0.0, diversity_coef=0.0, rl_coef=0.0, ce_coef=1.0)


def test_quantization_needs_weights_to_load() -> None:
    with pytest.raises(ValueError, match=r"feature_quantization='4bit'.*_name_or_path"):
        EBFTSettings(feature_quantization="4bit")


@pytest.mark.parametrize(("name", "text"), [("temperature", "6e-1"), ("ce_coef", "1e-2")])
def test_a_number_that_yaml_read_as_text_is_refused_with_a_hint(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}='{text}' .*YAML reads 1e-4 as text; write"):
        EBFTSettings(**{name: text})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="strides"):
        EBFTConfig(output_dir="unused", strides=8)  # type: ignore[call-arg]
