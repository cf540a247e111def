"""The model as the loss sees it: a packed batch goes in, the sum of the loss over its supervised tokens comes out.

The head is applied inside this module's forward, at supervised positions only, so that wrapping it (DDP, FSDP) covers
all of it. Where an architecture cannot take packed rows, batches are padded instead; a probe on the model itself
decides, never a list of names.

Shape suffixes: N tokens of a row, S supervised positions, B samples, T longest sample, D hidden size, R rank of an
adapted head, E = D + R.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from distill.errors import DistillError, Exit
from distill.records import AnswerLoss, Example, Pair
from distill.training.adapters import ADAPTER, factors
from distill.training.batches import micro_batches
from distill.training.cpu.attention import NAME
from distill.training.cpu.layers import fuse, unfuse
from distill.training.encode import encode_pair
from distill.training.host_to_device import send
from distill.training.losses import cross_entropy, read_targets
from distill.training.packing import Segment, pack
from distill.training.soft_labels.labels import Labels, mixed_loss
from distill.training.targets import Live, SoftTargets

PROBE = (7, 12)  # lengths of the two samples that the probe packs
MEASURED_TOKENS = 2048  # in a batch whose loss is only measured


@dataclass(frozen=True)
class Batch:
    """A row of samples: its ids, positions and segments, and where, what, how heavily and for whom to predict."""

    ids_N: Tensor
    positions_N: Tensor
    segments: tuple[Segment, ...]
    places_S: Tensor
    targets_S: Tensor
    weights_S: Tensor
    owners_S: Tensor
    soft: SoftTargets | Live | None = None

    @classmethod
    def make(cls, examples: Sequence[Example], share: bool = False, device: Any = "cpu") -> "Batch":
        """Pack examples; the place that predicts token i of a sample is that of token i - 1."""
        learned = [[i for i, w in enumerate(e.weights) if w and i] for e in examples]
        prompts = [
            spots[0] if spots else len(e.input_ids)
            for spots, e in zip(learned, examples, strict=True)
        ]
        row = pack([e.input_ids for e in examples], prompts, share)
        positions = [torch.arange(s.end - s.start) + s.position() for s in row.segments]
        targets = [
            (row.places[sample][i - 1], example.input_ids[i], sample)
            for sample, example in enumerate(examples)
            for i in learned[sample]
        ]
        columns = send(torch.tensor(targets, dtype=torch.long).view(-1, 3), device)
        places, ids, owners = columns.unbind(1)
        weights = [e.weights[i] for spots, e in zip(learned, examples, strict=True) for i in spots]
        return cls(
            send(torch.tensor(row.ids), device),
            send(torch.cat(positions), device),
            tuple(row.segments),
            places,
            ids,
            send(torch.tensor(weights, dtype=torch.float32), device),
            owners,
        )

    @classmethod
    def idle(cls, device: Any = "cpu") -> "Batch":
        """Return a batch that weighs nothing, for a process that has none left."""
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return cls(zero, zero, (Segment(0, 1),), zero, zero, zero.float(), zero)


class StudentModel(nn.Module):
    """A causal language model whose forward is the loss of a batch, by its tokens alone or by a teacher's `labels` too."""

    def __init__(self, model: Any, packing: bool = True) -> None:
        super().__init__()
        self.model, self.packing = model, packing
        self.labels: Labels | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder, self._head = (base.get_decoder(),), (base.get_output_embeddings(),)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's supervised tokens, in nats; with labels, and then its parts, (1 + P,)."""
        inputs = (self.states(batch), self.matrices(), batch.targets_S, batch.weights_S)
        bias_V = self._head[0].bias
        if self.labels and batch.soft:
            return mixed_loss(self.labels.settings, *inputs, batch.soft, bias_V)
        return cross_entropy(*inputs, bias_V)[0]

    @property
    def device(self) -> torch.device:
        """Return where the head is."""
        return self._head[0].weight.device

    def decoder(self) -> Any:
        """Return the model without its head."""
        return self._decoder[0]

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the output head's weight (V, E) for the `states`, and its bias."""
        matrices = self.matrices()
        return torch.cat(matrices, 1) if matrices[1:] else matrices[0], self._head[0].bias

    def matrices(self) -> tuple[Tensor, ...]:
        """Return the output head's weight W (V, D), and where it is adapted, the scaled B (V, R) for its last columns."""
        head = self._head[0]
        if not isinstance(head, LoraLayer):
            return (head.weight,)
        _, up, scale = factors(head)
        return head.weight, (up * scale).to(head.weight.dtype)

    def states(self, batch: Batch) -> Tensor:
        """Return what the head is applied to at the batch's supervised positions, (S, E)."""
        return self.widen(self.hidden(batch)[batch.places_S])

    def widen(self, hidden_ND: Tensor) -> Tensor:
        """Put an adapted head's A h (N, R) beside each hidden state h; E = D where the head is not adapted."""
        head = self._head[0]
        if not isinstance(head, LoraLayer):
            return hidden_ND
        down, *_ = factors(head)
        low_NR = nn.functional.linear(head.lora_dropout[ADAPTER](hidden_ND), down.to(hidden_ND))
        return torch.cat([hidden_ND, low_NR], 1)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states (N, D) of the batch's tokens, in their order."""
        return self._packed(batch) if self.packing else self._padded(batch)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Pack examples as this student computes them: prefixes are shared on a CPU; none at all is an idle batch."""
        device = self.device
        share = self.packing and device.type == "cpu"
        batch = Batch.make(examples, share, device) if examples else Batch.idle(device)
        if self.labels is None:
            return batch
        return replace(batch, soft=self.labels.targets([e.response_id for e in examples], device))

    def _packed(self, batch: Batch) -> Tensor:
        states = self.decoder()(
            input_ids=batch.ids_N[None],
            position_ids=batch.positions_N[None],
            use_cache=False,
            segments=batch.segments,
        )
        return states.last_hidden_state[0]

    def _padded(self, batch: Batch) -> Tensor:
        rows = [batch.ids_N[segment.start : segment.end] for segment in batch.segments]
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = [torch.ones_like(row) for row in rows]
        mask_BT = nn.utils.rnn.pad_sequence(real, batch_first=True)
        states = self.decoder()(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return states.last_hidden_state[mask_BT.bool()]


def make_student(
    model: Any, packing: bool = True, fused: bool = False
) -> tuple[StudentModel, list[str]]:
    """Wrap `model`, packing where its architecture allows, and with fused layers where asked and possible.

    Returns the student and notes for the user. Raises DistillError (exit 7) where the model's logits are not its
    head's output (a cap or a scale behind it).
    """
    plain, before = StudentModel(model, packing=False), model.config._attn_implementation
    training = model.training
    model.eval()
    try:
        expected = _check_head(plain)
        if not packing:
            return plain, []
        model.set_attn_implementation(NAME)
        student, decoder = StudentModel(model), plain.decoder()
        if fused and fuse(decoder):
            if _agrees(student, expected):
                return student, []
            unfuse(decoder)
        if _agrees(student, expected):
            return student, []
        model.set_attn_implementation(before)
        return plain, [f"{model.config.model_type} cannot take packed rows: batches are padded"]
    finally:
        model.train(training)


def _probe_batch(student: StudentModel, shift: int = 0) -> Batch:
    """Return two samples without supervision; `shift` changes the ids of the first."""
    first, second = PROBE
    ids = [*range(shift, first + shift), *range(first, first + second)]
    parts = [ids[:first], ids[first:]]
    examples = [
        Example(id="", response_id="", input_ids=tuple(p), weights=(0.0,) * len(p)) for p in parts
    ]
    return Batch.make(examples, device=student.device)


@torch.no_grad()
def _agrees(student: StudentModel, wanted_ND: Tensor) -> bool:
    """Tell whether packed rows give the states of padded ones, and nothing of one sample reaches the next."""
    try:
        states = student.hidden(_probe_batch(student))
        other = student.hidden(_probe_batch(student, shift=3))
    except (TypeError, ValueError, RuntimeError):
        return False  # the model does not pass lengths down, or has another kind of attention
    second = slice(PROBE[0], None)
    return _close(states, wanted_ND) and bool(torch.equal(states[second], other[second]))


@torch.no_grad()
def _check_head(plain: StudentModel) -> Tensor:
    """Return the probe's hidden states, after comparing the head's output with the model's logits."""
    batch = _probe_batch(plain)
    ids = batch.ids_N[None, : PROBE[0]]
    logits = plain.model(input_ids=ids, use_cache=False).logits[0]
    states = plain.hidden(batch)
    if not _close(nn.functional.linear(plain.widen(states[: PROBE[0]]), *plain.head()), logits):
        raise DistillError(
            Exit.TRAINING,
            plain.model.config.model_type,
            "scales or caps its logits behind the head, which this loss does not know",
            "use another student",
        )
    return states


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Tell whether two results agree but for rounding: thirty layers in bfloat16 differ by several percent."""
    allowed = 1e-3 if wanted.dtype == torch.float32 else 0.2
    return bool((found - wanted).float().norm() <= allowed * wanted.float().norm())


@torch.inference_mode()
def answer_loss(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], date: str, max_length: int
) -> list[AnswerLoss]:
    """Return how `model` reads each pair's answer, given the prompt; (0, 0, 0) for one longer than `max_length`."""
    examples = [encode_pair(tokenizer, pair, date) for pair in pairs]
    lengths = [len(e.input_ids) for e in examples]
    fitting = [i for i, length in enumerate(lengths) if length <= max_length]
    results = [AnswerLoss(loss=0.0, tokens=0, hits=0)] * len(pairs)
    before = model.config._attn_implementation
    try:
        student, _ = make_student(model)
        for samples in micro_batches(fitting, lengths, MEASURED_TOKENS):
            readings = _read(student, [examples[i] for i in samples])
            for sample, result in zip(samples, readings, strict=True):
                results[sample] = result
    finally:
        model.set_attn_implementation(before)
    return results


def _read(student: StudentModel, examples: Sequence[Example]) -> list[AnswerLoss]:
    """Read the samples of one packed batch in one forward pass."""
    batch, (head_VE, bias_V) = student.batch(examples), student.head()
    losses_S, hits_S = read_targets(student.states(batch), head_VE, batch.targets_S, bias_V)
    values_S3 = torch.stack([losses_S, torch.ones_like(losses_S), hits_S.float()], 1)
    sums_B3 = torch.zeros(len(examples), 3, dtype=torch.float64)
    sums_B3.index_add_(0, batch.owners_S.cpu(), values_S3.double().cpu())  # in order, on any device
    return [
        AnswerLoss(loss=loss, tokens=int(tokens), hits=int(hits))
        for loss, tokens, hits in sums_B3.tolist()
    ]
