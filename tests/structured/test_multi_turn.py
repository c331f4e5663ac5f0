"""Chats of several turns: every reply continues what the same completion has said before."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

from hf_ebft.data import chat
from hf_ebft.structured.multi_turn import (
    ChatLayout,
    MultiTurnRollouts,
    generate_on_server,
    generate_with_trainer,
    split_turns,
    unfold,
)

# The first user is greeted, the last asked to be answered: what templates do at the two ends.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<hello>{% endif %}[{{ m.role }}]{{ m.content }}<end>"
    "\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(300, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id
TRAINER = SimpleNamespace(processing_class=TOKENIZER, chat_template=None, chat_template_kwargs={})
# A group of three, then one of two with other lengths: no two completions of a group say the same.
CHATS = [[user("One"), user("Two"), user("Three")]] * 3 + [[SYSTEM, user("Uno"), user("Due")]] * 2


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


class Talker:
    """Replies with a number drawn from its whole context; remembers what it was asked."""

    def __init__(self, finished: bool = True, logprobs: bool = True) -> None:
        self.asked: list[list[list[int]]] = []
        self.finished, self.logprobs = finished, logprobs
        self.count = 0

    def __call__(self, prompt_ids: list[list[int]], trainer: Any) -> tuple[Any, Any]:
        self.asked.append(prompt_ids)
        replies = [self.reply(ids) for ids in prompt_ids]
        return replies, [[-float(t) for t in ids] for ids in replies] if self.logprobs else None

    def reply(self, ids: list[int]) -> list[int]:
        self.count += 1
        text = f"{sum(ids) % 997} in reply {self.count}"
        return ids_of(text) + ([END] if self.finished else [])


def plain_loop(talker: Talker) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """The chats one turn after another, as text: prompt, then pieces with their masks.

    The talker numbers its replies in the order of the batch: turn by turn.
    """
    numbers: dict[tuple[int, int], int] = {}
    for turn in range(3):
        for index, messages in enumerate(CHATS):
            if turn < sum(message["role"] == "user" for message in messages):
                numbers[index, turn] = len(numbers) + 1
    for index, messages in enumerate(CHATS):
        questions = [m["content"] for m in messages if m["role"] == "user"]
        system = "[system]Be brief.<end>\n" if messages[0] is SYSTEM else ""
        prompt = f"<hello>{system}[user]{questions[0]}<end>\n[assistant]"
        text, pieces = prompt, []
        for turn in range(len(questions)):
            reply = f"{sum(ids_of(text)) % 997} in reply {numbers[index, turn]}"
            pieces.append((reply + ("<end>" if talker.finished else ""), 1))
            if turn + 1 < len(questions):
                ended = "" if talker.finished else "<end>"
                pieces.append((f"{ended}\n[user]{questions[turn + 1]}<end>\n[assistant]", 0))
            text = prompt + "".join(piece for piece, _ in pieces)
        yield prompt, pieces


@pytest.mark.parametrize("finished", [True, False])
def test_every_turn_continues_its_own_completion(finished: bool) -> None:
    """Against a plain loop over completions and turns.

    Follow-ups looked up by group, not by completion, gave the completions of a group each other's
    histories, and those after the first group the wrong chat altogether.
    """
    talker = Talker(finished)
    output = MultiTurnRollouts(talker)(CHATS, TRAINER)
    for index, (prompt, pieces) in enumerate(plain_loop(talker)):
        assert TOKENIZER.decode(output["prompt_ids"][index]) == prompt
        tokens = [(token, mask) for piece, mask in pieces for token in ids_of(piece)]
        assert output["completion_ids"][index] == [token for token, _ in tokens]
        assert output["env_mask"][index] == [mask for _, mask in tokens]
        expected = [-float(token) if mask else 0.0 for token, mask in tokens]
        assert output["logprobs"][index] == expected
    completions = [tuple(ids) for ids in output["completion_ids"]]
    assert len(set(completions)) == len(CHATS), "nothing told the completions of a group apart"
    assert output["rollout_prompt_ids"] == output["prompt_ids"]
    assert output["completion_mask"] == output["env_mask"]


def test_turns_are_sampled_in_batches() -> None:
    talker = Talker()
    MultiTurnRollouts(talker)(CHATS, TRAINER)
    assert [len(asked) for asked in talker.asked] == [5, 5, 3]


def test_processes_sample_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose chats are over keeps taking part while another's go on; what it samples is lost."""
    alone = MultiTurnRollouts(Talker())(CHATS[3:], TRAINER)
    monkeypatch.setattr("hf_ebft.structured.multi_turn.gather_object", lambda mine: [*mine, 4])
    talker = Talker()
    assert MultiTurnRollouts(talker)(CHATS[3:], TRAINER) == alone
    assert [len(asked) for asked in talker.asked] == [2, 2, 1, 1]


