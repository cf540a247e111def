"""Draw the next token of each row: the likeliest, or one at random from a generator that belongs to the row alone.

Rows are seeded by request key and sample index, so that a draw does not depend on what shares the batch. Nothing else
is applied: no penalty, no top-k, whatever the model's own generation config says. Legend: B rows, V vocabulary.
"""

import hashlib

import torch

HEAD = 256  # ids looked at first for top-p; the whole vocabulary is sorted only where they do not suffice


def seeded(key: str, sample: int) -> torch.Generator:
    """Return the generator of one answer, seeded by its request's key and its sample index."""
    hashed = hashlib.sha256(f"{key} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8], "big") >> 1)


def likeliest(logits_BV: torch.Tensor) -> list[int]:
    """Return the id of the largest logit of each row, the first of equals."""
    return logits_BV.max(dim=-1).indices.tolist()  # on a CPU five times faster than argmax


def draw(
    logits_BV: torch.Tensor, temperature: float, top_p: float, generators: list[torch.Generator]
) -> list[int]:
    """Draw one id a row from softmax(logits / temperature), restricted to its top-p nucleus (arXiv 1904.09751)."""
    chances_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    uniform_B1 = uniform.to(chances_BV.device)[:, None]
    if top_p == 1:
        return _invert(chances_BV, uniform_B1).tolist()
    top_BK = chances_BV.topk(min(HEAD, chances_BV.shape[1]), dim=-1)
    values, ids = top_BK.values, top_BK.indices
    if bool((values.sum(-1) < top_p).any()):
        values, ids = chances_BV.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    picked_B = _invert(values.masked_fill(before >= top_p, 0), uniform_B1)
    return ids.gather(1, picked_B[:, None])[:, 0].tolist()


def _invert(weights_BK: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """Return the index at which each row's cumulated weights pass its share `uniform` of their sum."""
    cumulated_BK = weights_BK.double().cumsum(-1)
    wanted_B1 = uniform_B1 * cumulated_BK[:, -1:]
    index_B1 = torch.searchsorted(cumulated_BK, wanted_B1, right=True)
    return index_B1[:, 0].clamp_(max=weights_BK.shape[1] - 1)
