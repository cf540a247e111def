"""Divergences against float64 by autograd: cached and live, every part and temperature, whole and in chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from distill.training import losses
from distill.training.divergences import Live, SoftTargets, soft_loss
from distill.training.losses import cross_entropy

ROWS, WIDTH, WIDER, WORDS = 23, 12, 20, 101
SOFT = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
MIXES = [*({name: 1.0} for name in ("ce", *SOFT)), {"ce": 0.3, "forward_kl": 0.5, "jsd": 0.2}]
BETA, ALPHA = 0.3, 0.2
by_name = pytest.mark.parametrize("mix", MIXES, ids="+".join)
by_kind = pytest.mark.parametrize("kind", ["live", "cached"])
at_temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0])


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    """Let every block have several strips, as with a real vocabulary."""
    monkeypatch.setattr(losses, "STRIP_BYTES", 3 * 4 * WORDS)


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

    def soft(self, kind, temperature=1.0):
        return self.live if kind == "live" else self.lists(SIZES, temperature)

    def loss(self, soft, mix, temperature=1.0, part=slice(None), chunk=None):
        """Our loss; returns its sum, count and parts."""
        return soft_loss(
            self.hidden[part], self.head, self.targets[part], self.weights[part], soft, mix,
            BETA, ALPHA, temperature, self.bias, chunk,
        )  # fmt: skip


SIZES = [n % 9 for n in range(ROWS)]  # ragged, and some without any entry


def cut(soft, start, stop):
    """The soft targets of some positions."""
    if isinstance(soft, Live):
        return soft._replace(hidden_ND=soft.hidden_ND[start:stop])
    first, last = soft.offsets_N1[start], soft.offsets_N1[stop]
    return SoftTargets(
        soft.ids_M[first:last],
        soft.logprobs_M[first:last],
        soft.offsets_N1[start : stop + 1] - first,
        soft.tail_mass_N[start:stop],
        soft.tail_N[start:stop],
    )


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


def exact(problem, logits, mix, temperature, soft=None):
    """The same sum in float64, of all logits at once; bucketed where lists are given."""
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
    return total


def reference(problem, mix, temperature, soft=None):
    """The exact sum, and the gradients of the hidden states, the head and the bias by autograd."""
    hidden, head, bias = (
        t.detach().double().requires_grad_() for t in (problem.hidden, problem.head, problem.bias)
    )
    total = exact(problem, linear(hidden, head, bias), mix, temperature, soft)
    total.backward()
    return total.detach(), hidden.grad, head.grad, bias.grad


def close(found, wanted, rtol=2e-5):
    assert (found.double() - wanted).norm() <= rtol * wanted.norm() + 1e-6


@by_name
@at_temperatures
@by_kind
def test_value_and_every_gradient_agree_with_float64(mix, temperature, kind):
    problem = Problem()
    soft = problem.soft(kind, temperature)
    problem.head.requires_grad_(), problem.bias.requires_grad_()
    total, count, parts = problem.loss(soft, mix, temperature, chunk=7)
    (total * 3).backward()
    wanted, *slopes = reference(problem, mix, temperature, None if kind == "live" else soft)
    close(total, wanted)
    assert float(count) == pytest.approx(float(problem.weights.sum()))
    close(total, sum(share * parts[name].double() for name, share in mix.items()))
    for found, slope in zip((problem.hidden, problem.head, problem.bias), slopes, strict=True):
        close(found.grad, slope * 3)


@by_name
@by_kind
def test_bfloat16_loses_only_its_own_rounding(mix, kind):
    problem = Problem(torch.bfloat16)
    soft = problem.soft(kind)
    total, *_ = problem.loss(soft, mix)
    total.backward()
    wanted, slope, *_ = reference(problem, mix, 1.0, None if kind == "live" else soft)
    assert abs(float(total.detach()) - float(wanted)) < 0.01 * float(wanted)
    assert (problem.hidden.grad.double() - slope).norm() < 0.02 * slope.norm()


@by_kind
@at_temperatures
@pytest.mark.parametrize("name", SOFT)
def test_a_student_like_its_teacher_loses_nothing(name, temperature, kind):
    problem = Problem()
    soft = Live(problem.hidden.detach(), problem.head, WORDS, problem.bias)
    problem.live = soft
    total, *_ = problem.loss(problem.soft(kind, temperature), {name: 1.0}, temperature)
    total.backward()
    assert abs(float(total.detach())) < 1e-5
    assert float(problem.hidden.grad.abs().max()) < 1e-5


@by_kind
@settings(max_examples=6, deadline=None)
@given(chunk=st.integers(1, ROWS + 3), seed=st.integers(0, 99))
def test_chunked_equals_whole(kind, chunk, seed):
    whole, parts = Problem(seed=seed), Problem(seed=seed)
    one, *_ = whole.loss(whole.soft(kind), MIXES[-1], chunk=ROWS)
    many, *_ = parts.loss(parts.soft(kind), MIXES[-1], chunk=chunk)
    one.backward(), many.backward()
    torch.testing.assert_close(one, many, rtol=2e-6, atol=0)
    torch.testing.assert_close(whole.hidden.grad, parts.hidden.grad, rtol=1e-5, atol=4e-6)


@by_kind
def test_sums_of_pieces_are_the_sum_of_the_whole(kind):
    """However ragged the pieces: a sum and a count, and one division."""
    whole, parts = Problem(), Problem()
    soft = whole.soft(kind)
    total, count, found = whole.loss(soft, MIXES[-1])
    (total / count).backward()
    sums = [parts.loss(cut(soft, *p), MIXES[-1], part=slice(*p)) for p in ((0, 4), (4, 5), (5, 23))]
    (sum(s[0] for s in sums) / count).backward()
    close(sum(s[1] for s in sums), count)
    close(whole.hidden.grad, parts.hidden.grad.double())
    for name, value in found.items():
        close(sum(s[2][name] for s in sums), value.double())


@by_kind
@pytest.mark.parametrize("rows", [0, 5])
def test_all_masked_is_zero_and_finite(rows, kind):
    problem = Problem(rows=max(rows, 1))
    problem.weights.zero_()
    problem.head.requires_grad_()
    part = slice(0, rows)
    total, count, _ = problem.loss(
        cut(problem.lists([3] * max(rows, 1)) if kind == "cached" else problem.live, 0, rows),
        MIXES[-1],
        part=part,
    )
    total.backward()
    assert float(total.detach()) == 0 and float(count) == 0
    assert bool((problem.hidden.grad == 0).all()) and bool((problem.head.grad == 0).all())


@at_temperatures
@by_name
def test_lists_of_the_whole_vocabulary_are_the_live_teacher(mix, temperature):
    live, cached = Problem(), Problem()
    one, *_ = live.loss(live.live, mix, temperature)
    two, *_ = cached.loss(cached.lists([WORDS] * ROWS, temperature), mix, temperature)
    one.backward(), two.backward()
    close(one, two.detach().double())
    close(live.hidden.grad, cached.hidden.grad.double())


@settings(max_examples=6, deadline=None)
@given(name=st.sampled_from(SOFT), size=st.integers(0, 20), seed=st.integers(0, 99))
def test_what_the_lists_tell_is_a_lower_bound_that_grows_with_them(name, size, seed):
    problem = Problem(seed=seed)
    short, longer = (problem.lists([n] * ROWS) for n in (size, size + 5))
    found = [float(problem.loss(s, {name: 1.0})[0].detach()) for s in (short, longer, problem.live)]
    assert -1e-5 <= found[0] <= found[1] * (1 + 1e-5) and found[1] <= found[2] * (1 + 1e-5)


def one_id_lists(targets):
    """Hard labels as soft targets."""
    count = len(targets)
    return SoftTargets(targets, torch.zeros(count), torch.arange(count + 1), torch.zeros(count))


def test_a_hard_label_is_the_list_of_one_id_at_its_own_position():
    soft, hard = Problem(), Problem()
    found, *_ = soft.loss(one_id_lists(soft.targets), {"forward_kl": 1.0})
    wanted, _ = cross_entropy(hard.hidden, hard.head, hard.targets, hard.weights, hard.bias)
    found.backward(), wanted.backward()
    close(found, wanted.detach().double())
    close(soft.hidden.grad, hard.hidden.grad.double())
    late, *_ = soft.loss(one_id_lists(soft.targets.roll(1)), {"forward_kl": 1.0})
    assert abs(float((late - wanted).detach())) > 0.1  # of 82


def test_a_divergence_is_not_a_cross_entropy():
    """The teacher's entropy is taken off: two tokens, and a student that finds both alike."""
    soft = SoftTargets(
        torch.tensor([0, 1]), torch.tensor([0.9, 0.1]).log(), torch.tensor([0, 2]), torch.zeros(1)
    )
    hidden, head = torch.zeros(1, 2), torch.zeros(2, 2)
    targets, ones = torch.zeros(1, dtype=torch.long), torch.ones(1)
    names = dict.fromkeys(("ce", *SOFT), 1.0)
    total, _, parts = soft_loss(hidden, head, targets, ones, soft, names, beta=0.5, alpha=0.5)
    found = {name: round(float(value), 4) for name, value in parts.items()}
    wanted = {"ce": 0.6931, "forward_kl": 0.3681, "reverse_kl": 0.5108, "jsd": 0.1017}
    assert found == wanted | {"skew_kl": 0.1163}
    assert float(total) == pytest.approx(sum(found.values()), abs=2e-4)


