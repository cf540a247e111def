"""What the weights of a model must be: all there, none that belongs to another model, and numbers.

transformers and PEFT fill in what a file lacks with random numbers and go on; here that is an error
(exit 7) that names the tensors. Whoever loads a model or an adapter comes through this module.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import DistillError, Exit, one_line
from distill.models.devices import raise_device_error

if TYPE_CHECKING:
    import torch

MAY_BE_ZERO = re.compile(r"bias$|lora_B")  # experts have a bias each, a matrix in all
SHOWN = 4  # names in a message
ADAPTER_FILE = "adapter_model.safetensors"


def _refuse(where: object, defects: Mapping[str, Iterable[str]], fix: str) -> None:
    """Raise DistillError (exit 7) that names the tensors of each kind of defect, if any."""
    lines = []
    for defect, names in defects.items():
        if ordered := sorted(names):
            more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
            lines.append(f"{defect} {', '.join(ordered[:SHOWN])}{more}")
    if lines:
        raise DistillError(Exit.TRAINING, where, "; ".join(lines), fix)


def require_intact(where: str, report: Mapping[str, Any]) -> None:
    """Refuse (exit 7) weights that do not fit by transformers' `output_loading_info`.

    Tied weights and buffers that are computed again do not count as missing there.
    """
    shapes = report["mismatched_keys"]
    defects = {
        "lacks": report["missing_keys"],
        "holds, and its config.json does not know": report["unexpected_keys"],
        "holds in another shape than its config.json says": [
            f"{n} {tuple(have)} for {tuple(want)}" for n, have, want in shapes
        ],
        "cannot be read": report["error_msgs"],
    }
    fix = "use a complete copy of the model, with the config.json that belongs to its weights"
    _refuse(where, defects, fix)


def require_values(where: str, tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:
    """Refuse weights that are NaN or infinite, and matrices of zeros; raises DistillError (exit 7).

    A bias or a norm may be zero, and so may an adapter's B, which begins so. What bitsandbytes has
    packed in 4 bits is unpacked, one tensor at a time.
    """
    broken, empty = [], []
    for name, tensor in tensors:
        values: Any = tensor.detach()
        if (packed := getattr(tensor, "quant_state", None)) is not None:
            import bitsandbytes.functional  # pyright: ignore[reportMissingImports]

            values = bitsandbytes.functional.dequantize_4bit(tensor.data, packed)
        if not values.is_floating_point() or not values.numel():
            continue
        # one pass, and NaN comes through; the types of one byte know no comparison
        low, high = (values.float() if values.element_size() == 1 else values).aminmax()
        if not (low.isfinite() and high.isfinite()):
            broken.append(name)
        elif values.ndim > 1 and low == high == 0 and not MAY_BE_ZERO.search(name):
            empty.append(name)
    defects = {"has NaN or infinite values in": broken, "has nothing but zeros in": empty}
    _refuse(where, defects, "use an undamaged copy of the weights")


def add_adapter(base: Any, folder: Path) -> Any:
    """Return a model with the PEFT adapter in `folder` on it; raises DistillError (exit 7)."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    path, fix = folder / ADAPTER_FILE, "--redo train makes it again"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it warns of is refused below
            model: Any = PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
            stored = set(file.keys())
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise_device_error(error)
        what = f"could not be loaded: {one_line(error)}"
        raise DistillError(Exit.TRAINING, path, what, fix) from None
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    unknown = stored - tensors.keys()
    defects = {"lacks": tensors.keys() - stored, "holds, and its settings do not know": unknown}
    _refuse(path, defects, fix)
    require_values(f"{path}", tensors.items())
    return model
