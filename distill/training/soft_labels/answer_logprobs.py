"""Signals that came with an endpoint's answers: what the server listed at each token while it wrote them.

Nothing is read again and nothing more is paid: `teacher.extra_body: {logprobs: true, top_logprobs: 20}` made the lists
part of the answers, and the store has those as they came. A server writes a token as text, as bytes, or as its id
(vLLM with `return_tokens_as_token_ids`); what it wrote is laid along the answer's ids. Of a list, what names no one id
(parts of characters, in some servers' words) goes to the mass left over. A token without a list has its label alone:
the template's end where a server leaves that out, and places where the answer is cut into other tokens than it was
written in. Hosted interfaces list 20 at most. The distributions are taken to be those at temperature 1.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill.config import Config, Teacher
from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_text
from distill.records import Candidate, Example, Message, TokenLogprob
from distill.responders.ask import Ask
from distill.responders.endpoint.wire import Reply
from distill.responders.kinds import make_responder
from distill.responders.responder import Request, Sampling
from distill.responders.store import ResponseStore
from distill.storage.progress import say
from distill.training.soft_labels.cache import TEXT_ONLY, Signal, SignalCache, supervised_ids
from distill.training.soft_labels.top_logprobs import Chances, KeyedExample, enter, named, to_signal

ALIKE = 0.9  # of the answers' tokens must have a list, else the tokenizer is another, or few answers have any
LOOKED_AT = 64  # answers, before any is kept
NUMBERED = re.compile(r"token_id:(\d{1,8})")  # how vLLM writes an id
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how a vocabulary of pieces writes a byte
UNKNOWN = "\ufffd"  # what stands for part of a character
ASKED = "ask for them: teacher.extra_body={logprobs: true, top_logprobs: 20}"


def fill(cache: SignalCache, tokenizer: Any, texts: Sequence[KeyedExample], config: Config) -> None:
    """Put the distributions that came with the answers `texts` into the cache.

    Raises DistillError (exit 4) where too few of their tokens have any.
    """
    with ResponseStore(config.store_folder() / "responses", writable=False) as store:
        looked, lists = (Lists(tokenizer, config, store) for _ in range(2))
        some = texts[:: -(-len(texts) // LOOKED_AT)]
        for signal in looked.read([example for example, _ in some]):
            if isinstance(signal, str):
                raise _fault(config.teacher, f"an answer {signal}")
        if looked.gaps > (1 - ALIKE) * looked.tokens:
            what = (
                f"lists what was likely at {looked.tokens - looked.alone} of {looked.tokens} tokens"
            )
            raise _fault(config.teacher, f"{what}: its tokenizer is another, or it seldom does")
        if without := enter(cache, texts, lists.read):
            raise _fault(config.teacher, named(without))
        if lists.alone:
            say(
                f"signals: {lists.alone:,} of {lists.tokens:,} tokens have no list, but their label"
            )


def probe(config: Config, tokenizer: Any) -> None:
    """Ask one short question, once, before anything else is paid for; raises DistillError as `fill` does."""
    teacher, store = config.teacher, config.store_folder() / "responses"
    buyer = make_responder(teacher, config)
    question = (Message(role="user", content="Count from one to ten, in words."),)
    drawn = Sampling(max_new_tokens=min(32, teacher.max_new_tokens))
    request = Request.make(buyer.origin, "probe", question, drawn)
    with Ask(buyer, store, again=True) as ask:
        ask.fetch([request], "signals")
        reply = _reply(ask.store, request.id)
    if isinstance(reply, str) or not reply.logprobs:
        why = reply if isinstance(reply, str) else "has no log-probabilities"
        raise _fault(teacher, f"its answer to a first short question {why}")
    ids = encode_text(tokenizer, reply.text)
    if len(ids) - len(align(Spelling(tokenizer), reply.logprobs, ids)) > (1 - ALIKE) * len(ids):
        what = f"writes {reply.logprobs[0].token!r} first, and the text has other tokens"
        raise _fault(teacher, f"its tokenizer is another than that of signals.tokenizer: it {what}")


def _fault(teacher: Teacher, what: str) -> DistillError:
    """Return the error of answers without distributions."""
    return DistillError(Exit.TEACHER, teacher.model, what, f"{ASKED}; or {TEXT_ONLY}")


def _reply(store: ResponseStore, identifier: str) -> Reply | str:
    """Read a stored answer, or say why there is none to read."""
    key = next(store.reply_keys(identifier), None)
    if key is None:
        return "is not in the store"
    reply = store.raw(key).reply
    return f"cannot be read: {reply.error}" if reply.stop == "error" else reply


class Lists:
    """The lists of stored answers.

    It counts the tokens that it read, those that have their label alone, and of these the gaps: not an answer's last.
    """

    def __init__(self, tokenizer: Any, config: Config, store: ResponseStore) -> None:
        self.spelling, self.vocabulary = Spelling(tokenizer), len(tokenizer)
        self.settings, self.store = config.signals, store
        self.tokens = self.alone = self.gaps = 0

    def read(self, texts: Sequence[Example]) -> Iterator[Signal | str]:
        """Yield each answer's signal, or why it has none."""
        for text in texts:
            reply = _reply(self.store, text.response_id)
            if isinstance(reply, str):
                yield reply
                continue
            try:
                yield self._signal(reply, text)
            except ValueError as error:
                yield f"cannot be used: {error}"

    def _signal(self, reply: Reply, text: Example) -> Signal:
        """Lay a reply's lists along the ids of its text; raises ValueError for impossible probabilities."""
        ids = supervised_ids(text)
        aligned = align(self.spelling, reply.logprobs or (), ids)
        self.tokens += len(ids)
        self.alone += len(ids) - len(aligned)
        self.gaps += max(aligned, default=len(ids) - 1) + 1 - len(aligned)
        label = ({i: (0.0, None)} for i in ids)
        places = [aligned.get(n, alone) for n, alone in enumerate(label)]
        return to_signal(places, [1.0] * len(ids), self.settings, self.vocabulary)


