"""Conversations become token ids here, for teacher and student, in training, evaluation, serving.

Content is data: at each control token's text in it a mark is put before the template sees it, and
there the rendered text is cut before it is tokenised, so that it is encoded as text, unaltered.
Where a template puts an answer is found by rendering a sentinel in its place. Needs no torch.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from distill.errors import DistillError, Exit, one_line
from distill.reasoning import PAIRS
from distill.records import Message, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DATE = "2026-01-01"  # for trying a template
SEPARATOR = "\u200b"  # a zero-width space in a special token's text, which makes it plain text
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: no text has all of them
WRITTEN_LIKE_CONTROL = re.compile(r"<[|｜]\S+>|<\S+[|｜]>")  # what templates build of pieces
# Variables of templates that switch thinking, with the values for drop and for keep
SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),  # Qwen, GLM, Gemma, Nemotron, SmolLM, EXAONE, Hunyuan
    "thinking": (False, True),  # Granite, DeepSeek V3.1
    "reasoning_effort": ("none", None),  # Mistral
    "thinking_budget": (0, None),  # Seed-OSS
}
Reasoning = Literal["drop", "keep"]
Names: TypeAlias = tuple[tuple[str, str], ...]  # a tokenizer's special tokens, as templates do


class Turn(NamedTuple):
    """A prompt, and what the template writes around its answer.

    `opening` stands before the thought, `closing` between thought and answer, or both before an
    answer without one; `end` is the template's own end of the turn, or "" where it writes none.
    """

    prompt: str
    opening: str
    closing: str
    end: str


class ControlTokens(NamedTuple):
    """A tokenizer's control tokens, text to id; where the text of one begins, and a run of them."""

    ids: dict[str, int]
    begins: re.Pattern[str]
    run: re.Pattern[str]


def control_tokens(tokenizer: "Tokenizer") -> ControlTokens:
    """Return the tokenizer's control tokens: the special ones and the template's."""
    return _control_tokens(tokenizer, _template(tokenizer), len(tokenizer))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: "Tokenizer", template: str, size: int) -> ControlTokens:
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for i, token in tokenizer.added_tokens_decoder.items():
        text = str(token)
        in_template = text.strip() and text in template
        if token.special or in_template or WRITTEN_LIKE_CONTROL.fullmatch(text):
            ids[text] = i
    names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
    return ControlTokens(ids, beginnings(ids), re.compile(f"(?:{names})+" if names else "(?!)"))