def test_a_server_may_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the same call that single turns use, with the tokens that a completion may have."""
    asked = []

    class Server:
        def sample(self, prompt_ids: Any, max_tokens: int, trainer: Any) -> list[Any]:
            asked.append(max_tokens)
            replies, logprobs = Talker()(prompt_ids, trainer)
            pairs = zip(map(tuple, replies), map(tuple, logprobs), strict=True)
            return [SimpleNamespace(token_ids=ids, log_probs=ps) for ids, ps in pairs]

    server: Any = Server()
    trainer = SimpleNamespace(**vars(TRAINER), completion_budget=17, max_completion_length=17)
    output = MultiTurnRollouts(generate_on_server(server))(CHATS[3:], trainer)
    assert asked == [17, 17]
    assert [len(ids) for ids in output["completion_ids"]] == [len(p) for p in output["logprobs"]]


def test_a_generator_may_have_no_log_probs() -> None:
    assert MultiTurnRollouts(Talker(logprobs=False))(CHATS, TRAINER)["logprobs"] is None


def test_a_single_turn_is_an_ordinary_completion() -> None:
    output = MultiTurnRollouts(Talker())([[SYSTEM, user("Hi")]], TRAINER)
    assert TOKENIZER.decode(output["prompt_ids"][0]).endswith("[user]Hi<end>\n[assistant]")
    assert set(output["env_mask"][0]) == {1}


def test_replies_that_stand_in_the_prompt_stay() -> None:
    """A gap is where one message of the user follows another."""
    prompt = [user("a"), assistant("b"), user("c"), user("d")]
    assert split_turns(prompt) == [prompt[:3], prompt[3:]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("text", "need prompts of chat messages"),
        ([], "need prompts of chat messages"),
        ([user("a"), assistant("b")], "ends with a message of the assistant"),
    ],
)
def test_prompts_without_a_due_reply_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTurnRollouts(Talker())([prompt], TRAINER)


def test_a_template_that_hides_replies_is_refused() -> None:
    layout = ChatLayout(TOKENIZER, template="{{ messages[-1].content }}")
    with pytest.raises(ValueError, match="does not render every reply"):
        layout.separator([user("a"), user("b")], 0)


def test_a_template_may_change_earlier_replies() -> None:
    """Qwen3's does: it shows an empty thought in the last reply and not in earlier ones."""
    template = TEMPLATE.replace(
        "[{{ m.role }}]",
        "[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}",
    )
    layout = ChatLayout(TOKENIZER, template=template)
    separator = layout.separator([user("a"), user("b")], 0)
    assert TOKENIZER.decode(separator) == "<end>\n[user]b<end>\n[assistant]"


@pytest.mark.parametrize(
    ("replies", "logprobs", "message"),
    [
        ([[1]], None, "1 replies for 5 chats"),
        ([[1]] * 4 + [[]], None, "without any token"),
        ([[1]] * 5, [[0.0]] * 4 + [[0.0, 0.0]], "do not match"),
    ],
)
def test_generators_that_lose_something_are_refused(
    replies: Any, logprobs: Any, message: str
) -> None:
    rollouts = MultiTurnRollouts(lambda prompt_ids, trainer: (replies, logprobs))
    with pytest.raises(ValueError, match=message):
        rollouts(CHATS, TRAINER)


