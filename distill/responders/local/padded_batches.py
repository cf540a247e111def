"""The plain way to answer a batch, for architectures that the stream cannot serve: padded, until the longest row ends.

It asks nothing of a model but transformers' own forward pass with a cache (sliding windows of a special kind, attention
sinks, state-space layers, remote code). Slower, since a long answer holds its batch and padding is computed.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from distill.responders.local.continuous_batching import Chooser, Row, ended


def answer_padded(
    model: Any, rows: Sequence[Row], slots: int, stop_ids: frozenset[int], choose: Chooser
) -> Iterator[Row]:
    """Yield the rows as they finish, `slots` neighbours at a time."""
    for start in range(0, len(rows), slots):
        yield from _batch(model, list(rows[start : start + slots]), stop_ids, choose)


def _batch(model: Any, rows: list[Row], stop_ids: frozenset[int], choose: Chooser) -> Iterator[Row]:
    """Decode one left-padded batch; rows that have ended go on as padding until all have."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row.ids)) + row.ids for row in rows])
    mask = torch.tensor([[0] * (longest - len(r.ids)) + [1] * len(r.ids) for r in rows])
    ids, mask = ids.to(model.device), mask.to(model.device)
    past, live = None, list(rows)
    while live:
        started = time.perf_counter()
        logits, past = _forward(model, ids, mask, past)
        places = [rows.index(row) for row in live]
        for row, token in zip(live, choose(logits[places], live), strict=True):
            row.ids.append(token)
        ids = torch.tensor([[row.ids[-1]] for row in rows], device=model.device)
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
        share = (time.perf_counter() - started) / len(live)
        for row in live:
            row.seconds += share
        yield from (row for row in live if ended(row, stop_ids))
        live = [row for row in live if not ended(row, stop_ids)]


@torch.inference_mode()
def _forward(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, past: Any
) -> tuple[torch.Tensor, Any]:
    """Return the logits of the last position, and the cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
    )
    return output.logits[:, -1], output.past_key_values
