"""What the weights of a model must be: all there, none that belongs to another model, and numbers.

transformers and PEFT fill in what a file lacks with random numbers and go on; here that is an error (exit 7) that names
the tensors. Whoever loads a model or an adapter comes through this module.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import DistillError, Exit

if TYPE_CHECKING:
    import torch

SHOWN = 4  # names in a message
ADAPTER_FILE = "adapter_model.safetensors"


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def require_intact(where: str, report: Mapping[str, Any]) -> None:
    """Refuse what transformers loaded beside its file: `report` is its `output_loading_info`.

    Tied weights and buffers that are computed again do not count as missing there. Raises DistillError (exit 7).
    """
    wrong = {
        "lacks": report["missing_keys"],
        "holds, and its config.json does not know": report["unexpected_keys"],
        "holds in another shape than its config.json says": [
            f"{name} {tuple(stored)} for {tuple(expected)}"
            for name, stored, expected in report["mismatched_keys"]
        ],
        "cannot be read": report["error_msgs"],
    }
    defects = [f"{how} {_listed(names)}" for how, names in wrong.items() if names]
    if defects:
        fix = "use a complete copy of the model, with the config.json that belongs to its weights"
        raise DistillError(Exit.TRAINING, where, "; ".join(defects), fix)


def require_values(where: str, tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:
    """Refuse weights that are NaN or infinite, and matrices that are all zeros; raises DistillError (exit 7).

    A bias or a norm may be zero, and so may an adapter's B, which begins so.
    """
    broken, empty = [], []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # one pass, and NaN comes through; the types of one byte know no comparison
        low, high = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
        if not (low.isfinite() and high.isfinite()):
            broken.append(name)
        elif tensor.ndim > 1 and low == high == 0 and "lora_B" not in name:
            empty.append(name)
    defects = [f"has NaN or infinite values in {_listed(broken)}"] if broken else []
    defects += [f"has nothing but zeros in {_listed(empty)}"] if empty else []
    if defects:
        raise DistillError(
            Exit.TRAINING, where, "; ".join(defects), "use an undamaged copy of the weights"
        )


def values_of(model: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield a model's parameters as numbers; what bitsandbytes has packed in 4 bits is unpacked, one at a time."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "quant_state", None) is None:
            yield name, parameter.detach()
        else:
            from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
                dequantize_4bit,
            )

            yield name, dequantize_4bit(parameter.data, parameter.quant_state)


def stored_values(files: Sequence[Path], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield those tensors of safetensors files that have one of these names."""
    from safetensors import safe_open

    requested = set(names)
    for path in files:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
            for name in requested.intersection(file.keys()):
                yield name, file.get_tensor(name)


def add_adapter(base: Any, folder: Path) -> Any:
    """Return a model with the PEFT adapter in `folder` on it; raises DistillError (exit 7) where it does not fit."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_FILE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it warns of is refused below
            model: Any = PeftModel.from_pretrained(base, str(folder))
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
            stored = set(file.keys())
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        what = f"could not be loaded: {' '.join(str(error).split())[:300]}"
        raise DistillError(Exit.TRAINING, path, what, "--redo train makes it again") from None
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = {
        "lacks": tensors.keys() - stored,
        "holds, and its settings do not know": stored - tensors.keys(),
    }
    defects = [f"{how} {_listed(names)}" for how, names in wrong.items() if names]
    if defects:
        raise DistillError(Exit.TRAINING, path, "; ".join(defects), "--redo train makes it again")
    require_values(f"{path}", tensors.items())
    return model
