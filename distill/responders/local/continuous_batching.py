"""A stream of rows through the slots of one preallocated cache: no padding, rows leave when finished, others join.

Every step is one forward pass over a packed line of tokens: first the last token of each live row, then the prompt
tokens of rows that have just joined. The linear layers see real tokens only; attention runs for each row on its slot
of the cache, keys unexpanded under grouped queries; the head is applied to the first B positions. A prompt that begins
like one that is still in a slot copies that part of the cache instead of computing it.

What is computed together depends on the order of the rows and on their answers alone, so that the same rows in the
same order give the same bytes. Legend: L layers, S slots, H key heads, G queries a key head, C capacity, D head
dimension, T tokens of a step, B live rows, N keys seen, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.responders.local.packed_linear import packed

NAME = "distill_stream"  # of the attention function among those of transformers
SHARED_TOKENS = 16  # a shorter common prefix is not worth a wait or a copy
QUERY_CHUNK = 256  # prompt queries attended at once, so that a mask stays small
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}  # of joining prompts in one step

Chooser = Callable[[torch.Tensor, "Sequence[Row]"], list[int]]


@dataclass
class Row:
    """One answer being written: the ids so far, where the prompt ends, and how far the cache has read."""

    index: int
    ids: list[int]
    limit: int
    prompt: int = 0
    cached: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)

    def answer(self) -> list[int]:
        """Return the ids drawn so far."""
        return self.ids[self.prompt :]


def ended(row: Row, stop_ids: frozenset[int]) -> bool:
    """Tell whether a row has drawn an end token or all that it may draw."""
    return row.ids[-1] in stop_ids or len(row.ids) - row.prompt == row.limit


@dataclass
class Span:
    """The prompt tokens of a joining row in the packed line, its last token left out."""

    start: int
    end: int
    slot: int
    first: int  # position of the first of them in the row


@dataclass
class Step:
    """What the attention function needs to know of one forward pass."""

    cache: "Cache"
    slots_T: torch.Tensor
    positions_T: torch.Tensor
    rows: int
    longest: int
    spans: list[Span]
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return the additive mask [B, 1, 1, N] of the rows' last tokens, made once a step."""
        if window not in self.masks:
            ends_B1 = self.positions_T[: self.rows, None]
            keys_N = torch.arange(self.longest, device=ends_B1.device)
            hidden_BN = keys_N > ends_B1
            if window:
                hidden_BN |= keys_N <= ends_B1 - window
            mask_BN = torch.zeros(hidden_BN.shape, dtype=dtype, device=ends_B1.device)
            self.masks[window] = mask_BN.masked_fill_(hidden_BN, float("-inf"))[:, None, None]
        return self.masks[window]


class Cache:
    """Keys and values of all slots, layer by layer, allocated when a layer first writes."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self, layer: int, step: Step, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [1, H, T, D] of a step; return the layer's whole cache, twice [S, H, C, D]."""
        if layer not in self.layers:
            self.layers[layer] = (self._room(keys), self._room(values))
        for room_SHCD, new in zip(self.layers[layer], (keys, values), strict=True):
            room_SHCD[step.slots_T, :, step.positions_T] = new[0].transpose(0, 1)
        return self.layers[layer]

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.slots, like.shape[1], self.capacity, like.shape[3])
        return like.new_zeros(shape)  # zeros, since a masked key must still be finite

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of a slot to another."""
        for pair in self.layers.values():
            for room_SHCD in pair:
                room_SHCD[target, :, :count] = room_SHCD[source, :, :count]


def stream_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    step: Step | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in a stream's step; called without one, attend as transformers' SDPA does."""
    if step is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    keys_SHCD, values_SHCD = step.cache.write(int(module.layer_idx), step, key, value)  # pyright: ignore
    heads, rows = key.shape[1], step.rows
    grouped = query[0].transpose(0, 1).unflatten(1, (heads, -1))  # T, H, G, D
    out_BHGD = scaled_dot_product_attention(
        grouped[:rows],
        keys_SHCD[:rows, :, : step.longest],
        values_SHCD[:rows, :, : step.longest],
        attn_mask=step.mask(sliding_window, query.dtype),
        scale=scaling,
    )
    outputs = [out_BHGD.flatten(1, 2)]
    for span in step.spans:
        for start in range(span.start, span.end, QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, span.end)
            first = span.first + start - span.start
            seen = slice(None, first + end - start)
            outputs.append(
                _attend_prompt(
                    query[0, :, start:end],
                    keys_SHCD[span.slot, :, seen],
                    values_SHCD[span.slot, :, seen],
                    scaling,
                    sliding_window,
                )
            )
    return torch.cat(outputs).unsqueeze(0) if step.spans else outputs[0].unsqueeze(0), None


