"""Signals that came with an endpoint's answers: what the server listed at each token it wrote.

Nothing is read again and nothing more is paid: `teacher.extra_body: {logprobs: true, top_logprobs:
20}` made the lists part of the answers, and the store has those as they came. A server writes a
token as text, as bytes, or as its id (vLLM with `return_tokens_as_token_ids`); what it wrote is
aligned with the answer's ids. Listed tokens that stand for no single id (some servers print parts
of characters) count in the tail mass. A token without a list has its label alone: the template's
end where a server leaves it out, and where the answer is cut into other tokens than it was written
in. Hosted interfaces list 20 at most. The distributions are taken to be those at temperature 1.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill.config.learning import Signals
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_text
from distill.records import Candidate, Example, Message, TokenLogprob
from distill.responders.ask import Ask
from distill.responders.endpoint.wire import Reply
from distill.responders.kinds import make_responder
from distill.responders.responder import Request, Sampling
from distill.responders.store import ResponseStore
from distill.storage.progress import say
from distill.training.soft_labels.cache import (
    TEXT_ONLY,
    KeyedExample,
    Signal,
    SignalCache,
    name_failures,
    supervised_ids,
)

ALIKE = 0.9  # of the answers' tokens must have a list, else the tokenizer differs or few have any
PILOT = 64  # answers that are checked before any is stored
NUMBERED = re.compile(r"token_id:(\d{1,8})")  # how vLLM writes an id
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how a vocabulary of pieces writes a byte
UNKNOWN = "\ufffd"  # what stands for part of a character


def fill(cache: SignalCache, tokenizer: Any, texts: Sequence[KeyedExample], config: Config) -> None:
    """Put the distributions that came with the answers `texts` into the cache.

    Raises DistillError (exit 4) where too few of their tokens have any.
    """
    with ResponseStore(config.store_folder() / "responses", writable=False) as store:
        pilot, lists = (Lists(tokenizer, config.signals, store) for _ in range(2))
        some = texts[:: -(-len(texts) // PILOT)]
        for signal in pilot.read([text.example for text in some]):
            if isinstance(signal, str):
                raise _error(config, f"an answer {signal}")
        if pilot.gaps > (1 - ALIKE) * pilot.tokens:
            what = f"lists candidates at {pilot.tokens - pilot.alone} of {pilot.tokens} tokens"
            raise _error(config, f"{what}: its tokenizer is another, or it seldom does")
        if failures := cache.fill(texts, lists.read):
            raise _error(config, name_failures(failures))
    if lists.alone:
        say(f"signals: {lists.alone:,} of {lists.tokens:,} tokens have no list, but their label")


def probe(config: Config, tokenizer: Any) -> None:
    """Ask one short question, once, before anything else costs; raises DistillError as `fill`."""
    teacher, store = config.teacher, config.store_folder() / "responses"
    buyer = make_responder(teacher, config)
    question = (Message(role="user", content="Count from one to ten, in words."),)
    sampling = Sampling(max_new_tokens=min(32, teacher.max_new_tokens))
    request = Request.make(buyer.origin, "probe", question, sampling)
    with Ask(buyer, store, again=True) as ask:
        ask.fetch([request], "signals")
        reply = _reply(ask.store, request.id)
    if isinstance(reply, str) or not reply.logprobs:
        why = reply if isinstance(reply, str) else "has no log-probabilities"
        raise _error(config, f"its answer to a first short question {why}")
    ids = encode_text(tokenizer, reply.text)
    if len(ids) - len(align(Spelling(tokenizer), reply.logprobs, ids)) > (1 - ALIKE) * len(ids):
        what = f"writes {reply.logprobs[0].token!r} first, and the text has other tokens"
        raise _error(config, f"its tokenizer is another than that of signals.tokenizer: it {what}")


def _error(config: Config, what: str) -> DistillError:
    """Return the error of answers without distributions."""
    fix = "ask for them: teacher.extra_body={logprobs: true, top_logprobs: 20}"
    return DistillError(Exit.TEACHER, config.teacher.model, what, f"{fix}; or {TEXT_ONLY}")


def _reply(store: ResponseStore, identifier: str) -> Reply | str:
    """Return a stored answer, or why there is none to read."""
    key = next(store.reply_keys(identifier), None)
    if key is None:
        return "is not in the store"
    reply = store.raw(key).reply
    return f"cannot be read: {reply.error}" if reply.stop == "error" else reply


class Lists:
    """The lists of stored answers.

    It counts the tokens that it read, those that have their label alone, and of these the gaps: not
    an answer's last.
    """

    def __init__(self, tokenizer: Any, settings: Signals, store: ResponseStore) -> None:
        self.spelling, self.vocabulary = Spelling(tokenizer), len(tokenizer)
        self.settings, self.store = settings, store
        self.tokens = self.alone = self.gaps = 0

    def read(self, texts: Sequence[Example]) -> Iterator[Signal | str]:
        """Yield each answer's signal, or why it has none."""
        for text in texts:
            reply = _reply(self.store, text.response_id)
            if isinstance(reply, str):
                yield reply
                continue
            ids = supervised_ids(text)
            aligned = align(self.spelling, reply.logprobs or (), ids)
            self.tokens += len(ids)
            self.alone += len(ids) - len(aligned)
            self.gaps += max(aligned, default=len(ids) - 1) + 1 - len(aligned)
            lists = [aligned.get(n, {i: 0.0}) for n, i in enumerate(ids)]
            try:
                yield Signal.from_lists(lists, self.settings, self.vocabulary)
            except ValueError as error:  # impossible probabilities
                yield f"cannot be used: {error}"


def align(
    spelling: "Spelling", tokens: Sequence[TokenLogprob], ids: Sequence[int]
) -> dict[int, dict[int, float]]:
    """Return what is listed at each of `ids` that stands, in order, among the server's tokens."""
    theirs_ids = [spelling.id_of(token) for token in tokens]
    blocks = SequenceMatcher(None, theirs_ids, ids, autojunk=False).get_matching_blocks()
    aligned: dict[int, dict[int, float]] = {}
    for theirs, ours in ((block.a + n, block.b + n) for block in blocks for n in range(block.size)):
        token = tokens[theirs]
        candidates = [(spelling.id_of(other), other.logprob) for other in token.top]
        listed = {i: log for i, log in candidates if i is not None}
        aligned[ours] = {ids[ours]: token.logprob, **listed}
    return aligned


class Spelling:
    """The ids of a server's tokens, by their bytes: of byte-level and piece vocabularies."""

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

    def id_of(self, token: Candidate) -> int | None:
        """Return the id that a server's token stands for, or None where no single id does."""
        if numbered := NUMBERED.fullmatch(token.token):
            return int(numbered[1])
        text = token.token.encode("utf-8", "replace")
        try:
            data = text if token.bytes is None else bytes(token.bytes)
        except ValueError:  # no bytes
            return None
        return None if data == text and UNKNOWN in token.token else self.ids.get(data)
