"""LoRA adapters by PEFT: float32 masters, a working copy in the model's type in the forward pass, plain PEFT on disk.

A bf16 adapter loses its updates at small learning rates, so the weights that are trained stay float32 and only the
products run in the model's type; gradients come back to float32.
"""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.errors import DistillError, Exit
from distill.storage.files import fsync_folder
from distill.training.sharding import like, snapshot, whole

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"


def inject(
    model: Any,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | tuple[str, ...],
    seed: int,
) -> PeftModel:
    """Wrap `model` with a fresh adapter drawn from `seed`; raises DistillError (exit 7) where no module matches."""
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    # PEFT's type is int, its use is not
    lora_alpha: Any = int(alpha) if alpha == int(alpha) else alpha
    lora = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # PEFT asks for an attribute by its old name, and warns of what is refused below
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
            wrapped = get_peft_model(model, lora)
    except ValueError as error:
        what = str(error).splitlines()[0][:200]
        fix = "name modules of this model, such as q_proj, or all-linear"
        raise DistillError(Exit.TRAINING, "train.lora.target_modules", what, fix) from None
    _refuse_embeddings(model, targets)
    for parameter in parameters(wrapped).values():
        parameter.data = parameter.data.float()
    return wrapped  # pyright: ignore[reportReturnType]


def _refuse_embeddings(model: Any, targets: object) -> None:
    """Stop where embeddings would be adapted, or a head that is one: merging would add to both what was learnt for one."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(head, LoraLayer) and head.weight is table.weight
    if tied or isinstance(table, LoraLayer):
        what = "the output head, which is this model's embedding too" if tied else "the embedding"
        raise DistillError(
            *(Exit.TRAINING, "train.lora.target_modules", f"{targets} includes {what}"),
            "leave it out: an adapter of it cannot be merged",
        )


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by name, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted modules with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter, float]:
    """Return A (r, in), B (out, r) and the scale of an adapted linear module."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return a, b, float(layer.scaling[ADAPTER])  # pyright: ignore[reportReturnType]


def use_working_copies(model: nn.Module) -> None:
    """Let every adapted linear module compute in its input's type, from the float32 masters."""
    for _, layer in layers(model):
        layer.forward = _WorkingCopy(layer)  # pyright: ignore[reportAttributeAccessIssue]


class _WorkingCopy:
    """The forward of an adapted linear module: base(x) + scale · B(A(dropout(x))).

    The weights are looked up at each call: where they are sharded, others stand in their place between calls.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer
        self.base, self.drop = layer.base_layer, layer.lora_dropout[ADAPTER]

    def __call__(self, x: Tensor) -> Tensor:
        a, b, scale = factors(self.layer)
        low = nn.functional.linear(self.drop(x), a.to(x.dtype))
        return self.base(x) + nn.functional.linear(low, (b * scale).to(x.dtype))


def check_gradients(model: nn.Module) -> None:
    """Stop (exit 7) where an adapter is out of the loss's reach: after the first step every B has a gradient.

    A's gradient is zero then, since B starts at zero.
    """
    for name, parameter in parameters(model).items():
        gradient = parameter.grad
        if gradient is None or ("lora_B" in name and not whole(gradient).any()):
            raise DistillError(
                Exit.TRAINING, name, "got no gradient in the first step", "leave it out of targets"
            )


def tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return a snapshot of the adapter's weights under PEFT's names, float32 on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: snapshot(value, torch.float32) for name, value in state.items()}


def restore(model: PeftModel, wanted: Mapping[str, Tensor], where: object) -> None:
    """Put saved weights into the adapter and check that they are there; raises DistillError (exit 7) where names differ."""
    by_name = {name.replace(f".{ADAPTER}.", "."): p for name, p in parameters(model).items()}
    if by_name.keys() != wanted.keys():
        odd = sorted(by_name.keys() ^ wanted.keys())[0]
        raise DistillError(
            Exit.TRAINING, where, f"holds another adapter: {odd} differs", "--redo train"
        )
    for name, parameter in by_name.items():
        parameter.data.copy_(like(wanted[name], parameter))
    current = tensors(model)
    for name in wanted:
        if not torch.equal(current[name], wanted[name]):
            raise DistillError(Exit.TRAINING, where, f"{name} was not restored", "--redo train")


def save_adapter(
    model: PeftModel, weights: Mapping[str, Tensor], folder: Path, base: str | None
) -> None:
    """Write `weights` as a plain PEFT adapter whose config names `base`, replacing `folder` in one rename."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    settings = model.peft_config[ADAPTER]
    settings.inference_mode, settings.base_model_name_or_path = True, base
    settings.save_pretrained(str(temporary))
    settings.inference_mode = False
    path = temporary / WEIGHTS
    save_file(dict(weights), path, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    fsync_folder(folder.parent)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory of its own."""
    with safe_open(path, framework="pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
