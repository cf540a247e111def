"""Models by reference: the table without torch, shapes of real models, what is refused, loading."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config.values import Trust
from distill.errors import DistillError, Exit
from distill.models import devices, loading, registry
from distill.models.chat_template import encode_text
from distill.models.download import cache_folder
from distill.training.trial import ModelTrial, try_model
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import make_tiny, make_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A tiny model's folder that a test may damage."""
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(call, *arguments, **named) -> DistillError:
    with pytest.raises(DistillError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return caught.value


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_looking_up_needs_no_torch():
    code = (
        "import sys; from distill.models import registry as models; models.table();"
        "models.identity('smollm2-135m-instruct'); models.shape_of('Qwen/Qwen2.5-7B-Instruct');"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(registry.table()))
def test_a_shape_of_the_table_counts_the_real_architecture(name):
    info = registry.table()[name]
    shape, kind = info.shape, "qwen2" if "qwen" in name.lower() else "llama"
    config = AutoConfig.for_model(
        kind,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == shape.parameters
    assert registry.shape_from_config(config.to_dict()) == shape
    assert registry.COMMIT.fullmatch(info.revision) and info.license == "Apache-2.0"
    assert "/" not in name or info.hub_id == name


def test_the_shape_of_a_folder(tiny):
    shape = registry.shape_of(str(tiny))
    assert shape.parameters == loading.load_model(str(tiny)).num_parameters()
    assert registry.lookup(str(tiny)) is None
    assert "configs/models.yaml" in refused(registry.shape_of, "gpt2").fix


def test_a_shape_of_class_defaults():
    """C1: the config of gemma-3-4b-it names no heads and no vocabulary; its class does."""
    text: dict[str, Any] = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    text |= {"model_type": "gemma3_text", "sliding_window": 1024}
    shape = registry.shape_from_config({"model_type": "gemma3", "text_config": text})
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (8, 4, 256)
    assert (shape.vocab, shape.context, shape.tied) == (262208, 131072, True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text))
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=1e-3)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({}, "hidden_size"),
        ({"model_type": "mamba"}, "num_attention_heads"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "num_hidden_layers": [1]}, "num_hidden_layers"),
    ],
)
def test_a_config_without_a_size_is_refused_by_its_name(config, key):
    """C1, H4: one line that names the key, for `plan` too."""
    error = refused(registry.shape_from_config, config)
    assert error.code == Exit.TRAINING and key in error.what


HOSTILE = ("../x", "a/b/c", "x\0", "a" * 300, "", "./../x", "/a/../b", "~/x", "C:\\x")


@pytest.mark.parametrize(
    ("reference", "revision", "words"),
    [
        *((reference, None, "is not a reference") for reference in HOSTILE),
        ("smollm-135m-instruct", None, "did you mean smollm2-135m-instruct"),
        ("smollm2-135m-instruct", "f" * 40, "HuggingFaceTB/"),  # a named model is one file
        ("./nowhere", None, "config.json is missing"),
    ],
)
def test_a_reference_that_names_no_model_is_refused(reference, revision, words):
    error = refused(registry.fetch, reference, revision)
    assert error.code == Exit.CONFIG and words in str(error)


def test_auto_is_bfloat16_only_in_hardware(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("decided by the GPU")
    for flags, wanted in (("avx2 avx512f", torch.float32), ("avx512_bf16", torch.bfloat16)):
        monkeypatch.setattr(devices, "cpu_facts", lambda flags=flags: {"flags": flags})
        assert devices.pick_dtype() == wanted
    monkeypatch.setattr(devices, "cpu_facts", dict)
    assert devices.pick_dtype() == torch.float32


def test_pickles_are_refused_unless_allowed(copy):
    weights = loading.load_model(str(copy), "float32").state_dict()
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    error = refused(loading.load_model, str(copy))
    assert error.code == Exit.TRAINING and "allow_pickle" in error.fix
    assert loading.load_model(str(copy), trust=Trust(pickle=True)).num_parameters() > 0


EVIL = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.T", None],
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_the_author_is_refused(copy, name):
    change(copy / name, auto_map=EVIL)
    change(copy / "config.json", model_type="own")
    (copy / "evil.py").write_text("raise SystemExit('it ran')")
    for load in (loading.load_model, loading.load_tokenizer):
        error = refused(load, str(copy))
        assert error.code == Exit.TRAINING and "trust_remote_code" in error.fix
        assert "a teacher behind a server of its own" in error.fix  # C5: which has no such key


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "both"])
def test_code_is_not_needed_where_transformers_has_the_class(copy, name, kind, monkeypatch):
    """C3: the native class is used, `auto_map` is ignored, said, and not published."""
    monkeypatch.setenv("DISTILL_CACHE", str(copy / "cache"))
    for file in ("config.json", "tokenizer_config.json"):
        if name in (file, "both"):
            change(copy / file, auto_map=EVIL)
    (copy / "evil.py").write_text("raise SystemExit('it ran')")
    if kind != "llama":  # of a composite one the part for text decides
        text = json.loads((copy / "config.json").read_text())
        change(copy / "config.json", model_type="gemma3", text_config={**text, "model_type": kind})
    else:
        assert type(loading.load_model(str(copy))).__name__ == "LlamaForCausalLM"
    assert loading.load_tokenizer(str(copy)).decode([60]) != ""
    assert "auto_map" in try_model(ModelTrial(str(copy)))[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokenizer_config.json", {"vocab_file": "../../etc/passwd"}),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}),
        ("model.safetensors.index.json", {"weight_map": {"a": "../../../etc/passwd"}}),
    ],
)
def test_paths_out_of_the_folder_are_refused(copy, name, values):
    (copy / name).touch()
    (copy / name).write_text(json.dumps(values))
    error = refused(loading.load_model, str(copy))
    assert error.code == Exit.TRAINING and "outside the folder" in error.what


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_one_line(copy, name, damage):
    (copy / name).write_bytes(damage)
    assert refused(loading.load_model, str(copy)).code == Exit.TRAINING


