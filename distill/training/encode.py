"""From an answer to token ids and loss weights, and the first batch shown as the model will see it.

An example's ids are those of the rendered prompt, then of the answer, then the template's own end
token, which is supervised (an answer cut off by its length limit has no end, and none is taught).
Weights come from lengths, never from token ids: pad may equal the end token. Samples longer than
the limit are dropped, counted and named.
"""

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_prompt, encode_text, render, special_tokens
from distill.records import Pair, digest
from distill.storage.progress import console, say
from distill.training.batches import Example

SHOWN_CHARS = 1200  # of a sample's text on the screen


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair, date: str) -> Example:
    """Tokenise one pair; raises DistillError (exit 7) for a template that training cannot use."""
    messages, response = pair.prompt.messages, pair.response
    template = f"chat template of {tokenizer.name_or_path}"
    prompt = render(tokenizer, messages, date)
    conversation = render(tokenizer, messages, date, response.text)
    if not conversation.startswith(prompt):
        what = "a rendered conversation does not begin with its rendered prompt"
        fix = "use a template whose generation prompt is the beginning of the assistant's turn"
        raise DistillError(Exit.TRAINING, template, what, fix)
    prompt_ids = encode_prompt(tokenizer, messages, date)
    answer_ids = encode_text(tokenizer, conversation[len(prompt) :])
    control, cut_off = set(special_tokens(tokenizer).values()), response.stop == "length"
    end = next((n for n, token in enumerate(answer_ids) if token in control), None)
    if end is not None:
        answer_ids = answer_ids[:end] if cut_off else answer_ids[: end + 1]
    elif not cut_off:
        if not isinstance(eos := tokenizer.eos_token_id, int):
            what = "ends an answer with no end token, and the tokenizer names none"
            raise DistillError(Exit.TRAINING, template, what, "use an instruct model")
        answer_ids.append(eos)
    if not answer_ids:
        where, fix = f"sample {response.id}", "filter empty answers"
        raise DistillError(Exit.TRAINING, where, "no token to learn", fix)
    ids = (*prompt_ids, *answer_ids)
    weights = (0.0,) * len(prompt_ids) + (1.0,) * len(answer_ids)
    identity = digest({"ids": ids, "weights": weights})
    return Example(id=identity, response_id=response.id, input_ids=ids, weights=weights)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    date: str,
    max_length: int,
    where: object,
) -> list[Example]:
    """Tokenise `pairs` but those longer than `max_length` tokens, which are named on the screen.

    Raises DistillError (exit 7) if none is left.
    """
    examples = [encode_pair(tokenizer, pair, date) for pair in pairs]
    fitting = [example for example in examples if len(example.input_ids) <= max_length]
    long = [example for example in examples if len(example.input_ids) > max_length]
    if long:
        names = ", ".join(example.response_id for example in long[:5])
        more = f" and {len(long) - 5} more" if len(long) > 5 else ""
        say(f"dropped {len(long)} samples longer than {max_length} tokens: {names}{more}")
    if not fitting:
        what = f"none of {len(examples)} samples is left within {max_length} tokens"
        fix = "raise train.max_length, or loosen the filters"
        raise DistillError(Exit.TRAINING, where, what, fix)
    return fitting


def show(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], count: int = 2) -> None:
    """Print the first `count` examples of a batch, supervised tokens in «marks» and in colour."""
    console.print(f"first batch: {len(examples)} samples; «supervised» tokens are marked")
    for example in examples[:count]:
        console.print(marked(tokenizer, example), soft_wrap=True)


def marked(tokenizer: PreTrainedTokenizerBase, example: Example) -> Text:
    """Return the example's text with its supervised part marked."""
    text, tokens = Text(), zip(example.input_ids, example.weights, strict=True)
    for supervised, run in groupby(tokens, key=lambda token: bool(token[1])):
        part = f"{tokenizer.decode([i for i, _ in run])}"
        if supervised:
            text.append(f"«{part}»", style="bold green")
        else:
            excerpt = part if len(part) <= SHOWN_CHARS else f"{part[:SHOWN_CHARS]} …"
            text.append(excerpt, style="dim")
    return text
