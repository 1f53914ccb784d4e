"""The maths of block types L and D as functions without parameters.

Wu, Fan, Baevski, Dauphin, Auli: Pay Less Attention with Lightweight and Dynamic Convolutions (ICLR 2019),
https://arxiv.org/abs/1901.10430, carried over to two dimensions. Each operator has a folder of six files:

    api.py      public function: argument checks and choice of the backend
    naive.py    reference implementation, to be checked by eye against the formula
    eager.py    fast form in torch operators, for CPUs and wherever the kernels do not reach
    kernels.py  Triton kernels as operators of torch, from direct.py and, on tensor cores, from band.py

`dynamicconv2d_projected` is DynamicConv with the linear layer that predicts its logits: projected.py, projected_band.py
and projected_kernels.py in the folder of `dynamicconv2d`.
"""
from .dynamicconv2d.api import dynamicconv2d
from .dynamicconv2d.projected import dynamicconv2d_projected
from .lightconv2d.api import lightconv2d

__all__ = ['dynamicconv2d', 'dynamicconv2d_projected', 'lightconv2d']
