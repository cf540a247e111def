"""Losses against float64 by autograd: by tokens, cached and live, in one piece and in chunks."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from distill.config.learning import SOFT, Loss
from distill.models import arithmetic
from distill.training.losses import Live, SoftTargets, cross_entropy, soft_loss
from tests.support.training import gradient

ROWS, WIDTH, WIDER, WORDS = 23, 12, 20, 101
MIXES = [*({name: 1.0} for name in ("ce", *SOFT)), {"ce": 0.3, "forward_kl": 0.5, "jsd": 0.2}]
BETA, ALPHA = 0.3, 0.2
SIZES = [n % 9 for n in range(ROWS)]  # of the lists: ragged, and some without any entry
by_name = pytest.mark.parametrize("mix", MIXES, ids="+".join)
by_kind = pytest.mark.parametrize("kind", ["live", "cached"])
by_any_kind = pytest.mark.parametrize("kind", ["live", "cached", "tokens"])
at_temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0])
Soft = SoftTargets | Live | None  # None: the loss by tokens alone, which needs no teacher


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every block have several strips, as with a real vocabulary."""
    monkeypatch.setitem(arithmetic.STRIP_BYTES, "cpu", 3 * 4 * WORDS)


class Problem:
    """Hidden states and heads of both models, targets and ragged weights, some of them 0."""

    def __init__(self, dtype: torch.dtype = torch.float32, rows: int = ROWS, seed: int = 0) -> None:
        make = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=make) * scale).to(dtype)

        self.hidden = draw(rows, WIDTH).requires_grad_()
        self.head, self.bias = draw(WORDS, WIDTH), draw(WORDS)
        self.targets = torch.randint(0, WORDS, (rows,), generator=make)
        self.weights = torch.rand(rows, generator=make) * (torch.arange(rows) % 5 > 0)
        self.teacher_bias = draw(WORDS)
        self.live = Live(draw(rows, WIDER), draw(WORDS, WIDER, scale=0.7), WORDS, self.teacher_bias)

    def teacher(self) -> Tensor:
        """Return the teacher's exact logits, in float64."""
        hidden, head = self.live.hidden_ND.double(), self.live.head_VD.double()
        return linear(hidden, head, self.teacher_bias.double())

    def lists(self, sizes: Sequence[int], temperature: float = 1.0) -> SoftTargets:
        """Cut the teacher's distributions to their top ids, as many as `sizes` says for each."""
        logs = self.teacher().log_softmax(-1)
        order = logs.argsort(1, descending=True)
        ids = [row[:size] for row, size in zip(order, sizes, strict=True)]
        tails = [
            logs[n, row[size:]] for n, (row, size) in enumerate(zip(order, sizes, strict=True))
        ]
        return SoftTargets(
            torch.cat(ids),
            torch.cat([logs[n, row] for n, row in enumerate(ids)]).float(),
            torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()]),
            torch.stack([tail.exp().sum() for tail in tails]).float(),
            torch.stack([(tail / temperature).logsumexp(0) for tail in tails]).float(),
        )

    def soft(self, kind: str, temperature: float = 1.0) -> Soft:
        soft = {"live": lambda: self.live, "cached": lambda: self.lists(SIZES, temperature)}
        return soft[kind]() if kind in soft else None

    def loss(
        self,
        soft: Soft,
        mix: Mapping[str, float] = MIXES[-1],
        temperature: float = 1.0,
        part: slice = slice(None),
        chunk: int | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return our loss: its sum, count and parts."""
        inputs = (self.hidden[part], self.head, self.targets[part], self.weights[part])
        if soft is None:
            total, count = cross_entropy(*inputs, self.bias, chunk)
            return total, count, {"ce": total}
        return soft_loss(*inputs, soft, mix, BETA, ALPHA, temperature, self.bias, chunk)


def cut(soft: Soft, start: int, stop: int) -> Soft:
    """Return the soft targets of some positions."""
    if soft is None:
        return None
    if isinstance(soft, Live):
        return soft._replace(hidden_ND=soft.hidden_ND[start:stop])
    first, last = soft.offsets_N1[start], soft.offsets_N1[stop]
    assert soft.tail_N is not None
    return SoftTargets(
        *(soft.ids_M[first:last], soft.logprobs_M[first:last]),
        *(soft.offsets_N1[start : stop + 1] - first, soft.tail_mass_N[start:stop]),
        soft.tail_N[start:stop],
    )


def divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    """Return the definitions, word for word, over the last axis."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), torch.zeros_like(a)).sum(-1)

    mixed = BETA * p + (1 - BETA) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: BETA * kl(p, mixed) + (1 - BETA) * kl(q, mixed),
        "skew_kl": lambda: kl(p, ALPHA * p + (1 - ALPHA) * q),
    }[name]()


