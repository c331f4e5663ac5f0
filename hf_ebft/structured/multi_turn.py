"""Chats of several turns: every reply is generated on top of the replies generated before it.

A prompt holds the user's messages of the whole chat and no reply between them:

    [system, user, user, user]          three turns: a reply is due after each message of the user

(`hf_ebft.data.chat` with `turn="all"` makes such prompts.) The rollout reads them as

    prompt_ids       system, first message of the user, start of the assistant's turn
    completion_ids   reply 1 | separator | reply 2 | separator | reply 3
    env_mask         1 1 1 1   0 0 0 0 0   1 1 1 1   0 0 0 0 0   1 1 1 1

where a separator ends the assistant's turn, holds the next message of the user and starts the
assistant's next turn. Separators are not sampled, so they carry no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from accelerate.utils import gather_object

from hf_ebft.structured.trl_internals import sample_replies

if TYPE_CHECKING:
    from hf_ebft.structured.vllm.rollouts import VLLMRollouts

Message = Mapping[str, Any]
# Stands for a reply when a chat template is asked what surrounds one.
_PLACEHOLDER = "placeholder-of-a-reply"


class TurnGenerator(Protocol):
    """Samples one reply for each context, in the order given."""

    def __call__(
        self, prompt_ids: list[list[int]], trainer: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Token ids of the replies (with the token that ends them, if sampled) and log-probs."""
        ...