def beginnings(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of the first character of each place where one of `texts` begins."""
    rests = dict[str, list[str]]()
    for text in sorted(texts, key=len, reverse=True):
        if len(text) > 1:
            rests.setdefault(text[0], []).append(re.escape(text[1:]))
    branches = (f"{re.escape(first)}(?={'|'.join(more)})" for first, more in rests.items())
    return re.compile("|".join(branches) or "(?!)")


def cut_marks(text: str, tokenizer: "Tokenizer", mark: str) -> str:
    """Put `mark` into every control token's text, behind its first character."""
    return control_tokens(tokenizer).begins.sub(lambda match: match[0] + mark, text)


def template_hash(tokenizer: "Tokenizer", date: str) -> str:
    """Hash the chat template and the date that it is rendered with."""
    return digest({"template": tokenizer.chat_template, "date": date})


def vocabulary_hash(tokenizer: "Tokenizer") -> str:
    """Hash the vocabulary: equal hashes mean that token ids mean the same."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rows = "\n".join(f"{index} {token}" for token, index in tokens)
    return hashlib.sha256(rows.encode("utf-8", "surrogatepass")).hexdigest()[:32]


# Rendering


def _template(tokenizer: "Tokenizer") -> str:
    """Return the chat template; of several the one named default."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), "")
    return template or ""


def _run(template: str, names: Names, date: str, turns: object, asks: bool) -> str:
    """Render `turns` with a template as transformers does, but for the date."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    moment = datetime.fromisoformat(date)  # what a template that asks for the time is told
    clock = {"date_string": moment.strftime("%d %b %Y"), "strftime_now": moment.strftime}
    values = {**dict(names), **clock, "tools": None, "documents": None}
    values |= {"messages": turns, "add_generation_prompt": asks}
    return _compile_jinja_template(template).render(values)


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


@lru_cache(maxsize=32)
def _form(template: str, names: Names, date: str) -> tuple[bool, bool]:
    """Find by trying whether a template takes content as a list of parts, and no system turn.

    Raises ValueError, with the reason, where it takes no conversation.
    """
    why = "it renders no question, or no answer"

    def keeps(parts: bool, *roles: str) -> bool:
        nonlocal why
        texts = {role: f"{mark}text{mark}" for role, mark in zip(roles, MARKS, strict=False)}
        turns = [{"role": role, "content": _content(text, parts)} for role, text in texts.items()]
        try:
            rendering = _run(template, names, date, turns, roles[-1] != "assistant")
        except Exception as error:  # jinja2 raises whatever a template's author chose
            why = why if parts else one_line(error)
            return False
        return all(text in rendering for text in texts.values())

    for parts in (False, True):
        if keeps(parts, "user") and keeps(parts, "user", "assistant"):
            return parts, not keeps(parts, "system", "user")
    raise ValueError(why)


def folds_system(tokenizer: "Tokenizer", date: str) -> bool:
    """Tell whether a system turn goes into the first user turn, as the template has none."""
    try:
        return _form(_template(tokenizer), _names(tokenizer), date)[1]
    except ValueError:
        return False


def _names(tokenizer: "Tokenizer") -> Names:
    return tuple((k, v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str))


def _unusable(
    tokenizer: "Tokenizer", what: str, fix: str = "check the roles and their order"
) -> DistillError:
    where = f"chat template of {tokenizer.name_or_path}"
    return DistillError(Exit.TRAINING, where, what, f"{fix}, or use another model")


def _render(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    date: str,
    mark: str,
    answer: Mapping[str, str] | None = None,
) -> str:
    """Render a conversation, with `mark` in the control tokens' texts of its messages.

    With `answer`, the fields of the assistant's last turn, to its end, else up to where the answer
    begins. Raises DistillError (exit 7) where the template refuses.
    """
    template, names = _template(tokenizer), _names(tokenizer)
    turns, system = list[dict[str, Any]](), list[str]()
    try:
        parts, folds = _form(template, names, date)
        for message in messages:
            text = cut_marks(message.content, tokenizer, mark)
            if message.role == "system" and folds:
                system.append(text)
                continue
            if message.role == "user" and system:
                text, system = "\n\n".join([*system, text]), []
            turns.append({"role": message.role, "content": _content(text, parts)})
        if system:
            raise ValueError("it has no system turn, and no user turn follows to hold it")
        if answer is not None:
            content = _content(answer["content"], parts)
            turns.append({"role": "assistant", **answer, "content": content})
        return _run(template, names, date, turns, answer is None)
    except Exception as error:  # jinja2 raises whatever a template's author chose
        raise _unusable(tokenizer, f"refuses the conversation: {one_line(error)}") from None


def unused_mark(texts: Sequence[str]) -> str:
    """Return a character that stands in none of `texts`."""
    mark = next((mark for mark in MARKS if not any(mark in text for text in texts)), None)
    if mark is None:
        what = "has all of Unicode's noncharacters U+FDD0 to U+FDEF"
        raise DistillError(Exit.INPUT, f"prompt {texts[-1][:40]!r}", what, "remove one of them")
    return mark


def render(tokenizer: "Tokenizer", messages: Sequence[Message], date: str) -> str:
    """Render a conversation up to where the answer begins.

    Raises DistillError (exit 7) where the tokenizer has no chat template, or that refuses.
    """
    mark = unused_mark([message.content for message in messages])
    return _render(tokenizer, messages, date, mark).replace(mark, "")


def find_turn(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    date: str,
    thought: bool = False,
    mark: str | None = None,
) -> Turn:
    """Find what a template writes around the answer to a conversation, with a `thought` or without.

    Raises DistillError (exit 7) naming a template with which what is trained would not follow what
    the model sees at inference.
    """
    mark = mark or unused_mark([message.content for message in messages])
    answer, inner = f"{mark}answer{mark}", f"{mark}thought{mark}"
    prompt = _render(tokenizer, messages, date, mark)
    # A prompt may end in an open thought, or in one that was opened and closed
    pair, begin = None, len(prompt)
    for opener, closer in PAIRS:
        place = prompt.rfind(opener)
        if place >= 0 and prompt[place:].rstrip().endswith((opener.rstrip(), closer)):
            pair, begin = (opener, closer), place
            break
    is_open = pair is not None and pair[1] not in prompt[begin:]
    fields = {"content": answer}
    if thought:
        fields |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), inner)
    head, middle, rest = _render(tokenizer, messages, date, mark, fields).rpartition(answer)
    if not middle:
        raise _unusable(tokenizer, "leaves out the last answer")
    stop = control_tokens(tokenizer).run.search(rest)
    end = rest[: stop.end()] if stop else ""
    if not head.startswith(prompt[:begin]):
        # Training has the prompt's own ids, so what stands behind the question decides, spaces
        # apart: Mistral's older templates move the system turn once there is an answer
        question = cut_marks(messages[-1].content, tokenizer, mark).strip()
        before, after = (
            "".join(text.rpartition(question)[2].split()) if question else ""
            for text in (prompt[:begin], head)
        )
        if not before or not (after.startswith(before) if pair or thought else after == before):
            what = "writes the last turn otherwise than its prompt: an answer would follow other"
            fix = "use one whose generation prompt is the beginning of the assistant's turn"
            raise _unusable(tokenizer, f"{what} text", fix)
        head = prompt
    opener, closer = pair or next((p for p in PAIRS if p[0] in _template(tokenizer)), PAIRS[0])
    closer = f"\n{closer}" if closer == "<channel|>" else f"\n{closer}\n\n"
    lead = head[len(prompt) :] if head.startswith(prompt) else ""
    if thought and inner in lead:
        opening, _, closing = lead.partition(inner)
    elif thought:
        opening, closing = "" if is_open else f"{opener}\n", closer
    else:
        opening, closing = "", lead if head.startswith(prompt) else closer if is_open else ""
        closing = closing if closing.strip() else ""
    return Turn(prompt, opening, closing, end)


def fix_template(
    tokenizer: "Tokenizer", kwargs: Mapping[str, Any], reasoning: Reasoning | None = None
) -> None:
    """Give `tokenizer` the template with which a run asks and trains, and which it publishes.

    It is the model's own with `kwargs` as defaults, so that who renders without them sees the same.
    With `reasoning` its own switch for thinking is set as well; where it has none, or opens a
    channel, what `drop` writes before an answer becomes the end of its generation prompt. Raises
    DistillError (exit 7) where that cannot be.
    """
    from jinja2.meta import find_undeclared_variables
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template, values, turns = _template(tokenizer), dict(kwargs), [{"role": "user", "content": "?"}]
    question = (Message(role="user", content="?"),)

    def prompt(switch: Mapping[str, Any]) -> str | None:
        text = _with_defaults(template, switch)
        try:
            return _run(text, _names(tokenizer), DATE, turns, True)
        except Exception:  # as of a template for content in parts, and of one that refuses
            return None

    tree = _compile_jinja_template(template).environment.parse(template)
    variables = find_undeclared_variables(tree) if reasoning else set[str]()
    for name, (off, on) in SWITCHES.items():
        value = off if reasoning == "drop" else on
        mine = name in variables and name not in values and value is not None
        if mine and (value != "none" or re.search("['\"]none['\"]", template)):
            plain, switched = prompt({}), prompt({name: value})
            # one that is so already is left alone, and so is one that may not be switched
            if plain is None or switched not in (plain, None):
                values[name] = value
    fixed = _with_defaults(template, values)
    if values:
        tokenizer.chat_template = fixed
    if reasoning != "drop" or not (turn := find_turn(tokenizer, question, DATE)).closing:
        return
    suffix = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(turn.closing)} }}}}{{% endif %}}"
    tokenizer.chat_template = fixed.removesuffix("\n") + suffix
    if render(tokenizer, question, DATE) != turn.prompt + turn.closing:
        what = "has no form without thinking that could be written into it"
        raise _unusable(tokenizer, what, "set reasoning: keep")


def _with_defaults(template: str, values: Mapping[str, Any]) -> str:
    """Return a template with values for the variables that it is not given."""
    for name, value in reversed(list(values.items())):
        literal = "none" if value is None else json.dumps(value)
        null = "{% set null = none %}" if "null" in literal else ""  # JSON's word inside a list
        default = f"{null}{{% set {name} = {literal} %}}"
        template = f"{{% if {name} is not defined %}}{default}{{% endif %}}{template}"
    return template


# Tokens


def encode_text(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Tokenise rendered text as it stands, adding nothing.

    Raises DistillError (exit 3) naming a token for which the model has no embedding.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = vars(tokenizer).get("embeddings")  # see `loading.load_tokenizer`
    if rows is not None and ids and max(ids) >= rows:
        token, where = tokenizer.convert_ids_to_tokens(max(ids)), f"text {text[-40:]!r}"
        what = f"holds the token {token!r} ({max(ids)}), and the model has {rows} embeddings"
        raise DistillError(Exit.INPUT, where, what, "take that token out of the text")
    return ids


def encode_marked(tokenizer: "Tokenizer", text: str, mark: str) -> list[int]:
    """Tokenise rendered text, cut at each `mark`: no token reaches over one."""
    first, *others = text.split(mark)
    ids = encode_text(tokenizer, first)
    newline = encode_text(tokenizer, "\n") if others else []
    for piece in others:
        # behind a newline, as a tokenizer of pieces puts a space before the first of a text
        more = encode_text(tokenizer, f"\n{piece}")
        cut = more[: len(newline)] == newline
        ids += more[len(newline) :] if cut else encode_text(tokenizer, piece)
    return ids


def encode_prompt(tokenizer: "Tokenizer", messages: Sequence[Message], date: str) -> list[int]:
    """Return the ids of the rendered prompt; a forged control token is a DistillError (exit 3)."""
    mark = unused_mark([message.content for message in messages])
    ids = encode_marked(tokenizer, _render(tokenizer, messages, date, mark), mark)
    blank = [Message(role=m.role, content="x") for m in messages]
    plain = encode_text(tokenizer, render(tokenizer, blank, date))
    control = set(control_tokens(tokenizer).ids.values())
    count, expected = (sum(i in control for i in some) for some in (ids, plain))
    if count != expected:
        where = f"prompt {messages[-1].content[:40]!r}"
        what = f"{count} control tokens where the template alone has {expected}"
        raise DistillError(Exit.INPUT, where, what, "remove special-token text")
    return ids
