"""Data sets that structured mode takes, and what it says about those it cannot."""

import copy
import logging

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import processors

from hf_ebft.structured.datasets import REFUSED_COLUMNS
from hf_ebft.structured.encoding import ExampleEncoder
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_structured import (
    RecordedEBFT,
    assert_advantages,
    config,
    expected_advantages,
    policy,
    rows,
    tokenizer,
)


def build(folder, data, *, evaluation=None, tokens=None, **settings):
    return RecordedEBFT(
        policy(),
        config(folder, **({"max_steps": 1} | settings)),
        train_dataset=data,
        eval_dataset=evaluation,
        processing_class=tokenizer() if tokens is None else tokens,
    )


def test_list_of_rows_trains_like_a_dataset(tmp_path):
    trainer = build(tmp_path, rows().to_list(), evaluation=rows(2).to_list())
    trainer.train()
    seen = trainer.seen[0]
    assert_advantages(seen, expected_advantages(policy(), seen, rows(), n_samples=4))
    assert trainer.evaluate(rows(2).to_list())["eval_ebft/alignment"] == pytest.approx(
        trainer.evaluate()["eval_ebft/alignment"]
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train_dataset is empty"),
        (Dataset.from_dict({"prompt": [], "ground_truth": []}), "train_dataset is empty"),
        (IterableDataset.from_generator(lambda: iter(())), "train_dataset is an empty stream"),
        ([{"prompt": "a", "ground_truth": "b"}, "c"], "train_dataset: row 1 is a str"),
        (
            [{"prompt": "a", "ground_truth": "b"}, {"prompt": "\ud83d", "ground_truth": "b"}],
            "row 1, 'prompt': .* a lone surrogate",
        ),
        (
            [{"prompt": [{"role": "user", "content": "\ude00"}], "ground_truth": "b"}],
            "row 0, 'prompt': .* a lone surrogate",
        ),
        (
            [{"prompt": "a", "ground_truth": "b"}, {"prompt": 3, "ground_truth": "b"}],
            "every column needs one type",
        ),
        ("data.json", "train_dataset is a str; give a datasets.Dataset"),
    ],
)
def test_data_that_holds_no_rows_is_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, data)


@pytest.mark.parametrize(
    ("column", "value"), [("ground_truth", None), ("prompt", None)], ids=["truth", "prompt"]
)
def test_rows_without_one_of_the_two_are_found_before_training(tmp_path, column, value):
    """They raised when they were drawn, which may be after hours."""
    data = rows(9).to_list()
    data[3][column] = data[8][column] = value
    message = rf"train_dataset: 2 of 9 rows have no text .*'{column}': 3, 8 \(row 3 has None\)"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, data)
    with pytest.raises(ValueError, match="eval_dataset: 2 of 9 rows"):
        build(tmp_path, rows(), evaluation=data)
    kept = Dataset.from_list(data).filter(lambda row: row[column])
    assert len(build(tmp_path, kept).train_dataset) == 7


def test_empty_lists_of_messages_are_found_too(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    data = [{"prompt": chat, "ground_truth": "b"}] * 4 + [{"prompt": [], "ground_truth": "b"}]
    with pytest.raises(ValueError, match=r"1 of 5 rows .*'prompt': 4 \(row 4 has \[\]\)"):
        build(tmp_path, data)


def test_empty_evaluation_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] is empty"):
        build(tmp_path, rows(), evaluation={"a": rows(2), "b": []})


def test_chats_without_a_template_are_refused_before_the_first_step(tmp_path):
    chats = [{"prompt": [{"role": "user", "content": "a"}], "ground_truth": "b"} for _ in range(8)]
    tokens = copy.deepcopy(tokenizer())  # which is shared
    build(tmp_path, chats, tokens=tokens)  # with a template they are taken
    tokens.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.* Use a chat model"):
        build(tmp_path, chats, tokens=tokens)
    build(tmp_path, rows(), tokens=tokens)  # text needs none