def test_ground_truths_unfold_to_the_chat_they_come_from() -> None:
    messages = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]
    row = chat({"messages": messages}, turn="all")
    start, rest = unfold(row["prompt"], row["ground_truth"])
    assert start + rest == messages and start == messages[:2]
    with pytest.raises(ValueError, match="2 turn"):
        unfold(row["prompt"], ["b"])


# ---- With TRL's trainer --------------------------------------------------------------------------


def make_trainer(folder: Path, rollouts: Any, reward: Any, **settings: Any) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        learning_rate=1e-2,
        logging_steps=1,
        **settings,
    )
    rows = [{"prompt": [user("One"), user("Two")]}, {"prompt": [SYSTEM, user("Uno"), user("Due")]}]
    return GRPOTrainer(
        tiny_llama(vocabulary=len(TOKENIZER)),
        reward_funcs=reward,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows * 2),
        processing_class=make_tokenizer(),
        rollout_func=rollouts,
    )


def test_greedy_replies_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """With a model: token by token, one chat at a time, no cache and no padding."""
    trainer = make_trainer(
        tmp_path, MultiTurnRollouts(), lambda completions, **_: [0.0] * len(completions),
        generation_kwargs={"do_sample": False},
    )  # fmt: skip
    prompts = [[user("One"), user("Two")], [SYSTEM, user("A longer one"), user("Due"), user("Tre")]]
    output = MultiTurnRollouts()(prompts, trainer)
    model = trainer.model.eval()

    def greedy(text_ids: list[int]) -> list[int]:
        reply: list[int] = []
        while len(reply) < 6 and reply[-1:] != [END]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text_ids + reply])).logits
            reply.append(int(logits[0, -1].argmax()))
        return reply

    for index, prompt in enumerate(prompts):
        questions = [m["content"] for m in prompt if m["role"] == "user"]
        ids = list(output["prompt_ids"][index])
        expected: list[int] = []
        for question in questions[1:]:
            reply = greedy(ids + expected)
            ended = "" if reply[-1] == END else "<end>"
            expected += reply + ids_of(f"{ended}\n[user]{question}<end>\n[assistant]")
        expected += greedy(ids + expected)
        assert output["completion_ids"][index] == expected


def test_a_step_of_training_learns_replies_only(tmp_path: Path) -> None:
    """Through TRL: the loss has no gradient from the user's turns, rewards get what they need."""
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(columns, completion_ids=completion_ids)
        return [float(len(set(ids))) + index for index, ids in enumerate(completion_ids)]

    trainer = make_trainer(tmp_path, MultiTurnRollouts(), reward)
    batches: list[dict[str, Any]] = []
    inner = trainer._compute_loss

    def record(model: Any, inputs: dict[str, Any]) -> Any:
        batches.append(inputs)
        return inner(model, inputs)

    trainer._compute_loss = record  # type: ignore[method-assign]
    trainer.train()
    (batch,) = batches
    for row, (ids, mask) in enumerate(
        zip(seen["completion_ids"], seen["completion_mask"], strict=True)
    ):
        assert len(ids) == len(mask) and set(mask) == {0, 1}
        assert "[user]" in TOKENIZER.decode([t for t, m in zip(ids, mask, strict=True) if not m])
        assert batch["tool_mask"][row, : len(mask)].tolist() == mask
        assert TOKENIZER.decode(seen["rollout_prompt_ids"][row]).endswith("[assistant]")


def test_trl_still_has_the_method_that_continues_token_ids(tmp_path: Path) -> None:
    """It is private to TRL; if this fails, see how `GRPOTrainer._tool_call_loop` samples now."""
    trainer = make_trainer(tmp_path, None, lambda completions, **_: [0.0] * len(completions))
    contexts = [ids_of("a"), ids_of("a longer one")]
    replies, logprobs = generate_with_trainer(contexts, trainer)
    assert len(replies) == 2 and logprobs is None
    assert all(1 <= len(reply) <= 6 for reply in replies)