def align(
    spelling: "Spelling", places: Sequence[TokenLogprob], ids: Sequence[int]
) -> dict[int, Chances]:
    """Return what is listed at each of `ids` that stands, in order, among the tokens that were written."""
    tokens = [spelling.id_of(place) for place in places]
    blocks = SequenceMatcher(None, tokens, ids, autojunk=False).get_matching_blocks()
    pairs = [(one.a + n, one.b + n) for one in blocks for n in range(one.size)]
    return {ours: _place(spelling, places[theirs], ids[ours]) for theirs, ours in pairs}


def _place(spelling: "Spelling", place: TokenLogprob, own: int) -> Chances:
    """Return a list by ids, with the token that was written."""
    candidates = [(spelling.id_of(other), other.logprob) for other in place.top]
    listed = {i: (log, None) for i, log in candidates if i is not None}
    return {own: (place.logprob, None), **listed}


class Spelling:
    """Which id a server means by what it writes of a token: the bytes of each id, of byte-level and piece vocabularies."""

    def __init__(self, tokenizer: Any) -> None:
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        back = {char: byte for byte, char in bytes_to_unicode().items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        level = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self.ids: dict[bytes, int] = {}
        for token, i in tokenizer.get_vocab().items():
            if token in added:
                continue
            if level:
                self.ids[bytes(back[char] for char in token if char in back)] = i
            elif byte := BYTE.fullmatch(token):
                self.ids.setdefault(bytes.fromhex(byte[1]), i)
            else:
                self.ids[token.replace("\u2581", " ").encode("utf-8", "replace")] = i
        self.ids |= {content.encode("utf-8", "replace"): i for content, i in added.items()}

    def id_of(self, one: Candidate) -> int | None:
        """Return the id that a server's token stands for, or None where that is not to be told."""
        if numbered := NUMBERED.fullmatch(one.token):
            return int(numbered[1])
        text = one.token.encode("utf-8", "replace")
        try:
            data = text if one.bytes is None else bytes(one.bytes)
        except ValueError:  # no bytes
            return None
        return None if data == text and UNKNOWN in one.token else self.ids.get(data)