def _attend_prompt(
    query: torch.Tensor,
    keys_HND: torch.Tensor,
    values_HND: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend from consecutive prompt tokens, the last of which sees all keys; return [tokens, heads, D]."""
    heads, count, size = query.shape
    groups, seen = heads // keys_HND.shape[0], keys_HND.shape[1]
    visible = query.new_ones((count, seen), dtype=torch.bool).tril_(seen - count)
    if window:
        visible.triu_(seen - count - window + 1)
    out = scaled_dot_product_attention(
        query.reshape(1, -1, groups * count, size),
        keys_HND[None],
        values_HND[None],
        attn_mask=visible.repeat(groups, 1),
        scale=scaling,
    )
    return out.reshape(heads, count, -1).transpose(0, 1)


AttentionInterface.register(NAME, stream_attention)


class Stream:
    """Rows in their planned order, through `slots` slots; iterate to get them as they finish."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        slots: int,
        stop_ids: frozenset[int],
        choose: Chooser,
    ) -> None:
        self.model, self.stop_ids, self.choose = model, stop_ids, choose
        self.waiting = list(reversed(rows))
        self.live: list[Row | None] = []  # by slot; None where a row has left
        self.resident: list[list[int]] = []  # by slot: the ids whose keys are in the cache
        self.slots = min(slots, len(rows))
        self.cache = Cache(self.slots, max((len(r.ids) + r.limit for r in rows), default=0))
        self.budget = PREFILL_TOKENS.get(model.device.type, 4096)

    def __iter__(self) -> Iterator[Row]:
        while self.waiting or self.live:
            yield from self.advance()

    @torch.inference_mode()
    def advance(self) -> list[Row]:
        """Do one step: draw one token for every live row, and return the rows that it finished."""
        started = time.perf_counter()
        self._join()
        rows = self._close_gaps()
        tokens = self.choose(self._forward(rows), rows)
        work = [len(row.ids) - row.cached for row in rows]
        seconds = time.perf_counter() - started
        for row, token, share in zip(rows, tokens, work, strict=True):
            row.seconds += seconds * share / sum(work)
            row.cached = len(row.ids)
            row.ids.append(token)
        return self._leave(rows)

    def _join(self) -> None:
        """Seat waiting rows in their order, while slots and the step's budget of prompt tokens last."""
        joined: list[Row] = []
        spent = 0
        while self.waiting:
            slot = self.live.index(None) if None in self.live else len(self.live)
            if slot == self.slots:
                return
            row = self.waiting[-1]
            donor, shared = self._donor(row.ids)
            fresh = max((_common(row.ids, other.ids) for other in joined), default=0)
            late = fresh >= shared + SHARED_TOKENS  # better to wait for a row now being read
            spent += len(row.ids) - shared
            if joined and (late or spent > self.budget):
                return
            self._seat(self.waiting.pop(), slot, donor, shared)
            joined.append(row)

    def _donor(self, ids: list[int]) -> tuple[int, int]:
        """Return the slot whose cache begins most like `ids`, and how many tokens they share."""
        common = [min(_common(ids, other), len(ids) - 1) for other in self.resident]
        best = max(common, default=0)
        return (common.index(best), best) if best >= SHARED_TOKENS else (0, 0)

    def _seat(self, row: Row, slot: int, donor: int, shared: int) -> None:
        if slot == len(self.live):
            self.live.append(None)
            self.resident.append([])
        if shared and donor != slot:
            self.cache.copy(donor, slot, shared)
        row.cached = shared
        self.live[slot], self.resident[slot] = row, []  # a donor only after its first step

    def _close_gaps(self) -> list[Row]:
        """Move rows from the end into empty slots, so that the live ones are the first B; return them."""
        while None in self.live:
            row = self.live.pop()
            self.resident.pop()
            if row is not None:
                gap = self.live.index(None)
                self.cache.copy(len(self.live), gap, row.cached)
                self.live[gap], self.resident[gap] = row, row.ids[: row.cached]
        return [row for row in self.live if row is not None]

    def _forward(self, rows: list[Row]) -> torch.Tensor:
        """Run one step and return the logits [B, V] of each row's last token."""
        ids, slots = [row.ids[-1] for row in rows], list(range(len(rows)))
        positions = [len(row.ids) - 1 for row in rows]
        spans = []
        for slot, row in enumerate(rows):
            new = row.ids[row.cached : -1]
            if new:
                spans.append(Span(len(ids), len(ids) + len(new), slot, row.cached))
                ids += new
                slots += [slot] * len(new)
                positions += range(row.cached, row.cached + len(new))
        ids_T, slots_T, positions_T = torch.tensor(
            [ids, slots, positions], device=self.model.device
        )
        longest = 1 + max(positions)
        step = Step(self.cache, slots_T, positions_T, len(rows), longest, spans)
        output = self.model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            logits_to_keep=torch.arange(len(rows), device=self.model.device),
            step=step,
        )
        return output.logits[0]

    def _leave(self, rows: list[Row]) -> list[Row]:
        """Empty the slots of the rows that end here, and return these rows."""
        left = []
        for slot, row in enumerate(rows):
            self.resident[slot] = row.ids[: row.cached]
            if ended(row, self.stop_ids):
                self.live[slot] = None
                left.append(row)
        if not self.waiting and not any(self.live):
            self.live.clear()
        return left


