"""What the code of a model does is found out right, on every model type of the installed release.

`TABLE` is what transformers 5.23 does. A type that changes or is new fails by name here: look at
what changed, then correct the table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_ebft.packed.heads import Head
from hf_ebft.packed.model_code import find_head, mask_functions, why_not_split
from hf_ebft.packed.supported import check_supported
from tests.support.architectures import MODEL_TYPES, NOT_BUILT, tiny_config, tiny_model

BUILT = [model_type for model_type in MODEL_TYPES if model_type not in NOT_BUILT]
# Numbers that tell one kind of head from another, in whatever fields a configuration has.
NUMBERS = {"logit_scale": 0.3, "logits_scaling": 4.0, "final_logit_softcapping": 25.0}
SCALES = {
    1.0: "",
    0.3: "times logit_scale",
    4.0: "times logits_scaling",
    0.25: "over logits_scaling",
}
MASK_NAMES = {
    "create_bidirectional_mask": "bidirectional",
    "create_causal_mask": "causal",
    "create_chunked_causal_mask": "chunked",
    "create_masks_for_generate": "generate",
    "create_sliding_window_causal_mask": "sliding",
}
# What becomes of the head's output; whether attention can be split; which of transformers'
# functions make the masks. Types that are refused before anyone asks are left out.
TABLE: dict[str, str] = {
    "bounded; split attention; bidirectional causal generate sliding masks": """
        gemma4 gemma4_text
    """,
    "bounded; split attention; causal generate sliding masks": """
        gemma3_text gemma4_unified gemma4_unified_text
    """,
    "bounded; split attention; causal masks": """
        nanochat
    """,
    "bounded; split attention; causal sliding masks": """
        beam gemma3n_text
    """,
    "bounded; whole attention; causal sliding masks": """
        gemma2 inkling2_text vaultgemma
    """,
    "over logits_scaling; split attention; causal masks": """
        granite granitemoe granitemoeshared
    """,
    "over logits_scaling; whole attention; causal sliding masks": """
        granite_swa granitemoe_swa
    """,
    "plain; split attention; bidirectional causal generate sliding masks": """
        gemma3
    """,
    "plain; split attention; bidirectional causal masks": """
        electra gpt-sw3 gpt2
    """,
    "plain; split attention; bidirectional causal sliding masks": """
        dots3_note dots3_note_text phi4_multimodal
    """,
    "plain; split attention; causal chunked masks": """
        llama4 llama4_text
    """,
    "plain; split attention; causal generate masks": """
        hrm_text
    """,
    "plain; split attention; causal masks": """
        apertus arcee aria_text axk1 axk2 biogpt bitnet ctrl dbrx deepseek_v2 deepseek_v3
        deepseek_v32 diffllama emu3 ernie4_5 ernie4_5_moe flex_olmo fuyu gemma glm glm4
        glm4_moe glm4_moe_lite glm_moe_dsa gpt_bigcode gpt_neox helium hunyuan_v1_dense
        hunyuan_v1_moe hy_v3 internlm3 iquestcoder jais2 jetmoe lfm2 lfm2_moe llama
        longcat_flash minicpm3 minimax_m2 minimax_m3_vl_text mllama moshi nemotron olmo
        olmo2 olmoe opt persimmon phi seed_oss solar_open stablelm youtu
    """,
    "plain; split attention; causal sliding masks": """
        afmoe cwm doge dots1 exaone4 exaone_moe inkling_text kolibri1 laguna lfm3 mellum
        minimax ministral ministral3 mistral mixtral modernbert-decoder olmo3 phi3 phimoe
        qwen2 qwen2_moe qwen3 qwen3_moe smollm3 starcoder2
    """,
    "plain; whole attention; bidirectional causal masks": """
        xglm
    """,
    "plain; whole attention; causal masks": """
        codegen falcon git gpt_neo gpt_neox_japanese gptj hy_v4
    """,
    "plain; whole attention; causal sliding masks": """
        flint got_ocr2 gpt_oss mimo_v2_flash
    """,
    "times logit_scale; split attention; causal masks": """
        cohere
    """,
    "times logit_scale; split attention; causal sliding masks": """
        cohere2 cohere2_moe cohere_compass_text
    """,
    "times logits_scaling; split attention; causal masks": """
        hyperclovax
    """,
    "whole logits; split attention; bidirectional causal masks": """
        bert bert-generation ernie roc_bert
    """,
    "whole logits; whole attention; bidirectional causal masks": """
        big_bird megatron-bert rembert
    """,
}
EXPECTED = {name: label for label, names in TABLE.items() for name in names.split()}


def description(model_type: str) -> str | None:
    """What is found out about a type, in the words of `TABLE`; None if it is refused anyway."""
    config = tiny_config(model_type)
    text = config.get_text_config(decoder=True)
    for name in NUMBERS.keys() & vars(text).keys():
        setattr(text, name, NUMBERS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        check_supported(model)
    except ValueError:
        return None
    head, masks = find_head(model), sorted(MASK_NAMES[name] for name in mask_functions(model))
    return "; ".join(
        [
            "whole logits" if head is None else _words(head),
            f"{'whole' if why_not_split(model) else 'split'} attention",
            f"{' '.join(masks)} masks",
        ]
    )


def _words(head: Head) -> str:
    bound = "" if head.softcap is None else "bounded"
    return " ".join(filter(None, [SCALES[head.scale], bound])) or "plain"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", BUILT)
def test_every_type_of_the_installed_release_is_as_in_the_table(model_type: str) -> None:
    assert description(model_type) == EXPECTED.get(model_type)


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "granite", "cohere2", "falcon", "llama4"]
)
def test_some_types_are_as_in_the_table(model_type: str) -> None:
    assert description(model_type) == EXPECTED[model_type]


# ---- Heads --------------------------------------------------------------------------------------


# What a model makes of its logits.
Change = Callable[[PreTrainedModel, Tensor], Tensor]


def changed(change: Change, **numbers: float) -> LlamaForCausalLM:
    """A Llama whose forward does something to its logits."""

    class Changed(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            output = self.model(input_ids, attention_mask, position_ids, **kwargs)
            logits = change(self, self.lm_head(output.last_hidden_state))
            return CausalLMOutput(logits=logits)

    model = Changed(tiny_model("llama").config)
    for name, number in numbers.items():
        setattr(model.config, name, number)
    return model


@pytest.mark.parametrize(
    ("change", "numbers", "head"),
    [
        (lambda model, x: x, {}, Head("lm_head")),
        (lambda model, x: x.float().contiguous(), {}, Head("lm_head")),
        (
            lambda model, x: x * model.config.my_logit_factor,
            {"my_logit_factor": 0.7},
            Head("lm_head", 0.7),
        ),
        (lambda model, x: x, {"my_logit_factor": 0.7}, Head("lm_head")),
        (
            lambda model, x: 9.0 * torch.tanh(0.5 * x / 9.0),
            {"logits_cap": 9.0, "logits_over": 2.0},
            Head("lm_head", 0.5, 9.0),
        ),
    ],
)
def test_scale_and_bound_are_found_by_their_effect(
    change: Change, numbers: dict[str, float], head: Head
) -> None:
    assert find_head(changed(change, **numbers)) == head


UNKNOWN: dict[str, Change] = {
    "a number that no field holds": lambda model, x: x / 2,
    "some tokens": lambda model, x: x.index_fill(-1, torch.tensor([3]), -1e9),
    "a bound for large values only": lambda model, x: x.clamp(max=80.0),
    "sums over the vocabulary": lambda model, x: x - x.mean(-1, keepdim=True),
    "sums over the tokens": lambda model, x: x + x.mean(1, keepdim=True),
    "fewer tokens": lambda model, x: x[..., :-1],
    "low precision": lambda model, x: x.bfloat16(),
    "an error": lambda model, x: x @ x,
    "the head twice": lambda model, x: model.lm_head(x[..., : model.config.hidden_size]),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_keeps_whole_logits_and_says_so(
    change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        assert find_head(changed(change)) is None
    assert "head of Changed cannot be applied in chunks" in caplog.text


def test_no_weight_is_read_and_nothing_stays_replaced() -> None:
    model = tiny_model("gemma2")
    expected = find_head(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)
    calls: list[int] = []
    for module in (model.model.layers[0], model.model, model.lm_head):
        module.register_forward_hook(lambda *_: calls.append(1))
    assert expected is not None and find_head(model) == expected
    assert not calls
    model.lm_head(torch.zeros(1, model.config.hidden_size))
    assert calls == [1]
    assert "forward" not in vars(model.model) and "forward" not in vars(model.lm_head)
