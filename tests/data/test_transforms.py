"""Transforms of data sets: what each makes of a row, and what it says of rows it cannot use."""

import ast
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from hf_ebft.data import (
    TRANSFORMS,
    BadRowError,
    answer_start,
    chat,
    join_thinking,
    prompt_completion,
    question_answer,
    raw_text,
    reasoning,
    render_prompt,
    split_thinking,
    tokenize_and_cut,
    tokenize_prompt_completion,
    transform_rows,
    translation,
)
from tests.support.tiny import tiny_tokenizer

datasets = pytest.importorskip("datasets")

TOKENIZER = tiny_tokenizer(eos_token="<eos>")
CHAT_TOKENIZER = tiny_tokenizer(eos_token="<end>", bos_token="<bos>")
CHAT_TOKENIZER.chat_template = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
USER_2 = {"role": "user", "content": "And?"}
REPLY_2 = {"role": "assistant", "content": "Bye"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- Questions and translations ------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, "Add {1}"),
        ({"prompt_template": "Q: {input} ({domain})\nA: {{}}"}, "Q: Add {1} (maths)\nA: {}"),
        ({"chat": True}, [{"role": "user", "content": "Add {1}"}]),
        (
            {"chat": True, "system_prompt": "Be brief.", "prompt_template": "{input}!"},
            [SYSTEM, {"role": "user", "content": "Add {1}!"}],
        ),
    ],
)
def test_questions_with_answers(settings: dict[str, Any], prompt: Any) -> None:
    row = {"id": 7, "input": "Add {1}", "output": "2", "domain": "maths"}
    assert question_answer(row, **settings) == {"prompt": prompt, "ground_truth": "2"}


def test_columns_have_other_names() -> None:
    row = {"q": "1 + 1", "a": "2"}
    settings = {"question_column": "q", "answer_column": "a"}
    assert question_answer(row, **settings) == {"prompt": "1 + 1", "ground_truth": "2"}


def test_translations() -> None:
    row = {"translation": {"de": "Guten Tag", "en": "Good day"}}
    assert translation(row, source="de", target="en") == {
        "prompt": "Translate this from German to English:\nGerman: Guten Tag\nEnglish:",
        "ground_truth": " Good day",
    }
    settings: dict[str, Any] = {"chat": True, "prompt_template": "In {target_language}: {source}"}
    assert translation(row, source="en", target="de", **settings) == {
        "prompt": [{"role": "user", "content": "In German: Good day"}],
        "ground_truth": "Guten Tag",
    }


def test_a_language_without_name_gets_one() -> None:
    row = {"pair": {"xx": "a", "en": "b"}}
    settings: dict[str, Any] = {"source": "xx", "target": "en", "translation_column": "pair"}
    with pytest.raises(ValueError, match="name of the language 'xx' is unknown"):
        translation(row, **settings)
    made = translation(row, languages={"xx": "Xish"}, **settings)
    assert made["prompt"].startswith("Translate this from Xish to English:\nXish: a")


# ---- Chats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "prompt", "ground_truth"),
    [
        ("first", [SYSTEM, USER], "Hello"),
        ("last", [SYSTEM, USER, REPLY, USER_2], "Bye"),
        ("all", [SYSTEM, USER, USER_2], ["Hello", "Bye"]),
    ],
)
@pytest.mark.parametrize("trailing", [[], [{"role": "user", "content": "Wait"}]])
def test_turns_of_a_chat(turn: Any, prompt: Any, ground_truth: Any, trailing: list[Any]) -> None:
    row = {"messages": [SYSTEM, USER, REPLY, USER_2, REPLY_2, *trailing]}
    assert chat(row, turn=turn) == {"prompt": prompt, "ground_truth": ground_truth}


def test_other_names_of_roles() -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    made = chat(row, messages_column="conversations")
    assert made == {"prompt": [USER], "ground_truth": "Hello"}