def test_fewer_prompts_than_one_generation_batch_are_refused(tmp_path):
    """TRL made no step, and the script said where the model is."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    with pytest.raises(ValueError, match=r"7 prompts, but one generation batch needs 8: .*=32"):
        build(tmp_path, rows(7), **settings)
    with pytest.raises(ValueError, match="one generation batch needs 16"):
        build(tmp_path, rows(8), generation_batch_size=64)
    trainer = build(tmp_path, rows(8), **settings)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("column", REFUSED_COLUMNS)
def test_columns_that_cannot_be_honoured_are_refused(tmp_path, column):
    """`completion_mask` of a dataset was taken for the mask of a multi-turn rollout."""
    with pytest.raises(ValueError, match=rf"the column '{column}' .*Remove or rename it"):
        build(tmp_path, rows().add_column(column, [[1, 1]] * 8))


def with_bos():
    """Puts a BOS before every text, as the tokenizers of Llama and Gemma do."""
    tokens = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")
    assert tokens.bos_token_id is not None
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokens.bos_token_id)]
    )
    assert tokens("a").input_ids[0] == tokens.bos_token_id
    return tokens


@pytest.mark.parametrize("kind", [list, Dataset, IterableDataset])
def test_rendered_prompt_gets_one_bos(tmp_path, kind):
    """`apply_chat_template(tokenize=False)` begins with BOS, and the tokenizer put a second one."""
    data = [row | {"prompt": "<bos>" + row["prompt"]} for row in rows().to_list()]
    if kind is not list:
        data = Dataset.from_list(data)
    if kind is IterableDataset:
        data = data.to_iterable_dataset()
    tokens = with_bos()
    trainer = build(tmp_path, data, tokens=tokens, evaluation=rows(2))
    trainer.train()
    plain = {tuple(tokens(row["prompt"]).input_ids) for row in rows()}
    seen = {prompt for prompt, _, _ in trainer.seen[0]}
    assert seen and seen <= plain


def test_reward_alone_notes_a_second_bos_once(caplog):
    """There TRL makes the prompt's ids, so the reward can only say so."""
    encoder = ExampleEncoder(with_bos())
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        encoder.encode(["a", "<bos>b", "<bos>c"], ["d"] * 3)
    assert len(caplog.messages) == 1 and "'<bos>b' begins with BOS" in caplog.messages[0]


@pytest.mark.parametrize("kind", [list, IterableDataset])
def test_tokenizer_with_bos_leaves_other_prompts_alone(tmp_path, kind):
    chats = [
        {"prompt": [{"role": "user", "content": f"say {n}"}], "ground_truth": "it"}
        for n in range(8)
    ]
    tokens = with_bos()
    tokens.chat_template = tokenizer().chat_template
    data = chats if kind is list else Dataset.from_list(chats).to_iterable_dataset()
    trainer = build(tmp_path, data, tokens=tokens)
    assert [row["prompt"] for row in trainer.train_dataset] == [row["prompt"] for row in chats]
    plain = rows() if kind is list else rows().to_iterable_dataset()
    trainer = build(tmp_path, plain, tokens=tokens)
    assert [row["prompt"] for row in trainer.train_dataset] == rows()["prompt"][:]


def test_missing_prompt_is_named_with_a_tokenizer_that_adds_bos(tmp_path):
    data = [{"prompt": prompt, "ground_truth": "a"} for prompt in ("b", None)]
    with pytest.raises(ValueError, match=r"1 of 2 rows .*'prompt': 1 \(row 1 has None\)"):
        build(tmp_path, data, tokens=with_bos())
    stream = Dataset.from_list(data).to_iterable_dataset()  # whose rows are seen when drawn
    trainer = build(tmp_path, stream, tokens=with_bos())
    with pytest.raises(ValueError, match="prompt with the ground truth 'a' is a NoneType"):
        trainer.train()


def test_empty_prompt_is_named_before_anything_is_sampled(tmp_path):
    data = Dataset.from_dict({"prompt": [""] * 8, "ground_truth": ["found it"] * 8})
    trainer = build(tmp_path, data)
    with pytest.raises(ValueError, match="prompt '' with the ground truth 'found it' has no token"):
        trainer.train()
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]] * 8})
    chats = chats.add_column("ground_truth", ["b"] * 8).to_list()
    stream = Dataset.from_list([row | {"prompt": []} for row in chats]).to_iterable_dataset()
    with pytest.raises(ValueError, match="is an empty list"):
        build(tmp_path, stream).train()


def test_lone_surrogate_in_a_stream_is_named(tmp_path):
    def stream():
        for number in range(8):
            yield {"prompt": f"say {number} \ud83d", "ground_truth": "b"}

    trainer = build(tmp_path, IterableDataset.from_generator(stream))
    with pytest.raises(ValueError, match=r"prompt 'say \d .*' .*a lone surrogate"):
        trainer.train()


def test_prompt_with_an_image_is_refused(tmp_path):
    content = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is it?"}]
    prompt = [{"role": "user", "content": content}]
    trainer = build(tmp_path, [{"prompt": prompt, "ground_truth": "b"}] * 8)
    with pytest.raises(ValueError, match=r"contains a part of type 'image'.*reads text only"):
        trainer.train()


def test_ids_beyond_the_embedding_are_named(tmp_path):
    tokens = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
    tokens.add_tokens(["<new>", "<newer>", "<newest>"] + [f"<n{n}>" for n in range(20)])
    data = Dataset.from_dict({"prompt": ["a <n19>"] * 8, "ground_truth": ["b"] * 8})
    trainer = build(tmp_path, data, tokens=tokens)
    with pytest.raises(ValueError, match=r"prompt 'a <n19>' has the token '<n19>' \(id \d+\)"):
        trainer.train()
