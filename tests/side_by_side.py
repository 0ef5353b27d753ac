"""The recipe's third part on several processes, for a test: RECIPE [OPTION ...].

Run by torch.distributed.run; each process writes what it knows at the end into OUT/process-N.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.small_recipe import few_scenes


def main() -> None:
    recipe, *more = sys.argv[1:]
    trainer = few_scenes(Path(recipe), pytest.MonkeyPatch(), *more)
    trainer.run()
    told = {
        "step": trainer.progress.step,
        "seconds": trainer.progress.seconds,
        "curriculum": trainer.curriculum.state(),
        "weights": [w.double().sum().item() for w in trainer.crosslmm.state_dict().values()],
        "answers": [qa.question for qa, _ in trainer.guided.right],
    }
    name = f"process-{trainer.accelerator.process_index}.json"
    (trainer.out / name).write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
