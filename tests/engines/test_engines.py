"""The loop against engines as people run them: answers, a death in the middle, too long prompts,
soft labels. What a server is known to do stands in docs/field.md; here it does it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distill.config.teachers import EndpointTeacher
from distill.errors import DistillError, Exit
from distill.responders.endpoint.budget import attempts
from distill.responders.store import ResponseStore
from distill.training.soft_labels.cache import Signal
from tests.support.engines import ENGINES, TEXTS, Engine, local, make_served, served, settings
from tests.support.training import make_soft_run
from tests.training.test_answer_logprobs import far, generated, listed, make_answered, near

CONTEXT = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    with Engine(request.param, model, CONTEXT) as started:
        yield started


def patient(engine: Engine) -> EndpointTeacher:
    """Return how an engine is asked that may die: once more, soon."""
    return settings(engine, max_retries=1, initial_backoff=0.05)


def test_it_answers_as_the_local_teacher_does(engine: Engine, model: Path, tmp_path: Path) -> None:
    ours, theirs = local(model, tmp_path / "a"), served(patient(engine), tmp_path / "b")
    same = [a for a, b in zip(ours, theirs, strict=True) if (a.text, a.stop) == (b.text, b.stop)]
    assert len(same) >= 10, "more than near-ties differ"
    assert len({r.text for r in theirs}) > 6
    for a, b in zip(ours, theirs, strict=True):
        assert b.usage.input_tokens == a.usage.input_tokens and not b.usage.estimated
        assert b.usage.output_tokens == a.usage.output_tokens or a not in same


def test_a_prompt_that_is_too_long_is_that_item_s_failure(engine: Engine, tmp_path: Path) -> None:
    texts = [*TEXTS, "long " * CONTEXT]
    *answers, last = served(patient(engine), tmp_path, texts)
    assert {r.stop for r in answers} <= {"end", "length"} and all(r.text for r in answers)
    if engine.engine == "transformers":  # it has no limit, and says how much it read
        assert last.stop == "length" and last.usage.input_tokens > 5 * CONTEXT
    else:
        assert last.stop == "error" and "400" in str(last.error) and str(CONTEXT) in str(last.error)


def test_killed_and_started_again_it_is_asked_only_for_what_is_missing(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    texts = [f"{i}: {text}" for i, text in enumerate(TEXTS * 10)]
    with Engine(engine.engine, model, CONTEXT) as other:
        done = threading.Event()

        def kill() -> None:
            folder = tmp_path / "b"
            while not done.is_set() and answers_in(folder) < 4:
                done.wait(0.002)
            other.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(DistillError) as error:
            served(patient(other), tmp_path / "b", texts, 40)
        done.set()
        killer.join()
        assert error.value.code == Exit.TEACHER
        before = answers_in(tmp_path / "b")
        assert 4 <= before < len(texts)
        other.start()
        other.wait()
        answers = served(patient(other), tmp_path / "b", texts, 40)
    with ResponseStore(tmp_path / "b", writable=False) as store:
        tried = [a.billed for a in attempts(store, {"tiny": None})]
    assert tried.count("yes") == len(texts), "none was paid twice"
    assert all(r.text and r.stop in ("end", "length") for r in answers)


def answers_in(folder: Path) -> int:
    """Return how many answers a store that somebody is writing holds."""
    if not folder.exists():
        return 0
    with ResponseStore(folder, writable=False) as store:
        return sum(a.billed == "yes" for a in attempts(store, {"tiny": None}))


def close_to(found: dict[str, Signal], wanted: dict[str, Signal]) -> None:
    """Assert that a server's distributions are those of the same model read here.

    How near they come depends on the kernels for a processor: a few entries lie further off, none
    as far as those of another token or place.
    """
    assert found.keys() == wanted.keys()
    off, lists = list[float](), 0
    for name, signal in wanted.items():
        assert len(found[name]) == len(signal)
        for one, other in zip(listed(found[name]), listed(signal), strict=True):
            lists += len(other)
            off += [abs(one[i] - other[i]) for i in one.keys() & other.keys()]
    assert len(off) > 0.97 * lists
    assert np.quantile(off, 0.99) < 0.07 and max(off) < 0.25


def test_the_lists_that_come_with_its_answers_become_soft_labels(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    if engine.engine == "transformers":
        pytest.skip("transformers serve lists no log-probabilities")
    (tmp_path / "teacher").symlink_to(model)
    run = make_answered(tmp_path, engine.url, "tiny", p=0.9, k=20)
    generated(run)
    close_to(far(run), near(tmp_path, run, p=0.9, k=20))


def test_its_prompt_logprobs_become_soft_labels(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    if engine.engine != "vllm":
        pytest.skip("only vLLM reads a text again with prompt_logprobs")
    (tmp_path / "teacher").symlink_to(model)
    own = {"kind": "endpoint", "model": "tiny", "base_url": engine.url}
    run = make_soft_run(tmp_path, "far", signals={"endpoint": own, "p": 0.9, "k": 20})
    close_to(far(run), near(tmp_path, run, p=0.9, k=20))
