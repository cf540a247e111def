"""Signals from a server, which lists top log-probabilities at each token of a text.

It reads the answers again (vLLM's `prompt_logprobs`, bought and stored as answers are), or listed
them when it wrote them (`top_logprobs`), at temperature 1 and 20 ids at most unless vLLM is told
otherwise. Listed tokens that stand for no single id count in the tail mass.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

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
from distill.responders.responder import Request, Sampling, Scoring
from distill.responders.store import ResponseStore
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training.batches import Example
from distill.training.soft_labels.cache import SLACK, TEXT_ONLY, Signal, SignalCache, supervised_ids

ALIKE = 0.9  # of the tokens must agree and have a list, else the tokenizer differs or few have any
PILOT = 64  # answers that are checked before any is stored
NUMBERED = re.compile(r"token_id:(\d{1,8})")  # how vLLM writes an id
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how a vocabulary of pieces writes a byte
UNKNOWN = "\ufffd"  # what stands for part of a character
ASK_AGAIN = "see to the server: the same command asks again for what is missing"
LIST_THEM = f"ask for them: teacher.extra_body={{logprobs: true, top_logprobs: 20}}; or {TEXT_ONLY}"


class ListedToken(TypedDict):
    """What a server says of a token that it lists."""

    logprob: Annotated[float, Field(le=SLACK, allow_inf_nan=False)]
    decoded_token: NotRequired[object]


Listed = dict[Annotated[int, Field(ge=0, lt=1 << 24)], ListedToken]  # at one position, by ids
PROMPT_LOGPROBS = TypeAdapter(list[Listed | None])  # vLLM's: one a token, None at the first
Lists = Callable[[Example], list[dict[int, float]]]  # ids and log-probabilities at each token


def fill(
    cache: SignalCache,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Example],
    config: Config,
    run: Run,
) -> None:
    """Put the distributions of `texts` into the cache, asking for what the store lacks.

    One text is asked alone first, so that a server which cannot do it is found for the price of
    one. Raises DistillError (exit 4) where a text has no distributions that can be read; the same
    command asks again.
    """

    def read(part: Sequence[Example], lists: Lists) -> list[tuple[Example, str]]:
        return cache.fill(part, lambda some: signals_of(some, lists, config, tokenizer))

    if config.signals.from_answers:
        with ResponseStore(config.store_folder() / "responses", writable=False) as store:
            answers = Answers(tokenizer, store)
            answers.require(texts[:: -(-len(texts) // PILOT)], config.teacher.model)
            _require(read(texts, answers.lists), config.teacher.model, LIST_THEM)
        if answers.alone:
            share = f"{answers.alone:,} of {answers.tokens:,}"
            say(f"signals: {share} tokens have no list, but their label")
        return
    with make_ask(config, run) as ask:
        server = Server(tokenizer, ask)
        missing = [text for text, _ in read(texts, server.lists)]  # the store has the others
        for part in (missing[:1], missing[1:]):
            server.ask_for(part)
            _require(read(part, server.lists), ask.responder.model, ASK_AGAIN)


def probe(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ask for the lists of one short text, once, before other costs; DistillError as `fill`."""
    if config.signals.from_answers:
        at_once = config.teacher.model_copy(update={"batch": False})
        buyer, limit = make_responder(at_once, config), min(32, config.teacher.max_new_tokens)
        question = (Message(role="user", content="Count from one to ten, in words."),)
        request = Request.make(buyer.origin, "probe", question, Sampling(max_new_tokens=limit))
        with Ask(buyer, config.store_folder() / "responses", again=True) as ask:
            ask.fetch([request], "signals")
            answers = Answers(tokenizer, ask.store)
            try:
                ids = tuple(encode_text(tokenizer, answers.reply(request.id).text))
            except ValueError as error:
                what = f"its answer to a first short question {error}"
                raise DistillError(Exit.TEACHER, buyer.model, what, LIST_THEM) from None
            answers.require([Example("probe", request.id, ids, (1.0,) * len(ids))], buyer.model)
        return
    question = (Message(role="user", content="How much is 12 + 30?"),)
    ids = (*encode_prompt(tokenizer, question, config.template_date), *encode_text(tokenizer, "42"))
    text = Example("probe", "probe", ids, (0.0,) + (1.0,) * (len(ids) - 1))
    with make_ask(config) as ask:
        server = Server(tokenizer, ask)
        for last in (False, True):
            (signal,) = signals_of([text], server.lists, config, tokenizer)
            if isinstance(signal, Signal):
                return
            if not last:
                server.ask_for([text])
        what = f"a first short text {signal}"
        raise DistillError(Exit.TEACHER, ask.responder.model, what, ASK_AGAIN)


def _require(failures: Sequence[tuple[Example, str]], model: str | None, fix: str) -> None:
    """Raise DistillError (exit 4) naming the first text without a signal, if there is one."""
    if failures:
        (text, why), *others = failures
        more = f" (and {len(others)} others have none)" if others else ""
        raise DistillError(Exit.TEACHER, model, f"answer {text.response_id} {why}{more}", fix)