def bucketed(probabilities: Tensor, soft: SoftTargets) -> list[Tensor]:
    """Sum what is unlisted, position by position: (entries + 1) outcomes each."""
    rows = []
    for n, row in enumerate(probabilities):
        ids = soft.ids_M[soft.offsets_N1[n] : soft.offsets_N1[n + 1]]
        rest = torch.ones_like(row, dtype=torch.bool)
        rest[ids] = False
        rows.append(torch.cat([row[ids], row[rest].sum()[None]]))
    return rows


def exact(
    problem: Problem, logits: Tensor, mix: Mapping[str, float], temperature: float, soft: Soft
) -> Tensor:
    """Return the same sum in float64, of all logits at once; bucketed where lists are given."""
    p, q = (problem.teacher() / temperature).softmax(-1), (logits / temperature).softmax(-1)
    lists = isinstance(soft, SoftTargets)
    both = (
        zip(bucketed(p, soft), bucketed(q, soft), strict=True) if lists else zip(p, q, strict=True)
    )
    outcomes, total = list(both), torch.zeros((), dtype=torch.float64)
    for name, share in ({"ce": 1.0} if soft is None else mix).items():
        if name == "ce":
            values = torch.nn.functional.cross_entropy(logits, problem.targets, reduction="none")
        else:
            values = torch.stack([divergence(name, a, b) for a, b in outcomes]) * temperature**2
        total = total + share * (values * problem.weights.double()).sum()
    return total


def close(value: Tensor, expected: Tensor, rtol: float = 2e-5) -> None:
    assert (value.double() - expected).norm() <= rtol * expected.norm() + 1e-6


def test_every_weight_that_a_user_may_set_is_a_part_of_the_loss():
    weights = [
        name for name, field in Loss.model_fields.items() if name == "ce" or not field.default
    ]
    assert weights == list(Loss.model_validate(dict.fromkeys(weights, 1.0)).parts) == ["ce", *SOFT]


@by_name
@at_temperatures
@by_any_kind
def test_value_and_gradient_agree_with_float64(mix, temperature, kind):
    problem = Problem()
    soft = problem.soft(kind, temperature)
    total, count, parts = problem.loss(soft, mix, temperature, chunk=7)
    (total * 3).backward()
    hidden = problem.hidden.detach().double().requires_grad_()
    logits = linear(hidden, problem.head.double(), problem.bias.double())
    expected = exact(problem, logits, mix, temperature, soft)
    expected.backward()
    close(total.detach(), expected.detach())
    assert float(count) == pytest.approx(float(problem.weights.sum()))
    if soft:
        close(total, sum(share * parts[name].double() for name, share in mix.items()))  # pyright: ignore[reportArgumentType]
    close(gradient(problem.hidden), gradient(hidden) * 3)


@by_name
@by_any_kind
def test_bfloat16_loses_only_its_own_rounding(mix, kind):
    problem = Problem(torch.bfloat16)
    soft = problem.soft(kind)
    total, *_ = problem.loss(soft, mix)
    total.backward()
    hidden = problem.hidden.detach().double().requires_grad_()
    expected = exact(
        problem, linear(hidden, problem.head.double(), problem.bias.double()), mix, 1.0, soft
    )
    expected.backward()
    close(total.detach(), expected.detach(), rtol=0.01)
    close(gradient(problem.hidden), gradient(hidden), rtol=0.02)


@by_kind
@at_temperatures
@pytest.mark.parametrize("name", SOFT)
def test_a_student_like_its_teacher_loses_nothing(name, temperature, kind):
    problem = Problem()
    problem.live = Live(problem.hidden.detach(), problem.head, WORDS, problem.bias)
    problem.teacher_bias = problem.bias
    total, *_ = problem.loss(problem.soft(kind, temperature), {name: 1.0}, temperature)
    total.backward()
    assert abs(float(total.detach())) < 1e-5
    assert float(gradient(problem.hidden).abs().max()) < 1e-5


@by_any_kind
@settings(max_examples=6, deadline=None)
@given(chunk=st.integers(1, ROWS + 3), seed=st.integers(0, 99))
def test_chunked_equals_whole(kind, chunk, seed):
    whole, parts = Problem(seed=seed), Problem(seed=seed)
    one, *_ = whole.loss(whole.soft(kind), chunk=ROWS)
    many, *_ = parts.loss(parts.soft(kind), chunk=chunk)
    one.backward()
    many.backward()
    torch.testing.assert_close(one, many, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient(whole.hidden), gradient(parts.hidden), rtol=1e-5, atol=4e-6)


@by_any_kind
@pytest.mark.parametrize("rows", [0, 5])
def test_all_masked_is_zero_and_finite(rows, kind):
    problem = Problem(rows=max(rows, 1))
    problem.weights.zero_()
    lists = problem.lists([3] * max(rows, 1))
    soft = cut({"live": problem.live, "cached": lists}.get(kind), 0, rows)
    total, count, _ = problem.loss(soft, part=slice(0, rows))
    total.backward()
    assert float(total.detach()) == 0 and float(count) == 0
    assert bool((gradient(problem.hidden) == 0).all())


