"""Signals from a server, which lists top log-probabilities at each token of a text.

It reads the answers again, or listed them when it wrote them. Read again, a text is a completion of
its token ids with vLLM's `prompt_logprobs`, bought as answers are: attempts, retries, limits,
budget and ledger are theirs, and a reply is in the store before it is parsed, so a kill costs none
that was paid for. What came with answers (`teacher.extra_body: {logprobs: true, top_logprobs: 20}`)
is in the store already: nothing more is paid. There a server writes a token as text, as bytes, or
as its id (vLLM with `return_tokens_as_token_ids`), and what it wrote is aligned with the answer's
ids. Listed tokens that stand for no single id (some servers print parts of characters) count in the
tail mass. A token without a list has its label alone: the template's end where a server leaves it
out, and where the answer is cut into other tokens than it was written in.

A server lists k ids at most (vLLM 20, unless started with --max-logprobs; hosted interfaces 20), at
temperature 1. The tail mass is one minus what it lists.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from distill.config.learning import Signals
from distill.config.teachers import EndpointTeacher
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_prompt, encode_text
from distill.records import Candidate, Message, Response, TokenLogprob
from distill.responders.ask import Ask
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.wire import Reply, load_json, unpack
from distill.responders.kinds import make_responder
from distill.responders.prices import load_prices
from distill.responders.responder import Request, Responder, Sampling, Scoring
from distill.responders.store import ResponseStore
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training.batches import Example
from distill.training.soft_labels.cache import (
    SLACK,
    TEXT_ONLY,
    KeyedExample,
    Signal,
    SignalCache,
    name_failures,
    supervised_ids,
)

ALIKE = 0.9  # of the tokens must agree and have a list, else the tokenizer differs or few have any
PILOT = 64  # answers that are checked before any is stored
REPLY_BYTES_AN_ID = 31.0  # of a stored reply, deflated; the prompt's tokens have lists too
NUMBERED = re.compile(r"token_id:(\d{1,8})")  # how vLLM writes an id
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how a vocabulary of pieces writes a byte
UNKNOWN = "\ufffd"  # what stands for part of a character


class ListedToken(TypedDict):
    """What a server says of a token that it lists."""

    logprob: Annotated[float, Field(le=SLACK, allow_inf_nan=False)]
    decoded_token: NotRequired[object]


Listed = dict[Annotated[int, Field(ge=0, lt=1 << 24)], ListedToken]  # at one position, by ids
LISTS = TypeAdapter(list[Listed | None])


def fill(
    cache: SignalCache,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[KeyedExample],
    config: Config,
    run: Run,
) -> None:
    """Put the distributions of `texts` into the cache, asking for what the store lacks.

    One text is asked alone first, so that a server which cannot do it is found for the price of
    one. Raises DistillError (exit 4) where a text has no distributions that can be read; the same
    command asks again.
    """
    if config.signals.from_answers:
        with ResponseStore(config.store_folder() / "responses", writable=False) as store:
            fill_from_answers(cache, tokenizer, texts, config.signals, store, config.teacher.model)
        return
    with make_ask(config, run) as ask:
        server = Server(tokenizer, config.signals, ask)
        missing = [text for text, _ in cache.fill(texts, server.read)]  # the store has the others
        for part in (missing[:1], missing[1:]):
            server.ask_for([text.example for text in part])
            if failures := cache.fill(part, server.read):
                raise server.error(name_failures(failures))


def probe(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ask for the lists of one short text, once, before other costs; DistillError as `fill`."""
    if config.signals.from_answers:
        limit = min(32, config.teacher.max_new_tokens)
        at_once = config.teacher.model_copy(update={"batch": False})
        buyer = make_responder(at_once, config)
        probe_answer(buyer, config.store_folder() / "responses", tokenizer, limit)
        return
    question = (Message(role="user", content="How much is 12 + 30?"),)
    ids = (*encode_prompt(tokenizer, question, config.template_date), *encode_text(tokenizer, "42"))
    weights = (0.0,) + (1.0,) * (len(ids) - 1)
    text = Example(id="probe", response_id="probe", input_ids=ids, weights=weights)
    with make_ask(config) as ask:
        server = Server(tokenizer, config.signals, ask)
        if isinstance(next(server.read([text])), str):
            server.ask_for([text])
        if isinstance(signal := next(server.read([text])), str):
            raise server.error(f"a first short text {signal}")