class Chat(NamedTuple):
    """A chat as token ids.

    Attributes:
        prompt_ids: up to where the first reply starts.
        completion_ids: replies and separators.
        mask: 1 on the tokens of replies, 0 on separators; as long as `completion_ids`.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]


def split_turns(prompt: Sequence[Message]) -> list[list[Message]]:
    """What is said before each reply: a reply is due after a user's message that another follows.

    Args:
        prompt: messages of a chat, at least one of the user at the end.

    Raises:
        ValueError: text in place of messages, or a prompt that does not end with the user.
    """
    if isinstance(prompt, str) or not prompt:
        raise ValueError(
            "Multi-turn rollouts need prompts of chat messages, not text; hf_ebft.data.chat with "
            "turn='all' makes them."
        )
    if prompt[-1]["role"] != "user":
        raise ValueError(
            f"A prompt ends with a message of the {prompt[-1]['role']}; it has to end with the "
            "user, whom the last reply answers."
        )
    turns: list[list[Message]] = [[]]
    for message in prompt:
        said = turns[-1]
        if said and said[-1]["role"] == "user" and message["role"] == "user":
            turns.append([])
        turns[-1].append(message)
    return turns


def unfold(
    prompt: Sequence[Message], replies: Sequence[str]
) -> tuple[list[Message], list[Message]]:
    """A prompt of several turns and its replies, as what comes before the first reply and the rest.

    The rest takes turns: reply, user, reply, ...; it is TRL's form of a conversational completion.

    Raises:
        ValueError: not one reply for each turn.
    """
    turns = split_turns(prompt)
    if len(replies) != len(turns):
        raise ValueError(
            f"A prompt of {len(turns)} turn(s) has {len(replies)} replies in its ground truth; "
            "there has to be one for each."
        )
    rest: list[Message] = []
    for said, reply in zip([[], *turns[1:]], replies, strict=True):
        rest += [*said, {"role": "assistant", "content": reply}]
    return turns[0], rest


@dataclass(frozen=True)
class ChatLayout:
    """Where the turns of a chat stand among its tokens, by the tokenizer's chat template.

    Args:
        tokenizer: with a chat template, unless `template` is one.
        template: a template in place of the tokenizer's own.
        template_settings: keyword arguments of the template (`enable_thinking`, for example).
    """

    tokenizer: Any
    template: str | None = None
    template_settings: Mapping[str, Any] = field(default_factory=dict)

    def start(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids up to where the first reply starts."""
        return self._encode(self._render(split_turns(prompt)[0]))

    def separator(self, prompt: Sequence[Message], turn: int) -> list[int]:
        """Token ids between reply `turn` (from 0) and the next: end of turn, user, start of turn.

        The template lays out the chat with a placeholder for every reply, so that what it does at
        the first or last message is as in the real chat.

        Raises:
            ValueError: a template that does not show replies as they are.
        """
        messages: list[Message] = []
        for said in split_turns(prompt)[: turn + 2]:
            if messages:
                messages.append({"role": "assistant", "content": _PLACEHOLDER})
            messages += said
        text = self._render(messages)
        if text.count(_PLACEHOLDER) != turn + 1:
            raise ValueError(
                "The chat template does not show every reply once and as it is, so there is no "
                "telling what stands between two turns; use another template."
            )
        return self._encode(text.rpartition(_PLACEHOLDER)[2])

    @staticmethod
    def append_reply(chat: Chat, reply_ids: Sequence[int]) -> None:
        """Add a reply to a chat."""
        chat.completion_ids.extend(reply_ids)
        chat.mask.extend([1] * len(reply_ids))

    def append_separator(self, chat: Chat, prompt: Sequence[Message], turn: int) -> int:
        """Add what follows reply `turn`; returns the number of tokens added.

        A reply that was cut before its end is ended here, by tokens that carry no loss.
        """
        separator = self.separator(prompt, turn)
        if chat.completion_ids[-1:] == separator[:1]:  # the reply has ended the turn itself
            separator = separator[1:]
        chat.completion_ids.extend(separator)
        chat.mask.extend([0] * len(separator))
        return len(separator)

    def _render(self, messages: Sequence[Message]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
            **self.template_settings,
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


class MultiTurnRollouts:
    """`rollout_func` of TRL's `GRPOTrainer` for chats of several turns.

        EBFTGRPOTrainer(..., rollout_func=MultiTurnRollouts())

    All chats of a batch take their first turn together, then those that go on their second, and so
    on. Every completion has a history of its own, whatever the others of its group have said.

    A turn may be as long as a whole completion of one turn (`max_completion_length`). A reply
    that reaches that length is cut, the separator ends it, and the chat goes on.

    Args:
        generate: samples one reply for each context; all processes call it together. Default: what
            the trainer itself samples with (transformers, or TRL's vLLM). For rollouts from a stock
            vLLM server: `generate_on_server`.
    """

    def __init__(self, generate: TurnGenerator | None = None) -> None:
        self.generate = generate_with_trainer if generate is None else generate

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Generate every turn of every chat.

        Args:
            prompts: (B * n) chats, each repeated for the n completions of its group.
            trainer: the trainer that asks.

        Returns:
            `prompt_ids`, `completion_ids`, `logprobs` (None where the generator has none; 0
            on separators) and `env_mask`, as TRL wants them. TRL keeps these from reward
            functions, so there is also `rollout_prompt_ids` and `completion_mask` with the same
            contents, which reach them as columns.

        Raises:
            ValueError: a prompt without messages, or a generator that does not return one reply for
                each context.
        """
        layout = ChatLayout(
            trainer.processing_class, trainer.chat_template, trainer.chat_template_kwargs
        )
        n_turns = [len(split_turns(prompt)) for prompt in prompts]
        chats = [Chat(layout.start(prompt), [], []) for prompt in prompts]
        logprobs: list[list[float]] | None = [[] for _ in prompts]
        # Processes sample together (sharded weights, a server that is sent new ones), so all take
        # as many turns as the longest chat of any has.
        for turn in range(max(gather_object([max(n_turns)]))):
            unfinished = [index for index, count in enumerate(n_turns) if count > turn]
            for index in unfinished if turn else []:
                added = layout.append_separator(chats[index], prompts[index], turn - 1)
                if logprobs is not None:
                    logprobs[index] += [0.0] * added
            contexts = [
                chats[index].prompt_ids + chats[index].completion_ids for index in unfinished
            ]
            # Processes whose chats are finished sample once more, to keep in step; the reply is
            # discarded.
            replies, reply_logprobs = self.generate(contexts or [chats[0].prompt_ids], trainer)
            _check_replies(replies, reply_logprobs, len(contexts) or 1)
            if reply_logprobs is None:
                logprobs = None
            for position, index in enumerate(unfinished):
                layout.append_reply(chats[index], replies[position])
                if logprobs is not None and reply_logprobs is not None:
                    logprobs[index] += reply_logprobs[position]
        prompt_ids, mask = [chat.prompt_ids for chat in chats], [chat.mask for chat in chats]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [chat.completion_ids for chat in chats],
            "logprobs": logprobs,
            "env_mask": mask,
            "rollout_prompt_ids": prompt_ids,
            "completion_mask": mask,
        }


def generate_with_trainer(
    prompt_ids: list[list[int]], trainer: Any
) -> tuple[list[list[int]], list[list[float]] | None]:
    """One reply for each context, by whatever a TRL trainer samples with."""
    return sample_replies(trainer, prompt_ids)


def generate_on_server(rollouts: VLLMRollouts) -> TurnGenerator:
    """One reply for each context, by a stock vLLM server.

        args = EBFTGRPOConfig(vllm_lora_sync=True, ...)
        rollout_func = MultiTurnRollouts(generate_on_server(VLLMRollouts(args)))

    Args:
        rollouts: from the server; its prefetching is for single turns and is not used.
    """

    def generate(
        prompt_ids: list[list[int]], trainer: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        # Imported when there is a server: it brings its client along.
        from hf_ebft.structured.vllm.trainer_options import get_max_tokens

        completions = rollouts.sample(prompt_ids, get_max_tokens(trainer), trainer)
        ids = [list(completion.token_ids) for completion in completions]
        return ids, [list(completion.log_probs) for completion in completions]

    return generate


def _check_replies(
    replies: list[list[int]], logprobs: list[list[float]] | None, n_contexts: int
) -> None:
    if len(replies) != n_contexts:
        raise ValueError(f"The generator returned {len(replies)} replies for {n_contexts} chats.")
    if any(not reply for reply in replies):
        raise ValueError("The generator returned a reply without any token, not even an EOS.")
    if logprobs is not None and [len(one) for one in logprobs] != [len(one) for one in replies]:
        raise ValueError("The generator returned log-probs that do not match its replies' tokens.")
