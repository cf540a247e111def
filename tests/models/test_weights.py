"""H1: weights that are missing, or are no numbers, are refused by name before anything is asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.cli import main
from distill.config.learning import Student
from distill.errors import DistillError, Exit
from distill.models import loading, registry
from distill.models.weights import require_values
from distill.responders.local.local_model import LocalResponder
from distill.training import adapters
from distill.training.adapters import write_merged
from tests.support.tiny import make_tiny

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def rename(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("model.", "other.")] = tensors.pop(name)


def poison(value: float) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[UP][3, 5] = value

    return change


def cut(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP][:-2].clone()


DAMAGE: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "one is missing": (without(UP), ("lacks", UP)),
    "the embedding is missing, and the tied head with it": (
        without(EMBEDDING),
        ("lacks", EMBEDDING),
    ),
    "a norm is missing": (without("model.norm.weight"), ("lacks", "model.norm.weight")),
    "all are missing": (Tensors.clear, ("lacks", "more")),
    "all have other names": (rename, ("lacks", "does not know", "other.")),
    "one is of no use": (
        lambda t: t.update({"model.layers.7.mlp.up_proj.weight": t[UP].clone()}),
        ("does not know", "model.layers.7"),
    ),
    "one has another shape": (cut, ("another shape", UP, "(62, 32)")),
    "a NaN": (poison(float("nan")), ("NaN", UP)),
    "an infinity": (poison(float("inf")), ("infinite", UP)),
    "zeros": (lambda t: t[UP].zero_(), ("zeros", UP)),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "m")


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def refused(call: Callable[..., Any], *given: Any, **named: Any) -> str:
    """Return the one line with which a call is refused (exit 7)."""
    with pytest.raises(DistillError) as caught:
        call(*given, **named)
    assert caught.value.code == Exit.TRAINING and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("call", [loading.load_model, loading.check_model])
def test_weights_that_are_not_the_model_s(
    what: str, call: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    folder = copied(tiny, tmp_path / "m")
    change, words = DAMAGE[what]
    edit(folder / "model.safetensors", change)
    said = refused(call, str(folder))
    assert all(word in said for word in words), said
    call(str(tiny))


def test_an_untied_head_must_be_there_and_a_tied_one_need_not(tmp_path: Path) -> None:
    untied = make_tiny(tmp_path / "untied", "qwen2", tied=False)
    tied = make_tiny(tmp_path / "tied", "qwen2")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    for call in (loading.check_model, loading.load_model):
        call(str(untied))
        call(str(tied))
    edit(untied / "model.safetensors", without("lm_head.weight"))
    for call in (loading.check_model, loading.load_model):
        assert "lacks lm_head.weight" in refused(call, str(untied))


def test_either_of_two_tied_weights_will_do(tiny: Path, tmp_path: Path) -> None:
    """Some save the head and leave the embedding out: the same tensor under its other name."""
    folder = copied(tiny, tmp_path / "m")
    edit(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t.pop(EMBEDDING)}))
    loading.check_model(str(folder))
    whole, other = (loading.load_model(str(f), "float32").state_dict() for f in (tiny, folder))
    assert torch.equal(whole[EMBEDDING], other[EMBEDDING])


def test_what_is_computed_again_may_lie_in_the_file(tiny: Path, tmp_path: Path) -> None:
    """Old checkpoints hold each layer's rotary frequencies, which no model reads any more."""
    folder = copied(tiny, tmp_path / "m")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit(folder / "model.safetensors", lambda t: t.update(old))
    loading.check_model(str(folder))
    loading.load_model(str(folder))


