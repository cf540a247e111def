"""How fast a model answers one request at a time, and how fast it reads: timed apart from the answers that are scored.

Two short runs a model, of fresh prompts and past the store: a handful through one slot, one after the other, as a
single user would meet it; and a batch that draws one token an answer, which is the reading of the prompts. The time is
that of the model's steps: loading and set-up are left out. A prompt's beginning that the one before it shares is
computed once, as in the batch. What was timed is kept, so that a run that goes on or is made again says the same.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from distill.records import Timing
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Raw, Request
from distill.storage.files import read_records, write_records
from distill.storage.progress import say

ALONE = 8  # prompts asked one at a time
READ = 32  # prompts read in a batch
SECONDS = 5.0  # of each of the two runs, beyond which no further prompt is begun


def timed(path: Path, responder: LocalResponder, requests: Sequence[Request]) -> Timing | None:
    """Time a model on some of the requests, or return what `path` holds; None where nothing could be timed."""
    if path.exists():
        return next(iter(read_records(path, Timing)), None)
    say(f"{responder.model}: timed one request at a time")
    alone = measured(responder, spread(requests, ALONE), max_batch_size=1)
    first = [shortened(request) for request in spread(requests, READ)]
    read = measured(responder, first, max_batch_size=responder.max_batch_size)
    if not alone or not read:
        return None
    timing = Timing(
        requests=len(alone),
        output_tokens=sum(raw.usage.output_tokens for raw in alone),
        seconds=sum(raw.usage.seconds for raw in alone),
        read_tokens=sum(raw.usage.input_tokens for raw in read),
        read_seconds=sum(raw.usage.seconds for raw in read),
    )
    write_records(path, [timing])
    return timing


def spread(requests: Sequence[Request], count: int) -> list[Request]:
    """Choose up to `count` requests, evenly from first to last."""
    step = max(1, len(requests) // count)
    return list(requests[::step][:count])


def shortened(request: Request) -> Request:
    """Return the request for an answer of one token."""
    sampling = request.sampling.model_copy(update={"max_new_tokens": 1})
    return request.model_copy(update={"sampling": sampling})


def measured(
    responder: LocalResponder, requests: Sequence[Request], max_batch_size: int | None
) -> list[Raw]:
    """Ask until all have answered or the time is over, and return the answers that came."""
    usual, responder.max_batch_size = responder.max_batch_size, max_batch_size
    started, raws = time.monotonic(), []
    try:
        for raw in responder.ask(requests):
            raws.append(raw)
            if time.monotonic() - started > SECONDS:
                break
    finally:
        responder.max_batch_size = usual
    return raws
