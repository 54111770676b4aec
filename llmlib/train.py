"""A small training loop: AdamW, a schedule, clipping, mixed precision on a GPU, and checkpoints that lose nothing."""

import math
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from llmlib.data import IGNORED, Batch, Corpus, Split, batch, evaluation_batches
from llmlib.errors import TrainingError, require

Task = Callable[[int], Batch | tuple]
SCHEDULES = ("constant", "cosine", "linear", "trapezoid")


@dataclass
class History:
    """What a run measured, step by step: loss in nats per token, learning rate, gradient norm, (step, evaluation)."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    auxiliary_losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    def smoothed(self, window: int = 20) -> list[float]:
        """The loss, averaged over the last `window` steps."""
        recent = (self.losses[max(0, i + 1 - window) : i + 1] for i in range(len(self.losses)))
        return [sum(r) / len(r) for r in recent]


def learning_rate_at(
    step: int, *, steps: int, peak: float, warmup: int = 0, schedule: str = "cosine", floor: float = 0.1
) -> float:
    """The learning rate of `step` (from 0): a linear warm-up to `peak`, then the schedule, down to floor · peak.

    constant   stays at the peak
    cosine     half a cosine (1608.03983)
    linear     a straight line
    trapezoid  at the peak for three fifths, then a straight line (arXiv:2405.18392)
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    remaining = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "trapezoid": min(1.0, (1 - progress) / 0.4),
    }[schedule]
    return peak * (floor + (1 - floor) * remaining)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: see `spared_from_decay` for what goes without."""
    trained, spared = dict(model.named_parameters()), spared_from_decay(model)
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    return [
        {"params": [p for name, p in trained.items() if name not in spared], "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if name in spared], "weight_decay": 0.0},
    ]


def spared_from_decay(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay leaves alone: all vectors, such as gains and biases, and those that
    a module's class names in `undecayed`. (A tag on a parameter is lost where PyTorch makes it anew.)"""
    names = {id(p): name for name, p in model.named_parameters()}
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
    return vectors | {
        names[id(p)]
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name in getattr(module, "undecayed", ())
    }


def automatic_precision(device: torch.device | str) -> torch.dtype:
    """float32 on a CPU, bfloat16 on a GPU that computes with it (sm_80 or newer), float16 on an older one."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def cross_entropy(logits: Float[Tensor, "*b v"], targets: Int64[Tensor, "*b"]) -> Float[Tensor, ""]:
    """Mean of -log softmax(logits)[target] over the targets that are not IGNORED, in nats; computed in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def loss_of(model: nn.Module, data: Batch | tuple) -> Float[Tensor, ""]:
    """Cross-entropy of a model on one batch, whose inputs are a tensor or the tuple of the model's arguments."""
    inputs, targets, *documents = _to(data, next(model.parameters()).device)
    context = {"documents": documents[0]} if documents and documents[0] is not None else {}
    if hasattr(model, "loss") and isinstance(inputs, Tensor):
        return model.loss(inputs, targets, **context)
    return cross_entropy(model(*(inputs if isinstance(inputs, tuple) else (inputs,)), **context), targets)


