"""The one place where conversations become token ids, for teacher and student, in training, evaluation and serving.

Content is data: special-token text inside a message is broken up before rendering, and a rendered prompt that holds
more control tokens than its template alone is an error. Needs a tokenizer, but no torch.
"""

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from distill.errors import DistillError, Exit
from distill.records import Message, digest

SEPARATOR = "\u200b"  # a zero-width space inside a special-token text keeps it readable and makes it plain text


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the tokenizer's control tokens: text to id."""
    added = tokenizer.added_tokens_decoder.items()
    control = {str(token): index for index, token in added if token.special}
    return control or dict(
        zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    )


def neutralise(text: str, tokenizer: Any) -> str:
    """Break up every special-token text in `text`, so that it is read as plain characters."""
    names = sorted(special_tokens(tokenizer), key=len, reverse=True)
    if not names:
        return text
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(pattern, lambda found: found[0][0] + SEPARATOR + found[0][1:], text)


def template_hash(tokenizer: Any, date: str) -> str:
    """Hash the chat template and the date that it is rendered with."""
    return digest({"template": tokenizer.chat_template, "date": date})


def vocabulary_hash(tokenizer: Any) -> str:
    """Hash the vocabulary: equal hashes mean that token ids mean the same."""
    rows = "\n".join(
        f"{index} {token}"
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda row: row[1])
    )
    return hashlib.sha256(rows.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def render(
    tokenizer: Any, messages: Sequence[Message], date: str, answer: str | None = None
) -> str:
    """Render a conversation up to where the answer begins, or, with `answer`, to the template's own end.

    Raises DistillError (exit 7) where the tokenizer has no chat template or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise DistillError(
            Exit.TRAINING, tokenizer.name_or_path, "has no chat template", "use an instruct model"
        )
    turns = [{"role": m.role, "content": neutralise(m.content, tokenizer)} for m in messages]
    if answer is not None:
        turns.append({"role": "assistant", "content": neutralise(answer, tokenizer)})
    stated = {
        "date_string": datetime.fromisoformat(date).strftime("%d %b %Y"),
        "strftime_now": _fixed_clock(date),
    }
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None, **stated
        )
    except Exception as error:  # jinja2 raises whatever a template's author chose
        where = f"chat template of {tokenizer.name_or_path}"
        raise DistillError(
            Exit.TRAINING, where, f"refuses the conversation: {error}", "check roles and order"
        ) from None


def _fixed_clock(date: str) -> Any:
    """Return a `strftime_now` for templates that always tells the configured date."""
    moment = datetime.fromisoformat(date)
    return lambda form: moment.strftime(form)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenise rendered text as it stands, adding nothing."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_prompt(tokenizer: Any, messages: Sequence[Message], date: str) -> list[int]:
    """Return the ids of the rendered prompt; raises DistillError (exit 3) where content forges a control token."""
    ids = encode_text(tokenizer, render(tokenizer, messages, date))
    blank = [Message(role=m.role, content="x") for m in messages]
    control = set(special_tokens(tokenizer).values())
    expected = sum(i in control for i in encode_text(tokenizer, render(tokenizer, blank, date)))
    count = sum(i in control for i in ids)
    if count != expected:
        what = f"{count} control tokens where the template alone has {expected}"
        raise DistillError(
            Exit.INPUT, f"prompt {messages[-1].content[:40]!r}", what, "remove special-token text"
        )
    return ids
