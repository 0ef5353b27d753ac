"""Give a trained model the places of what it finds, so that "which way" is read as a difference.

`python -m model.training.place_path --start RUN/model --out OUT --level 10 --learning-rate 5e-4
--steps 1000`: see `model.training.paths`.

For "Which way does the cat move?" one head of the fifth layer's self-attention finds the first
frame that shows it, another the last ones, and visual-to-visual attention looks at it in each
frame; but only an uncertain place was left of that when the answer read it. So:

1. The head of V2V that looks at what came last writes the mean place of what it looks at into two
   directions of the residual stream that have the least in them.
2. The head that finds the last frames writes that place into two such directions of the text, the
   one that finds the first frame writes it there with the opposite sign.

Their sum is how far the object went, to the right and down.
"""

from __future__ import annotations

import torch

from model.training.order import PLACE_HEADS
from model.training.order_guide import ASKED, LOOKS
from model.training.paths import (
    PathTrainer,
    Seen,
    command,
    head_rows,
    least_squares,
    make_room,
    reads,
    size_of,
    weakest_directions,
)

V2V = LOOKS[-1], 0  # layer and head that looks at what came last
FIRST, LAST = PLACE_HEADS
AXES = 2
IN_FRAMES, IN_TEXT = 0.6, 0.8  # what a picture's width is written as, for the size of a token
PATCHES = 0.1  # share of patches that places are fitted to
RIDGE = 1e-5


class PlacesTrainer(PathTrainer):
    """Adds the path for places."""

    taught = ("direction",)

    def add_path(self, seen: Seen) -> None:
        """Change the model's weights in place, by what `seen` shows of it."""
        model = self.crosslmm.model.language_model
        branch, finds = model.layers[V2V[0]].dual_cross_attention.v2v, model.layers[ASKED]
        looks = head_rows(branch, V2V[1])
        heads = {sign: head_rows(finds.self_attn, i) for sign, i in ((-1, FIRST), (1, LAST))}
        make_room(branch, looks, seen, AXES)
        for rows in heads.values():
            make_room(finds.self_attn, rows, seen, AXES)
        outputs = seen.all_outputs(model.layers)
        in_frames = weakest_directions([*outputs[V2V[0]], *outputs[ASKED - 1]], AXES)
        in_text = weakest_directions(outputs[ASKED], AXES)
        weight, bias = self._fit_places(seen)
        branch.v_proj.weight[looks][:AXES] = weight.T.float()
        branch.v_proj.bias[looks][:AXES] = bias.float()
        written = IN_FRAMES * size_of(seen.visual(outputs[V2V[0]]))
        write = in_frames * written / branch.gate.double().tanh()
        branch.o_proj.weight[:, looks][:, :AXES] = write.float()
        found = size_of(seen.visual(outputs[ASKED - 1]))
        told = IN_TEXT * size_of(seen.text(outputs[ASKED]))
        for sign, rows in heads.items():
            reads(finds, rows, in_frames, written, found)
            finds.self_attn.o_proj.weight[:, rows][:, :AXES] = (sign * told * in_text).float()

    def _fit_places(self, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Least squares from original tokens to their places: 0 is the middle, 1 a whole side."""
        grid = self.crosslmm.config.original_grid
        centres = (torch.arange(grid) + 0.5) / grid - 0.5
        down, right = torch.meshgrid(centres, centres, indexing="ij")
        places = torch.stack((right, down), -1).flatten(0, 1)  # (N, 2)
        given, wanted = [], []
        for batch in seen.batches:
            memory, _ = self.memory_at_any_time(batch)
            some = torch.rand(memory.shape[:3]) < PATCHES
            given.append(memory[some])
            wanted.append(places.expand(*memory.shape[:2], -1, -1)[some])
        return least_squares(torch.cat(given), torch.cat(wanted), RIDGE)


if __name__ == "__main__":
    command(PlacesTrainer)
