"""Rollouts of chats with several turns: every reply follows the replies generated before it.

A prompt contains the user's messages of the whole chat, without replies between them:

    [system, user, user, user]          three turns: a reply follows each message of the user

(`hf_ebft.data.chat` with `turn="all"` makes such prompts.) A rollout has the form

    prompt_ids       system, first message of the user, start of the assistant's turn
    completion_ids   reply 1 | separator | reply 2 | separator | reply 3
    env_mask         1 1 1 1   0 0 0 0 0   1 1 1 1   0 0 0 0 0   1 1 1 1

A separator ends the assistant's turn, contains the next message of the user, and starts the
assistant's next turn. Separators are not sampled, so they have no loss.
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
# Replaces a reply to find the text that a chat template writes around it.
_PLACEHOLDER = "placeholder-of-a-reply"


class TurnGenerator(Protocol):
    """Samples one reply for each context, in the given order."""

    def __call__(
        self, prompt_ids: list[list[int]], trainer: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Token ids of the replies (including a sampled end token), and their log-probs."""
        ...


class Chat(NamedTuple):
    """A chat as token ids.

    Attributes:
        prompt_ids: tokens before the first reply.
        completion_ids: replies and separators.
        mask: 1 on the tokens of replies, 0 on separators; as long as `completion_ids`.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]


def split_turns(prompt: Sequence[Message]) -> list[list[Message]]:
    """Split a prompt into the messages before each reply; every turn ends with a user's message.

    Args:
        prompt: messages of a chat; the last one must be the user's.

    Raises:
        ValueError: the prompt is text, or does not end with a message of the user.
    """
    if isinstance(prompt, str) or not prompt:
        raise ValueError(
            "Multi-turn rollouts need prompts of chat messages, not text; hf_ebft.data.chat with "
            "turn='all' makes them."
        )
    if prompt[-1]["role"] != "user":
        raise ValueError(
            f"A prompt ends with a message of the {prompt[-1]['role']}, but the last reply must "
            "follow a message of the user; cut the prompt after its last user message."
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
    """Split a prompt of several turns and its replies into the first context and the rest.

    The rest alternates: reply, user, reply, ... This is TRL's form of a conversational completion.

    Raises:
        ValueError: the number of replies is not that of the turns.
    """
    turns = split_turns(prompt)
    if len(replies) != len(turns):
        raise ValueError(
            f"A prompt of {len(turns)} turn(s) has {len(replies)} replies in its ground truth; "
            "give one reply for each turn."
        )
    rest: list[Message] = []
    for said, reply in zip([[], *turns[1:]], replies, strict=True):
        rest += [*said, {"role": "assistant", "content": reply}]
    return turns[0], rest


@dataclass(frozen=True)
class ChatLayout:
    """Computes the tokens around the replies of a chat, with the tokenizer's chat template.

    Args:
        tokenizer: the policy's tokenizer; it needs a chat template unless `template` is given.
        template: a template to use instead of the tokenizer's.
        template_settings: keyword arguments of the template (such as `enable_thinking`).
    """

    tokenizer: Any
    template: str | None = None
    template_settings: Mapping[str, Any] = field(default_factory=dict)

    def start(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids before the first reply."""
        return self._encode(self._render(split_turns(prompt)[0]))

    def separator(self, prompt: Sequence[Message], turn: int) -> list[int]:
        """Token ids between reply `turn` (from 0) and the next: end of turn, user, start of turn.

        The chat is rendered with a placeholder for every reply, so that special cases of the
        template for first and last messages are as in the real chat.

        Raises:
            ValueError: the template changes or omits replies.
        """
        messages: list[Message] = []
        for said in split_turns(prompt)[: turn + 2]:
            if messages:
                messages.append({"role": "assistant", "content": _PLACEHOLDER})
            messages += said
        text = self._render(messages)
        if text.count(_PLACEHOLDER) != turn + 1:
            raise ValueError(
                "The chat template does not render every reply once and unchanged, so the text "
                "between two turns is unknown; use another template."
            )
        return self._encode(text.rpartition(_PLACEHOLDER)[2])

    @staticmethod
    def append_reply(chat: Chat, reply_ids: Sequence[int]) -> None:
        """Add a reply to a chat."""
        chat.completion_ids.extend(reply_ids)
        chat.mask.extend([1] * len(reply_ids))

    def append_separator(self, chat: Chat, prompt: Sequence[Message], turn: int) -> int:
        """Add the separator after reply `turn`; returns the number of tokens added.

        If the reply was cut before its end, tokens without loss end it here.
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

    All chats of a batch generate their first turn together, then their second, and so on. Every
    completion follows its own earlier replies, not those of others in its group.

    Each reply may have `max_completion_length` tokens. A reply that reaches this length is cut, the
    separator ends it, and the chat continues.

    Args:
        generate: samples one reply for each context; all processes call it together. Default: the
            trainer's own sampler (transformers, or TRL's vLLM). For rollouts from a stock vLLM
            server: `generate_on_server`.
    """

    def __init__(self, generate: TurnGenerator | None = None) -> None:
        self.generate = generate_with_trainer if generate is None else generate

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Generate every turn of every chat.

        Args:
            prompts: (B * n) chats, each repeated for the n completions of its group.
            trainer: the calling trainer.

        Returns:
            `prompt_ids`, `completion_ids`, `logprobs` (None if the generator has none; 0 on
            separators) and `env_mask`, as TRL expects them. TRL does not pass these to reward
            functions, so `rollout_prompt_ids` and `completion_mask` have the same contents and are
            passed as columns.

        Raises:
            ValueError: a prompt has no messages, or the generator does not return one reply for
                each context.
        """
        layout = ChatLayout(
            trainer.processing_class, trainer.chat_template, trainer.chat_template_kwargs
        )
        n_turns = [len(split_turns(prompt)) for prompt in prompts]
        chats = [Chat(layout.start(prompt), [], []) for prompt in prompts]
        logprobs: list[list[float]] | None = [[] for _ in prompts]
        # Processes sample together (sharded weights, a server that gets new ones), so all generate
        # as many turns as the longest chat of any process.
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
    """One reply for each context, by the sampler of a TRL trainer."""
    return sample_replies(trainer, prompt_ids)


def generate_on_server(rollouts: VLLMRollouts) -> TurnGenerator:
    """One reply for each context, by a stock vLLM server.

        args = EBFTGRPOConfig(vllm_lora_sync=True, ...)
        rollout_func = MultiTurnRollouts(generate_on_server(VLLMRollouts(args)))

    Args:
        rollouts: rollouts from the server; prefetching is for single turns and is not used here.
    """

    def generate(
        prompt_ids: list[list[int]], trainer: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        # Imported only when a server is used, since it imports the server's client.
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
