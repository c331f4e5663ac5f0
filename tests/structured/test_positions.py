"""What a sequence is worth does not depend on its batch mates: positions, and limits of length."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from hf_ebft.structured.sequence_features import SequenceFeatureNetwork, TokenSequence
from tests.support.tiny_structured import (
    RecordedEBFT,
    config,
    plain_feature,
    policy,
    rows,
    tokenizer,
)

VOCABULARY = len(tokenizer())


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=48,
            n_embd=16,
            n_layer=4,
            n_head=2,
            initializer_range=0.4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def gpt_neo():
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=48,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global"], 2]],
            initializer_range=0.4,
        )
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=48,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            init_std=0.4,
            dropout=0.0,
        )
    )


def xglm():
    return XGLMForCausalLM(
        XGLMConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=48,
            d_model=16,
            ffn_dim=24,
            num_layers=2,
            attention_heads=2,
            init_std=0.4,
            dropout=0.0,
        )
    )


def llama(**rope):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=rope.pop("positions", 64),
            rope_parameters=rope,
            initializer_range=0.4,
        )
    )


def dynamic():
    """Rescales beyond 24 tokens."""
    return llama(rope_type="dynamic", factor=4.0, rope_theta=10_000.0, positions=24)


def longrope():
    """Other frequencies beyond 24 tokens."""
    return llama(
        rope_type="longrope",
        rope_theta=10_000.0,
        short_factor=[1.0] * 4,
        long_factor=[4.0, 9.0, 16.0, 25.0],
        original_max_position_embeddings=24,
        factor=4.0,
    )


def build(folder, model, data=None, **settings):
    return RecordedEBFT(
        model,
        config(folder, **({"max_steps": 1} | settings)),
        train_dataset=rows() if data is None else data,
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("make", [gpt2, gpt_neo, opt, xglm, policy])
def test_log_probs_in_the_loss_are_those_of_the_sequence_alone(tmp_path, make):
    """TRL pads on the left; absolute positions were those of the padded row."""
    torch.manual_seed(0)
    trainer = build(tmp_path, make())
    model = trainer.model.eval()
    sequences = [([5, 6], [7, 8, 9]), ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14]), ([9], [8, 7, 6])]
    width = max(len(prompt) for prompt, _ in sequences)
    ids = [[0] * (width - len(prompt)) + prompt + rest for prompt, rest in sequences]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt + rest) for prompt, rest in sequences]
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            model, torch.tensor(ids), torch.tensor(mask), 3
        )
        for row, (prompt, rest) in enumerate(sequences):
            logits = model(torch.tensor([prompt + rest])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(rest)[:, None])[:, 0]
            torch.testing.assert_close(found[row], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_feature_is_that_of_the_sequence_alone_or_refused(make):
    """A long sequence changed the features of a short one in its batch by up to 0.998."""
    model = make().eval()
    network = SequenceFeatureNetwork(
        model,
        feature_layers=(0.25, 0.5, 0.75),
        embed_method="last_token",
        normalization="per_layer",
        batch_tokens=1000,
    )
    short, within = TokenSequence((5, 6, 7), (8, 9)), TokenSequence(tuple(range(1, 21)), (8, 9))
    found = network.embed([short, within])
    for row, sequence in enumerate((short, within)):
        expected = plain_feature(model, sequence.prompt_ids, sequence.completion_ids)
        np.testing.assert_allclose(found[row].numpy(), expected, atol=2e-5)
    # The danger is real: beside a longer row the same tokens mean something else.
    beyond = TokenSequence(tuple(range(1, 41)), (8, 9))
    width = len(beyond)
    ids = torch.zeros(2, width, dtype=torch.long)
    ids[0, : len(short)] = torch.tensor(short.prompt_ids + short.completion_ids)
    ids[1] = torch.tensor(beyond.prompt_ids + beyond.completion_ids)
    with torch.no_grad():
        beside = model(ids, use_cache=False).logits[0, len(short) - 1]
        alone = make().eval()(ids[:1, : len(short)], use_cache=False).logits[0, -1]
    assert (beside - alone).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"has 42 tokens, but .* beyond 24 tokens"):
        network.embed([short, beyond])


@pytest.mark.parametrize("make", [dynamic, longrope, gpt2])
def test_rows_beyond_a_models_positions_are_refused_before_sampling(tmp_path, make):
    """GPT-2 raised an IndexError in the middle of sampling."""
    long = Dataset.from_dict({"prompt": ["x y " * 30] * 8, "ground_truth": ["z"] * 8})
    trainer = build(tmp_path, make(), long)
    with pytest.raises(ValueError, match=r"longest prompt with a completion of full length has"):
        trainer.train()
    long = Dataset.from_dict({"prompt": ["x"] * 8, "ground_truth": ["z w " * 40] * 8})
    trainer = build(tmp_path, make(), long)
    with pytest.raises(ValueError, match=r"longest prompt with its ground truth has .* beyond"):
        trainer.train()
    fitting = Dataset.from_dict({"prompt": ["x y", "x"] * 4, "ground_truth": ["z w", "z"] * 4})
    build(tmp_path, make(), fitting, ce_coef=0.1).train()
    with pytest.raises(ValueError, match="completion of full length"):
        build(tmp_path, make(), fitting, pad_to_multiple_of=32).train()
