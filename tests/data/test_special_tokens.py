"""Special tokens around texts: one BOS, and rows that end as the chat template ends a reply."""

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_ebft.data import (
    encode_text,
    prompt_completion,
    tokenize_and_cut,
    tokenize_prompt_completion,
)
from hf_ebft.data.special_tokens import Endings
from tests.support.tiny import tiny_tokenizer

REPLY = "Hello"
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


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_2 = (  # no generation prompt, and a reply ends with EOS
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (  # no special token at all
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
TEMPLATES: dict[str, tuple[str, dict[str, str], str]] = {
    "gemma": (GEMMA, {"start": "<start_of_turn>", "end": "<end_of_turn>"}, "<end_of_turn>"),
    "chatml": (CHATML, {"start": "<|im_start|>", "end": "<|im_end|>"}, "<|im_end|>"),
    "llama-3": (
        LLAMA_3,
        {"start": "<|start|>", "stop": "<|stop|>", "end": "<|eot_id|>"},
        "<|eot_id|>",
    ),
    "phi-3": (PHI_3, {"end": "<|end|>", "user": "<|user|>", "me": "<|assistant|>"}, "<|end|>"),
    "llama-2": (LLAMA_2, {}, " <eos>"),
    "alpaca": (ALPACA, {}, "<eos>"),
}


def by_name(name: str, **settings: Any) -> tuple[Any, str]:
    """A tokenizer with this model family's template, and the text that ends a reply there."""
    template, added, end = TEMPLATES[name]
    return chat_tokenizer(template, **added, **settings), end


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("rendered", [False, True])
@pytest.mark.parametrize("already_ended", [False, True])
def test_a_chat_ends_as_its_template_ends_a_reply(
    name: str, rendered: bool, already_ended: bool
) -> None:
    """For prompts as messages and as text, for completions with and without their end."""
    tokenizer, end = by_name(name)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": REPLY}], tokenize=False
    )
    tail = whole[whole.index(REPLY) + len(REPLY) :]
    completion = REPLY + tail if already_ended else REPLY
    row = {"prompt": text if rendered else CHAT, "completion": completion}
    made = prompt_completion(row, tokenizer=tokenizer, min_completion=1)
    learned = [label for label in made["labels"] if label != -100]
    # Where nothing but space ends a reply, space is text.
    ended = completion + end if name == "alpaca" else REPLY + end
    assert learned == tokenizer(ended, add_special_tokens=False).input_ids
    rows = tokenize_prompt_completion(
        [(text, completion)], tokenizer, sequence_len=64, min_length=1, min_completion=1
    )
    assert {key: ids.tolist() for key, ids in rows[0].items()} == made


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_document_that_is_a_chat_keeps_its_end(name: str) -> None:
    tokenizer, end = by_name(name, adds_bos=False)
    text = tokenizer.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": REPLY}], tokenize=False
    )
    (row,) = tokenize_and_cut([text], tokenizer, sequence_len=64, min_length=1)
    ids = row["input_ids"].tolist()
    expected = tokenizer(REPLY + end, add_special_tokens=False).input_ids
    if name != "alpaca":  # it has no mark of its own, so the text ends like any other
        assert ids[-len(expected) :] == expected
    assert ids[-1] != ids[-2]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_no_chat_ends_with_one_eos(name: str) -> None:
    tokenizer, _ = by_name(name)
    for completion in ("4", "4<eos>"):
        made = prompt_completion(
            {"prompt": "2 + 2 =", "completion": completion}, tokenizer=tokenizer, min_completion=1
        )
        assert made["labels"][-2:] == tokenizer("4<eos>", add_special_tokens=False).input_ids
        (row,) = tokenize_and_cut([completion], tokenizer, sequence_len=9, min_length=1)
        assert row["input_ids"].tolist() == tokenizer("4<eos>").input_ids


def test_a_template_that_cannot_lay_out_a_reply_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = chat_tokenizer("{{ raise_exception('only tools') }}")
    row = {"prompt": "2 + 2 =", "completion": "4"}
    made = prompt_completion(row, tokenizer=tokenizer, min_completion=1)
    assert made["labels"][-1] == tokenizer.eos_token_id
    assert "cannot render a question with a reply (only tools)" in caplog.text


def test_a_template_is_looked_at_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of `dataset.map` must not cost three renderings and a list of special tokens."""
    tokenizer = gemma()
    made = []
    build = Endings.__init__
    monkeypatch.setattr(
        Endings, "__init__", lambda self, tokenizer: (made.append(1), build(self, tokenizer))[1]
    )
    row = {"prompt": CHAT, "completion": REPLY}
    ends = [
        prompt_completion(row, tokenizer=tokenizer, min_completion=1)["labels"][-1]
        for _ in range(3)
    ]
    assert len(made) == 1
    tokenizer.chat_template = GEMMA.replace("<end_of_turn>", "<eos>")
    ends.append(prompt_completion(row, tokenizer=tokenizer, min_completion=1)["labels"][-1])
    assert len(made) == 2
    assert tokenizer.convert_ids_to_tokens(ends) == ["<end_of_turn>"] * 3 + ["<eos>"]
