"""Misclassified images found by evaluation.predict, in one process and in several."""
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from coatnet_train.evaluation import evaluator as evaluation


class Numbers(Dataset):
    """Images whose value is their index, all of label 0."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return torch.full((1, 2, 2), float(index)), 0, -1


class Wrong(torch.nn.Module):
    """Predicts label 1, with more confidence for higher indices; only index 3 is predicted correctly."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value = images[:, 0, 0, 0]
        return torch.stack([torch.where(value == 3, 50., 0.), 1 + value], 1)


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_every_misclassified_image_is_named_once_and_the_surest_come_first(monkeypatch, processes):
    """Each process reads its part of every batch of 4; images that pad the last batch are not counted twice."""
    batches = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9] if processes == 1 else [8, 9, 0, 1]]  # as accelerate pads
    part = 4 // processes
    gathered = []
    for process in range(processes):
        own = batches if processes == 1 else [batch[process * part:(process + 1) * part] for batch in batches]
        accelerator = SimpleNamespace(
            device='cpu', num_processes=processes, process_index=process, autocast=nullcontext,
            gather_for_metrics=lambda values: values)
        monkeypatch.setattr(evaluation, 'gather_object', lambda wrong: gathered.extend(wrong) or list(gathered))
        found = evaluation.predict(Wrong(), DataLoader(Numbers(), batch_sampler=own), accelerator, keep_wrong=6)
    if processes > 1:  # the result must not depend on the order of arrival
        random.Random(0).shuffle(gathered)
        monkeypatch.setattr(evaluation, 'gather_object', lambda wrong: list(gathered))
        found = evaluation.predict(Wrong(), DataLoader(Numbers(), batch_sampler=own), accelerator, keep_wrong=6)
    assert [item.index for item in found.wrong] == [9, 8, 7, 6, 5, 4]
    assert all(item.image.unique() == item.index and item[3:] == (0, 1) for item in found.wrong)
    confidence = [item.confidence for item in found.wrong]
    assert confidence == sorted(confidence, reverse=True) and confidence[0] > 0.99