def _common(left: list[int], right: list[int]) -> int:
    """Return the length of the common beginning of two lists."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # bisect on slices, which compare at C speed
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle - 1)
    return low


@contextmanager
def streaming(model: Any) -> Iterator[bool]:
    """Let the model attend as a stream inside the block; yield whether that computes what its own attention does.

    Where it does not (the architecture does not go through transformers' attention interface, or adds something of its
    own such as soft-capping), the model keeps its attention. On a CPU in bfloat16 the linear layers are packed too.
    """
    own = model.config._attn_implementation
    ids = [[(7 * place + shift) % 97 for place in range(9 + 3 * shift)] for shift in (1, 2)]
    wanted = [_own_logits(model, row) for row in ids]
    with packed(model):
        try:
            yield (_switch(model, NAME) and _agrees(model, ids, wanted)) or not _switch(model, own)
        finally:
            _switch(model, own)


def _switch(model: Any, name: str) -> bool:
    """Set the model's attention function, and return whether it took it."""
    try:
        model.set_attn_implementation(name)
    except (ValueError, AttributeError, ImportError):
        return False
    return model.config._attn_implementation == name


@torch.inference_mode()
def _own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits [2, V] that end the ids and the ids with one more, as the model itself computes them."""
    longer = torch.tensor([[*ids, ids[0]]], device=model.device)
    return model(input_ids=longer, use_cache=False).logits[0, -2:].float()


def _agrees(model: Any, ids: list[list[int]], wanted: list[torch.Tensor]) -> bool:
    """Run the ids through a stream, forced to go on as the model's own pass did, and compare the logits."""
    seen: list[torch.Tensor] = []

    def record(logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
        seen.append(logits_BV.float())
        return [row.ids[0] for row in rows]

    rows = [Row(index, list(row), limit=2) for index, row in enumerate(ids)]
    stream = Stream(model, rows, len(rows), frozenset(), record)
    try:
        finished = list(stream)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError):
        return False  # an architecture that the stream does not fit fails in a way of its own
    if len(finished) != len(rows) or not stream.cache.layers:
        return False
    found = torch.stack(seen, dim=1)
    error = (found - torch.stack(wanted)).norm() / torch.stack(wanted).norm()
    return bool(error < (1e-3 if model.dtype == torch.float32 else 0.05))
