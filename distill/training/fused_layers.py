"""Decoder layers of the Llama kind for LoRA training on a CPU, with their backward by hand.

The same mathematics as transformers' layers with PEFT's adapters. Adapted modules that share an
input become one product, [x | xA'] [W | sB]', and so does their backward; norms and residuals stay
inside; nothing is saved that need not be. The student's probe compares the two.

Shape suffixes: N tokens of a packed row, D hidden size, I inputs, O outputs, R ranks side by side.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.models.arithmetic import JOINED
from distill.training import attention
from distill.training.adapters import ADAPTER, factors
from distill.training.batches import Segment

KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


class Projection:
    """Linear modules with one input, adapted or not, as one matrix [W | sB] of (O, I + R)."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        linears: list[Any] = [getattr(m, "base_layer", m) for m in modules]
        adapted = [factors(m) if isinstance(m, LoraLayer) else None for m in modules]
        self.inputs = linears[0].in_features
        self.widths = [linear.out_features for linear in linears]
        ranks = [a_b_s[0].shape[0] if a_b_s else 0 for a_b_s in adapted]
        weight = linears[0].weight
        self.matrix = weight.new_zeros(sum(self.widths), self.inputs + sum(ranks))
        self.down = weight.new_zeros(sum(ranks), self.inputs)
        self.bias: Tensor | None = None
        if any(linear.bias is not None for linear in linears):
            self.bias = weight.new_zeros(sum(self.widths))  # of modules without one, it stays zero
        self.parts: list[tuple[slice, slice, float]] = []  # rows of O, columns of R, scale
        self.masters: list[nn.Parameter] = []  # A, B, A, B, ... in float32
        row = column = 0
        for linear, width, rank, lora in zip(linears, self.widths, ranks, adapted, strict=True):
            rows, columns = slice(row, row + width), slice(column, column + rank)
            self.matrix[rows, : self.inputs] = linear.weight.data
            linear.weight.data = self.matrix[rows, : self.inputs]  # the same memory from now on
            if self.bias is not None and linear.bias is not None:
                self.bias[rows] = linear.bias.data
            if lora:
                self.parts.append((rows, columns, lora[2]))
                self.masters += lora[:2]
            row, column = row + width, column + rank

    def buffer(self, like: Tensor) -> Tensor:
        """Return an empty (N, I + R) whose first I columns the caller fills."""
        return like.new_empty(like.shape[0], self.matrix.shape[1])

    def forward(self, wide_NI: Tensor, residual_NO: Tensor | None = None) -> Tensor:
        """Fill the last R columns of the buffer, and return the outputs (N, O) plus a residual."""
        for number, (rows, columns, scale) in enumerate(self.parts):  # the working copy of masters
            a, b = self.masters[2 * number : 2 * number + 2]
            self.down[columns] = a
            self.matrix[rows, self.inputs :][:, columns] = b * scale
        torch.mm(wide_NI[:, : self.inputs], self.down.t(), out=wide_NI[:, self.inputs :])
        if residual_NO is not None:
            out = torch.addmm(residual_NO, wide_NI, self.matrix.t())
            return out if self.bias is None else out.add_(self.bias)
        return nn.functional.linear(wide_NI, self.matrix, self.bias)

    def backward(self, wide_NI: Tensor, grad_NO: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the inputs (N, I) and of the masters, those in float32."""
        grad_NI = torch.mm(grad_NO, self.matrix)
        low_NR, low_grad_NR = wide_NI[:, self.inputs :], grad_NI[:, self.inputs :]
        grad_a = torch.mm(low_grad_NR.t(), wide_NI[:, : self.inputs]).float()
        gradients = []
        for rows, columns, scale in self.parts:
            grad_b = torch.mm(grad_NO[:, rows].t(), low_NR[:, columns]).float()
            gradients += [grad_a[columns], grad_b.mul_(scale)]
        return torch.addmm(grad_NI[:, : self.inputs], low_grad_NR, self.down), gradients


class Norm:
    """Root-mean-square normalisation (arXiv 1910.07467) by a frozen weight, in float32 inside."""

    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight.data, module.variance_epsilon

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the normalised rows."""
        return nn.functional.rms_norm(x_ND, (x_ND.shape[1],), self.weight, self.eps)

    def backward(self, x_ND: Tensor, grad_ND: Tensor, residual_ND: Tensor) -> Tensor:
        """Return the gradient of x: through the norm, plus that of the residual beside it."""
        size = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True, dtype=torch.float32)
        inverse = (size.square() / x_ND.shape[1] + self.eps).rsqrt()
        weighted, x = grad_ND.float() * self.weight.float(), x_ND.float()
        along = (weighted * x).sum(1, keepdim=True) * inverse.pow(3) / x_ND.shape[1]
        return weighted.mul_(inverse).addcmul_(x, along, value=-1).add_(residual_ND).to(x_ND.dtype)


