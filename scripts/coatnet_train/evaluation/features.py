"""Features of any timm model, and their evaluation by nearest neighbours and linear probe."""
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from coatnet_train.runtime.cli import ConfigError, one_line

__all__ = ['PooledFeatures', 'PyramidFeatures', 'knn_top1', 'linear_probe']

PROBE_STRENGTHS = tuple(10. ** power for power in range(-6, 3))  # C of the logistic regression


class PooledFeatures(nn.Module):
    """(B, 3, H, W) -> {'embedding': (B, C)}: the input of the classifier, without the hidden layer `pre_logits`.

    timm's heads NormMlpClassifierHead (CoAtNet, MaxViT, this zoo), its channels-last sibling and MambaOut's have a
    layer of this name between norm and classifier, VGG has one before the pooling; other models only lose the
    classifier. Norms are kept, unlike with `reset(..., reset_other=True)` of timm's heads.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        model.reset_classifier(0)  # first, because it reads pre_logits
        for module in (model, getattr(model, 'head', None)):
            if isinstance(getattr(module, 'pre_logits', None), nn.Module):
                module.pre_logits = nn.Identity()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {'embedding': self.model(images)}


class PyramidFeatures(nn.Module):
    """(B, 3, H, W) -> {'level_I': (B, C, h, w)}: the maps of timm's forward_intermediates, as with features_only=True.

    Args:
        model: Any model of timm; what comes after the last level is removed.
        out_indices: Levels to return, counted from the end if negative; the last five at most if not given.
    """

    def __init__(self, model: nn.Module, out_indices: tuple[int, ...] = ()):
        super().__init__()
        levels = model.prune_intermediate_layers(list(out_indices) or min(5, len(model.feature_info)))
        self.levels = sorted(set(levels))  # the order in which forward_intermediates returns them
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.model.forward_intermediates(images, indices=self.levels, intermediates_only=True)
        return {f'level_{level}': values for level, values in zip(self.levels, maps, strict=True)}


def knn_top1(train: torch.Tensor, train_labels: torch.Tensor, val: torch.Tensor, val_labels: torch.Tensor,
             k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 (%) of the k nearest neighbours: each votes for its class with exp(cosine similarity / temperature).

    As in DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294), after Wu et al. 2018
    (https://arxiv.org/abs/1805.01978).

    Args:
        train, val: Features (N, C) and (M, C), float32.
        train_labels, val_labels: (N,) and (M,), int64, from 0.
        k: Neighbours, at most N.
        temperature: Greater than 0.
    """
    train, classes, right = F.normalize(train), int(train_labels.max()) + 1, 0
    for features, labels in zip(F.normalize(val).split(256), val_labels.split(256), strict=True):
        similarity, nearest = (features @ train.T).topk(k)
        votes = torch.zeros(len(features), classes, device=train.device)
        votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(val)


def linear_probe(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray,
                 seed: int = 0) -> dict[str, float | bool]:
    """Logistic regression on standardised features: top-1 (%) on val, the chosen C, and whether the fit converged.

    C, the inverse strength of the L2 penalty, is the best of PROBE_STRENGTHS on a stratified fifth of train (at least
    one image of each class); the final fit uses all of train. Val is used for neither. Raises ConfigError where train
    has too few images or classes.

    Args:
        train, val: Features (N, C) and (M, C).
        train_labels, val_labels: (N,) and (M,).
        seed: Seed of that held-out fifth.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    max_iter = 1000
    held_out = max(math.ceil(0.2 * len(train_labels)), len(np.unique(train_labels)))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iter)),
        {'logisticregression__C': PROBE_STRENGTHS}, cv=StratifiedShuffleSplit(1, test_size=held_out, random_state=seed))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', ConvergenceWarning)  # reported as 'converged'
            search.fit(train, train_labels)
    except ValueError as error:
        raise ConfigError(f'--linear-probe needs more images or classes in --split: {one_line(error)}.') from error
    return {
        'top1': 100 * float(search.score(val, val_labels)), 'C': search.best_params_['logisticregression__C'],
        'held_out_top1': 100 * float(search.best_score_),
        'converged': bool(search.best_estimator_[-1].n_iter_.max() < max_iter)}
