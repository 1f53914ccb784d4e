"""The training loop: steps, evaluation, and checkpoints from which a run resumes with identical results."""
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from safetensors.torch import load_file
from timm.scheduler import create_scheduler_v2
from timm.task.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch import nn
from torch.utils.data import DataLoader

from coatnet_train.data.dataset import check_labels, derive_seed
from coatnet_train.data.loader import EpochSampler, UnreadableImages
from coatnet_train.evaluation.evaluator import Predictions, predict
from coatnet_train.runtime.cli import Preempted
from coatnet_train.runtime.files import write_file
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.training.checkpoint import Progress, write_state
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.distillation import BatchMixup
from coatnet_train.training.fsdp import gather_training_state, gather_weights, restore_training_state
from coatnet_train.training.loaders import training_transform
from coatnet_train.training.run_dir import score_key, write_curves, write_metrics, write_weights
from coatnet_train.training.schedule import advice
from coatnet_train.training.task import set_trunk_to_eval

__all__ = ['Trainer']

CURVES_SECONDS = 60  # minimum time between two drawings of curves.png, as one takes as long as a short epoch


class Trainer:
    """One run, from `progress` to its last epoch.

    Args:
        settings: Settings of finetune.py.
        accelerator: What `create_accelerator` returned.
        task: Model, loss and averaged weights; its model is prepared by the accelerator.
        full_model: If that model is sharded (FSDP), a full copy to evaluate and release, else None.
        optimizer: Prepared by the accelerator.
        loaders: What `create_loaders` returned.
        data_config: Input size, normalisation and crop of the model.
        num_classes: Number of classes in the data.
        run_dir: Where weights, metrics and checkpoints go.
        resume_signature: Settings and digests that must be the same when the run is resumed.
        checkpoint: What `read_checkpoint` returned, to resume from; None starts at the first epoch.
    """

    def __init__(
            self, settings: FinetuneSettings, accelerator: Accelerator, task: TrainingTask,
            full_model: nn.Module | None, optimizer: AcceleratedOptimizer,
            loaders: tuple[DataLoader, DataLoader, EpochSampler | None], data_config: dict, num_classes: int,
            run_dir: Path, resume_signature: dict, checkpoint: dict | None = None) -> None:
        self.settings, self.accelerator, self.task, self.optimizer = settings, accelerator, task, optimizer
        self.train_loader, self.val_loader, self.sampler = loaders
        self.data_config, self.run_dir, self.resume_signature = data_config, run_dir, resume_signature
        self.is_main_process, self.device = accelerator.is_main_process, accelerator.device
        self.memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.sharded = full_model is not None
        self.eval_model = full_model if self.sharded else unwrap_model(task.get_eval_model(ema=settings.model_ema))
        self.last_epoch = settings.last_epoch or settings.epochs

        # an incomplete last group of --grad-accum-steps batches would weigh less than the others
        self.steps_per_epoch = len(self.train_loader) - len(self.train_loader) % settings.grad_accum_steps
        self.images_per_step = settings.batch_size * accelerator.num_processes
        images = len(self.train_loader.dataset)
        padded = self.sampler is not None and images <= self.images_per_step  # one batch, smaller than a full one
        self.images_per_epoch = images if padded else self.steps_per_epoch * self.images_per_step
        self.updates = settings.epochs * (self.steps_per_epoch // settings.grad_accum_steps)

        scale = optimizer.optimizer.defaults['lr'] / settings.lr  # of --lr-base-size
        self.scheduler, _ = create_scheduler_v2(
            optimizer.optimizer, 'cosine', num_epochs=settings.epochs, warmup_epochs=settings.warmup_epochs,
            min_lr=settings.min_lr * scale, warmup_lr=settings.warmup_lr * scale, step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch // settings.grad_accum_steps)
        self.num_classes, self.mixup = num_classes, None
        if settings.mixup or settings.cutmix:
            self.mixup = BatchMixup(
                settings.mixup, settings.cutmix, prob=settings.mixup_prob, switch_prob=settings.mixup_switch_prob,
                label_smoothing=settings.smoothing, num_classes=num_classes)

        self.progress = Progress()
        if checkpoint:
            self.restore(checkpoint)
        self.curves_drawn = time.monotonic()
        begun = min(self.progress.batch * self.images_per_step, self.images_per_epoch)
        self.bar = progress_bar(
            total=settings.epochs * self.images_per_epoch,
            initial=(self.progress.epoch - 1) * self.images_per_epoch + begun, unit='img',
            quiet=not self.is_main_process)
        self.log = self.bar.write if self.is_main_process else lambda _: None
        self.unreadable_train, self.unreadable_val = (
            UnreadableImages(loader.dataset.dataset, settings.max_bad_images, self.log, found)
            for loader, found in ((self.train_loader, self.progress.bad_train),
                                  (self.val_loader, self.progress.bad_val)))

    def restore(self, checkpoint: dict) -> None:
        """Load weights, optimizer, schedule and progress from a checkpoint."""
        if self.sharded:
            restore_training_state(self.task.trainable_module, self.optimizer.optimizer, checkpoint)
        else:
            self.task.load_checkpoint_state(checkpoint['state_dict'])
            self.optimizer.load_state_dict(checkpoint['optimizer'])
        if self.settings.model_ema:
            self.task.load_checkpoint_state(checkpoint['state_dict_ema'], ema=True)
        self.scheduler.load_state_dict(checkpoint['scheduler'])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint['scaler'])
        self.progress = Progress(**checkpoint['progress'])

    def save(self) -> None:
        """Write the checkpoint after all other files: if the process dies before, the work is repeated identically."""
        self.progress.bad_train = sorted(self.unreadable_train.found)
        self.progress.bad_val = sorted(self.unreadable_val.found)
        if self.sharded:
            state = gather_training_state(self.task.trainable_module, self.optimizer.optimizer)
        else:
            state = self.task.get_checkpoint_state() | {'optimizer': self.optimizer.state_dict()}
        if not self.is_main_process:
            return
        if self.settings.model_ema:
            state |= self.task.get_checkpoint_state(ema=True)
        scaler = self.accelerator.scaler
        state |= {'scheduler': self.scheduler.state_dict(),
                  'resume_signature': self.resume_signature, 'progress': asdict(self.progress),
                  'scaler': scaler.state_dict() if scaler else None}
        write_file(self.run_dir / 'last' / 'checkpoint.pt', partial(write_state, state))

    def run(self, summary_line: str) -> tuple[dict, Predictions]:
        """Train to the last epoch.

        Args:
            summary_line: Printed first.

        Returns:
            The row of the best epoch, and what its weights predict for the held-out images.

        Raises:
            Preempted: After a SIGTERM; everything is saved.
            FloatingPointError: A loss or gradient is not finite; the last checkpoint is from before that step.
        """
        self.log(summary_line)
        self.log_advice()
        with self.sigterm_at_next_update():
            while self.progress.epoch <= self.last_epoch and not self.out_of_patience():
                self.train_epoch()
                self.end_epoch()
            if self.is_main_process:
                write_curves(self.run_dir, self.progress.history)
            # read the released file back from disk, so that predictions and figures are those of the file
            self.eval_model.load_state_dict(load_file(self.run_dir / 'model.safetensors'))
            return max(self.progress.history, key=score_key), self.evaluate(keep_wrong=24)

    def log_advice(self) -> None:
        """Log how many images an epoch leaves out, and whether the run is too short."""
        settings, images = self.settings, len(self.train_loader.dataset)
        indexed = self.sampler is not None and not settings.class_balanced  # otherwise no fixed set of images
        for line in advice(images, self.images_per_epoch if indexed else images, self.updates, settings.batch_size,
                           self.accelerator.num_processes * settings.grad_accum_steps,
                           step=2 if settings.mixup or settings.cutmix else 1,
                           scheduled=settings.recipe == 'small_data'):
            self.log(line)

    @contextmanager
    def sigterm_at_next_update(self) -> Iterator[None]:
        """Defer SIGTERM to the next weight update; close the progress bar at the end."""
        previous = signal.signal(signal.SIGTERM, lambda *_: self.accelerator.set_trigger())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.bar.close()

    def train_epoch(self) -> None:
        """Train on the remaining batches of this epoch."""
        progress, settings = self.progress, self.settings
        if progress.batch == self.steps_per_epoch:
            return
        if settings.train_img_sizes:  # before the workers start
            stage = (progress.epoch - 1) * len(settings.train_img_sizes) // settings.epochs
            self.train_loader.dataset.transform = training_transform(
                settings, self.data_config, settings.train_img_sizes[stage])
        if self.mixup:
            self.mixup.mixup_enabled = not settings.mixup_off_epoch or progress.epoch <= settings.mixup_off_epoch
        self.bar.set_description(f'epoch {progress.epoch}/{settings.epochs}')
        self.task.train()
        if settings.freeze_trunk:
            set_trunk_to_eval(unwrap_model(self.task.trainable_module))
        begun = time.perf_counter()
        for images, targets, bad, *stored in self.remaining_batches():
            self.unreadable_train.add(self.accelerator.gather(bad.to(self.device)))
            self.train_step(images, targets, *stored)
            if not self.accelerator.sync_gradients:
                continue
            progress.updates += 1
            self.scheduler.step_update(progress.updates)
            self.task.update_ema(progress.updates)
            due = settings.recovery_interval and progress.updates % settings.recovery_interval == 0
            stop = self.accelerator.check_trigger()
            if stop or (due and progress.batch < self.steps_per_epoch):
                progress.epoch_seconds += time.perf_counter() - begun
                begun = time.perf_counter()
                self.save()
            if stop:
                raise Preempted(f'stopped by SIGTERM in epoch {progress.epoch}, saved after batch {progress.batch}')
        progress.epoch_seconds += time.perf_counter() - begun

    def remaining_batches(self) -> Iterator:
        if self.sampler is not None:
            self.sampler.epoch = self.progress.epoch
            self.sampler.start = self.progress.batch * self.images_per_step
            return islice(self.train_loader, self.steps_per_epoch - self.progress.batch)
        self.train_loader.dataset.epoch = self.progress.epoch
        self.train_loader.dataset.dataset.set_epoch(self.progress.epoch)
        return islice(self.train_loader, self.progress.batch, self.steps_per_epoch)

    def train_step(self, images: torch.Tensor, targets: torch.Tensor, *stored: torch.Tensor) -> None:
        """Compute loss and gradient of a batch, and update the weights after every --grad-accum-steps batches.

        Args:
            images: (B, C, H, W).
            targets: Labels (B,).
            stored: Stored teacher outputs for these images (--teacher-outputs).
        """
        progress, accelerator = self.progress, self.accelerator
        check_labels(targets, self.num_classes, min_label=0)
        images = images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        # all randomness of a step comes from (seed, epoch, batch), so a checkpoint needs no generator state
        random_seed(derive_seed(self.settings.seed, progress.epoch, progress.batch), accelerator.process_index)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        taught = ()
        if stored:
            stored = [column.to(self.device, non_blocking=True) for column in stored]
            taught = stored, (self.mixup.lam if self.mixup else 1.)
        with accelerator.accumulate(self.task.trainable_module):
            with accelerator.autocast():
                loss = self.task(images, targets, *taught)['loss']
            loss_value = accelerator.reduce(loss.detach().clone(), 'mean').item()
            self.check_finite(loss_value, 'training loss', progress.batch + 1)
            accelerator.backward(loss)
            if self.settings.clip_grad is not None and accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.task.get_clip_parameters(), self.settings.clip_grad)
                if not accelerator.scaler:  # a gradient scaler skips such a step itself
                    self.check_finite(float(norm), 'gradient norm of the training loss', progress.batch + 1)
            progress.lr = max(group['lr'] for group in self.optimizer.param_groups)
            self.optimizer.step()
            self.optimizer.zero_grad()
        count = len(images) * accelerator.num_processes
        progress.loss_sum += loss_value * count
        progress.batch += 1
        self.bar.set_postfix(loss=f'{loss_value:.3f}', refresh=False)
        self.bar.update(count)

    def end_epoch(self) -> None:
        """Evaluate the epoch if it is due, and save; raises Preempted after a SIGTERM."""
        progress, epoch = self.progress, self.progress.epoch
        progress.train_seconds += progress.epoch_seconds
        if epoch % self.settings.val_interval == 0 or epoch == self.last_epoch:
            self.score_epoch()
        progress.epoch, progress.batch, progress.loss_sum, progress.epoch_seconds = epoch + 1, 0, 0.0, 0.0
        self.save()
        if self.accelerator.check_trigger() and progress.epoch <= self.last_epoch:
            raise Preempted(f'stopped by SIGTERM, saved after epoch {epoch}')

    def score_epoch(self) -> None:
        """Evaluate, and write the metrics, their curves at intervals, and the weights if they are the best so far."""
        progress, epoch = self.progress, self.progress.epoch
        if self.sharded:
            gather_weights(self.task.trainable_module, self.eval_model)
        scores = self.evaluate().scores
        self.check_finite(scores['loss'], 'evaluation loss', progress.batch)
        speed = self.images_per_epoch / progress.epoch_seconds
        row = {'epoch': epoch, 'lr': progress.lr, 'train_loss': progress.loss_sum / self.images_per_epoch,
               'eval_loss': scores['loss'], 'eval_top1': scores['top1'], 'eval_top5': scores['top5'],
               'images_per_second': speed}
        progress.history.append(row)
        best = max(progress.history, key=score_key)
        self.log(f'epoch {epoch:>3}/{self.settings.epochs}  lr {progress.lr:.2e}  training loss '
                 f'{row["train_loss"]:.4f}  held out: loss {scores["loss"]:.4f}  top-1 {scores["top1"]:.2f} %  top-5 '
                 f'{scores["top5"]:.2f} %  {speed:.0f} images/s{"  best" if best is row else ""}')
        if self.settings.tracker:
            self.accelerator.log(row, step=epoch)
        if self.is_main_process:
            if best is row:
                write_weights(self.run_dir / 'model.safetensors', self.eval_model.state_dict())
            write_metrics(self.run_dir, progress.history)
            if time.monotonic() - self.curves_drawn >= CURVES_SECONDS:
                write_curves(self.run_dir, progress.history)
                self.curves_drawn = time.monotonic()

    def evaluate(self, keep_wrong: int = 0) -> Predictions:
        for buffer in self.eval_model.buffers() if self.accelerator.num_processes > 1 else ():
            broadcast(buffer)  # evaluate the buffers of the main process, which it releases
        # the unwrapped model: DDP would wait for a process that has fewer batches
        return predict(self.eval_model, self.val_loader, self.accelerator, on_batch=self.unreadable_val.add,
                       keep_wrong=keep_wrong)

    def check_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            saved = self.run_dir / 'last' / 'checkpoint.pt'
            raise FloatingPointError(
                f'{what} is {value} at step {(self.progress.epoch - 1) * self.steps_per_epoch + step} '
                f'(epoch {self.progress.epoch}): start another --experiment with a lower --lr; '
                f'the last good checkpoint is {saved if saved.exists() else "none, no epoch was finished"}.')

    def out_of_patience(self) -> bool:
        """Whether --patience epochs have passed since the best one."""
        history = self.progress.history
        return bool(self.settings.patience and history and
                    history[-1]['epoch'] - max(history, key=score_key)['epoch'] >= self.settings.patience)
