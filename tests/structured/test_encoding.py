"""Token ids of prompts and ground truths: TRL's for the prompt, the policy's for the truth."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ebft.structured.encoding import ExampleEncoder, text_of
from tests.support.tiny_structured import RecordedEBFT, config, policy, rows, tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def encode(prompt, truth, **settings):
    (example,) = ExampleEncoder(tokenizer(), **settings).encode([prompt], [truth])
    return example


def shown(ids):
    return tokenizer().decode(list(ids))


def end_of_turn():
    return tokenizer().convert_tokens_to_ids("<|end|>")


def test_text_is_prompt_then_ground_truth_then_end_of_sequence():
    tokens = tokenizer()
    example = encode("def f(", "x): pass")
    assert list(example.prompt_ids) == tokens("def f(")["input_ids"]
    assert list(example.truth_ids) == [*tokens("x): pass")["input_ids"], tokens.eos_token_id]
    assert example.is_target == (True,) * len(example.truth_ids)


def test_seam_is_where_the_policy_has_it():
    """Joint tokenization merges over the seam, and the prompt would lose its last token."""
    tokens = tokenizer()
    prompt, truth = "  ", "  x"
    together = tokens(prompt + truth)["input_ids"]
    apart = tokens(prompt)["input_ids"]
    assert together[: len(apart)] != apart  # or this would test nothing
    example = encode(prompt, truth)
    assert list(example.prompt_ids) == apart
    assert shown(example.prompt_ids + example.truth_ids[:-1]) == prompt + truth


def test_end_of_sequence_is_not_doubled():
    example = encode("a", "b<eos>")
    assert example.truth_ids.count(tokenizer().eos_token_id) == 1


def test_chat_ends_with_its_end_of_turn_and_without_what_the_template_puts_after_it():
    example = encode([user("hi")], [assistant("hello")], eos_token_ids=[end_of_turn()])
    assert shown(example.prompt_ids) == "<|user|>hi<|end|>\n<|assistant|>"
    assert shown(example.truth_ids) == "hello<|end|>"
    as_text = encode([user("hi")], "hello", eos_token_ids=[end_of_turn()])
    assert as_text == example


def test_chat_rendered_to_text_ends_like_the_chat():
    """A policy ends its reply with the end of turn; EOS would be a last token it never writes."""
    settings = {"eos_token_ids": [end_of_turn()]}
    chat = encode([user("hi")], "hello", **settings)
    rendered = tokenizer().apply_chat_template(
        [user("hi")], tokenize=False, add_generation_prompt=True
    )
    assert encode(rendered, "hello", **settings) == chat
    assert encode(rendered, "hello<|end|>\n", **settings) == chat
    # Where sampling does not stop there, a completion goes on to EOS.
    assert encode(rendered, "hello").truth_ids[-1] == tokenizer().eos_token_id
    # A text that is no chat ends with EOS.
    assert encode("hi", "hello", **settings).truth_ids[-1] == tokenizer().eos_token_id


def test_prompt_ids_are_those_that_trl_feeds_to_the_policy(tmp_path):
    """The one place where TRL's tokenization is repeated; this fails when TRL's moves."""
    from datasets import Dataset

    chats = Dataset.from_dict(
        {"prompt": [[user(f"say {n}")] for n in range(4)], "ground_truth": ["one"] * 4}
    )
    for data in (rows(4), chats):
        trainer = RecordedEBFT(
            policy(),
            config(tmp_path, max_steps=1),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        trainer.train()
        ours = {
            example.prompt_ids
            for example in trainer.reward.encoder.encode(data["prompt"], data["ground_truth"])
        }
        theirs = {prompt for prompt, _, _ in trainer.seen[0]}
        assert theirs and theirs <= ours


def test_first_end_token_is_the_end():
    """Phi's template writes `<|end|>` and `<|endoftext|>`; completions stop at the first."""
    template = tokenizer().chat_template.replace("<|end|>\n", "<|end|>\n<eos>")
    settings = {
        "eos_token_ids": [end_of_turn()],
        "chat_template_kwargs": {"chat_template": template},
    }
    example = encode([user("hi")], [assistant("hello")], **settings)
    assert shown(example.truth_ids) == "hello<|end|>"
    assert example.is_target == (True,) * len(example.truth_ids)
    truth = [assistant("one"), user("more"), assistant("two")]
    example = encode([user("count")], truth, **settings)
    pairs = list(zip(example.truth_ids, example.is_target, strict=True))
    assert shown(t for t, target in pairs if target) == "one<|end|>two<|end|>"
    as_text = encode("hi", "hello<|end|>\n<eos>", eos_token_ids=[end_of_turn()])
    assert shown(as_text.truth_ids) == "hello<|end|>"


