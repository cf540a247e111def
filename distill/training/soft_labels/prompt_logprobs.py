"""Signals from a server: an endpoint reads the answers, and says how likely each token was and what else was likely.

The form is vLLM's: a completion of the whole text as token ids, with `prompt_logprobs`. Each text is a request that is
bought as answers are: attempts, retries, limits, budget and bill are theirs, and a reply is in the store before it is
read, so a kill costs none that was paid for. Their distributions then go into the cache, from the store.

A server lists k ids at most (vLLM 20, unless started with --max-logprobs; hosted interfaces 20), at temperature 1. The
mass left over is one minus what it lists. Its tokens are held against the tokenizer's, and its lists against the text.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.config import Config, EndpointTeacher
from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_prompt, encode_text
from distill.records import Example, Message, Response
from distill.responders.ask import Ask
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.endpoint.wire import load_json, unpack
from distill.responders.prices import load_prices
from distill.responders.responder import Scoring
from distill.storage.run_folder import Run
from distill.training.soft_labels.cache import Signal, SignalCache
from distill.training.soft_labels.top_logprobs import (
    SLACK,
    Chances,
    KeyedExample,
    enter,
    named,
    to_signal,
)

ALIKE = 0.9  # of the tokens must read the same on both sides: some servers print parts of characters in their own way
# of a stored reply, deflated, a listed id; the prompt's tokens have lists too
REPLY_BYTES_AN_ID = 31.0


def scoring_settings(config: Config) -> EndpointTeacher:
    """Return how the server is asked for distributions; what shapes the answers of the same server is left out."""
    reader, settings = config.soft_teacher(), config.signals
    assert isinstance(reader, EndpointTeacher)
    extra = reader.extra_body if settings.endpoint else {}
    changes = {
        "api": "completions",
        "extra_body": {**extra, "prompt_logprobs": settings.k},
        "max_tokens_field": "max_tokens",
        "omit": (),
    }
    return reader.model_copy(update=changes)


def fill(
    cache: SignalCache, tokenizer: Any, texts: Sequence[KeyedExample], config: Config, run: Run
) -> None:
    """Put the distributions of `texts` into the cache, asking for what the store lacks.

    One text is asked alone first, so that a server which cannot do it is found for the price of one. Raises
    DistillError (exit 4) where a text has no distributions that can be read; the same command asks again.
    """
    with asking(config, run) as ask:
        server = Server(tokenizer, config, ask)
        failures = [
            text for text, _ in enter(cache, texts, server.read)
        ]  # the store has the others
        for part in (failures[:1], failures[1:]):
            server.ask_for([example for example, _ in part])
            if without := enter(cache, part, server.read):
                raise server.fault(named(without))


def probe(config: Config, tokenizer: Any) -> None:
    """Let the server read a short text, once, before anything else is paid for; raises DistillError as `fill` does."""
    question = (Message(role="user", content="How much is 12 + 30?"),)
    ids = (*encode_prompt(tokenizer, question, config.template_date), *encode_text(tokenizer, "42"))
    text = Example(
        id="probe", response_id="probe", input_ids=ids, weights=(0.0,) + (1.0,) * (len(ids) - 1)
    )
    with asking(config) as ask:
        server = Server(tokenizer, config, ask)
        if isinstance(next(server.read([text])), str):
            server.ask_for([text])
        if isinstance(signal := next(server.read([text])), str):
            raise server.fault(f"a first short text {signal}")


def asking(config: Config, payer: Run | None = None) -> Ask:
    """Return how the endpoint that reads is asked."""
    settings = scoring_settings(config)
    price = load_prices(config.evaluation.prices).teacher(settings.model)
    responder = EndpointResponder(settings, price, config.name)
    return Ask(responder, config.store_folder() / "responses", payer)


class Server:
    """The endpoint that reads, and the store of its replies."""

    def __init__(self, tokenizer: Any, config: Config, ask: Ask) -> None:
        self.tokenizer, self.settings, self.ask = tokenizer, config.signals, ask

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
        store = self.ask.store
        for text in texts:
            request = self._next(text)
            fault = next(store.errors(request.id), None)
            if fault or not request.sample:
                yield f"has no reply: {fault or 'it was not asked'}"
                continue
            last = Response.make_id(request.key, request.sample - 1)
            try:
                yield self._signal((store.get("response", last) or {})["body"], text)
            except ValueError as error:
                yield f"has a reply that cannot be used: {error}"

    def _signal(self, body: Mapping[str, Any], text: Example) -> Signal:
        """Read a stored reply; raises ValueError in words."""
        if body.get("cut"):
            raise ValueError(f"{body['cut']} (raise max_body_bytes of the endpoint)")
        places = prompt_logprobs(unpack(body), text.input_ids)
        require_tokens(self.tokenizer, places, text.input_ids)
        return to_signal(places, text.weights, self.settings, len(self.tokenizer))

    def fault(self, what: str) -> DistillError:
        """Return the error of a text without distributions."""
        fix = "see to the server: the same command asks again for what is missing"
        return DistillError(Exit.TEACHER, self.ask.responder.model, what, fix)


def expected_bytes(tokens: int, k: int) -> float:
    """Return about how many bytes the stored replies of texts of so many tokens take, at most."""
    return tokens * (k + 1) * REPLY_BYTES_AN_ID


def prompt_logprobs(data: bytes, ids: Sequence[int]) -> list[Chances]:
    """Return what a reply lists at each token of a text, nothing at the first; raises ValueError in words.

    vLLM writes them into the choice, and with a chat beside the choices.
    """
    body = load_json(data)
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    lists = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if not isinstance(lists, list):
        raise ValueError(
            "it holds no prompt_logprobs, which signals need: does the server give them, as vLLM does?"
        )
    if len(lists) != len(ids):
        raise ValueError(f"its prompt_logprobs are of {len(lists)} tokens, the text has {len(ids)}")
    try:
        places = [_place(row or {}) for row in lists]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("its prompt_logprobs cannot be read") from None
    if wrong := [
        n for n, (place, i) in enumerate(zip(places, ids, strict=True)) if n and i not in place
    ]:
        raise ValueError(f"it does not list token {wrong[0]} of the text among those at its place")
    return places


def _place(row: Mapping[str, Any]) -> Chances:
    """Read the list of one token; raises ValueError, TypeError, KeyError or AttributeError."""
    chances = {int(i): (float(one["logprob"]), one.get("decoded_token")) for i, one in row.items()}
    if any(
        not 0 <= i < 1 << 24 or math.isnan(log) or log > SLACK for i, (log, _) in chances.items()
    ):
        raise ValueError
    return chances


def require_tokens(tokenizer: Any, places: Sequence[Chances], ids: Sequence[int]) -> None:
    """Raise ValueError where the server reads the ids of a text as other tokens than the tokenizer does."""
    pairs = [
        (place[i][1], tokenizer.decode([i]), i)
        for place, i in zip(places, ids, strict=True)
        if place
    ]
    plain = [
        (a.strip(), b.strip(), i)
        for a, b, i in pairs
        if isinstance(a, str) and "\ufffd" not in a + b
    ]
    comparable = [(theirs, ours, i) for theirs, ours, i in plain if theirs and ours]
    others = [row for row in comparable if row[0] != row[1]]
    if len(others) > (1 - ALIKE) * len(comparable):
        theirs, ours, i = others[0]
        raise ValueError(
            f"its tokenizer is another: id {i} is {theirs!r} there, and {ours!r} in signals.tokenizer"
        )
