"""Special tokens around texts: one BOS, and rows that end as the chat template ends a reply."""

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_ebft.data import (
    encode_text,
    prompt_completion,
    tokenize_and_cut,
    tokenize_prompt_completion,
)
from tests.support.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


def chat_tokenizer(template: str, *, adds_bos: bool = True, **added: str) -> Any:
    """A tokenizer with this chat template, with EOS `<eos>` and these further special tokens."""
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer(bos_token="<bos>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(added.values())})
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    return tokenizer


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma() -> Any:
    """Gemma's layout: turns end with a token that is not the EOS token."""
    return chat_tokenizer(GEMMA, start="<start_of_turn>", end="<end_of_turn>")


def test_a_rendered_prompt_has_one_bos() -> None:
    """As the template tokenizes it itself; the tokenizer puts BOS before any text."""
    tokenizer = gemma()
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(
        CHAT, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert expected.count(tokenizer.bos_token_id) == 1
    assert encode_text(rendered, tokenizer) == expected

    pair = {"prompt": rendered, "completion": "Hello"}
    made = prompt_completion(pair, tokenizer=tokenizer, min_completion=1)
    assert made["input_ids"][: len(expected)] == expected
    assert made["labels"] == [-100] * len(expected) + made["input_ids"][len(expected) :]
    rows = tokenize_prompt_completion(
        [(rendered, "Hello")], tokenizer, sequence_len=64, min_length=1, min_completion=1
    )
    assert rows[0]["input_ids"][: len(expected)].tolist() == expected

    # Where a later row begins with a BOS of the text's own, there is no second one either.
    pieces = tokenize_and_cut([rendered * 2], tokenizer, sequence_len=len(expected), min_length=4)
    assert [row["input_ids"].tolist() for row in pieces] == [expected, expected[:-1]]


def test_a_text_without_bos_is_encoded_as_the_tokenizer_does() -> None:
    tokenizer = gemma()
    for text in ("", "Hi", "Hi<bos>"):
        assert encode_text(text, tokenizer) == tokenizer(text).input_ids
    bare = chat_tokenizer(GEMMA, adds_bos=False)
    assert encode_text("<bos>Hi", bare) == bare("<bos>Hi").input_ids
    doubled = bare("<bos><bos>Hi").input_ids  # this text's own affair: nothing adds one
    assert encode_text("<bos><bos>Hi", bare) == doubled