# A server that reads the answers again


def make_ask(config: Config, payer: Run | None = None) -> Ask:
    """Return how the endpoint is asked; what shapes the same server's answers is left out."""
    reader, settings = config.soft_teacher(), config.signals
    assert isinstance(reader, EndpointTeacher)
    extra = reader.extra_body if settings.endpoint else {}
    changes = {
        "api": "completions",
        "extra_body": {**extra, "prompt_logprobs": settings.k},
        "max_tokens_field": "max_tokens",
        "omit": (),
        "chat_template_kwargs": {},  # the ids are rendered here
    }
    price = load_prices(config.evaluation.prices).teacher(reader.model)
    responder = EndpointResponder(reader.model_copy(update=changes), price, config.name)
    return Ask(responder, config.store_folder() / "responses", payer)


class Server:
    """The endpoint that reads, and the store of its replies."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Signals, ask: Ask) -> None:
        self.tokenizer, self.settings, self.ask = tokenizer, settings, ask

    def ask_for(self, texts: Sequence[Example]) -> None:
        """Buy a reply for each text, a further one where the last could not be read."""
        self.ask.fetch([self._next(text) for text in texts], "signals")

    def _next(self, text: Example) -> Scoring:
        """Return the first request for a text that has no reply yet."""
        request = Scoring.of(self.ask.responder.origin, text.input_ids)
        while ("response", request.id) in self.ask.store:
            request = request.model_copy(update={"sample": request.sample + 1})
        return request

    def read(self, texts: Sequence[Example]) -> Iterator[Signal | str]:
        """Yield each text's signal from its last reply, or why it has none."""
        store, vocabulary = self.ask.store, len(self.tokenizer)
        for text in texts:
            request = self._next(text)
            failure = next(store.errors(request.id), None)
            if failure or not request.sample:
                yield f"has no reply: {failure or 'it was not asked'}"
                continue
            last = Response.make_id(request.key, request.sample - 1)
            body = (store.get("response", last) or {})["body"]
            try:
                if body.get("cut"):
                    raise ValueError(f"{body['cut']} (raise max_body_bytes of the endpoint)")
                lists = prompt_logprobs(unpack(body), text.input_ids)
                require_tokens(self.tokenizer, lists, text.input_ids)
                rows = [
                    {i: one["logprob"] for i, one in listed.items()}
                    for listed, weight in zip(lists, text.weights, strict=True)
                    if weight
                ]
                yield Signal.from_lists(rows, self.settings, vocabulary)
            except ValueError as error:
                yield f"has a reply that cannot be used: {error}"

    def error(self, what: str) -> DistillError:
        """Return the error of a text without distributions."""
        fix = "see to the server: the same command asks again for what is missing"
        return DistillError(Exit.TEACHER, self.ask.responder.model, what, fix)


def expected_bytes(tokens: int, k: int) -> float:
    """Return about how many bytes the stored replies of texts of so many tokens take, at most."""
    return tokens * (k + 1) * REPLY_BYTES_AN_ID