@pytest.mark.parametrize("what", ["chat template", "eos"])
def test_a_tokenizer_must_be_whole(copy, what):
    if what == "eos":
        change(copy / "tokenizer_config.json", eos_token=None)
    else:
        (copy / "chat_template.jinja").unlink()
    error = refused(loading.load_tokenizer, str(copy))
    assert error.code == Exit.TRAINING and what in error.what


def test_an_adapter_belongs_to_its_base(tiny, copy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert "retrain" in refused(registry.check_base, adapter, str(tiny)).fix
    base = registry.record_base(adapter, str(tiny))
    assert base["identity"] == registry.identity(str(tiny)) and str(tiny) not in str(base)
    registry.check_base(adapter, str(copy))  # the same weights elsewhere
    other = make_tiny(tmp_path / "other", seed=1)
    assert refused(registry.check_base, adapter, str(other)).code == Exit.TRAINING


def test_identity_sees_a_change(copy):
    before = registry.identity(str(copy))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert registry.identity(str(copy)) != before
    assert registry.identity("smollm2-135m-instruct").startswith("b179c952")
    assert registry.identity("Qwen/Qwen2.5-7B-Instruct").startswith("a09a3545")
    assert registry.identity("a/b", "f" * 40) == "f" * 40


def test_a_model_of_the_hub_then_offline(tiny, tmp_path, monkeypatch):
    from huggingface_hub import constants

    with fake_hub() as hub:
        sha = hub.add("acme/tiny", {path.name: path.read_bytes() for path in tiny.iterdir()})
        hub.add("acme/tiny", {"training_args.bin": b"pickle", "model.py": b"code"})
        use_hub(monkeypatch, hub, tmp_path, token=None)
        folder = registry.fetch("acme/tiny", sha)
        assert registry.identity("acme/tiny", sha) == sha
        assert not (folder / "training_args.bin").exists() and not (folder / "model.py").exists()
        assert loading.load_model("acme/tiny", revision=sha).num_parameters() > 0
        assert refused(registry.fetch, "acme/none").code == Exit.INPUT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert registry.fetch("acme/tiny", sha) == folder
    assert refused(registry.fetch, "acme/other").code == Exit.INPUT


def test_a_tokenizer_may_be_larger_than_the_embedding(tiny, tmp_path):
    """C4, and its neighbours: such a token is an error where a text holds one, and only there."""
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    make_tokenizer(("<image>", *(f"<extra{n}>" for n in range(9)))).save_pretrained(folder)
    tokenizer = loading.load_tokenizer(str(folder))
    assert len(tokenizer) > 264 and encode_text(tokenizer, "2 and 2")
    tokenizer.add_tokens(["<late>"])
    error = refused(encode_text, tokenizer, "see <late>")
    assert error.code == Exit.INPUT and "'<late>'" in error.what and "264" in error.what
    try_model(ModelTrial(str(folder)))


def test_no_pad_token_is_needed(tiny, tmp_path):
    """C2: as Llama 3 and Mistral come; `test_families.py` trains and publishes such ones."""
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert loading.load_tokenizer(str(folder)).pad_token_id is None


@pytest.mark.parametrize("method", ["gptq", "awq", "nope", 7])
def test_quantised_weights_need_their_package(copy, method):
    """H4: found before anything is asked, by what transformers says is missing."""
    change(copy / "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert refused(loading.check_model, str(copy)).code == Exit.TRAINING


@pytest.mark.parametrize("name", ["a\nb", "100%d", "caf\udce9", "–dash"])
def test_a_folder_may_have_any_name(tiny, tmp_path, name, monkeypatch):
    """H4: newlines, percent signs and bytes that are no UTF-8 end in one line, or work."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(tiny, tmp_path / name))
    if name.isprintable() or "\n" in name:
        assert try_model(ModelTrial(str(folder))) == []
        (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DistillError, match=r"added_tokens|surrogates") as caught:
        try_model(ModelTrial(str(folder)))
    assert caught.value.code == Exit.TRAINING


def test_a_user_without_a_home(monkeypatch):
    """H4: LANG=C without HOME, and a user whom /etc/passwd does not know."""
    for name in ("HOME", "XDG_CACHE_HOME", "DISTILL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert refused(cache_folder).code == Exit.STATE