def test_heads_that_are_padded_differently_are_compared_over_the_tokenizer_s_ids():
    plain, padded = Problem(), Problem()
    padded.head = torch.cat([padded.head, torch.ones(4, WIDTH)])
    padded.bias = torch.cat([padded.bias, torch.ones(4)])
    live = padded.live
    wider, biased = torch.cat([live.head_VD, torch.ones(9, WIDER)]), torch.ones(WORDS + 9)
    biased[:WORDS] = live.bias_V
    live = live._replace(head_VD=wider, bias_V=biased)
    one, _, parts = plain.loss(plain.live, {"jsd": 1.0})
    two, *_ = padded.loss(live, {"jsd": 1.0})
    one.backward(), two.backward()
    close(two, one.detach().double())
    close(padded.hidden.grad, plain.hidden.grad.double())
    _, _, mixed = padded.loss(live, {"ce": 0.5, "jsd": 0.5})
    hard, _ = cross_entropy(padded.hidden, padded.head, padded.targets, padded.weights, padded.bias)
    close(mixed["jsd"], parts["jsd"].double())
    close(mixed["ce"], hard.detach().double())


@by_kind
def test_an_adapted_head_and_tied_embeddings_get_the_whole_gradient(kind):
    """An adapter behind the head's weight, and a weight that is the input's as well."""
    problem = Problem()
    soft, tokens = problem.soft(kind), torch.arange(ROWS) % WORDS
    down, up = torch.randn(3, WIDTH), torch.randn(WORDS, 3)

    def train(loss, dtype):
        base, a, b = (t.detach().to(dtype).requires_grad_() for t in (problem.head, down, up))
        loss(torch.tanh(base[tokens]), base + b @ a).backward()
        return base.grad, a.grad, b.grad

    def ours(hidden, head):
        problem.hidden, problem.head = hidden, head
        return problem.loss(soft, MIXES[-1])[0]

    def wanted(hidden, head):
        logits = linear(hidden, head, problem.bias.double())
        return exact(problem, logits, MIXES[-1], 1.0, soft if kind == "cached" else None)

    for found, slope in zip(train(wanted, torch.float64), train(ours, torch.float32), strict=True):
        close(slope, found)


