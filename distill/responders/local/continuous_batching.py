"""Answers rows in a continuous batch: no padding, rows leave when finished, others join.

Every step is one forward pass over a packed line of tokens: first the last token of each live row,
then the prompt tokens of rows that have just joined. What is computed together depends on the order
of the rows and on their answers alone, so that the same rows in the same order give the same bytes.
Legend: R places of rows in the cache, H key heads, G queries a key head, C capacity, D head
dimension, T tokens of a step, B live rows, N keys seen, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.errors import DistillError, Exit
from distill.models.arithmetic import PREFILL_TOKENS
from distill.models.devices import raise_device_error
from distill.responders.local.packed_linear import packed

NAME = "distill_stream"  # of the attention function among those of transformers
SHARED_TOKENS = 16  # a shorter common prefix is not worth a wait or a copy
QUERY_CHUNK = 256  # prompt queries attended at once, so that a mask stays small

Chooser = Callable[[torch.Tensor, "Sequence[BatchRow]"], list[int]]


class BatchRow:
    """One answer being written: its ids, where the prompt ends, how far the cache has read."""

    def __init__(self, index: int, ids: list[int], limit: int) -> None:
        self.index, self.ids, self.limit, self.prompt = index, ids, limit, len(ids)
        self.cached, self.seconds, self.logprob = 0, 0.0, 0.0

    def answer(self) -> list[int]:
        """Return the answer's ids so far."""
        return self.ids[self.prompt :]

    def ended(self, stop_ids: frozenset[int]) -> bool:
        """Tell whether the last id is an end token, or the last that the row may have."""
        return self.ids[-1] in stop_ids or len(self.ids) - self.prompt == self.limit


class PromptSpan(NamedTuple):
    """The prompt tokens of a joining row in the packed line, its last token left out."""

    start: int
    end: int
    row: int
    first: int  # position of the first of them in the row


@dataclass
class Step:
    """What the attention function needs to know of one forward pass."""

    cache: "Cache"
    rows_T: torch.Tensor
    positions_T: torch.Tensor
    rows: int
    longest: int
    spans: list[PromptSpan]
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
    """Keys and values of all rows, layer by layer, allocated when a layer first writes."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self, layer: int, step: Step, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [1, H, T, D]; return the layer's cache, twice [R, H, C, D]."""
        if layer not in self.layers:
            # their widths may differ; zeros, since a masked key must still be finite
            shapes = [(self.rows, n.shape[1], self.capacity, n.shape[3]) for n in (keys, values)]
            self.layers[layer] = (keys.new_zeros(shapes[0]), values.new_zeros(shapes[1]))
        for room_RHCD, new in zip(self.layers[layer], (keys, values), strict=True):
            room_RHCD[step.rows_T, :, step.positions_T] = new[0].transpose(0, 1)
        return self.layers[layer]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of a row to another."""
        for pair in self.layers.values():
            for room_RHCD in pair:
                room_RHCD[target, :, :count] = room_RHCD[source, :, :count]


def continuous_batch_attention(
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
    """Attend in a step of a batch; called without one, attend as transformers' SDPA does."""
    if step is None:
        plain = (module, query, key, value, attention_mask)
        return sdpa_attention_forward(*plain, scaling=scaling, **kwargs)
    if others := [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]:
        raise ValueError(f"{others}")  # where prompts are short it may agree without them
    keys_RHCD, values_RHCD = step.cache.write(int(module.layer_idx), step, key, value)  # pyright: ignore
    heads, rows = key.shape[1], step.rows
    grouped = query[0].transpose(0, 1).unflatten(1, (heads, -1))  # T, H, G, D
    out_BHGD = scaled_dot_product_attention(
        grouped[:rows],
        keys_RHCD[:rows, :, : step.longest],
        values_RHCD[:rows, :, : step.longest],
        attn_mask=step.mask(sliding_window, query.dtype),
        scale=scaling,
    )
    outputs = [out_BHGD.flatten(1, 2)]
    for span in step.spans:
        for start in range(span.start, span.end, QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, span.end)
            # consecutive prompt tokens, the last of which sees all keys
            chunk, seen = query[0, :, start:end], span.first + end - span.start
            count, groups = end - start, len(chunk) // heads
            visible = query.new_ones((count, seen), dtype=torch.bool).tril_(seen - count)
            if sliding_window:
                visible.triu_(seen - count - sliding_window + 1)
            out = scaled_dot_product_attention(
                chunk.reshape(1, -1, groups * count, chunk.shape[2]),
                keys_RHCD[span.row, None, :, :seen],
                values_RHCD[span.row, None, :, :seen],
                attn_mask=visible.repeat(groups, 1),
                scale=scaling,
            )
            outputs.append(out.reshape(len(chunk), count, -1).transpose(0, 1))
    return torch.cat(outputs).unsqueeze(0) if step.spans else outputs[0].unsqueeze(0), None


