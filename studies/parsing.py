"""Does a source file still parse if it is cut off and a model continues it?

A file is cut at a random token. The model reads the last tokens before the cut and continues. The
whole file up to the cut is judged, with the continuation up to its last line break: open strings
and brackets are closed, a block that has just begun gets a `pass`, and then `ast.parse` must accept
it. A continuation that completes no line fails. The file's own continuation of the same length is
judged in the same way: its share is what a perfect model would get.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

OPENING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Cut:
    """A place where a file is cut.

    Attributes:
        file: index of the file.
        before: the file's text up to the cut.
        context: the last token ids before the cut.
        truth: the file's own continuation, as text.
    """

    file: int
    before: str
    context: list[int]
    truth: str


def choose_cuts(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    cuts_per_file: int,
    context_tokens: int,
    new_tokens: int,
    seed: int,
) -> list[Cut]:
    """Random places in each file with enough tokens on both sides; files that are too short: none.

    Args:
        texts: whole files.
        tokenizer: of the model.
        cuts_per_file: places in each file; fewer where it has fewer.
        context_tokens: tokens that the model will read.
        new_tokens: tokens that it will write.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    cuts = []
    for file, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        places = len(ids) - context_tokens - new_tokens + 1
        for offset in torch.randperm(max(places, 0), generator=generator)[:cuts_per_file].tolist():
            place = context_tokens + offset
            cuts.append(
                Cut(
                    file,
                    tokenizer.decode(ids[:place]),
                    ids[offset:place],
                    tokenizer.decode(ids[place : place + new_tokens]),
                )
            )
    return cuts


def parses(before: str, continuation: str) -> bool:
    """Whether the continued text parses, as far as its last line break, once it is closed."""
    end = continuation.rfind("\n") + 1
    if end == 0:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are not errors
        try:
            ast.parse(closed(before + continuation[:end]))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False
    return True


def closed(text: str) -> str:
    """`text`, which ends with a line break, with what is open at its end closed.

    Only what any text may need that is cut off between two lines: the end of a triple-quoted
    string, brackets, and a body for a block whose header is the last line of code. Nothing wrong is
    mended.
    """
    brackets: list[str] = []
    quote = ""  # of the string that we are in
    last_code = ""  # last character of code so far
    line_start = header = 0  # of this line, and of the line that last_code is in
    place = 0
    while place < len(text):
        character = text[place]
        if quote:
            if character == "\\":
                place += 2
                continue
            if text.startswith(quote, place):
                place += len(quote)
                quote = ""
                continue
            if character == "\n" and len(quote) == 1:
                quote = ""  # unterminated: wrong, and ast.parse will say so
        elif character == "#":
            newline = text.find("\n", place)
            place = len(text) if newline < 0 else newline
            continue
        elif character in "\"'":
            quote = character * 3 if text.startswith(character * 3, place) else character
            last_code, header = character, line_start
            place += len(quote)
            continue
        elif character in OPENING:
            brackets.append(OPENING[character])
        elif brackets and character == brackets[-1]:
            brackets.pop()
        if character == "\n":
            line_start = place + 1
        elif not character.isspace() and not quote:
            last_code, header = character, line_start
        place += 1
    if quote or brackets:
        return f"{text}{quote}{''.join(reversed(brackets))}\n"
    if last_code == ":":
        line = text[header:]
        indent = line[: len(line) - len(line.lstrip())]
        return f"{text}{indent} pass\n"
    return text


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, cuts: Sequence[Cut], *, new_tokens: int, samples: int, seed: int
) -> tuple[list[str], list[list[str]]]:
    """What the model writes after each cut: greedily, and `samples` times at temperature 1."""
    ids = torch.tensor([cut.context for cut in cuts], device=model.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
    }

    def texts(written: torch.Tensor) -> list[str]:
        return tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)

    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        greedy = texts(model.generate(ids, do_sample=False, **options))
        sampled = texts(
            model.generate(
                ids,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
                **options,
            )
        )
    model.train(training)
    return greedy, [sampled[i * samples : (i + 1) * samples] for i in range(len(cuts))]


def parse_shares(
    model: Any, tokenizer: Any, cuts: Sequence[Cut], *, new_tokens: int, samples: int, seed: int
) -> dict[str, list[float]]:
    """For each cut: whether the greedy and the true continuation parse, share of samples."""
    greedy, sampled = continuations(
        model, tokenizer, cuts, new_tokens=new_tokens, samples=samples, seed=seed
    )
    return {
        "parse_greedy": [
            float(parses(cut.before, text)) for cut, text in zip(cuts, greedy, strict=True)
        ],
        "parse_sampled": [
            sum(parses(cut.before, text) for text in group) / samples
            for cut, group in zip(cuts, sampled, strict=True)
        ],
        "parse_truth": [float(parses(cut.before, cut.truth)) for cut in cuts],
    }