class Largest(TorchDispatchMode):
    """Remember the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, made.numel())
        return made


@by_kind
def test_logits_exist_for_a_block_only_and_a_frozen_head_gets_no_gradient(kind):
    problem, chunk = Problem(), 4
    soft = problem.soft(kind)
    with Largest() as seen:
        problem.loss(soft, MIXES[-1], 2.0 if kind == "live" else 1.0, chunk=chunk)[0].backward()
    assert seen.elements == chunk * WORDS < WIDTH * WORDS
    assert problem.head.grad is None and problem.bias.grad is None


@by_kind
@at_temperatures
def test_large_logits_and_sure_teachers_stay_finite(temperature, kind):
    problem = Problem()
    problem.hidden = (problem.hidden.detach() * 300).requires_grad_()
    problem.live = problem.live._replace(hidden_ND=problem.live.hidden_ND * 100)
    soft = problem.soft(kind, temperature)
    total, *_ = problem.loss(soft, dict.fromkeys(("ce", *SOFT), 0.2), temperature)
    total.backward()
    assert bool(torch.isfinite(total)) and bool(torch.isfinite(problem.hidden.grad).all())


def test_what_is_wrong_is_said():
    problem = Problem()
    lists = problem.lists(SIZES)
    with pytest.raises(ValueError, match="no loss is called kl"):
        problem.loss(lists, {"kl": 1.0})
    with pytest.raises(ValueError, match="23 positions, but soft targets of 22"):
        problem.loss(cut(lists, 0, ROWS - 1), MIXES[-1])
    with pytest.raises(ValueError, match="not captured at temperature 2"):
        problem.loss(lists._replace(tail_N=None), MIXES[-1], 2.0)
    with pytest.raises(ValueError, match="temperature=0"):
        problem.loss(lists, MIXES[-1], 0)