AttentionInterface.register(NAME, continuous_batch_attention)


class ContinuousBatch:
    """Rows in their planned order, `size` at once; iterate for those that finish together."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[BatchRow],
        size: int,
        stop_ids: frozenset[int],
        choose: Chooser,
    ) -> None:
        self.model, self.stop_ids, self.choose = model, stop_ids, choose
        self.waiting = list(reversed(rows))
        self.live: list[BatchRow | None] = []  # by place in the cache; None where a row has left
        self.resident: list[list[int]] = []  # by place: the ids whose keys are in the cache
        self.size = min(size, len(rows))
        self.cache = Cache(self.size, max((len(r.ids) + r.limit for r in rows), default=0))
        self.budget = PREFILL_TOKENS[model.device.type]

    def __iter__(self) -> Iterator[list[BatchRow]]:
        while self.waiting or self.live:
            if finished := self.advance():
                yield finished

    @torch.inference_mode()
    def advance(self) -> list[BatchRow]:
        """Choose one token for every live row, and return the rows that this finishes."""
        started = time.perf_counter()
        self._join()
        while None in self.live:  # rows from the end fill the gaps: the live ones are the first B
            row = self.live.pop()
            self.resident.pop()
            if row is not None:
                gap = self.live.index(None)
                self.cache.copy(len(self.live), gap, row.cached)
                self.live[gap], self.resident[gap] = row, row.ids[: row.cached]
        rows = [row for row in self.live if row is not None]
        tokens = self.choose(self._forward(rows), rows)
        work = [len(row.ids) - row.cached for row in rows]
        seconds = time.perf_counter() - started
        finished = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.seconds += seconds * work[place] / sum(work)
            row.cached = len(row.ids)
            row.ids.append(token)
            self.resident[place] = row.ids[: row.cached]
            if row.ended(self.stop_ids):
                self.live[place] = None
                finished.append(row)
        if not self.waiting and not any(self.live):
            self.live.clear()
        return finished

    def _join(self) -> None:
        """Let waiting rows join in their order, while places and the step's prompt tokens last."""
        joined: list[BatchRow] = []
        spent = 0
        while self.waiting:
            place = self.live.index(None) if None in self.live else len(self.live)
            if place == self.size:
                return
            row = self.waiting[-1]
            # the place whose cache begins most like this prompt, and how many tokens they share
            common = [min(_common(row.ids, other), len(row.ids) - 1) for other in self.resident]
            shared = max(common, default=0)
            donor, shared = (common.index(shared), shared) if shared >= SHARED_TOKENS else (0, 0)
            fresh = max((_common(row.ids, other.ids) for other in joined), default=0)
            late = fresh >= shared + SHARED_TOKENS  # better to wait for a row now being read
            spent += len(row.ids) - shared
            if joined and (late or spent > self.budget):
                return
            if place == len(self.live):
                self.live.append(None)
                self.resident.append([])
            if shared and donor != place:
                self.cache.copy(donor, place, shared)
            row.cached = shared
            self.live[place], self.resident[place] = row, []  # a donor only after its first step
            joined.append(self.waiting.pop())

    def _forward(self, rows: list[BatchRow]) -> torch.Tensor:
        """Run one step and return the logits [B, V] of each row's last token."""
        ids, places = [row.ids[-1] for row in rows], list(range(len(rows)))
        positions = [len(row.ids) - 1 for row in rows]
        spans = []
        for place, row in enumerate(rows):
            new = row.ids[row.cached : -1]
            if new:
                spans.append(PromptSpan(len(ids), len(ids) + len(new), place, row.cached))
                ids += new
                places += [place] * len(new)
                positions += range(row.cached, row.cached + len(new))
        columns = [ids, places, positions]
        ids_T, places_T, positions_T = torch.tensor(columns, device=self.model.device)
        step = Step(self.cache, places_T, positions_T, len(rows), 1 + max(positions), spans)
        output = self.model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            logits_to_keep=torch.arange(len(rows), device=self.model.device),
            step=step,
        )
        return output.logits[0]