@pytest.mark.parametrize("name", SOFT)
@settings(max_examples=6, deadline=None)
@given(size=st.integers(0, 20), seed=st.integers(0, 99))
def test_the_loss_of_lists_is_a_lower_bound_that_grows_with_them(name, size, seed):
    problem = Problem(seed=seed)
    teachers = (*(problem.lists([n] * ROWS) for n in (size, size + 5)), problem.live)
    short, longer, live = (float(problem.loss(s, {name: 1.0})[0].detach()) for s in teachers)
    assert -1e-5 <= short <= longer * (1 + 1e-5) and longer <= live * (1 + 1e-5)


def test_a_hard_label_is_the_list_of_one_id_at_its_own_position():
    soft, hard = Problem(), Problem()

    def one_id(targets: Tensor) -> SoftTargets:
        zeros = torch.zeros(ROWS)
        return SoftTargets(targets, zeros, torch.arange(ROWS + 1), zeros)

    total, *_ = soft.loss(one_id(soft.targets), {"forward_kl": 1.0})
    expected, *_ = hard.loss(None)
    total.backward()
    expected.backward()
    close(total, expected.detach().double())
    close(gradient(soft.hidden), gradient(hard.hidden).double())
    late, *_ = soft.loss(one_id(soft.targets.roll(1)), {"forward_kl": 1.0})
    assert abs(float((late - expected).detach())) > 0.1  # of 82


def test_a_divergence_is_not_a_cross_entropy():
    """The teacher's entropy is taken off: two tokens, and a student that finds both alike."""
    soft = SoftTargets(
        torch.tensor([0, 1]), torch.tensor([0.9, 0.1]).log(), torch.tensor([0, 2]), torch.zeros(1)
    )
    inputs = (torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(1, dtype=torch.long), torch.ones(1))
    names: dict[str, float] = dict.fromkeys(("ce", *SOFT), 1.0)
    total, _, parts = soft_loss(*inputs, soft, names, beta=0.5, alpha=0.5)
    values = {name: round(float(value), 4) for name, value in parts.items()}
    expected = {"ce": 0.6931, "forward_kl": 0.3681, "reverse_kl": 0.5108, "jsd": 0.1017}
    assert values == expected | {"skew_kl": 0.1163}
    assert float(total) == pytest.approx(sum(values.values()), abs=2e-4)


def test_heads_that_are_padded_differently_are_compared_over_the_tokenizer_s_ids():
    plain, padded = Problem(), Problem()
    padded.head = torch.cat([padded.head, torch.ones(4, WIDTH)])
    padded.bias = torch.cat([padded.bias, torch.ones(4)])
    wider = torch.cat([padded.live.head_VD, torch.ones(9, WIDER)])
    biased = torch.cat([padded.teacher_bias, torch.ones(9)])
    live = padded.live._replace(head_VD=wider, bias_V=biased)
    one, _, parts = plain.loss(plain.live, {"jsd": 1.0})
    two, *_ = padded.loss(live, {"jsd": 1.0})
    one.backward()
    two.backward()
    close(two, one.detach().double())
    close(gradient(padded.hidden), gradient(plain.hidden).double())
    _, _, mixed = padded.loss(live, {"ce": 0.5, "jsd": 0.5})
    close(mixed["jsd"], parts["jsd"].double())
    close(mixed["ce"], padded.loss(None)[0].detach().double())


class Largest(TorchDispatchMode):
    """Remember the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, made.numel())
        return made


@by_any_kind
def test_logits_exist_for_a_block_only(kind):
    problem, chunk = Problem(), 4
    soft = problem.soft(kind)
    with Largest() as seen:
        problem.loss(soft, MIXES[-1], 2.0 if kind == "live" else 1.0, chunk=chunk)[0].backward()
    assert seen.elements == chunk * WORDS < WIDTH * WORDS


@by_any_kind
@at_temperatures
def test_large_logits_and_sure_teachers_stay_finite(temperature, kind):
    problem = Problem()
    problem.hidden = (problem.hidden.detach() * 300).requires_grad_()
    problem.live = problem.live._replace(hidden_ND=problem.live.hidden_ND * 100)
    soft = problem.soft(kind, temperature)
    total, *_ = problem.loss(soft, dict.fromkeys(("ce", *SOFT), 0.2), temperature)
    total.backward()
    assert bool(torch.isfinite(total)) and bool(torch.isfinite(gradient(problem.hidden)).all())


@pytest.mark.parametrize(
    ("message", "changes", "temperature"),
    [
        ("23 positions, but soft targets of 22", {"tail_mass_N": torch.ones(22)}, 1.0),
        ("not captured at temperature 2", {"tail_N": None}, 2.0),
    ],
)
def test_an_impossible_loss_is_an_error(message, changes, temperature):
    problem = Problem()
    with pytest.raises(ValueError, match=message):
        problem.loss(problem.lists(SIZES)._replace(**changes), temperature=temperature)
