"""The head taken apart gives what the model itself gives, in values and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from hf_ebft.packed.forward import PackedForward
from hf_ebft.packed.heads import Head
from hf_ebft.packed.log_probs import packed_log_probs
from hf_ebft.packed.model_code import find_head
from hf_ebft.packed.sampling import Rollouts, make_generator, sample_rollouts
from hf_ebft.packed.verification import verify_packing
from tests.support.architectures import tiny_model
from tests.support.exactness import Case, lora_model, ragged_batch, row_log_probs, sample

CASE = Case(ragged_batch(33, 21), stride=6)


def without_head(forward: PackedForward) -> PackedForward:
    """The same, with whole logits."""
    return dataclasses.replace(forward, head=None)


def log_probs_and_gradients(
    model: nn.Module, forward: PackedForward, rollouts: Rollouts
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    found = packed_log_probs(
        model, forward, rollouts, temperature=0.7, with_document=True, chunk_size=9
    )
    weights = torch.linspace(-1, 1, found.rollout.numel()).view_as(found.rollout)
    loss = (weights * found.rollout)[rollouts.exists[:, None].expand_as(weights[..., 0])].sum()
    (loss + found.document.sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found.rollout.detach(), gradients


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gemma3_text", {"final_logit_softcapping": 2.0}),
        ("gemma3_text", {"final_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": 1.5}),
        ("cohere2", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("minicpm3", {}),
        ("opt", {}),
        ("phi", {}),  # a head with a bias
    ],
)
def test_head_in_chunks_is_the_model_s_own(architecture: str, overrides: dict[str, object]) -> None:
    model = tiny_model(architecture, **overrides)
    forward = PackedForward.for_model(model)
    assert forward.head is not None
    layout = CASE.layout()
    rollouts, _ = sample(model, forward, layout)
    found, gradients = log_probs_and_gradients(model, forward, rollouts)
    expected, expected_gradients = log_probs_and_gradients(model, without_head(forward), rollouts)
    exists = rollouts.exists[:, None].expand(found.shape[:3])
    torch.testing.assert_close(found[exists], expected[exists], atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m
        )
    # And the whole vocabulary, as the model itself returns it.
    with torch.no_grad():
        whole = row_log_probs(model, forward, rollouts)
        at_1 = packed_log_probs(
            model, forward, rollouts, temperature=1.0, with_document=False, chunk_size=9
        ).rollout
    picked = whole.gather(-1, rollouts.tokens[..., None])[..., 0]
    torch.testing.assert_close(at_1[exists], picked[exists], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_head_under_adapters(targets: str | list[str]) -> None:
    adapted = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    forward = PackedForward.for_model(adapted)
    assert forward.head is not None
    rollouts, _ = sample(adapted, forward, CASE.layout())
    found, gradients = log_probs_and_gradients(adapted, forward, rollouts)
    expected, expected_gradients = log_probs_and_gradients(adapted, without_head(forward), rollouts)
    exists = rollouts.exists[:, None].expand(found.shape[:3])
    torch.testing.assert_close(found[exists], expected[exists], atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4)


def test_model_is_as_it_was_afterwards() -> None:
    model = lora_model("llama")
    forward = PackedForward.for_model(model)
    assert forward.head is not None
    before = dict(vars(model.get_output_embeddings()))
    sample(model, forward, CASE.layout())
    assert vars(model.get_output_embeddings()) == before
    ids = torch.arange(5, 12)[None]
    assert model(input_ids=ids).logits.shape[:2] == (1, 7)


def test_a_forward_that_another_library_has_hooked_stays_hooked() -> None:
    model = tiny_model("llama")
    head = model.get_output_embeddings()
    called: list[int] = []
    original = head.forward

    def hooked(hidden: Tensor) -> Tensor:
        called.append(hidden.shape[0])
        return original(hidden)

    head.forward = hooked
    sample(model, PackedForward.for_model(model), CASE.layout())
    assert called and head.forward is hooked


def test_head_is_that_of_the_model_in_hand() -> None:
    """Not of the one that the recipe was read from: it may have been copied, or resized since."""
    forward = PackedForward.for_model(tiny_model("llama"))
    other = tiny_model("llama")
    expected, _ = sample(other, PackedForward.for_model(other), CASE.layout())
    found, _ = sample(other, forward, CASE.layout())
    assert torch.equal(found.tokens, expected.tokens)
    other.resize_token_embeddings(200)
    sample(other, forward, CASE.layout())


def test_head_that_is_not_called_is_noticed() -> None:
    model = tiny_model("llama")
    forward = PackedForward.for_model(model)
    head = model.lm_head
    model.forward = lambda **arguments: CausalLMOutput(
        logits=nn.functional.linear(model.model(arguments["input_ids"])[0], head.weight)
    )
    with pytest.raises(RuntimeError, match="did not call its own lm_head"):
        sample(model, forward, CASE.layout())


def test_unknown_steps_after_the_head_keep_whole_logits() -> None:
    parent = type(tiny_model("llama"))

    class Halved(parent):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            output = self.model(input_ids, attention_mask, position_ids, **kwargs)
            logits = self.lm_head(output.last_hidden_state)
            logits = logits / 2
            output.logits = logits
            return output

    model = Halved(tiny_model("llama").config).eval()
    assert find_head(model) is None
    forward = PackedForward.for_model(model)
    verify_packing(model, forward)
    assert find_head(tiny_model("llama")) is not None


def test_a_step_that_is_read_wrongly_is_refused_at_construction() -> None:
    """The self-test goes through the head, as training does."""
    model = tiny_model("llama")
    forward = PackedForward.for_model(model)
    wrong = Head(forward.head.name, scale=0.5)
    with pytest.raises(ValueError, match="other log-probabilities on a packed row"):
        verify_packing(model, dataclasses.replace(forward, head=wrong))


def test_sampling_never_makes_more_than_a_chunk_of_logits() -> None:
    """And draws the same whatever the chunk: random numbers go row by row."""
    model = tiny_model("llama")
    forward = PackedForward.for_model(model)
    rows: list[int] = []
    model.lm_head.register_forward_hook(
        lambda _module, _args, output: rows.append(output.numel() // output.shape[-1])
    )
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: (
        rows.append(hidden.numel() // hidden.shape[-1]) or original(hidden)
    )
    drawn = []
    for chunk_size in (3, 1000):
        rows.clear()
        generator = make_generator(torch.device("cpu"), 5)
        drawn.append(
            sample_rollouts(
                model,
                forward,
                CASE.layout(),
                temperature=1.0,
                top_p=1.0,
                chunk_size=chunk_size,
                generator=generator,
            ).tokens
        )
        if chunk_size == 3:
            inside = [count for count in rows if count <= 3]
            assert len(inside) > 10
    assert torch.equal(*drawn)