def _common(left: list[int], right: list[int]) -> int:
    """Return the length of the common beginning of two lists."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # bisect on slices, which compare at C speed
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle - 1)
    return low


@contextmanager
def continuous_attention(model: PreTrainedModel) -> Iterator[bool]:
    """Let the model attend so inside the block; yield whether that computes what it does itself.

    Where it does not, as with soft-capping, the model keeps its attention. On a CPU in bfloat16 the
    linear layers are packed too. Raises DistillError (exit 7) where the model's type is too narrow.
    """
    usual = model.config._attn_implementation or "eager"
    prompts = [[(7 * n + shift) % 97 for n in range(9 + 3 * shift)] for shift in (1, 2)]
    with torch.inference_mode():  # logits [2, V] that end each prompt, and it with one id more
        longer = [torch.tensor([[*ids, ids[0]]], device=model.device) for ids in prompts]
        logits = [model(input_ids=ids, use_cache=False).logits[0, -2:].float() for ids in longer]
        expected = torch.stack(logits)
    if not expected.isfinite().all():
        what, fix = f"overflows in {model.dtype}", "set its dtype to float32"
        raise DistillError(Exit.TRAINING, f"model {model.config.name_or_path}", what, fix)
    with packed(model):
        try:
            fits = _switch(model, NAME) and _agrees(model, prompts, expected)
            yield fits or not _switch(model, usual)
        finally:
            _switch(model, usual)


def _switch(model: PreTrainedModel, name: str) -> bool:
    """Set the model's attention function, and return whether it took it."""
    try:
        model.set_attn_implementation(name)
    except (ValueError, AttributeError, ImportError):
        return False
    return model.config._attn_implementation == name


def _agrees(model: PreTrainedModel, prompts: list[list[int]], expected: torch.Tensor) -> bool:
    """Answer prompts, forced to go on as the model's own pass did, and compare the logits."""
    seen: list[torch.Tensor] = []

    def record(logits_BV: torch.Tensor, rows: Sequence[BatchRow]) -> list[int]:
        seen.append(logits_BV.float())
        return [row.ids[0] for row in rows]

    rows = [BatchRow(index, list(ids), limit=2) for index, ids in enumerate(prompts)]
    batch = ContinuousBatch(model, rows, len(rows), frozenset(), record)
    try:
        finished = list(batch)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise_device_error(error)
        return False  # an architecture that does not fit fails in a way of its own
    if sum(map(len, finished)) != len(rows) or not batch.cache.layers:
        return False
    error = (torch.stack(seen, dim=1) - expected).norm() / expected.norm()
    return bool(error < (1e-3 if model.dtype == torch.float32 else 0.05))


@torch.inference_mode()
def answer_padded(
    model: PreTrainedModel,
    rows: Sequence[BatchRow],
    size: int,
    stop_ids: frozenset[int],
    choose: Chooser,
) -> Iterator[list[BatchRow]]:
    """Yield the rows that finish together, `size` neighbours at a time, left-padded to the end.

    It asks nothing of a model but transformers' own forward pass with a cache. Slower, since a long
    answer holds its batch and padding is computed.
    """
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        longest = max(len(row.ids) for row in batch)
        ids = torch.tensor([[0] * (longest - len(row.ids)) + row.ids for row in batch])
        mask = torch.tensor([[0] * (longest - len(r.ids)) + [1] * len(r.ids) for r in batch])
        ids, mask = ids.to(model.device), mask.to(model.device)
        past, live = None, list(enumerate(batch))
        while live:
            started = time.perf_counter()
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=past,
                use_cache=True,
            )
            past, logits = output.past_key_values, output.logits[:, -1]
            alive = [row for _, row in live]
            tokens = choose(logits[[place for place, _ in live]], alive)
            for row, token in zip(alive, tokens, strict=True):
                row.ids.append(token)
            # rows that have ended go on as padding
            ids = torch.tensor([[row.ids[-1]] for row in batch], device=model.device)
            mask = torch.cat((mask, mask.new_ones(len(batch), 1)), dim=1)
            share = (time.perf_counter() - started) / len(live)
            for row in alive:
                row.seconds += share
            if finished := [row for row in alive if row.ended(stop_ids)]:
                yield finished
            live = [(place, row) for place, row in live if not row.ended(stop_ids)]
