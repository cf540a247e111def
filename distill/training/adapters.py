"""LoRA adapters by PEFT: float32 masters that are trained, plain PEFT files, and the merged model.

A bf16 adapter loses its updates at small learning rates: so only the products run in the model's
type. The last stage that trains writes `merged/`: the adapter is added once, in float32, and cast
once to the type of the base's files. Evaluation loads that folder and publishing copies it;
`source.json` says whose adapter it holds.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.errors import DistillError, Exit
from distill.models.weights import ADAPTER_FILE as WEIGHTS
from distill.training.processes import full_tensor, like, sharded, snapshot

if TYPE_CHECKING:  # and what writes files imports the rest itself: a benchmark has torch and PEFT
    from distill.config.learning import Student
    from distill.models.chat_template import Reasoning
    from distill.storage.run_folder import Run

ADAPTER = "default"
SOURCE = "source.json"  # the one file of merged/ that is no part of the model
OPTIMIZER_PARTS = ("exp_avg", "exp_avg_sq", "step")


def inject(
    model: Any,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | tuple[str, ...],
    seed: int,
) -> PeftModel:
    """Wrap `model` with a fresh adapter drawn from `seed`.

    Raises DistillError (exit 7) where no module matches, and for the embeddings and the head, which
    the losses read as they are, and which are one matrix in most small models.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    # PEFT's type is int, its use is not
    settings: Any = {"lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "r": r}
    settings |= {"lora_dropout": dropout, "target_modules": targets}
    lora = LoraConfig(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # PEFT asks for an attribute by its old name, and warns of what is refused below
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
            wrapped: Any = get_peft_model(model, lora)
        modules = [name for name, _ in model.named_modules()]
        for target in [] if isinstance(targets, str) else targets:
            if not any(f".{name}".endswith(f".{target}") for name in modules):
                raise ValueError(f"no module is called {target}")
        ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        for name, module in ends.items():
            if isinstance(module, LoraLayer):
                raise ValueError(f"the {name} is trained by no adapter")
    except (ValueError, re.error, OverflowError) as error:  # a name is an expression
        what = str(error).splitlines()[0][:200]
        fix = "name modules of this model, such as q_proj, or all-linear"
        raise DistillError(Exit.TRAINING, "train.lora.target_modules", what, fix) from None
    for parameter in parameters(wrapped).values():
        parameter.data = parameter.data.float()
    return wrapped


def unadapted(model: PeftModel) -> list[str]:
    """Return a layer's matrices without an adapter: experts, their router, convolutions."""
    names = [n for n, p in model.named_parameters() if p.ndim > 1 and not p.requires_grad]
    inside = [re.split(r"\.\d+\.", name, maxsplit=1)[1:] for name in names]
    others = {n[0] for n in inside if n and ".base_layer." not in n[0] and "bias" not in n[0]}
    return sorted(name.removesuffix(".weight") for name in others)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by name, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter, float]:
    """Return A (r, in), B (out, r) and the scale of an adapted linear module."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return a, b, float(layer.scaling[ADAPTER])  # pyright: ignore[reportReturnType]


def adapt(wrapped: PeftModel, checkpointing: bool = False) -> PeftModel:
    """Let every adapted linear module compute in its input's type, from the float32 masters."""
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.forward = _WorkingCopy(module)  # pyright: ignore[reportAttributeAccessIssue]
    if checkpointing:
        model: Any = wrapped.get_base_model()
        model.activation_checkpointing_enable({"use_reentrant": False})
    return wrapped.train()


class _WorkingCopy:
    """The forward of an adapted linear module: base(x) + scale · B(A(dropout(x))).

    The weights are looked up at each call: where they are sharded, others stand in their place
    between calls.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer
        self.base, self.drop = layer.base_layer, layer.lora_dropout[ADAPTER]
        self.casts: tuple[Tensor, Tensor] | None = None  # of A and of scale · B, for some passes

    def __call__(self, x: Tensor) -> Tensor:
        a, b, scale = factors(self.layer)
        if self.casts and self.casts[0].dtype == x.dtype:
            parts = (self.base(x), self.drop(x), a, b, *self.casts, scale)
            return _LowRank.apply(*parts)  # pyright: ignore[reportReturnType]
        low = nn.functional.linear(self.drop(x), a.to(x.dtype))
        return self.base(x) + nn.functional.linear(low, (b * scale).to(x.dtype))


class _LowRank(torch.autograd.Function):
    """base + B(A(x)) by casts of the masters, whose gradients it makes."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor,
        cast_a: Tensor, cast_b: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        flat = x.flatten(0, -2)
        low = flat @ cast_a.t()
        ctx.save_for_backward(flat, low, cast_a, cast_b)
        ctx.scale, ctx.shape = scale, x.shape
        return torch.addmm(base.flatten(0, -2), low, cast_b.t()).view(base.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, cast_a, cast_b = ctx.saved_tensors
        grad = upstream[0].flatten(0, -2)
        grad_low = grad @ cast_b
        grad_a, grad_b = (grad_low.t() @ flat).float(), (grad.t() @ low).float().mul_(ctx.scale)
        grad_x = (grad_low @ cast_a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return upstream[0], grad_x, grad_a, grad_b, None, None, None


@contextmanager
def cast_once(model: PeftModel) -> Iterator[None]:
    """Cast the masters once for all passes in the block, in which no step is taken.

    For a GPU, where a launch takes longer than the work on weights so small. A CPU's passes, and
    those of weights in shards, are as they were.
    """
    forwards = [vars(module).get("forward") for module in model.modules()]
    copies = [copy for copy in forwards if isinstance(copy, _WorkingCopy)]
    if model.device.type != "cpu" and not sharded():
        for copy in copies:
            a, b, scale = factors(copy.layer)
            copy.casts = a.detach().to(model.dtype), (b.detach() * scale).to(model.dtype)
    yield
    for copy in copies:
        copy.casts = None


def check_gradients(model: nn.Module) -> None:
    """Stop (exit 7) where no gradient reached an adapter's B in step 1; A's is zero, as B is."""
    for name, parameter in parameters(model).items():
        gradient = parameter.grad
        if gradient is None or ("lora_B" in name and not full_tensor(gradient).any()):
            what = "got no gradient in the first step"
            raise DistillError(Exit.TRAINING, name, what, "leave it out of targets")


def tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return a snapshot of the adapter's weights under PEFT's names, float32 on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: snapshot(value, torch.float32) for name, value in state.items()}


def restore(model: PeftModel, saved: Mapping[str, Tensor], where: object) -> None:
    """Put saved weights into the adapter; raises DistillError (exit 7) for other names."""
    by_name = {name.replace(f".{ADAPTER}.", "."): p for name, p in parameters(model).items()}
    if others := by_name.keys() ^ saved.keys():
        what = f"holds another adapter: {min(others)} differs"
        raise DistillError(Exit.TRAINING, where, what, "--redo train")
    for name, parameter in by_name.items():
        parameter.data.copy_(like(saved[name], parameter))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return a snapshot of AdamW's state as tensors named `PARAMETER.PART`, on the CPU."""
    states = [(name, optimizer.state[p]) for name, p in named.items() if p in optimizer.state]
    return {f"{n}.{part}": snapshot(state[part]) for n, state in states for part in OPTIMIZER_PARTS}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
) -> None:
    """Put into AdamW the state that was saved beside the weights of these parameters."""
    for name, p in named.items():
        optimizer.state[p] = {part: like(saved[f"{name}.{part}"], p) for part in OPTIMIZER_PARTS}


def save_adapter(
    model: PeftModel, weights: Mapping[str, Tensor], folder: Path, base: str | None
) -> None:
    """Write `weights` as a plain PEFT adapter of `base`, replacing `folder` in one rename."""
    from distill.storage.files import disk_errors, replacing

    settings = model.peft_config[ADAPTER]
    settings.inference_mode, settings.base_model_name_or_path = True, base
    with disk_errors(folder), replacing(folder) as work:
        settings.save_pretrained(str(work))
        save_file(dict(weights), work / WEIGHTS, metadata={"format": "pt"})
    settings.inference_mode = False


def merged_student(student: "Student", run: "Run") -> Path:
    """Return the folder of the run's merged student, made now for a run of an earlier distill."""
    from distill.storage.files import read_json, sha256_file

    adapter, folder = run.trained("adapter"), run.trained("merged")
    source = read_json(folder / SOURCE) if (folder / SOURCE).is_file() else {}
    if source.get("adapter_sha256") != sha256_file(adapter / WEIGHTS):
        write_merged(student, adapter, folder, run.config.reasoning)
    return folder


def write_merged(
    student: "Student", adapter: Path, folder: Path, reasoning: "Reasoning" = "drop"
) -> None:
    """Write the student with `adapter` as a model of its own, replacing `folder` in one rename.

    Its chat template is that of the training: `reasoning` and the student's settings are in it.
    Raises DistillError (exit 7) where the adapter belongs to another base or does not fit, 5 where
    the disk is full.
    """
    from distill.models import loading, portable, registry
    from distill.storage.files import disk_errors, read_json, replacing, sha256_file, write_json

    registry.check_base(adapter, student.model, student.revision)
    base = registry.fetch(student.model, student.revision, student.trust)
    config = read_json(base / "config.json")
    both, keys = (config, registry.text_config(config)), ("dtype", "torch_dtype")
    dtypes = (tree[key] for tree in both for key in keys if tree.get(key))
    dtype = getattr(torch, next(dtypes, "float32"))
    model = loading.load_merged(student.model, adapter, dtype, student.revision, student.trust)
    tokenizer = loading.student_tokenizer(student, reasoning)
    model.config.name_or_path = ""  # else the folder of this machine is written into the config
    vars(model.config).pop("_model_name_or_path", None)  # a GGUF's own title, not a model's id
    if not student.trust_remote_code:  # what was ignored here is not asked of who loads it next
        vars(model.config).pop("auto_map", None)
    with disk_errors(folder), replacing(folder) as work:
        model.save_pretrained(work, max_shard_size="100GB")
        portable.respell_config(work, student.trust)
        portable.write_tokenizer(tokenizer, base, work, student.trust)
        write_json(work / SOURCE, {"adapter_sha256": sha256_file(adapter / WEIGHTS)})
