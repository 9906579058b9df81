"""The training loop: steps, epochs, measurements, checkpoints."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.dataset import Split
from ..data.loader import Batches
from ..data.quality import Quality
from ..data.split import take
from ..quality_agnostic import QualityAgnostic
from ..runs.checkpoint import CheckpointStore, check_state
from ..runs.config import TrainConfig
from ..runs.errors import CheckpointError, Interrupted, NonFiniteError, as_usage_error
from ..runs.folder import AT_QUALITY, CHECKPOINTS
from . import non_finite
from .distributed import Processes
from .evaluation import predict
from .interruption import Interruption
from .optimization import WaysWarmup, build_optimizer, build_schedule, go_on
from .preparation import Material, build_objective
from .progress import Observer
from .records import Records
from .state import EpochSums, TrainingState

PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loop:
    """Trains ``network`` on ``material``, from the beginning or from a checkpoint.

    Args:
        records: of the run folder; None writes neither tables nor checkpoints.

    Attributes:
        state: where the run stands.
        last_batch: images and labels of the latest step; None before the first.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        material: Material,
        network: nn.Module,
        records: Records | None,
        observer: Observer,
    ) -> None:
        self.config, self.processes, self.material = config, processes, material
        self.records, self.observer = records, observer
        device = processes.device
        network = network.to(device)
        if not network.training:  # otherwise parts in eval mode are frozen and stay so
            network.train()
        if config.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if processes.world > 1 and device.type == "cuda":  # on CPUs PyTorch has no such layer
            # Before the objective hooks onto its layers, for some of them are replaced.
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        objective = build_objective(config, network, material, processes)
        trained = torch.compile(objective) if config.compile else objective
        self.parallel = processes.wrap(cast(nn.Module, trained))
        self.loader = material.train_loader(config, processes)
        self.steps_per_epoch = math.ceil(len(self.loader) / config.accumulate)
        optimizer = build_optimizer(objective, config)
        averaged = None
        if config.ema is not None:
            averaged = AveragedModel(
                cast(nn.Module, objective.model),
                multi_avg_fn=get_ema_multi_avg_fn(config.ema),
                use_buffers=True,
            )
        self.state = TrainingState(
            objective=objective,
            optimizer=optimizer,
            schedule=build_schedule(optimizer, config, self.steps_per_epoch),
            scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
            averaged=averaged,
        )
        self._ways_warmup = WaysWarmup(
            objective, round(config.ways_warmup_epochs * self.steps_per_epoch)
        )
        self.store = None
        if config.run_dir is not None:
            check_state(objective.state_dict())
            self.store = CheckpointStore(config.run_dir / CHECKPOINTS, config.keep)
        self.last_batch: tuple[Tensor, Tensor] | None = None
        self._meant = frozenset(non_finite.not_finite(objective))
        self._meant_averaged = frozenset(non_finite.not_finite(self.plain))
        self._save_steps, self._save_seconds = _interval(config.checkpoint_every)
        self._saved = time.monotonic()

    @property
    def plain(self) -> nn.Module:
        """The network without its objective."""
        return cast(nn.Module, self.state.objective.model)

    @property
    def measured(self) -> nn.Module:
        """The network that is measured and handed out: the averaged one, if there is one."""
        return self.plain if self.state.averaged is None else self.state.averaged.module

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def resume(self) -> bool:
        """Go on from the newest good checkpoint, if the run should and there is one.

        Raises:
            CheckpointError: there are some, and none can be read.
        """
        store, processes, state = self.store, self.processes, self.state
        if store is None or self.config.resume != "auto":
            return False
        stored = processes.on_first(lambda: store.load_newest(self.observer.said))
        if stored is None:
            return False
        if not all(map(torch.equal, stored["labels"], self._labels())):
            raise CheckpointError(
                f"{store.folder}: its checkpoints are of other training labels; the data set has "
                "changed since"
            )
        try:
            same = state.load_state_dict(stored, processes)
        except (KeyError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[-1].strip()
            raise CheckpointError(
                f"{store.folder}: its checkpoints don't fit this network and objective ({reason})"
            ) from error
        if not same:
            self.observer.said(
                "another device or number of processes than before: random numbers will differ "
                "from those of an uninterrupted run"
            )
        before = stored["config"]["epochs"]
        if before != self.config.epochs:
            with as_usage_error(ValueError):
                rate = go_on(state.optimizer, state.schedule)
            self.observer.said(
                f"{self.config.epochs} epochs instead of {before}: the learning rate goes on as "
                f"that of {self.config.epochs}, at {rate:.4g}"
            )
        self.observer.said(
            f"resumed after step {state.step} of {self.steps}, in epoch "
            f"{min(state.epoch + 1, self.config.epochs)} of {self.config.epochs}"
        )
        return True

    def train(self, interruption: Interruption) -> None:
        """Take all steps that are left.

        Raises:
            NonFiniteError, DiskFullError, Interrupted: see ``Trainer.fit``.
        """
        state, accumulate = self.state, self.config.accumulate
        self.observer.started(state.step, self.steps)
        while state.epoch < self.config.epochs:
            # None, after the epoch's last step, which may have been on fewer batches.
            batches = self.loader.epoch(state.epoch, state.step_in_epoch * accumulate)
            while state.step_in_epoch < self.steps_per_epoch:
                self._step(list(self._timed(batches, accumulate)))
                self._heed(interruption)
            self._finish_epoch()
        self.processes.settle()

    def forward_backward(
        self, objective: nn.Module, images: Tensor, labels: Tensor, share: float = 1.0
    ) -> dict[str, Tensor]:
        """Add the gradients of ``share`` times the loss; the loss and its terms, detached."""
        images = self._laid_out(images)
        with self._autocast():
            output = objective(images, labels)
        values = {"loss": output.loss.detach(), **output.terms}
        if images.device.type == "cpu" and not values["loss"].isfinite():
            # Before it spoils the weights; on a GPU, looking at every step would cost time.
            self._fail({name: float(value) for name, value in values.items()}, images)
        self.state.scaler.scale(output.loss * share).backward()
        return values

    def _step(self, group: list[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step, on as many batches as are accumulated."""
        state, start = self.state, time.perf_counter()
        lr = state.optimizer.param_groups[0]["lr"]
        self._ways_warmup.before(state.step)
        state.optimizer.zero_grad(set_to_none=True)
        logged = (state.step + 1) % self.config.log_every == 0 or state.step == 0
        own = EpochSums()
        if self.config.awp is None:
            found = list(self._gradients(group))
        else:
            objective = cast(QualityAgnostic, state.objective)
            with objective.perturbed(self.config.awp) as perturbation:
                found = list(self._gradients(group))
                perturbation.move()
                for _ in self._gradients(group):
                    pass
        for values in found:
            if logged:
                own.add(values)
            state.sums.add(values)
            state.latest.update(values)
        self.last_batch = group[-1]
        if self.config.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            clip_grad_norm_(
                [p for g in state.optimizer.param_groups for p in g["params"]],
                self.config.clip_norm,
            )
        state.scaler.step(state.optimizer)
        state.scaler.update()
        with warnings.catch_warnings():
            # In half precision the first steps may be left out, until the scale fits.
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
            state.schedule.step()
        if state.averaged is not None:
            state.averaged.update_parameters(self.plain)
            self._take_over(state.averaged.module)
        state.step += 1
        state.step_in_epoch += 1
        known = None
        if logged:
            # Of a way whose turn it wasn't, what was seen last.
            seen = {name for names in own.totals for name in names}
            if unseen := {n: value for n, value in state.latest.items() if n not in seen}:
                own.add(unseen)
            known = self._read(own)
            if self.records is not None and self.processes.first:
                row = {"step": state.step, "epoch": state.epoch + 1, **known, "lr": lr}
                self.records.step(row)
        sums = state.sums
        sums.seconds += time.perf_counter() - start
        if known is not None:
            known["images_per_second"] = self._images(sums.batches) / sums.seconds
            known["data_share"] = sums.data_seconds / sums.seconds
        self.observer.stepped(known)

    @torch.no_grad()
    def _take_over(self, averaged: nn.Module) -> None:
        """What isn't meant to be finite has no average: -inf less -inf is NaN."""
        if self._meant_averaged:
            values, current = averaged.state_dict(), self.plain.state_dict()
            for name in self._meant_averaged:
                values[name].copy_(current[name])

    def _gradients(self, group: list[tuple[Tensor, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Add up the gradients of the batches that one step accumulates; the values of each."""
        for i, (images, labels) in enumerate(group):
            with contextlib.ExitStack() as stack:
                if i + 1 < len(group) and self.processes.world > 1:
                    stack.enter_context(self.parallel.no_sync())  # type: ignore[operator]
                values = self.forward_backward(self.parallel, images, labels, 1 / len(group))
            yield values

    def _timed(self, batches: Batches, count: int) -> Batches:
        """The next ``count`` batches, the time it takes to get them added up."""
        sums, start = self.state.sums, time.perf_counter()
        for batch in islice(batches, count):
            waited = time.perf_counter() - start
            sums.data_seconds += waited
            sums.seconds += waited
            yield batch
            start = time.perf_counter()

    def _heed(self, interruption: Interruption) -> None:
        """Save if it is time, and stop if a signal came, to this process or another."""
        due = time.monotonic() - self._saved >= self._save_seconds
        if due:
            self._saved = time.monotonic()
        stop, save = self.processes.agree(interruption.signal, int(due))
        state = self.state
        if state.step_in_epoch < self.steps_per_epoch:  # or the end of the epoch will save
            save = save or state.step % self._save_steps == 0
        if stop or save:
            self._save()
        if stop:
            kept = "nothing is saved" if self.store is None else f"saved in {self.store.folder}"
            raise Interrupted(stop, f"stopped after step {state.step} of {self.steps}, {kept}")

    def _finish_epoch(self) -> None:
        """Measure if it is due, complete the epoch's row, save."""
        state, start = self.state, time.perf_counter()
        if self.processes.device.type != "cpu":
            torch.accelerator.synchronize(self.processes.device)
        sums = state.sums
        sums.seconds += time.perf_counter() - start
        means = self._read(sums)
        self.processes.agree_on_buffers(self.measured)
        measured, memorised = dict[str, float](), dict[str, float]()
        epoch, epochs = state.epoch + 1, self.config.epochs
        if epoch % self.config.evaluate_every == 0 or epoch == epochs:
            memorised = self._memorised()
            measured = {**self._measure(), "train_accuracy": memorised.pop("train_accuracy")}
        row: dict[str, float] = {
            "epoch": epoch,
            "train_loss": means.pop("loss"),
            **measured,
            "seconds": sums.seconds,
            "images_per_second": self._images(sums.batches) / sums.seconds,
            "data_seconds": sums.data_seconds,
            "lr": state.optimizer.param_groups[0]["lr"],
            **means,
            **memorised,
        }
        before = [r["test_accuracy"] for r in state.rows if "test_accuracy" in r]
        best = "test_accuracy" in row and row["test_accuracy"] > max(before, default=-1.0)
        state.rows.append(row)
        state.epoch, state.step_in_epoch, state.sums = epoch, 0, EpochSums()
        self._save(best=best)
        if self.records is not None and self.processes.first:
            self.records.metrics(state.rows, state.step)
        self.observer.epoch_finished(row, epochs)

    def _measure(self) -> dict[str, float]:
        """Loss and accuracy on the test images, or on those held out in their place; with
        qualities their means, and the accuracy at each."""
        test, qualities = self.material.test, self.config.measured_on
        losses, accuracies = [], []
        for quality in qualities or (None,):
            predicted, loss = self._predict(test, quality)
            losses.append(loss / len(test))
            accuracies.append(_share(predicted == test.labels))
        names = [f"{AT_QUALITY}{quality.name}" for quality in qualities]
        return {
            "test_loss": statistics.fmean(losses),
            "test_accuracy": statistics.fmean(accuracies),
            **dict(zip(names, accuracies, strict=False)),
        }

    def _memorised(self) -> dict[str, float]:
        """How many of the labels trained on are predicted, and how many of the wrong ones."""
        material = self.material
        some = take(material.train, material.measured)
        learnt = self._predict(some)[0] == some.labels
        result = {"train_accuracy": _share(learnt)}
        if material.noisy:
            wrong = some.labels != material.true_labels[material.measured]
            result["fit_noisy"] = _share(learnt[wrong])
        return result

    def _predict(self, split: Split, quality: Quality | None = None) -> tuple[Tensor, float]:
        """Predictions (N,) on the CPU for a whole split, and its summed cross entropy."""
        batches = self.material.test_loader(split, self.config, self.processes, quality)
        laid_out = ((self._laid_out(images), labels) for images, labels in batches)
        predictions, loss = predict(self.measured, laid_out, self._autocast())
        everyones = self.processes.gather(predictions.cpu())
        return torch.cat(everyones), self.processes.sum(loss.to(self.processes.device)).item()

    def _save(self, *, best: bool = False) -> None:
        """Write a checkpoint, unless what it would hold is spoilt."""
        self._saved = time.monotonic()
        store, records, state = self.store, self.records, self.state
        if store is None:
            return
        if state.sums.batches:
            self._read(state.sums)
        looked_at = [("weights", state.objective, self._meant)]
        if state.averaged is not None:
            looked_at.append(("averaged weights", state.averaged.module, self._meant_averaged))
        for what, module, meant in looked_at:
            if (name := non_finite.spoilt(module, meant)) is not None:
                raise NonFiniteError(
                    f"after step {state.step} the {what} {name} are not finite"
                    f"{self._saved_before()}"
                )
        content = {
            **state.state_dict(self.processes),
            "config": self.config.as_json(),
            "labels": self._labels(),
        }

        def write() -> None:
            if records is not None:
                records.sync()
            store.save(state.step, content, best=best)

        self.processes.on_first(write)

    def _labels(self) -> list[Tensor]:
        """The labels trained on, and where some are wrong the true ones too."""
        material = self.material
        labels = [material.train.labels] + [material.true_labels] * material.noisy
        return [x.to(torch.int16) for x in labels]

    def _read(self, sums: EpochSums) -> dict[str, float]:
        """The means of ``sums`` over all processes, if they are numbers.

        Raises:
            NonFiniteError: they aren't.
        """
        values = sums.means(self.processes)
        if not all(map(math.isfinite, values.values())):
            assert self.last_batch is not None
            self._fail(values, self._laid_out(self.last_batch[0]))
        return values

    def _fail(self, values: Mapping[str, float], images: Tensor) -> NoReturn:
        if self.config.trained_on:
            images = images.flatten(0, 1)
        reason = non_finite.describe(self.state.objective, images, values, self._meant)
        raise NonFiniteError(f"step {self.state.step + 1}: {reason}{self._saved_before()}")

    def _saved_before(self) -> str:
        any_saved = self.store is not None and self.store.paths()
        return "; the checkpoints there are were saved before" if any_saved else ""

    def _images(self, batches: int) -> int:
        """Images in ``batches`` batches of all processes."""
        return batches * min(self.config.batch_size, len(self.material.train))

    def _laid_out(self, images: Tensor) -> Tensor:
        if not self.config.channels_last:
            return images
        batch = images.flatten(0, -4)  # the views too
        return batch.contiguous(memory_format=torch.channels_last).view(images.shape)

    def _autocast(self) -> torch.autocast:
        amp = self.config.amp
        return torch.autocast(
            self.processes.device.type, dtype=PRECISIONS[amp], enabled=amp != "off"
        )


def _interval(text: str) -> tuple[int, float]:
    """Steps and seconds between checkpoints; the one that isn't given is out of reach."""
    if text.endswith("m"):
        return 1 << 62, 60 * float(text[:-1])
    return int(text), math.inf


def _share(hits: Tensor) -> float:
    return hits.double().mean().item() if len(hits) else 0.0