def test_shards_are_looked_at_too(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    loading.load_model(str(tiny), "float32").save_pretrained(folder, max_shard_size="20KB")
    loading.load_tokenizer(str(tiny)).save_pretrained(folder)
    loading.check_model(str(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    shard = folder / index["weight_map"][UP]
    edit(shard, poison(float("nan")))
    for call in (loading.check_model, loading.load_model):
        assert UP in refused(call, str(folder))
    edit(shard, without(UP))
    for call in (loading.check_model, loading.load_model):
        assert f"lacks {UP}" in refused(call, str(folder))


def test_zeros_where_they_belong() -> None:
    fine = [("norm.weight", torch.zeros(4)), ("q.lora_B.weight", torch.zeros(4, 4))]
    fine += [("packed", torch.zeros(4, 4, dtype=torch.uint8)), ("none", torch.zeros(0, 4))]
    require_values("m", fine)
    half = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    assert "zeros in w (" in refused(require_values, "m", [("w", half)])


def test_an_adapter_beside_the_model_is_not_added_to_it(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "adapter" in refused(loading.load_model, str(folder))


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as training writes it."""
    model = loading.load_model(str(tiny), "float32")
    wrapped = adapters.inject(model, 4, 8, 0.0, "all-linear", 0)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapters.save_adapter(wrapped, adapters.tensors(wrapped), folder, None)
    registry.record_base(folder, str(tiny))
    return folder


ADAPTED = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
BROKEN_ADAPTER: dict[str, Callable[[Tensors], object]] = {
    "lacks": without(ADAPTED),
    "do not know": lambda t: t.update(
        {ADAPTED.replace("layers.1", "layers.9"): t[ADAPTED].clone()}
    ),
    "NaN": lambda t: t[ADAPTED].fill_(float("nan")),
    "size mismatch": lambda t: t.update({ADAPTED: torch.ones(3, 32)}),
}


@pytest.mark.parametrize("what", BROKEN_ADAPTER)
def test_an_adapter_that_is_not_intact(
    what: str, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    """It is refused where a student answers on policy, and where it is merged."""
    folder = copied(adapter, tmp_path / "adapter")
    edit(folder / adapters.WEIGHTS, BROKEN_ADAPTER[what])
    calls: tuple[Callable[[Path], Any], ...] = (
        lambda place: LocalResponder.load(str(tiny), "float32", adapter=place).network,
        lambda place: write_merged(Student(model=str(tiny)), place, tmp_path / "merged"),
    )
    for call in calls:
        call(adapter)
        said = refused(call, folder)
        assert what in said and "up_proj.lora_A" in said


def test_a_merged_model_is_cast_like_one_that_is_loaded_so(tiny: Path, adapter: Path) -> None:
    """The rotary frequencies, which are computed anew, stay in float32."""
    merged = loading.load_merged(str(tiny), adapter, dtype=torch.bfloat16)
    loaded = loading.load_model(str(tiny), "bfloat16")
    types = [
        {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}
        for model in (merged, loaded)
    ]
    assert types[0] == types[1] and set(types[0].values()) == {torch.bfloat16, torch.float32}


def config_of(folder: Path, **changes: Any) -> Path:
    """Write a run whose teacher would answer, and where a broken model is needed later."""
    rows = [{"prompt": f"What is {n} and {n}?"} for n in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "name": "r",
        "runs": str(folder / "runs"),
        "corpus": {"path": str(folder / "rows.jsonl"), "near_duplicate_threshold": None},
        "teacher": {"kind": "local", "model": str(folder / "good"), "max_new_tokens": 4},
        "student": {"model": str(folder / "good")},
        "train": {"bf16": False},
        "terms": {"basis": "our own tiny model"},
        **changes,
    }
    (folder / "c.yaml").write_text(json.dumps(tree))
    return folder / "c.yaml"


@pytest.mark.parametrize(
    ("role", "what"),
    [("student", "one is missing"), *((role, "zeros") for role in ("teacher", "reader", "judge"))],
)
def test_nothing_is_asked_for_a_model_that_is_not_whole(
    role: str, what: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(tiny, tmp_path / "good")
    bad = copied(tiny, tmp_path / "bad")
    edit(bad / "model.safetensors", DAMAGE[what][0])
    soft = {"train": {"bf16": False, "loss": {"ce": 0.5, "forward_kl": 0.5}}}
    changes: dict[str, Any] = {
        "student": {"student": {"model": str(bad)}},
        "teacher": {"teacher": {"kind": "local", "model": str(bad), "max_new_tokens": 4}},
        "reader": {**soft, "signals": {"model": str(bad)}},
        "judge": {"evaluation": {"judge": {"kind": "local", "model": str(bad)}}},
    }[role]
    path = config_of(tmp_path, **changes)
    assert main(["run", str(path)]) == Exit.TRAINING
    assert UP in capsys.readouterr().err
    assert not (tmp_path / "runs/.store").exists(), "something was asked before"
    if role in ("student", "teacher"):
        assert main(["generate", str(path)]) == Exit.TRAINING
        assert main(["plan", str(path), "--pilot", "2"]) == Exit.TRAINING
        assert not (tmp_path / "runs/.store").exists()