def rotate(heads_NHd: Tensor, cos_N1h: Tensor, sin_N1h: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of every head (arXiv 2104.09864); -sin turns it back."""
    half = heads_NHd.shape[2] // 2
    first, second = heads_NHd[..., :half], heads_NHd[..., half:]
    turned = torch.empty_like(heads_NHd, memory_format=torch.contiguous_format)
    torch.mul(first, cos_N1h, out=turned[..., :half]).addcmul_(second, sin_N1h, value=-1)
    torch.mul(second, cos_N1h, out=turned[..., half:]).addcmul_(first, sin_N1h)
    return turned


class FusedLayer:
    """One decoder layer: the forward that replaces the module's own."""

    def __init__(self, layer: Any) -> None:
        attend, mlp = layer.self_attn, layer.mlp
        self.norms = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.qkv = Projection([attend.q_proj, attend.k_proj, attend.v_proj])
        self.out, self.down = Projection([attend.o_proj]), Projection([mlp.down_proj])
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj])
        self.head_dim, self.scale = attend.head_dim, attend.scaling
        self.module = weakref.ref(layer)  # whose `forward` this is: no circle that keeps both

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        segments: Sequence[Segment],
        **unused: Any,
    ) -> Tensor:
        half = self.head_dim // 2
        cos, sin = (t[0, :, None, :half].to(hidden_states.dtype) for t in position_embeddings)
        module = self.module()

        def compute(x_ND: Tensor) -> Any:
            masters = (*self.qkv.masters, *self.out.masters)
            x: Any = _Attend.apply(x_ND, self, cos, sin, segments, *masters)
            return _Feed.apply(x, self, *self.gate_up.masters, *self.down.masters)

        again = module is not None and module.training and module.gradient_checkpointing
        x_ND = hidden_states[0]
        x: Any = checkpoint(compute, x_ND, use_reentrant=False) if again else compute(x_ND)
        return x[None]


class _Attend(torch.autograd.Function):
    """x + out(attention(qkv(norm(x))))."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, layer: FusedLayer, cos: Tensor, sin: Tensor,
        segments: Sequence[Segment], *masters: Tensor,
    ) -> Tensor:  # fmt: skip
        wide = layer.qkv.buffer(x_ND)
        wide[:, : x_ND.shape[1]] = layer.norms[0].forward(x_ND)
        heads_NHd = layer.qkv.forward(wide).unflatten(1, (-1, layer.head_dim))
        queries, keys, values = (width // layer.head_dim for width in layer.qkv.widths)
        turned = rotate(heads_NHd[:, : queries + keys], cos, sin)
        query, key = turned.split([queries, keys], dim=1)
        value = heads_NHd[:, -values:]
        mixed, saved = attention.forward(query, key, value, segments, layer.scale)
        inner = layer.out.buffer(x_ND)
        inner[:, : layer.out.inputs] = mixed.flatten(1)
        ctx.layer, ctx.segments = layer, segments
        ctx.save_for_backward(x_ND, wide, query, key, value, inner, cos, sin, *saved)
        return layer.out.forward(inner, x_ND)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        layer, grad_ND = ctx.layer, upstream[0]
        x_ND, wide, query, key, value, inner, cos, sin, *saved = ctx.saved_tensors
        grad_mixed, out_gradients = layer.out.backward(inner, grad_ND)
        gradients = attention.backward(
            grad_mixed.view_as(query), query, key, value, saved, ctx.segments, layer.scale
        )
        turned_back = rotate(torch.cat(gradients[:2], dim=1), cos, -sin)
        grad_made = torch.cat([turned_back.flatten(1), gradients[2].flatten(1)], dim=1)
        grad_normed, qkv_gradients = layer.qkv.backward(wide, grad_made)
        grad_x = layer.norms[0].backward(x_ND, grad_normed, grad_ND)
        return grad_x, None, None, None, None, *qkv_gradients, *out_gradients


class _Feed(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) · up(norm(x)))."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, layer: FusedLayer, *masters: Tensor) -> Tensor:
        wide = layer.gate_up.buffer(x_ND)
        wide[:, : x_ND.shape[1]] = layer.norms[1].forward(x_ND)
        projected = layer.gate_up.forward(wide)
        gate, up = projected.split(layer.gate_up.widths, dim=1)
        inner = layer.down.buffer(x_ND)
        active = torch.ops.aten.silu.out(gate, out=inner[:, : gate.shape[1]])
        active.mul_(up)
        ctx.layer = layer
        ctx.save_for_backward(x_ND, wide, projected, inner)
        return layer.down.forward(inner, x_ND)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        layer, grad_ND = ctx.layer, upstream[0]
        x_ND, wide, projected, inner = ctx.saved_tensors
        grad_active, down_gradients = layer.down.backward(inner, grad_ND)
        gate, up = projected.split(layer.gate_up.widths, dim=1)
        grad_made = torch.empty_like(projected)
        grad_gate, grad_up = grad_made.split(layer.gate_up.widths, dim=1)
        torch.mul(torch.nn.functional.silu(gate), grad_active, out=grad_up)
        grad_active *= up
        torch.ops.aten.silu_backward.grad_input(grad_active, gate, grad_input=grad_gate)
        grad_normed, up_gradients = layer.gate_up.backward(wide, grad_made)
        grad_x = layer.norms[1].backward(x_ND, grad_normed, grad_ND)
        return grad_x, None, *up_gradients, *down_gradients


def fusible(layer: Any) -> bool:
    """Tell whether `FusedLayer` computes a decoder layer, of linear or adapted modules."""
    if type(layer).__name__ not in KINDS:
        return False
    parts, modules = {**layer.self_attn._modules, **layer.mlp._modules}, list[Any]()
    for name in (name for group in JOINED for name in group):
        adapted = isinstance(parts[name], LoraLayer)
        if adapted and not isinstance(parts[name].lora_dropout[ADAPTER], nn.Identity):
            return False
        modules.append(parts[name].base_layer if adapted else parts[name])
    plain = all(type(module) is nn.Linear for module in modules)
    return plain and type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def fuse(decoder: Any) -> bool:
    """Replace every layer's forward where all are fusible and on a CPU; returns whether it did."""
    layers = list(getattr(decoder, "layers", ()))
    on_cpu = all(p.device.type == "cpu" for p in decoder.parameters())
    if not layers or not on_cpu or not all(map(fusible, layers)):
        return False
    for layer in layers:
        layer.forward = FusedLayer(layer)
    return True
