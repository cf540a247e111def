"""What a model's work takes, from its shape alone: floating-point operations and bytes. Imports no torch.

Formulas count a multiplication and an addition as two operations, after Kaplan et al. 2020 (arXiv 2001.08361, section
2.1). With LoRA the frozen weights get no gradient: forward and backward to the inputs, 4 a weight, not 6.
"""

from dataclasses import dataclass
from typing import Any

from distill.models import Shape

HEAD_CHUNK = 3 * 32 * 2**20  # bytes: a chunk of float32 logits, its slope and its bfloat16 copy
ALLOCATOR = 1.06  # what PyTorch's CUDA allocator holds above what is in use


@dataclass(frozen=True)
class Span:
    """A range of a quantity, both ends possible."""

    low: float
    high: float

    def __add__(self, other: "Span") -> "Span":
        return Span(self.low + other.low, self.high + other.high)

    def __mul__(self, other: "Span | float") -> "Span":
        by = other if isinstance(other, Span) else Span(other, other)
        return Span(self.low * by.low, self.high * by.high)

    __rmul__ = __mul__

    def __truediv__(self, rate: "Span") -> "Span":
        return Span(self.low / rate.high, self.high / rate.low)


NOTHING = Span(0, 0)


def total(spans: Any) -> Span:
    """Add spans up."""
    return sum(spans, NOTHING)


def head_parameters(shape: Shape) -> int:
    """Return the weights of the output head."""
    return shape.vocab * shape.hidden


def body_parameters(shape: Shape) -> int:
    """Return the weights that every token passes: all but embedding and head."""
    return shape.parameters - head_parameters(shape) * (1 if shape.tied else 2)


def linear_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return (in, out) of each linear module of a layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, inner = shape.hidden, shape.intermediate
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def adapter_parameters(shape: Shape, r: int, targets: str | tuple[str, ...]) -> int:
    """Return the weights of a LoRA adapter of rank `r`; `targets` as in PEFT."""
    sizes = linear_sizes(shape)
    chosen = sizes if targets == "all-linear" else [n for n in sizes if n in targets]
    head = shape.vocab + shape.hidden if "lm_head" in targets else 0
    return r * (shape.layers * sum(sum(sizes[name]) for name in chosen) + head)


def attention_flops(shape: Shape, tokens: float) -> float:
    """Return the operations of causal attention over one text of `tokens`: scores and their sums."""
    return 2 * shape.layers * shape.heads * shape.head_dim * tokens**2


def answer_flops(shape: Shape, prompt: float, answer: float) -> float:
    """Return the operations of one answer; the head is applied where a token is drawn."""
    body = 2 * body_parameters(shape) * (prompt + answer)
    return body + 2 * head_parameters(shape) * answer + attention_flops(shape, prompt + answer)


def training_flops(
    shape: Shape, adapter: int, prompt: float, answer: float, checkpointing: bool
) -> float:
    """Return the operations of one sample of a LoRA step; the head sees supervised positions only."""
    tokens, passes = prompt + answer, 6 if checkpointing else 4
    body = (passes * body_parameters(shape) + 6 * adapter) * tokens
    attention = (3.5 + checkpointing) * attention_flops(shape, tokens)
    return body + 4 * head_parameters(shape) * answer + attention


def forward_flops(shape: Shape, prompt: float, answer: float) -> float:
    """Return the operations of measuring the loss of one answer."""
    return answer_flops(shape, prompt, answer)


def layer_bytes(shape: Shape, r: int) -> int:
    """Return what one layer keeps for its backward, bytes a token, in bfloat16.

    Two float32 inputs of the norms; the inputs of attention and MLP; queries, keys, values and their sums; gate, its
    activation, up and their product; and the inner activations of seven adapters.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * 4 * shape.hidden
    inputs = 2 * 2 * shape.hidden
    attention = 2 * (2 * queries + 2 * keys)
    return norms + inputs + attention + 2 * 4 * shape.intermediate + 2 * 7 * r


def training_bytes(
    shape: Shape, adapter: int, r: int, tokens: int, checkpointing: bool, four_bit: bool
) -> float:
    """Return the peak of a LoRA training on a GPU with micro-batches of `tokens`."""
    weights = 2 * shape.parameters
    if (
        four_bit
    ):  # NF4 with its constants (arXiv 2305.14314) for the layers; embedding and head stay
        weights -= (2 - 0.52) * body_parameters(shape)
    masters = adapter * (4 + 4 + 8)  # weights, gradients, Adam's two moments, all float32
    kept = layer_bytes(shape, r) * tokens * (1 if checkpointing else shape.layers)
    inputs = 2 * shape.hidden * tokens * (shape.layers if checkpointing else 1)
    backward = 2 * (3 * shape.intermediate + 3 * shape.hidden) * tokens
    return ALLOCATOR * (weights + masters + kept + inputs + backward + HEAD_CHUNK)


def cache_bytes(shape: Shape) -> int:
    """Return the bytes of keys and values, a token, in bfloat16."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
