"""The loop of finetune.py: epochs of steps, evaluation, and a checkpoint from which either goes on bit for bit."""
import json
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
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from timm.task.task import TrainingTask
from timm.utils import random_seed, unwrap_model
from torch import nn
from torch.utils.data import DataLoader

from coatnet_train.data.dataset import check_labels, seed_of
from coatnet_train.data.loader import BadPictures, EpochSampler
from coatnet_train.evaluation.evaluator import Predictions, predict
from coatnet_train.runtime.cli import Preempted
from coatnet_train.runtime.files import write_file
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.training.checkpoint import Progress, write_state
from coatnet_train.training.config import Settings
from coatnet_train.training.fsdp import copy_weights, restore_training_state, training_state
from coatnet_train.training.loaders import training_transform
from coatnet_train.training.run_dir import rank, write_metrics, write_weights
from coatnet_train.training.schedule import advice
from coatnet_train.training.task import set_trunk_to_eval

__all__ = ['Trainer']


class Trainer:
    """One run, on its way from `progress` to its last epoch.

    Args:
        settings: Of finetune.py.
        accelerator: Of `processes.start`.
        task: Model, loss and average of the weights; its model is prepared by the accelerator.
        whole_model: Where that model is sharded (FSDP), a whole copy to evaluate and release.
        optimizer: Prepared by the accelerator.
        loaders: What `loaders.create_loaders` returned.
        data_config: How pictures are made ready for the model.
        num_classes: Of the data.
        run_dir: Where weights, metrics and checkpoints go.
        facts: What must be the same when the run is resumed.
    """

    def __init__(
            self, settings: Settings, accelerator: Accelerator, task: TrainingTask,
            whole_model: nn.Module | None, optimizer: AcceleratedOptimizer,
            loaders: tuple[DataLoader, DataLoader, EpochSampler | None], data_config: dict, num_classes: int,
            run_dir: Path, facts: dict) -> None:
        self.settings, self.accelerator, self.task, self.optimizer = settings, accelerator, task, optimizer
        self.train_loader, self.val_loader, self.sampler = loaders
        self.data_config, self.run_dir, self.facts = data_config, run_dir, facts
        self.writes, self.device = accelerator.is_main_process, accelerator.device
        self.memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.sharded = whole_model is not None
        self.eval_model = whole_model if self.sharded else unwrap_model(task.get_eval_model(ema=settings.model_ema))
        self.progress = Progress()
        self.last_epoch = settings.last_epoch or settings.epochs

        # A last group of batches that is not whole would weigh less than the others.
        self.steps_per_epoch = len(self.train_loader) - len(self.train_loader) % settings.grad_accum_steps
        self.pictures_per_step = settings.batch_size * accelerator.num_processes
        pictures = len(self.train_loader.dataset)
        padded = self.sampler is not None and pictures <= self.pictures_per_step  # one batch, smaller than a full one
        self.pictures_per_epoch = pictures if padded else self.steps_per_epoch * self.pictures_per_step
        self.updates = settings.epochs * (self.steps_per_epoch // settings.grad_accum_steps)

        scale = optimizer.optimizer.defaults['lr'] / settings.lr  # of --lr-base-size
        self.scheduler, _ = create_scheduler_v2(
            optimizer.optimizer, 'cosine', num_epochs=settings.epochs, warmup_epochs=settings.warmup_epochs,
            min_lr=settings.min_lr * scale, warmup_lr=settings.warmup_lr * scale, step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch // settings.grad_accum_steps)
        self.num_classes, self.mixup = num_classes, None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, prob=settings.mixup_prob, switch_prob=settings.mixup_switch_prob,
                label_smoothing=settings.smoothing, num_classes=num_classes)

    def restore(self, checkpoint: dict) -> None:
        """Go on from what `read_checkpoint` returned."""
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
        """Written last of all: whatever is killed before it is done again, with the same result."""
        self.progress.bad_train, self.progress.bad_val = sorted(self.bad_train.found), sorted(self.bad_val.found)
        if self.sharded:
            state = training_state(self.task.trainable_module, self.optimizer.optimizer)
        else:
            state = self.task.get_checkpoint_state() | {'optimizer': self.optimizer.state_dict()}
        if not self.writes:
            return
        if self.settings.model_ema:
            state |= self.task.get_checkpoint_state(ema=True)
        scaler = self.accelerator.scaler
        state |= {'scheduler': self.scheduler.state_dict(),
                  'facts': json.loads(json.dumps(self.facts)), 'scaler': scaler.state_dict() if scaler else None,
                  'progress': asdict(self.progress)}
        write_file(self.run_dir / 'last' / 'checkpoint.pt', partial(write_state, state))

    def run(self, headline: str) -> tuple[dict, Predictions]:
        """Train to the end.

        Args:
            headline: Printed first.

        Returns:
            The row of the best epoch, and what its weights predict for the held-out pictures.

        Raises:
            Preempted: After a SIGTERM; everything is saved.
            FloatingPointError: A loss or gradient is not finite; the last checkpoint was saved before.
        """
        with self.reporting(headline):
            while self.progress.epoch <= self.last_epoch and not self.out_of_patience():
                self.train_epoch()
                self.end_epoch()
            # The released file once more, from disk: the pictures show what it does.
            self.eval_model.load_state_dict(load_file(self.run_dir / 'model.safetensors'))
            return max(self.progress.history, key=rank), self.evaluate(keep_wrong=24)

    @contextmanager
    def reporting(self, headline: str) -> Iterator[None]:
        """With a progress bar, a count of unreadable pictures, and SIGTERM waiting for the next update."""
        begun = min(self.progress.batch * self.pictures_per_step, self.pictures_per_epoch)
        self.bar = progress_bar(
            total=self.settings.epochs * self.pictures_per_epoch,
            initial=(self.progress.epoch - 1) * self.pictures_per_epoch + begun, unit='img', quiet=not self.writes)
        self.say = self.bar.write if self.writes else lambda _: None
        self.say(headline)
        settings, images = self.settings, len(self.train_loader.dataset)
        indexed = self.sampler is not None and not settings.class_balanced  # others draw as they like
        for line in advice(images, self.pictures_per_epoch if indexed else images, self.updates, settings.batch_size,
                           self.accelerator.num_processes * settings.grad_accum_steps,
                           step=2 if settings.mixup or settings.cutmix else 1,
                           scheduled=settings.recipe == 'small_data'):
            self.say(line)
        bad = self.progress.bad_train, self.progress.bad_val
        self.bad_train, self.bad_val = (
            BadPictures(loader.dataset.dataset, self.settings.max_bad_images, self.say)
            for loader in (self.train_loader, self.val_loader))
        self.bad_train.found, self.bad_val.found = map(set, bad)
        previous = signal.signal(signal.SIGTERM, lambda *_: self.accelerator.set_trigger())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.bar.close()

    def train_epoch(self) -> None:
        """The batches of this epoch that are left."""
        progress, settings = self.progress, self.settings
        if progress.batch == self.steps_per_epoch:
            return
        if settings.train_img_sizes:  # before the workers start
            share = (progress.epoch - 1) * len(settings.train_img_sizes) // settings.epochs
            self.train_loader.dataset.transform = training_transform(
                settings, self.data_config, settings.train_img_sizes[share])
        if self.mixup:
            self.mixup.mixup_enabled = not settings.mixup_off_epoch or progress.epoch <= settings.mixup_off_epoch
        self.bar.set_description(f'epoch {progress.epoch}/{settings.epochs}')
        self.task.train()
        if settings.freeze_trunk:
            set_trunk_to_eval(unwrap_model(self.task.trainable_module))
        begun = time.perf_counter()
        for images, targets, bad in self.batches_left():
            self.bad_train.add(self.accelerator.gather(bad.to(self.device)))
            self.train_step(images, targets)
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

    def batches_left(self) -> Iterator:
        if self.sampler is not None:
            self.sampler.epoch = self.progress.epoch
            self.sampler.start = self.progress.batch * self.pictures_per_step
            return islice(self.train_loader, self.steps_per_epoch - self.progress.batch)
        self.train_loader.dataset.epoch = self.progress.epoch
        self.train_loader.dataset.dataset.set_epoch(self.progress.epoch)
        return islice(self.train_loader, self.progress.batch, self.steps_per_epoch)

    def train_step(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        """Loss and gradient of a batch, and the update of the weights once --grad-accum-steps are together."""
        progress, accelerator = self.progress, self.accelerator
        check_labels(targets, self.num_classes, least=0)
        images = images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        # All randomness of a step comes from (seed, epoch, batch): nothing to save but where we are.
        random_seed(seed_of(self.settings.seed, progress.epoch, progress.batch), accelerator.process_index)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        with accelerator.accumulate(self.task.trainable_module):
            with accelerator.autocast():
                loss = self.task(images, targets)['loss']
            loss_value = accelerator.reduce(loss.detach().clone(), 'mean').item()
            self.check_finite(loss_value, 'training loss', progress.batch + 1)
            accelerator.backward(loss)
            if self.settings.clip_grad is not None and accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.task.get_clip_parameters(), self.settings.clip_grad)
                if not accelerator.scaler:  # which would leave this step out
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
        """Evaluate if it is due, and save."""
        progress, epoch = self.progress, self.progress.epoch
        progress.train_seconds += progress.epoch_seconds
        if epoch % self.settings.val_interval == 0 or epoch == self.last_epoch:
            self.score_epoch()
        progress.epoch, progress.batch, progress.loss_sum, progress.epoch_seconds = epoch + 1, 0, 0.0, 0.0
        self.save()
        if self.accelerator.check_trigger() and progress.epoch <= self.last_epoch:
            raise Preempted(f'stopped by SIGTERM, saved after epoch {epoch}')

    def score_epoch(self) -> None:
        """Evaluate, and write the metrics and, if they are the best, the weights."""
        progress, epoch = self.progress, self.progress.epoch
        if self.sharded:
            copy_weights(self.task.trainable_module, self.eval_model)
        scores = self.evaluate().scores
        self.check_finite(scores['loss'], 'evaluation loss', progress.batch)
        speed = self.pictures_per_epoch / progress.epoch_seconds
        row = {'epoch': epoch, 'lr': progress.lr, 'train_loss': progress.loss_sum / self.pictures_per_epoch,
               'eval_loss': scores['loss'], 'eval_top1': scores['top1'], 'eval_top5': scores['top5'],
               'images_per_second': speed}
        progress.history.append(row)
        best = max(progress.history, key=rank)
        self.say(f'epoch {epoch:>3}/{self.settings.epochs}  lr {progress.lr:.2e}  training loss '
                 f'{row["train_loss"]:.4f}  held out: loss {scores["loss"]:.4f}  top-1 {scores["top1"]:.2f} %  top-5 '
                 f'{scores["top5"]:.2f} %  {speed:.0f} images/s{"  best" if best is row else ""}')
        if self.settings.tracker:
            self.accelerator.log(row, step=epoch)
        if self.writes:
            if best is row:
                write_weights(self.run_dir / 'model.safetensors', self.eval_model.state_dict())
            write_metrics(self.run_dir, progress.history)

    def evaluate(self, keep_wrong: int = 0) -> Predictions:
        for buffer in self.eval_model.buffers() if self.accelerator.num_processes > 1 else ():
            broadcast(buffer)  # what the first process releases
        # the bare model: DDP would wait for a process that has fewer batches
        return predict(self.eval_model, self.val_loader, self.accelerator, on_batch=self.bad_val.add,
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
                    history[-1]['epoch'] - max(history, key=rank)['epoch'] >= self.settings.patience)
