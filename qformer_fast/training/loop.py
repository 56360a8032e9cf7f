"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qformer_fast.data.batches import ImageTextDataset, ShuffledBatches, batch_loader
from qformer_fast.data.files import write_text
from qformer_fast.ranks import Ranks
from qformer_fast.training.checkpoint import list_checkpoints, load_checkpoint_state, save_checkpoint
from qformer_fast.training.config import OptimizerConfig, RunConfig
from qformer_fast.training.optimizer import build_optimizer, lr_at
from qformer_fast.training.profile import Interval, NoProfile, Profile
from qformer_fast.training.stages import AUTOCAST, Stage, autocast, build_stage

Entry = dict[str, float | int]


def resolve_device(name: str) -> torch.device:
    """A torch device; "auto" is a GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def train(
    model: nn.Module,
    dataset: ImageTextDataset,
    run: RunConfig,
    optimizer_config: OptimizerConfig | None = None,
    *,
    encoder: nn.Module | None = None,
    num_workers: int = 0,
    on_log: Callable[[Entry], None] | None = None,
) -> list[Entry]:
    """Trains ``model`` in place and writes log and checkpoints to ``run.output_dir``.

    The order of the data, the negatives and the dropout depend on ``run.seed`` and the step alone, so a run that was
    interrupted and resumed has the losses of one that was not (bit for bit on a CPU). SIGINT and SIGTERM end the run
    after the step at hand, with a checkpoint; a second one ends it at once. A step's losses are read while the next
    one runs.

    In a process group of several ranks each trains on its share of the batch, and rank 0 writes the files. Batches, and
    but for rounding the losses of a run without dropout and drawn negatives, do not depend on how many share them.

    Args:
        model (nn.Module): a :class:`Blip2QFormer`, :class:`Blip2OPT` or :class:`Blip2Joint`, moved to the device;
            trainable parameters are those that require grad.
        dataset (ImageTextDataset): with cached tokens, or with pixels: a :class:`PairDataset` for stage 1, otherwise a
            :class:`LanguageDataset`.
        run (RunConfig): length, precision, places.
        optimizer_config (OptimizerConfig, Optional): Default: `None`, the paper's.
        encoder (nn.Module, Optional): pixels to image tokens; needed when the dataset gives pixels. Moved to the
            device, and to the dtype of ``run.precision``.
        num_workers (int): threads that read a cache, or processes that read pictures. Default: 0.
        on_log (Callable, Optional): called with each entry as it is logged.

    Returns:
        list: the entries of ``log.jsonl``, earlier ones of a resumed run included: step (from 1), epoch (from 0, of the
        step's last batch), lr, loss, grad_norm (before clipping), samples_per_second; of stage 1 and of both stages
        also the losses that ``loss`` is the sum of, in-batch r1_i2t and r1_t2i, itm_accuracy and temp; with
        ``run.profile`` rank 0's shares of the time since the entry before, see
        :meth:`qformer_fast.training.profile.Interval.shares`. Losses and metrics are means over the step's forward
        passes and over the ranks; only rank 0 has entries.

    Raises:
        ValueError: checkpoints in ``output_dir`` but ``run.resume`` is False, or of a run with another seed or batch; a
            damaged checkpoint; TensorBoard asked for and not installed; CUDA graphs without a GPU or not of stage 1; a
            data set for another kind of model, or one that differs between the ranks. FloatingPointError: a loss or
            gradient that is NaN or Inf; names it and the step.
    """
    check_output_dir(run)
    optimizer_config = optimizer_config or OptimizerConfig()
    if (encoder is None) == (dataset.cache is None):
        raise ValueError("encoder must be given exactly when the dataset gives pixels instead of cached tokens")
    device = resolve_device(run.device)
    output_dir = Path(run.output_dir)
    ranks = Ranks.current()
    # hosts may have other files
    ranks.check_same("the checksum of dataset", dataset.digest)
    whole_batch = run.batch_size * ranks.world_size
    order = ShuffledBatches(len(dataset), whole_batch, seed=run.seed, rank=ranks.rank, world_size=ranks.world_size)
    torch.manual_seed(run.seed)
    model.to(device).train()
    if encoder is not None:
        encoder.to(device, AUTOCAST.get(run.precision))
    if run.gradient_checkpointing != "none":
        model.gradient_checkpointing_enable(run.gradient_checkpointing)
    optimizer = build_optimizer(model, optimizer_config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    stage = build_stage(model, dataset, run)
    scaler = torch.amp.GradScaler(device.type, enabled=stage.scales_loss)
    identity = dict(seed=run.seed, batch_size=whole_batch, accumulation=run.accumulation, pairs=len(dataset))
    identity |= {"trainable_parameters": sum(p.numel() for p in parameters), **stage.identity()}
    step = 0
    if checkpoints := list_checkpoints(output_dir):
        state = load_checkpoint_state(checkpoints[-1], model, optimizer, identity=identity)
        scaler.load_state_dict(state["scaler"])
        step = state["step"]
    order.start = step * run.accumulation
    output_dir.mkdir(parents=True, exist_ok=True)
    pin_memory = device.type == "cuda"

    def save(step: int) -> None:
        state = {"step": step, "identity": identity, "scaler": scaler.state_dict(), "run": dataclasses.asdict(run)}
        if ranks.first:
            save_checkpoint(output_dir, model, optimizer, state, keep=run.keep)
        ranks.wait()

    saved_at = step
    clock = _Clock(step, whole_batch * run.accumulation)
    to_device = _Copy(device)
    profile = Profile(device) if run.profile else NoProfile()
    if run.profile and not ranks.alone:
        stage.watch(profile)
    with (
        contextlib.closing(
            _Log(output_dir, after=step, tensorboard=run.tensorboard, on_log=on_log) if ranks.first else _NoLog()
        ) as log,
        contextlib.closing(batch_loader(dataset, order, num_workers=num_workers, pin_memory=pin_memory)) as loader,
        _stop_signals() as stopped,
        tqdm(total=run.steps, initial=step, unit="step", disable=None if ranks.first else True) as progress,
    ):
        metrics_reader = _MetricsReader(stage, log, progress, output_dir, check_norm=not scaler.is_enabled())
        # several ranks stop when all know that one of them is to
        while step < run.steps and not (stopped.is_set() if ranks.alone else metrics_reader.stopped):
            ranks.seed(run.seed, step)
            lr = lr_at(step, run.steps, optimizer_config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            metrics = torch.zeros(len(stage.metrics), device=device)
            share = scaler.scale(torch.full((), 1 / run.accumulation, device=device))
            for number in range(run.accumulation):
                with profile.part("data"):
                    batch = next(loader)
                    images = to_device(batch.images)
                with profile.part("encoder"):
                    images = _image_tokens(encoder, dataset.unpack(images), run.precision)
                with profile.part("qformer"):
                    found = stage.step(images, batch, share, last=number == run.accumulation - 1)
                metrics += found / run.accumulation
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            scalars = [model.get_parameter(name).detach() for name in stage.scalars]
            values = torch.cat([metrics, torch.stack([grad_norm, *scalars])])
            if not ranks.alone:
                values = ranks.mean(torch.cat([values, values.new_full((1,), float(stopped.is_set()))]))
            if not scaler.is_enabled():
                # fused AdamW leaves the weights alone where this is 1; with loss scaling the scaler sets it
                optimizer.found_inf = 1.0 - values.isfinite().all().float()
            if optimizer_config.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, optimizer_config.max_grad_norm, grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress.update()
            about = {"step": step, "epoch": (step * run.accumulation - 1) // order.per_epoch, "lr": lr}
            if logs := step % run.log_every == 0 or step == run.steps:
                about["samples_per_second"] = clock.rate(step)
            metrics_reader.push(values, about, profile.cut() if logs else None, logs=logs)
            if step % run.save_every == 0 or step == run.steps:
                metrics_reader.flush()
                save(step)
                saved_at = step
        metrics_reader.flush()
        if step < run.steps:
            if saved_at < step:
                save(step)
            progress.write(f"stopped at step {step} of {run.steps}; go on with run.resume=true and the same output_dir")
    return log.entries


def check_output_dir(run: RunConfig) -> None:
    """Refuses to write over a run that is not to be resumed.

    Raises:
        ValueError: a file at ``run.output_dir``; checkpoints in it but ``run.resume`` is False.
    """
    if Path(run.output_dir).is_file():
        raise ValueError(f"run.output_dir must be a folder, got {run.output_dir}, a file")
    if list_checkpoints(run.output_dir) and not run.resume:
        raise ValueError(
            f"run.output_dir has checkpoints in it ({run.output_dir}): set run.resume or choose another folder"
        )


def _image_tokens(encoder: nn.Module | None, images: Tensor, precision: str) -> Tensor:
    if encoder is None:
        return images.float() if precision == "fp32" else images
    with autocast(images.device, precision):
        return encoder(images)


class _Copy:
    """Images to the device; to a GPU in a stream of its own, beside the step that it is still at."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, images: Tensor) -> Tensor:
        if self._stream is None:
            return images.to(self._device)
        with torch.cuda.stream(self._stream):
            images = images.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        images.record_stream(current)
        return images


class _MetricsReader:
    """Reads a step's metrics once the next step is on its way, so that the host does not wait for the device.

    ``stopped`` says whether some rank was told to stop, as of the last step that was read.
    """

    def __init__(self, stage: Stage, log: _Log | _NoLog, progress: tqdm, output_dir: Path, *, check_norm: bool):
        self._log, self._progress, self._output_dir = log, progress, output_dir
        self._names = (*stage.metrics, "grad_norm", *stage.scalars)
        self._finite = (*stage.losses, "grad_norm") if check_norm else stage.losses
        self._shown = [name for name in (*stage.losses, "r1_i2t", "itm_accuracy") if name in self._names]
        self._pending: tuple[Tensor, torch.cuda.Event | None, Entry, Interval | None, bool] | None = None
        self.stopped = False

    def push(self, values: Tensor, about: Entry, interval: Interval | None, *, logs: bool) -> None:
        """Takes a step's metrics, gradient norm and scalars, and where the time went, and reads the step before."""
        self.flush()
        on_host, copied = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(values.device))
        self._pending = on_host, copied, about, interval, logs

    def flush(self) -> None:
        """Reads what was pushed last.

        Raises:
            FloatingPointError: a loss or the gradient norm is NaN or Inf.
        """
        if self._pending is None:
            return
        (values, copied, about, interval, logs), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        found = values.tolist()
        # several ranks add how many of them are to stop
        self.stopped = any(value > 0 for value in found[len(self._names) :])
        entry: Entry = dict(zip(self._names, found, strict=False))
        for name in self._finite:
            if not math.isfinite(entry[name]):
                last = list_checkpoints(self._output_dir)
                where = f"the last good checkpoint is {last[-1]}" if last else "no checkpoint was written yet"
                raise FloatingPointError(
                    f"{name} is {entry[name]} at step {about['step']}; it did not change the weights, {where}"
                )
        if logs:
            self._log.write(about | entry | (interval.shares() if interval is not None else {}))
            self._progress.set_postfix({name: f"{entry[name]:.3f}" for name in self._shown})