def signals_of(
    texts: Sequence[Example], lists: Lists, config: Config, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Signal | str]:
    """Yield each text's signal, or why it has none."""
    for text in texts:
        try:
            yield Signal.from_lists(lists(text), config.signals, len(tokenizer))
        except ValueError as error:
            yield str(error)


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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ask: Ask) -> None:
        self.tokenizer, self.ask, self.store = tokenizer, ask, ask.store

    def ask_for(self, texts: Sequence[Example]) -> None:
        """Buy a reply for each text, a further one where the last could not be read."""
        self.ask.fetch([self._next(text) for text in texts], "signals")

    def _next(self, text: Example) -> Scoring:
        """Return the first request for a text that has no reply yet."""
        request = Scoring.of(self.ask.responder.origin, text.input_ids)
        while ("response", request.id) in self.store:
            request = request.model_copy(update={"sample": request.sample + 1})
        return request

    def lists(self, text: Example) -> list[dict[int, float]]:
        """Return what the last reply lists at supervised tokens; ValueError says why not."""
        request = self._next(text)
        failure = next(self.store.errors(request.id), None)
        if failure or not request.sample:
            raise ValueError(f"has no reply: {failure or 'it was not asked'}")
        last = Response.make_id(request.key, request.sample - 1)
        body = (self.store.get("response", last) or {})["body"]
        try:
            if body.get("cut"):
                raise ValueError(f"{body['cut']} (raise max_body_bytes of the endpoint)")
            rows = prompt_logprobs(unpack(body), text.input_ids)
            require_tokens(self.tokenizer, rows, text.input_ids)
        except ValueError as error:
            raise ValueError(f"has a reply that cannot be used: {error}") from None
        pairs = zip(rows, text.weights, strict=True)
        return [{i: one["logprob"] for i, one in row.items()} for row, weight in pairs if weight]


def prompt_logprobs(data: bytes, ids: Sequence[int]) -> list[Listed]:
    """Return what a reply lists at each token of a text, nothing at the first; or ValueError."""
    reply: Any = load_json(data)
    try:
        rows = PROMPT_LOGPROBS.validate_python(reply["choices"][0]["prompt_logprobs"])
    except (LookupError, TypeError, ValidationError):
        what = "it holds no prompt_logprobs that can be read, which signals need"
        raise ValueError(f"{what}: does the server give them, as vLLM does?") from None
    lists = [row or {} for row in rows]
    listed = [i in row for row, i in zip(lists, ids, strict=False)][1:]
    if len(lists) != len(ids) or not all(listed):
        what = f"its prompt_logprobs are of {len(lists)} tokens"
        raise ValueError(f"{what}, and not of the {len(ids)} of the text")
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


class Answers:
    """The lists of stored answers; it counts the tokens, and those that have their label alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, store: ResponseStore) -> None:
        self.spelling, self.store = Spelling(tokenizer), store
        self.tokens = self.alone = 0

    def reply(self, identifier: str) -> Reply:
        """Return a stored answer; ValueError says why there is none to read."""
        if (key := next(self.store.reply_keys(identifier), None)) is None:
            raise ValueError("is not in the store")
        reply = self.store.raw(key).reply
        if reply.stop == "error":
            raise ValueError(f"cannot be read: {reply.error}")
        return reply

    def lists(self, text: Example) -> list[dict[int, float]]:
        """Return what came with an answer, and the label alone where a token has no list."""
        ids, aligned = supervised_ids(text), self._aligned(text)
        self.tokens += len(ids)
        self.alone += len(ids) - len(aligned)
        return [aligned.get(n, {i: 0.0}) for n, i in enumerate(ids)]

    def _aligned(self, text: Example) -> dict[int, dict[int, float]]:
        tokens = self.reply(text.response_id).logprobs or ()
        return align(self.spelling, tokens, supervised_ids(text))

    def require(self, texts: Sequence[Example], model: str | None) -> None:
        """Raise DistillError (exit 4) where too many tokens, before an answer's end, lack lists."""
        tokens = listed = gaps = 0
        try:
            for text in texts:
                aligned, count = self._aligned(text), len(supervised_ids(text))
                tokens, listed = tokens + count, listed + len(aligned)
                gaps += max(aligned, default=count - 1) + 1 - len(aligned)
        except ValueError as error:
            raise DistillError(Exit.TEACHER, model, f"an answer {error}", LIST_THEM) from None
        if gaps > (1 - ALIKE) * tokens:
            what = f"lists candidates at {listed} of {tokens} tokens: it has no log-probabilities,"
            what = f"{what} or its tokenizer is another than signals.tokenizer's"
            raise DistillError(Exit.TEACHER, model, what, LIST_THEM)


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