def prompt_logprobs(data: bytes, ids: Sequence[int]) -> list[Listed]:
    """Return what a reply lists at each token of a text, nothing at the first; raises ValueError.

    vLLM writes the lists into the choice.
    """
    body = load_json(data)
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    rows = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if not isinstance(rows, list):
        what = "it holds no prompt_logprobs, which signals need"
        raise ValueError(f"{what}: does the server give them, as vLLM does?")
    if len(rows) != len(ids):
        raise ValueError(f"its prompt_logprobs are of {len(rows)} tokens, the text has {len(ids)}")
    try:
        lists = [row or {} for row in LISTS.validate_python(rows)]
    except ValidationError:
        raise ValueError("its prompt_logprobs cannot be read") from None
    for n, (listed, token) in enumerate(zip(lists, ids, strict=True)):
        if n and token not in listed:
            raise ValueError(f"it does not list token {n} of the text among those at its position")
    return lists


def require_tokens(
    tokenizer: PreTrainedTokenizerBase, lists: Sequence[Listed], ids: Sequence[int]
) -> None:
    """Raise ValueError where the server reads a text's ids as other tokens than the tokenizer."""
    compared, others = 0, list[tuple[str, str, int]]()
    for listed, i in zip(lists, ids, strict=True):
        theirs = listed[i].get("decoded_token") if listed else None
        ours = f"{tokenizer.decode([i])}"
        if isinstance(theirs, str) and UNKNOWN not in theirs + ours:
            theirs, ours = theirs.strip(), ours.strip()
            compared += bool(theirs and ours)
            others += [(theirs, ours, i)] if theirs and ours and theirs != ours else []
    if len(others) > (1 - ALIKE) * compared:
        theirs, ours, i = others[0]
        what = f"id {i} is {theirs!r} there, and {ours!r} in signals.tokenizer"
        raise ValueError(f"its tokenizer is another: {what}")


# Lists that came with the answers


def fill_from_answers(
    cache: SignalCache,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[KeyedExample],
    settings: Signals,
    store: ResponseStore,
    model: str | None,
) -> None:
    """Put the distributions that came with the answers `texts` into the cache.

    Raises DistillError (exit 4) where too few of their tokens have any.
    """
    pilot, lists = (Lists(tokenizer, settings, store) for _ in range(2))
    for signal in pilot.read([text.example for text in texts[:: -(-len(texts) // PILOT)]]):
        if isinstance(signal, str):
            raise _error(model, f"an answer {signal}")
    if pilot.gaps > (1 - ALIKE) * pilot.tokens:
        what = f"lists candidates at {pilot.tokens - pilot.alone} of {pilot.tokens} tokens"
        raise _error(model, f"{what}: its tokenizer is another, or it seldom does")
    if failures := cache.fill(texts, lists.read):
        raise _error(model, name_failures(failures))
    if lists.alone:
        say(f"signals: {lists.alone:,} of {lists.tokens:,} tokens have no list, but their label")


def probe_answer(
    buyer: Responder, store: Path, tokenizer: PreTrainedTokenizerBase, limit: int
) -> None:
    """Ask one short question, and look for the lists of its answer of at most `limit` tokens."""
    question = (Message(role="user", content="Count from one to ten, in words."),)
    request = Request.make(buyer.origin, "probe", question, Sampling(max_new_tokens=limit))
    with Ask(buyer, store, again=True) as ask:
        ask.fetch([request], "signals")
        reply = _reply(ask.store, request.id)
    if isinstance(reply, str) or not reply.logprobs:
        why = reply if isinstance(reply, str) else "has no log-probabilities"
        raise _error(buyer.model, f"its answer to a first short question {why}")
    ids = encode_text(tokenizer, reply.text)
    if len(ids) - len(align(Spelling(tokenizer), reply.logprobs, ids)) > (1 - ALIKE) * len(ids):
        what = f"writes {reply.logprobs[0].token!r} first, and the text has other tokens"
        what = f"its tokenizer is another than that of signals.tokenizer: it {what}"
        raise _error(buyer.model, what)


def _error(model: str | None, what: str) -> DistillError:
    fix = "ask for them: teacher.extra_body={logprobs: true, top_logprobs: 20}"
    return DistillError(Exit.TEACHER, model, what, f"{fix}; or {TEXT_ONLY}")


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

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: Signals, store: ResponseStore
    ) -> None:
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
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