class _Log:
    """``log.jsonl``, and TensorBoard events where asked for."""

    def __init__(self, output_dir: Path, *, after: int, tensorboard: bool, on_log: Callable[[Entry], None] | None):
        self._on_log = on_log
        self._events = _event_writer(output_dir, purge_step=after + 1) if tensorboard else None
        path = output_dir / "log.jsonl"
        self.entries = [entry for entry in _read_entries(path) if entry["step"] <= after]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in entry.items():
                self._events.add_scalar(name, value, entry["step"])
        if self._on_log is not None:
            self._on_log(entry)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


class _NoLog:
    """Of ranks that write no files."""

    entries: ClassVar[list[Entry]] = []

    def write(self, entry: Entry) -> None:
        pass

    def close(self) -> None:
        pass


def _read_entries(path: Path) -> list[Entry]:
    """Entries up to the first line that a killed run left half-written."""
    entries: list[Entry] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _event_writer(output_dir: Path, *, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"run.tensorboard needs qformer_fast[tensorboard] installed: {error}") from error
    return SummaryWriter(output_dir, purge_step=purge_step)


class _Clock:
    """Samples a second since the last reading."""

    def __init__(self, step: int, samples_per_step: int):
        self._step, self._samples, self._time = step, samples_per_step, time.perf_counter()

    def rate(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self._step) * self._samples / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one does what it did before.

    Outside the main thread, where no handler can be put, nothing sets it.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    previous: dict[int, Any] = {}

    def stop(number: int, _frame: Any) -> None:
        stopped.set()
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, stop)
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
