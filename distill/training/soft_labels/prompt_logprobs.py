"""Signals from a server: an endpoint reads the answers, and lists top log-probabilities.

The form is vLLM's: a completion of the full text as token ids, with `prompt_logprobs`. Each text is
a request that is bought as answers are: attempts, retries, limits, budget and ledger are theirs,
and a reply is in the store before it is parsed, so a kill costs none that was paid for. The
distributions then go into the cache, from the store.

A server lists k ids at most (vLLM 20, unless started with --max-logprobs; hosted interfaces 20), at
temperature 1. The tail mass is one minus what it lists. Its tokens are compared with the
tokenizer's, and its lists with the text.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from distill.config.learning import Signals
from distill.config.teachers import EndpointTeacher
from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_prompt, encode_text
from distill.records import Example, Message, Response
from distill.responders.ask import Ask
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.wire import load_json, unpack
from distill.responders.prices import load_prices
from distill.responders.responder import Scoring
from distill.storage.run_folder import Run
from distill.training.soft_labels.cache import (
    SLACK,
    KeyedExample,
    Signal,
    SignalCache,
    name_failures,
)

ALIKE = 0.9  # of the tokens must agree: some servers print parts of characters in their own way
REPLY_BYTES_AN_ID = 31.0  # of a stored reply, deflated; the prompt's tokens have lists too


class Listed(NamedTuple):
    """A token that a server lists: its log-probability, and its text where the server says it."""

    logprob: float
    text: str | None


def fill(
    cache: SignalCache, tokenizer: Any, texts: Sequence[KeyedExample], config: Config, run: Run
) -> None:
    """Put the distributions of `texts` into the cache, asking for what the store lacks.

    One text is asked alone first, so that a server which cannot do it is found for the price of
    one. Raises DistillError (exit 4) where a text has no distributions that can be read; the same
    command asks again.
    """
    with make_ask(config, run) as ask:
        server = Server(tokenizer, config.signals, ask)
        missing = [text for text, _ in cache.fill(texts, server.read)]  # the store has the others
        for part in (missing[:1], missing[1:]):
            server.ask_for([text.example for text in part])
            if failures := cache.fill(part, server.read):
                raise server.error(name_failures(failures))


def probe(config: Config, tokenizer: Any) -> None:
    """Let the server read a short text, once, before other costs; raises DistillError as `fill`."""
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
    }
    price = load_prices(config.evaluation.prices).teacher(reader.model)
    responder = EndpointResponder(reader.model_copy(update=changes), price, config.name)
    return Ask(responder, config.store_folder() / "responses", payer)


class Server:
    """The endpoint that reads, and the store of its replies."""

    def __init__(self, tokenizer: Any, settings: Signals, ask: Ask) -> None:
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
                    {i: one.logprob for i, one in listed.items()}
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


def prompt_logprobs(data: bytes, ids: Sequence[int]) -> list[dict[int, Listed]]:
    """Return what a reply lists at each token of a text, nothing at the first; raises ValueError.

    vLLM writes the lists into the choice, and with a chat beside the choices.
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
        lists = [
            {
                int(i): Listed(float(one["logprob"]), one.get("decoded_token"))
                for i, one in (row or {}).items()
            }
            for row in rows
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("its prompt_logprobs cannot be read") from None
    for n, (listed, token) in enumerate(zip(lists, ids, strict=True)):
        for i, (log, _) in listed.items():
            if not 0 <= i < 1 << 24 or math.isnan(log) or log > SLACK:
                raise ValueError("its prompt_logprobs cannot be read")
        if n and token not in listed:
            raise ValueError(f"it does not list token {n} of the text among those at its position")
    return lists


def require_tokens(
    tokenizer: Any, lists: Sequence[Mapping[int, Listed]], ids: Sequence[int]
) -> None:
    """Raise ValueError where the server reads a text's ids as other tokens than the tokenizer."""
    comparable: list[tuple[str, str, int]] = []
    for listed, i in zip(lists, ids, strict=True):
        theirs, ours = listed[i].text if listed else None, tokenizer.decode([i])
        if isinstance(theirs, str) and "\ufffd" not in theirs + ours:
            comparable.append((theirs.strip(), ours.strip(), i))
    comparable = [row for row in comparable if row[0] and row[1]]
    others = [row for row in comparable if row[0] != row[1]]
    if len(others) > (1 - ALIKE) * len(comparable):
        theirs, ours, i = others[0]
        what = f"id {i} is {theirs!r} there, and {ours!r} in signals.tokenizer"
        raise ValueError(f"its tokenizer is another: {what}")
