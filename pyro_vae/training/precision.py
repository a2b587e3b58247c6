"""The precision that "auto" means, by a rule and not by a clock: a repeated run does the same."""

import torch
from torch import nn

from pyro_vae.compat import has_fast_bfloat16
from pyro_vae.pairs.pair import placement
from pyro_vae.training.settings import Precision

LEAST_WORK = 1e8
"""From this many multiplications for a step on, products in bfloat16 save more time than their
casts cost (docs/how-to/engine.md)."""


def chosen_precision(pair: nn.Module, batch_size: int) -> Precision:
    """Return bfloat16 if the processor multiplies in it and the networks are large enough.

    Each weight of a linear layer takes part in three products for each row: forward, and two
    backward. Layers that use a weight several times, such as convolutions, count once.

    >>> import pyro_vae as pv
    >>> chosen_precision(pv.VAE.mlp((4,)), batch_size=32)
    'float32'
    """
    device, dtype = placement(pair)
    weights = sum(p.numel() for p in pair.parameters() if p.requires_grad and p.dim() >= 2)
    large = 3 * batch_size * weights >= LEAST_WORK
    suits = device.type == "cpu" and has_fast_bfloat16() and dtype == torch.float32
    return "bfloat16" if large and suits else "float32"
