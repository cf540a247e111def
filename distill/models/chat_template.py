"""Conversations become token ids here, for teacher and student, in training, evaluation, serving.

Content is data: special-token text inside a message is broken up before rendering, and a rendered
prompt that holds more control tokens than its template alone is an error. Needs no torch.
"""

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from distill.errors import DistillError, Exit
from distill.records import Message, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SEPARATOR = "\u200b"  # a zero-width space in a special token's text, which makes it plain text


def special_tokens(tokenizer: "Tokenizer") -> dict[str, int]:
    """Return the tokenizer's control tokens: text to id."""
    added = tokenizer.added_tokens_decoder.items()
    control = {str(token): index for index, token in added if token.special}
    pairs = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return control or dict(pairs)


def neutralise(text: str, tokenizer: "Tokenizer") -> str:
    """Break up every special-token text in `text`, so that it is read as plain characters."""
    names = sorted(special_tokens(tokenizer), key=len, reverse=True)
    if not names:
        return text
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(pattern, lambda match: match[0][0] + SEPARATOR + match[0][1:], text)


def template_hash(tokenizer: "Tokenizer", date: str) -> str:
    """Hash the chat template and the date that it is rendered with."""
    return digest({"template": tokenizer.chat_template, "date": date})


def vocabulary_hash(tokenizer: "Tokenizer") -> str:
    """Hash the vocabulary: equal hashes mean that token ids mean the same."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rows = "\n".join(f"{index} {token}" for token, index in tokens)
    return hashlib.sha256(rows.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def render(
    tokenizer: "Tokenizer", messages: Sequence[Message], date: str, answer: str | None = None
) -> str:
    """Render a conversation up to where the answer begins, or, with `answer`, to its end.

    Raises DistillError (exit 7) where the tokenizer has no chat template, or that refuses.
    """
    if not tokenizer.chat_template:
        what, fix = "has no chat template", "use an instruct model"
        raise DistillError(Exit.TRAINING, tokenizer.name_or_path, what, fix)
    turns = [{"role": m.role, "content": neutralise(m.content, tokenizer)} for m in messages]
    if answer is not None:
        turns.append({"role": "assistant", "content": neutralise(answer, tokenizer)})
    moment = datetime.fromisoformat(date)  # what a template that asks for the time is told
    clock = {"date_string": moment.strftime("%d %b %Y"), "strftime_now": moment.strftime}
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None, **clock
        )
    except Exception as error:  # jinja2 raises whatever a template's author chose
        where, what = tokenizer.name_or_path, f"its template refuses the conversation: {error}"
        raise DistillError(Exit.TRAINING, where, what, "check roles and order") from None
    assert isinstance(text, str)
    return text


def encode_text(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Tokenise rendered text as it stands, adding nothing."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_prompt(tokenizer: "Tokenizer", messages: Sequence[Message], date: str) -> list[int]:
    """Return the ids of the rendered prompt; a forged control token is a DistillError (exit 3)."""
    ids = encode_text(tokenizer, render(tokenizer, messages, date))
    blank = [Message(role=m.role, content="x") for m in messages]
    control = set(special_tokens(tokenizer).values())
    expected = sum(i in control for i in encode_text(tokenizer, render(tokenizer, blank, date)))
    count = sum(i in control for i in ids)
    if count != expected:
        where = f"prompt {messages[-1].content[:40]!r}"
        what = f"{count} control tokens where the template alone has {expected}"
        raise DistillError(Exit.INPUT, where, what, "remove special-token text")
    return ids