@pytest.mark.parametrize("separate", [False, True])
def test_thinking_in_chats_is_stripped_or_kept_by_choice(separate: bool) -> None:
    def reply(answer: str) -> dict[str, str]:
        if separate:
            return {"role": "assistant", "content": answer, "reasoning_content": "Hm."}
        return {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\n{answer}"}

    row = {"messages": [USER, reply("Hello"), USER_2, reply("Bye")]}
    with pytest.raises(ValueError, match=r"contains thinking, .* set thinking='strip'"):
        chat(row)
    kept, stripped = chat(row, thinking="keep"), chat(row, thinking="strip")
    # Earlier replies lose it either way, as chat templates do it.
    assert kept["prompt"] == stripped["prompt"] == [USER, REPLY, USER_2]
    assert (kept["ground_truth"], kept["embed_thinking"]) == (
        "<think>\nHm.\n</think>\n\nBye",
        True,
    )
    assert (stripped["ground_truth"], stripped["embed_thinking"]) == ("Bye", False)
    everything = chat(row, turn="all", thinking="keep")
    assert everything["ground_truth"] == [
        "<think>\nHm.\n</think>\n\nHello",
        "<think>\nHm.\n</think>\n\nBye",
    ]
    with pytest.raises(ValueError, match="have thinking before each reply"):
        chat(row, turn="all", thinking="strip")


# ---- Thinking -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("42", (None, "42")),
        ("<think>\nsix sevens\n</think>\n\n42", ("six sevens", "42")),
        ("six sevens</think>42", ("six sevens", "42")),
        ("<think>\n\n</think>\n\n42", ("", "42")),
        ("<think>a</think>b<think>c</think>42", ("a</think>b<think>c", "42")),
    ],
)
def test_thinking_is_told_from_the_answer(text: str, parts: tuple[str | None, str]) -> None:
    assert split_thinking(text) == parts


@pytest.mark.parametrize("text", ["<think>on and on", "<think>a</think>b<think>c"])
def test_thinking_without_end_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ends within its thinking"):
        split_thinking(text)


@given(st.text(), st.text(min_size=1).map(str.strip).filter(bool))
def test_what_is_joined_is_split_again(thought: str, answer: str) -> None:
    if "think>" not in thought + answer:
        assert split_thinking(join_thinking(thought, answer)) == (thought.strip(), answer)


def test_reasoning_is_stripped_or_kept() -> None:
    row = {"prompt": "6 * 7", "ground_truth": "<think>sevens</think>\n42"}
    assert reasoning(row, thinking="strip") == {
        "prompt": "6 * 7",
        "ground_truth": "42",
        "embed_thinking": False,
    }
    kept = reasoning(row, thinking="keep")
    assert kept["ground_truth"] == "<think>\nsevens\n</think>\n\n42" and kept["embed_thinking"]
    apart = {"prompt": [USER], "answer": "42", "why": "sevens"}
    columns = {"answer_column": "answer", "thinking_column": "why"}
    assert reasoning(apart, thinking="keep", **columns) == kept | {"prompt": [USER]}
    plain = {"prompt": "6 * 7", "ground_truth": "42"}
    assert reasoning(plain, thinking="strip")["ground_truth"] == "42"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("42", "42"),
        ("<think>sevens</think>\n\n42<eos>", "42<eos>"),
        ("<think>a</think> <think>b</think>42", "42"),
        ("<think>on and on", ""),
        ("<think>a</think> b <think>c", ""),
        ("<think>a</think>", ""),
    ],
)
def test_answers_are_found_in_tokens(completion: str, answer: str) -> None:
    """Whatever the tags are tokenized as; here a byte or two at a time."""
    prompt, ids = (TOKENIZER(text).input_ids for text in ("6 * 7 =", completion))
    start = answer_start(prompt, ids, TOKENIZER)
    assert TOKENIZER.decode(ids[start:]) == answer


def test_a_prompt_may_open_the_thinking() -> None:
    prompt = TOKENIZER("6 * 7 =<think>\n").input_ids
    closed = TOKENIZER("6 * 7 =<think></think>\n").input_ids
    ids = TOKENIZER("sevens, so</think>42").input_ids
    assert TOKENIZER.decode(ids[answer_start(prompt, ids, TOKENIZER) :]) == "42"
    unfinished = TOKENIZER("sevens, so").input_ids
    assert answer_start(prompt, unfinished, TOKENIZER) == len(unfinished)
    assert answer_start(closed, unfinished, TOKENIZER) == 0


# ---- Rows that cannot be used -----------------------------------------------------------------

GERMAN = partial(translation, source="de", target="en")