@pytest.mark.parametrize(
    ("prompt", "truth"),
    [
        ("say", "a <eos> b and more"),
        ([user("say")], "a <eos> b and more"),
        ([user("say")], [assistant("a <eos> b and more")]),
        ([user("say")], [assistant("a<eos>b"), user("c"), assistant("d")]),
    ],
)
def test_ground_truth_that_goes_on_after_an_end_token_is_refused(prompt, truth):
    """Its tail was lost without a word: no completion can write it."""
    with pytest.raises(ValueError, match=r"continues after '<eos>', but every completion ends"):
        encode(prompt, truth)


def test_several_turns_leave_the_users_out_of_the_targets():
    truth = [assistant("one"), user("more"), assistant("two")]
    example = encode([user("count")], truth, eos_token_ids=[end_of_turn()])
    expected = "one<|end|>\n<|user|>more<|end|>\n<|assistant|>two<|end|>"
    assert shown(example.truth_ids) == expected
    pairs = list(zip(example.truth_ids, example.is_target, strict=True))
    assert shown(t for t, target in pairs if target) == "one<|end|>two<|end|>"


def test_replies_take_turns_with_the_users_messages():
    """Prompts of multi-turn rollouts: all messages of the user, and a list of replies."""
    replies = encode([user("count"), user("more")], ["one", "two"], eos_token_ids=[end_of_turn()])
    truth = [assistant("one"), user("more"), assistant("two")]
    assert replies == encode([user("count")], truth, eos_token_ids=[end_of_turn()])


def test_equal_neighbours_are_encoded_once():
    encoder = ExampleEncoder(tokenizer())
    first, second, third = encoder.encode(["a", "a", "b"], ["c", "c", "c"])
    assert first is second
    assert third is not first


def test_tokenizer_that_puts_a_space_before_every_text():
    """SentencePiece models: the ground truth alone would begin with a space that is not there."""
    vocabulary = {"<eos>": 0, "▁": 1, "\n": 2, "a": 3, "b": 4, "▁a": 5, "▁b": 6}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert tokens("b")["input_ids"] == [6]
    (example,) = ExampleEncoder(tokens).encode(["a"], ["b"])
    assert (example.prompt_ids, example.truth_ids) == ((5,), (4, 0))
    assert tokens.decode([5, 4]) == "ab"


@pytest.mark.parametrize(
    ("prompt", "truth", "message"),
    [
        ("a", None, "is None; it must be a text"),
        ("a", 3, "is 3; it must be a text"),
        ("a", [], r"is \[\]; it must be a text"),
        ("a", [assistant("b")], "is a text, but its ground truth is a list"),
        ([user("a")], [assistant("b"), user("c")], "must end with one of the assistant"),
    ],
)
def test_ground_truth_that_cannot_be_encoded_is_refused(prompt, truth, message):
    with pytest.raises(ValueError, match=message):
        encode(prompt, truth)


def test_template_that_rewrites_the_prompt_is_refused():
    tokens = tokenizer()
    template = "{{ messages|length }}" + tokens.chat_template
    encoder = ExampleEncoder(tokens, chat_template_kwargs={"chat_template": template})
    with pytest.raises(ValueError, match="changes earlier messages"):
        encoder.encode([[user("a")]], ["b"])


def test_template_options_are_used():
    template = tokenizer().chat_template + "{% if opened %}<|system|>{% endif %}"
    options = {"chat_template": template, "opened": True}
    with pytest.raises(ValueError, match="changes earlier messages"):
        encode([user("a")], "b", chat_template_kwargs=options)
    assert encode([user("a")], "b", chat_template_kwargs=options | {"opened": False})


def test_tokenizer_without_end_of_sequence_is_refused():
    without = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match="no eos_token"):
        ExampleEncoder(without)
    with pytest.raises(TypeError, match="needs the policy's tokenizer"):
        ExampleEncoder(object())


def test_text_for_tables():
    assert text_of("a") == "a"
    assert text_of([assistant("a"), user("b")]) == "a\nb"
    assert text_of(["a", "b"]) == "a\nb"
