"""The mean of the weights of several runs of the recipe, as one model.

`python -m model.training.average runs/both/model runs/a/model runs/b/model`

Runs that went on from the same weights with other seeds make other mistakes; their mean answers a
little better than each of them and costs no more ("model soups", Wortsman et al. 2022). It works
only among relatives: runs from nothing must not be mixed. The guides' linear heads are left behind,
so a run that starts from the mean begins them anew (`bundled --heads-only` first).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from model.types import InputError


def average(out: Path, folders: Sequence[Path]) -> None:
    """Write the mean of models into `out`, with the first one's other files."""
    weights = [load_file(folder / SAFE_WEIGHTS_NAME) for folder in folders]
    shapes = [{name: tensor.shape for name, tensor in one.items()} for one in weights]
    for folder, shape in zip(folders, shapes, strict=True):
        if shape != shapes[0]:
            odd = sorted(set(shape.items()) ^ set(shapes[0].items()))
            raise InputError(f"{folder} is not like {folders[0]}: {odd[0][0]} differs.")
    shutil.copytree(folders[0], out, ignore=shutil.ignore_patterns(SAFE_WEIGHTS_NAME))
    mean = {
        name: torch.stack([one[name].double() for one in weights]).mean(0).to(tensor.dtype)
        for name, tensor in weights[0].items()
    }
    with safe_open(folders[0] / SAFE_WEIGHTS_NAME, "pt") as file:
        save_file(mean, out / SAFE_WEIGHTS_NAME, file.metadata())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that does not exist yet")
    parser.add_argument("models", type=Path, nargs="+", help="OUT/model of runs")
    args = parser.parse_args()
    try:
        average(args.out, args.models)
    except (InputError, FileExistsError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
