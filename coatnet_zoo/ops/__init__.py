"""LightConv and DynamicConv, the operators of block types L and D, as functions.

Wu, Fan, Baevski, Dauphin, Auli: Pay Less Attention with Lightweight and Dynamic Convolutions (ICLR 2019),
https://arxiv.org/abs/1901.10430, extended to two dimensions. Each operator has a folder with these files:

    api.py      public function: argument checks and choice of the backend
    naive.py    reference implementation, to be checked by eye against the formula
    eager.py    fast implementation in torch operators, for CPUs and where the Triton kernels cannot run
    kernels.py  Triton kernels registered as torch operators
    direct.py   Triton kernels without tensor cores, for all other layouts, dtypes and sizes
    band.py     Triton kernels on tensor cores, for 16-bit channels_last; LightConv also has toeplitz.py

`dynamicconv2d_projected` computes DynamicConv and the linear layer that predicts its logits. It has the files
projected.py, projected_kernels.py and projected_band.py in the folder of `dynamicconv2d`.
"""
from .dynamicconv2d.api import dynamicconv2d
from .dynamicconv2d.projected import dynamicconv2d_projected
from .lightconv2d.api import lightconv2d

__all__ = ['dynamicconv2d', 'dynamicconv2d_projected', 'lightconv2d']
