"""The latest outputs of some of a model's modules, for losses on what happens inside of it."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn


class Outputs(dict[Hashable, torch.Tensor | tuple]):
    """What each watched module returned in the last forward pass, by the key given to `watch`."""

    def watch(self, key: Hashable, module: nn.Module) -> None:
        """Keep the outputs of `module` from now on."""

        def keep(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            self[key] = output

        module.register_forward_hook(keep)