def _to(data, device: torch.device):
    if isinstance(data, tuple):
        return tuple(_to(part, device) for part in data)
    return data if data is None else data.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 16,
    time: int = 128,
    windows: int | None = 64,
    packed: bool = False,
) -> float:
    """Mean loss, nats per byte, over `windows` windows spread evenly over a split (None: all of it)."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for one in evaluation_batches(split, batch_size, time, windows=windows, packed=packed):
        kept = int((one.targets != IGNORED).sum())
        total, count = total + loss_of(model, one).item() * kept, count + kept
    model.train(was_training)
    return total / count


@dataclass(frozen=True)
class _Settings:
    """What decides the course of a run; a checkpoint of another course is refused."""

    steps: int
    batch_size: int
    time: int
    learning_rate: float
    warmup: int
    schedule: str
    floor: float
    weight_decay: float
    betas: tuple[float, float]
    clip: float | None
    seed: int
    packed: bool
    precision: str

    def check(self) -> None:
        require(self.steps > 0, f"steps={self.steps} must be at least 1")
        require(self.schedule in SCHEDULES, f"schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        require(0 <= self.warmup <= self.steps, f"warmup={self.warmup} must lie between 0 and steps={self.steps}")
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")


def train(
    model: nn.Module,
    data: Corpus | Split | Task,
    *,
    steps: int,
    batch_size: int = 16,
    time: int = 128,
    learning_rate: float = 3e-3,
    warmup: int | None = None,
    schedule: str = "cosine",
    floor: float = 0.1,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float | None = 1.0,
    seed: int = 0,
    packed: bool = False,
    precision: torch.dtype | None = None,
    evaluate_every: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool | None = None,
) -> History:
    """Minimise the cross-entropy of `model` on `data`, in place, on the device where the model is.

    data              a Corpus (its train split; its validation split is for evaluation), a Split, or a function of the
                      step that gives (inputs, targets), where inputs may be a tuple of the model's arguments
    warmup            steps of linear warm-up; None: a twentieth of all
    clip              the largest gradient norm; None: no clipping
    packed            documents don't see each other across their boundaries
    precision         dtype of the forward pass; None: see `automatic_precision`
    evaluate_every    steps between two evaluations; the last step is always evaluated when this is given
    checkpoint        a file to save to each `checkpoint_every` steps. A call that finds it continues from there, and
                      ends with the same weights, bit for bit, as a run that was never interrupted
    progress          a progress bar; None: where someone is watching

    AdamW is 1711.05101. Raises TrainingError when the loss or a gradient is no longer finite, or when the checkpoint
    can't be continued; ConfigError for impossible settings; CorpusError for too short a text.
    """
    device = next(model.parameters()).device
    dtype = precision or automatic_precision(device)
    warmup = steps // 20 if warmup is None else warmup
    settings = _Settings(
        steps, batch_size, time, learning_rate, warmup, schedule, floor, weight_decay, tuple(betas), clip, seed, packed,
        str(dtype),
    )  # fmt: skip
    settings.check()
    validation = data.validation if isinstance(data, Corpus) else None
    require(
        evaluate_every is None or validation is not None,
        "evaluate_every needs a Corpus: only a Corpus has a validation split",
    )
    draw = _drawer(data, settings)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    history, first = History(), 0
    if checkpoint is not None and Path(checkpoint).exists():
        history, first = _resume(Path(checkpoint), settings, model, optimizer, scaler)

    model.train()
    with _bar(steps, first, progress) as bar:
        for step in range(first, steps):
            rate = learning_rate_at(
                step, steps=steps, peak=learning_rate, warmup=warmup, schedule=schedule, floor=floor
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, auxiliary, norm = _step(model, draw(step), optimizer, scaler, dtype, clip, step)
            history.losses.append(loss)
            history.auxiliary_losses.append(auxiliary)
            history.learning_rates.append(rate)
            history.gradient_norms.append(norm)
            done = step + 1
            if evaluate_every and (done % evaluate_every == 0 or done == steps):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    score = evaluate(model, validation, batch_size=batch_size, time=time, packed=packed)
                history.evaluations.append((done, score))
            if checkpoint is not None and (done % checkpoint_every == 0 or done == steps):
                _save(Path(checkpoint), settings, model, optimizer, scaler, history, done)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
    model.eval()
    return history


def _drawer(data: Corpus | Split | Task, settings: _Settings) -> Task:
    if not isinstance(data, Corpus | Split):
        return data
    split = data.train if isinstance(data, Corpus) else data
    size, time, seed, packed = settings.batch_size, settings.time, settings.seed, settings.packed
    return lambda step: batch(split, size, time, seed=seed, step=step, packed=packed)


def _step(model, data, optimizer, scaler, dtype, clip, step) -> tuple[float, float, float]:
    """One update; returns the loss, the auxiliary loss and the norm of the gradient before clipping."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of(model, data)
        auxiliary = model.auxiliary_loss() if hasattr(model, "auxiliary_loss") else 0.0
    total = loss + auxiliary
    _require_finite("loss", total.item(), step, optimizer)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip).item()
    if not scaler.is_enabled():  # float16 overflows now and then: the scaler skips that step and lowers its scale
        _require_finite("gradient", norm, step, optimizer)
    scaler.step(optimizer)
    scaler.update()
    for module in model.modules():
        if hasattr(module, "after_step"):  # a mixture of experts moves its balancing bias here
            module.after_step()
    return loss.item(), torch.as_tensor(auxiliary).item(), norm


def _require_finite(what: str, value: float, step: int, optimizer) -> None:
    rate = optimizer.param_groups[0]["lr"]
    require(
        math.isfinite(value),
        f"the {what} is {value} at step {step} (learning rate {rate:.2g}): the model has diverged. Try a third of the "
        f"learning rate, a longer warm-up or clip=1.0, and start from fresh weights or from the last checkpoint",
        TrainingError,
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _save(path: Path, settings, model, optimizer, scaler, history, step) -> None:
    """Write everything that the rest of the run depends on; the rename makes the file appear whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "settings": asdict(settings), "step": step, "history": asdict(history), "model": model.state_dict(),
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _resume(path: Path, settings, model, optimizer, scaler) -> tuple[History, int]:
    remedy = f"delete {path} to start afresh, or give another checkpoint file"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["settings"]
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"the checkpoint {path} can't be read ({type(error).__name__}: {error}): {remedy}"
        ) from error
    wanted = asdict(settings)
    changed = [f"{k} was {found.get(k)!r}, is {v!r}" for k, v in wanted.items() if found.get(k) != v]
    require(
        not changed, f"the checkpoint {path} belongs to another run ({'; '.join(changed)}): {remedy}", TrainingError
    )
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise TrainingError(f"the checkpoint {path} belongs to another model: {error}. Either {remedy}") from error
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return History(**state["history"]), state["step"]


# --- progress ---------------------------------------------------------------------------------------------------------


def _watched() -> bool:
    """Whether a progress bar has a reader: a terminal or a notebook, but not a run whose output is compared."""
    if os.environ.get("LLMLIB_PROGRESS") is not None:
        return os.environ["LLMLIB_PROGRESS"] not in ("0", "off", "")
    if "CI" in os.environ or "PYTEST_CURRENT_TEST" in os.environ:
        return False
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def _bar(steps: int, first: int, progress: bool | None):
    from tqdm import tqdm

    shown = _watched() if progress is None else progress
    return tqdm(total=steps, initial=first, disable=not shown, leave=False, unit="step")