@pytest.mark.parametrize(
    ("transform", "row", "message"),
    [
        (
            question_answer,
            {"input": None, "output": "b"},
            "Row 3: column 'input' contains a None",
        ),
        (question_answer, {"input": "a", "output": " "}, "Row 3: column 'output' is blank"),
        (question_answer, {"input": "a", "output": 2}, "Row 3: column 'output' contains a int"),
        (GERMAN, {"translation": {"de": "a"}}, "'en' of column 'translation' is missing; .* de"),
        (GERMAN, {"translation": {"de": "a", "en": None}}, "'en' of .* contains a NoneType"),
        (GERMAN, {"translation": "a"}, "Row 3: column 'translation' contains a str"),
        (chat, {"messages": []}, "Row 3: column 'messages' contains no list"),
        (chat, {"messages": [USER]}, "Row 3: .* contains no reply of the assistant"),
        (chat, {"messages": [REPLY]}, "Row 3: .* no message of the user before the last reply"),
        (chat, {"messages": ["Hi"]}, "Row 3: message 0 .* is a str"),
        (chat, {"messages": [USER, {"role": "tool", "content": "x"}]}, "message 1 .* role 'tool'"),
        (
            chat,
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "message 1 .* no text",
        ),
        (
            partial(chat, turn="all"),
            {"messages": [USER, USER_2, REPLY]},
            "roles user, user, assistant; for turn='all'",
        ),
        (
            partial(chat, thinking="strip"),
            {"messages": [USER, {"role": "assistant", "content": "<think>a"}]},
            "Row 3: message 1 .* ends within its thinking",
        ),
        (
            partial(reasoning, thinking="keep"),
            {"prompt": "a", "ground_truth": "b"},
            "Row 3: column 'ground_truth' has no thinking to keep",
        ),
        (
            partial(reasoning, thinking="strip"),
            {"prompt": "a", "ground_truth": "<think>b</think>"},
            "Row 3: column 'ground_truth' has no answer",
        ),
        (
            partial(reasoning, thinking="strip", thinking_column="why"),
            {"prompt": "a", "ground_truth": "<think>b</think>c", "why": "d"},
            "Row 3: thinking is in 'ground_truth' and in 'why'",
        ),
    ],
)
def test_bad_rows_are_named(transform: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        transform(row, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: question_answer({"q": "a"}, 0), "Row 0 has no column 'input'; it has 'q'"),
        (
            lambda: question_answer({"input": "a", "output": "b"}, prompt_template="Q: {}"),
            "must contain names of columns in braces",
        ),
        (
            lambda: question_answer({"input": "a", "output": "b"}, prompt_template="{x.y}"),
            "must contain names of columns",
        ),
        (
            lambda: question_answer({"input": "a", "output": "b"}, system_prompt="s"),
            "system_prompt needs chat=True",
        ),
        (lambda: question_answer({"input": ["a"], "output": ["b"]}), "leave batched=False"),
        (lambda: chat({"messages": [[USER, REPLY]]}), "leave batched=False"),
        (lambda: chat({"messages": [USER, REPLY]}, turn="second"), "turn='second' is unknown"),  # type: ignore[arg-type]
        (lambda: translation({}, source="de", target="de"), "are both 'de'"),
        (
            lambda: translation(
                {"translation": {"de": "a", "en": "b"}},
                source="de",
                target="en",
                prompt_template="{text}",
            ),
            r"contains \{text\}, which is unknown",
        ),
        (lambda: reasoning({}, thinking="drop"), "thinking='drop' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_do_not_fit_are_no_bad_rows(call: Callable[[], Any], message: str) -> None:
    """So that leaving out bad rows cannot hide a wrong name of a column."""
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert not isinstance(caught.value, BadRowError)


# ---- Whole data sets --------------------------------------------------------------------------

ROWS = [{"input": f"q{n}", "output": None if n % 3 == 1 else f"a{n}", "n": n} for n in range(7)]
GOOD = [{"prompt": f"q{n}", "ground_truth": f"a{n}"} for n in (0, 2, 3, 5, 6)]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_bad_rows_are_left_out_and_counted(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadRowError, match="Row 1: column 'output'"):
        list(transform_rows(kind(ROWS), question_answer))
    with caplog.at_level(logging.WARNING):
        made = transform_rows(kind(ROWS), question_answer, bad_rows="skip")
    assert list(made) == GOOD
    assert "2 of 7 rows were left out. Row 1: column 'output' contains a NoneType" in caplog.text
    caplog.clear()
    assert list(transform_rows(kind(ROWS[2:4]), question_answer, bad_rows="skip")) == GOOD[1:3]
    assert caplog.text == ""


def test_data_sets_without_a_usable_row_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows to transform"):
        transform_rows([], question_answer)
    with pytest.raises(ValueError, match=r"None of 1 rows can be used\. Row 0: column 'output'"):
        transform_rows([ROWS[1]], question_answer, bad_rows="skip")
    with pytest.raises(ValueError, match="no column 'question'"):
        transform_rows(ROWS, question_answer, bad_rows="skip", question_column="question")
    with pytest.raises(ValueError, match="bad_rows='drop' is unknown"):
        transform_rows(ROWS, question_answer, bad_rows="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "rows", "settings"),
    [
        ("question_answer", [{"input": "a", "output": "b"}], {"chat": True}),
        (
            "translation",
            [{"translation": {"de": "a", "en": "b"}}],
            {"source": "de", "target": "en"},
        ),
        ("chat", [{"messages": [SYSTEM, USER, REPLY, USER_2, REPLY_2]}], {"turn": "all"}),
        ("reasoning", [{"prompt": "a", "ground_truth": "b"}], {"thinking": "strip"}),
    ],
)
def test_every_transform_works_in_dataset_map(
    name: str, rows: list[Any], settings: dict[str, Any]
) -> None:
    """Straight through Arrow, which fills columns of structs and has types of its own."""
    data = datasets.Dataset.from_list(rows * 3)
    transform = TRANSFORMS[name]
    plain = data.map(transform, fn_kwargs=settings, remove_columns=data.column_names)
    expected = [transform(row, **settings) for row in rows * 3]
    assert list(plain) == list(transform_rows(data, transform, **settings)) == expected


def test_examples_of_the_documentation_are_true() -> None:
    """Every call in docs/data.md that is followed by its result as a comment."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    checked = 0
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        known: dict[str, Any] = dict(TRANSFORMS)
        for code, result in re.findall(r"((?:^[^#\n].*\n)+)((?:^#.*\n)+)", block, flags=re.M):
            if not result.startswith("# {"):
                continue
            *before, call = ast.parse(code).body
            exec(compile(ast.Module(before, []), "data.md", "exec"), known)
            assert isinstance(call, ast.Expr)
            made = eval(compile(ast.Expression(call.value), "data.md", "eval"), known)
            assert made == ast.literal_eval(result.replace("#", "")), code
            checked += 1
    assert checked == 6


# ---- Tokens for strided mode --------------------------------------------------------------------


def test_raw_text_in_dataset_map_is_what_is_cut_at_once(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["import os\n" * 20, "", "x", "def f():\n    return 1\n" * 9]
    settings = {"sequence_len": 32, "min_length": 8}
    data = datasets.Dataset.from_dict({"text": texts, "n": range(4)})
    with caplog.at_level(logging.INFO):
        made = data.map(
            raw_text,
            batched=True,
            batch_size=2,
            remove_columns=data.column_names,
            fn_kwargs={"tokenizer": TOKENIZER, **settings},
        )
    rows = tokenize_and_cut(texts, TOKENIZER, **settings)
    assert made["input_ids"] == [rows[n]["input_ids"].tolist() for n in range(len(rows))]
    assert "1 empty documents skipped" in caplog.text and "too short for a block" in caplog.text
    nothing = raw_text({"text": ["x", ""]}, tokenizer=TOKENIZER, **settings)
    assert nothing == {"input_ids": []}


def test_raw_text_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no column 'text', only 'body'"):
        raw_text({"body": ["a"]}, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"needs a batch; call dataset\.map with batched=True"):
        raw_text({"text": "a"}, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="contains a NoneType in row 1"):
        raw_text({"text": ["a", None]}, tokenizer=TOKENIZER)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("sequence_len", [24, 512])
def test_prompts_are_masked_as_in_one_go(bos: bool, sequence_len: int) -> None:
    tokenizer = tiny_tokenizer(eos_token="<eos>", bos_token="<bos>")
    if bos:
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    pairs = [("2 + 2 = ", "4, which is the sum of two and two"), ("x", "y" * 30)]
    rows = tokenize_prompt_completion(
        pairs, tokenizer, sequence_len=sequence_len, min_length=1, min_completion=1
    )
    for number, (prompt, completion) in enumerate(pairs):
        row = {"prompt": prompt, "completion": completion}
        made = prompt_completion(row, tokenizer=tokenizer, sequence_len=sequence_len)
        assert made == {name: ids.tolist() for name, ids in rows[number].items()}


def test_chat_prompts_follow_the_template() -> None:
    """Once with BOS, although template and tokenizer both write it."""
    CHAT_TOKENIZER._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", CHAT_TOKENIZER.bos_token_id)]
    )
    row = {"prompt": [USER, REPLY, USER_2], "completion": "Bye"}
    made = prompt_completion(row, tokenizer=CHAT_TOKENIZER, min_completion=1)
    whole = "<bos>[user]Hi<end>[assistant]Hello<end>[user]And?<end>[assistant]Bye<end>"
    assert CHAT_TOKENIZER.decode(made["input_ids"]) == whole
    learned = [label for label in made["labels"] if label != -100]
    assert CHAT_TOKENIZER.decode(learned) == "Bye<end>"
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt([USER], TOKENIZER, "The prompt")


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "a"}, ValueError, "Row 2 has no column 'completion'"),
        ({"prompt": "a", "completion": ""}, BadRowError, "Row 2: column 'completion' contains no"),
        ({"prompt": 3, "completion": "b"}, BadRowError, "Row 2: column 'prompt' contains a int"),
        (
            {"prompt": "abc " * 30, "completion": "b" * 9},
            BadRowError,
            "0 of 10 completion tokens fit",
        ),
    ],
)
def test_pairs_that_do_not_fit(row: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prompt_completion(row, 2, tokenizer=TOKENIZER, sequence_len=32)
