"""From a kept answer to token ids and loss weights, and the first batch shown as the model will see it.

An example's ids are those of the rendered prompt, then of the answer, then the template's own end token, which is
supervised (an answer cut off by its length limit has no end, and none is taught). Weights come from lengths, never
from token ids: pad may equal the end token. Samples longer than the limit are dropped, counted and named.
"""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_prompt, encode_text, render, special_tokens
from distill.records import Example, Pair, digest
from distill.storage.progress import console, say

SHOWN_CHARS = 1200  # of a sample's text on the screen


def encode_pair(tokenizer: Any, pair: Pair, date: str) -> Example:
    """Tokenise one pair; raises DistillError (exit 7) where the template does not begin the conversation with the prompt."""
    messages, answer = pair.prompt.messages, pair.response.text
    prompt = render(tokenizer, messages, date)
    rendered = render(tokenizer, messages, date, answer)
    if not rendered.startswith(prompt):
        what = "a rendered conversation does not begin with its rendered prompt"
        raise DistillError(
            Exit.TRAINING,
            f"chat template of {tokenizer.name_or_path}",
            what,
            "use a template whose generation prompt is the beginning of the assistant's turn",
        )
    prompt_ids = encode_prompt(tokenizer, messages, date)
    answer_ids = _until_end(tokenizer, rendered[len(prompt) :], pair.response.stop == "length")
    if not answer_ids:
        raise DistillError(
            Exit.TRAINING, f"sample {pair.response.id}", "no token to learn", "filter empty answers"
        )
    ids = (*prompt_ids, *answer_ids)
    weights = (0.0,) * len(prompt_ids) + (1.0,) * len(answer_ids)
    identity = digest({"ids": ids, "weights": weights})
    return Example(id=identity, response_id=pair.response.id, input_ids=ids, weights=weights)


def _until_end(tokenizer: Any, rest: str, cut_off: bool) -> list[int]:
    """Return the ids of the answer with the template's end token, or without it where the answer was cut off."""
    ids = encode_text(tokenizer, rest)
    control = set(special_tokens(tokenizer).values())
    end = next((place for place, token in enumerate(ids) if token in control), None)
    if end is not None:
        return ids[:end] if cut_off else ids[: end + 1]
    if cut_off:
        return ids
    if tokenizer.eos_token_id is None:
        raise DistillError(
            Exit.TRAINING,
            f"chat template of {tokenizer.name_or_path}",
            "ends an answer with no end token, and the tokenizer names none",
            "use an instruct model",
        )
    return [*ids, tokenizer.eos_token_id]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], date: str, max_length: int, where: object
) -> list[Example]:
    """Tokenise `pairs`, drop those longer than `max_length` tokens and say so; raises DistillError (exit 7) if none is left."""
    examples = [encode_pair(tokenizer, pair, date) for pair in pairs]
    fitting = [example for example in examples if len(example.input_ids) <= max_length]
    long = [example for example in examples if len(example.input_ids) > max_length]
    if long:
        names = ", ".join(example.response_id for example in long[:5])
        more = f" and {len(long) - 5} more" if len(long) > 5 else ""
        say(f"dropped {len(long)} samples longer than {max_length} tokens: {names}{more}")
    if not fitting:
        what = f"none of {len(examples)} samples is left within {max_length} tokens"
        raise DistillError(
            Exit.TRAINING, where, what, "raise train.max_length, or loosen the filters"
        )
    return fitting


def show(tokenizer: Any, examples: Sequence[Example], count: int = 2) -> None:
    """Print the first `count` examples of a batch, each run of supervised tokens in «marks» and in colour."""
    console.print(f"first batch: {len(examples)} samples; «supervised» tokens are marked")
    for example in examples[:count]:
        console.print(marked(tokenizer, example), soft_wrap=True)


def marked(tokenizer: Any, example: Example) -> Text:
    """Return the example's text with its supervised part marked."""
    text, start = Text(), 0
    for place in range(1, len(example.weights) + 1):
        if place < len(example.weights) and bool(example.weights[place]) == bool(
            example.weights[start]
        ):
            continue
        part = tokenizer.decode(list(example.input_ids[start:place]))
        learned = bool(example.weights[start])
        excerpt = part if learned or len(part) <= SHOWN_CHARS else f"{part[:SHOWN_CHARS]} …"
        text.append(
            f"«{excerpt}»" if learned else excerpt, style="bold green" if learned else "dim"
        )
        start = place
    return text
