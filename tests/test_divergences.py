"""Divergences against float64 by autograd: cached and live, every part and temperature, whole and in chunks."""


import pytest
import torch
from torch.nn.functional import linear

from distill.training.divergences import soft_loss
from distill.training.targets import Live, SoftTargets

ROWS, WIDTH, WIDER, WORDS = 23, 12, 20, 101
SOFT = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
MIXES = [*({name: 1.0} for name in ("ce", *SOFT)), {"ce": 0.3, "forward_kl": 0.5, "jsd": 0.2}]
BETA, ALPHA = 0.3, 0.2
by_name = pytest.mark.parametrize("mix", MIXES, ids="+".join)
at_temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0])


class Problem:
    """Hidden states and heads of both models, targets and ragged weights, some of them 0."""

    def __init__(self, dtype=torch.float32, rows=ROWS, seed=0):
        make = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=make) * scale).to(dtype)

        self.hidden = draw(rows, WIDTH).requires_grad_()
        self.head, self.bias = draw(WORDS, WIDTH), draw(WORDS)
        self.targets = torch.randint(0, WORDS, (rows,), generator=make)
        self.weights = torch.rand(rows, generator=make) * (torch.arange(rows) % 5 > 0)
        self.live = Live(draw(rows, WIDER), draw(WORDS, WIDER, scale=0.7), WORDS, draw(WORDS))

    def teacher(self):
        """The teacher's exact logits, in float64."""
        bias = self.live.bias_V.double()
        return linear(self.live.hidden_ND.double(), self.live.head_VD.double(), bias)

    def lists(self, sizes, temperature=1.0):
        """Cut the teacher's distribution to the likeliest ids, as many as `sizes` says for each position."""
        logs = self.teacher().log_softmax(-1)
        order = logs.argsort(1, descending=True)
        ids = [row[:size] for row, size in zip(order, sizes, strict=True)]
        other = [row[size:] for row, size in zip(order, sizes, strict=True)]
        kept = [logs[n, row] for n, row in enumerate(ids)]
        tails = [logs[n, row] for n, row in enumerate(other)]
        return SoftTargets(
            torch.cat(ids),
            torch.cat(kept).float(),
            torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()]),
            torch.stack([tail.exp().sum() for tail in tails]).float(),
            torch.stack([(tail / temperature).logsumexp(0) for tail in tails]).float(),
        )

    def loss(self, soft, mix, temperature=1.0, part=slice(None), chunk=None):
        """Our loss; returns its sum, count and parts."""
        return soft_loss(
            self.hidden[part], self.head, self.targets[part], self.weights[part], soft, mix,
            BETA, ALPHA, temperature, self.bias, chunk,
        )  # fmt: skip


SIZES = [n % 9 for n in range(ROWS)]  # ragged, and some without any entry


def divergence(name, p, q):
    """The definitions, word for word, over the last axis."""

    def kl(a, b):
        return torch.where(a > 0, a * (a / b).log(), torch.zeros_like(a)).sum(-1)

    mixed = BETA * p + (1 - BETA) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: BETA * kl(p, mixed) + (1 - BETA) * kl(q, mixed),
        "skew_kl": lambda: kl(p, ALPHA * p + (1 - ALPHA) * q),
    }[name]()


def bucketed(probabilities, soft):
    """Sum what is unlisted, position by position: (entries + 1) outcomes each."""
    rows = []
    for n, row in enumerate(probabilities):
        ids = soft.ids_M[soft.offsets_N1[n] : soft.offsets_N1[n + 1]]
        rest = torch.ones_like(row, dtype=torch.bool)
        rest[ids] = False
        rows.append(torch.cat([row[ids], row[rest].sum()[None]]))
    return rows


def reference(problem, mix, temperature, soft=None):
    """The same sum in float64, by autograd over all logits at once; bucketed where lists are given."""
    hidden = problem.hidden.detach().double().requires_grad_()
    head = problem.head.detach().double().requires_grad_()
    bias = problem.bias.detach().double().requires_grad_()
    logits = linear(hidden, head, bias)
    p = (problem.teacher() / temperature).softmax(-1)
    q = (logits / temperature).softmax(-1)
    pairs = [p, q] if soft is None else [bucketed(p, soft), bucketed(q, soft)]
    total = torch.zeros((), dtype=torch.float64)
    for name, share in mix.items():
        if name == "ce":
            values = torch.nn.functional.cross_entropy(logits, problem.targets, reduction="none")
        else:
            values = torch.stack([divergence(name, a, b) for a, b in zip(*pairs, strict=True)])
            values = values * temperature**2
        total = total + share * (values * problem.weights.double()).sum()
    total.backward()
    return total.detach(), hidden.grad, head.grad, bias.grad


def close(found, wanted, rtol=2e-5):
    assert (found.double() - wanted).norm() <= rtol * wanted.norm() + 1e-6


@by_name
@at_temperatures
@pytest.mark.parametrize("kind", ["live", "cached"])
def test_value_and_every_gradient_agree_with_float64(mix, temperature, kind):
    problem = Problem()
    soft = problem.live if kind == "live" else problem.lists(SIZES, temperature)
    problem.head.requires_grad_(), problem.bias.requires_grad_()
    total, count, parts = problem.loss(soft, mix, temperature, chunk=7)
    (total * 3).backward()
    wanted, *slopes = reference(problem, mix, temperature, None if kind == "live" else soft)
    close(total, wanted)
    assert float(count) == pytest.approx(float(problem.weights.sum()))
    assert float(total) == pytest.approx(sum(mix[k] * float(v) for k, v in parts.items()), rel=1e-5)
    for found, slope in zip((problem.hidden, problem.head, problem.bias), slopes, strict=True):
        close(found.grad, slope * 3)
