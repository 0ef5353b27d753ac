"""Paths that are written into the bundled model, `model.training.paths`, and that for places."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.training.order_guide import ASKED
from model.training.paths import (
    RIGHT_WEIGHT,
    TAUGHT_WEIGHT,
    Seen,
    command,
    head_rows,
    least_squares,
    make_room,
    weakest_directions,
)
from model.training.place_path import AXES, FIRST, LAST, V2V, PlacesTrainer
from tests.small_recipe import few_scenes
from tests.tiny import tiny_model


def test_least_squares_finds_a_linear_map() -> None:
    tokens, weight, bias = torch.randn(500, 6), torch.randn(6, 2), torch.tensor([3.0, -40.0])
    found = least_squares(tokens, tokens @ weight + bias, ridge=1e-9)
    torch.testing.assert_close(found[0].float(), weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1].float(), bias, atol=1e-3, rtol=1e-3)


def test_the_weakest_directions_are_those_that_tokens_do_not_use() -> None:
    tokens = torch.randn(3, 50, 8)
    tokens[..., 2], tokens[..., 5] = 0, 0
    found = weakest_directions([tokens], 2)
    assert found[[2, 5]].square().sum(0).allclose(torch.ones(2).double())


def test_a_head_gives_up_what_it_uses_least() -> None:
    attention = tiny_model().model.language_model.layers[1].self_attn
    width = attention.head_dim
    rows, free = slice(width, 2 * width), 3
    basis = torch.randn(width - free, attention.v_proj.in_features)
    with torch.no_grad():  # its values span no more than is to be left
        attention.v_proj.weight[rows] = torch.randn(width, width - free) @ basis
        attention.v_proj.bias[rows] = 0
        attention.o_proj.weight[:, rows] = torch.randn(attention.o_proj.out_features, width)
    tokens = torch.randn(4, 30, attention.v_proj.in_features)

    def written() -> torch.Tensor:
        return attention.v_proj(tokens)[..., rows] @ attention.o_proj.weight[:, rows].T

    class Values:
        def outputs(self, module: torch.nn.Module) -> list[torch.Tensor]:
            return [module(tokens).detach()]

    before = written()
    make_room(attention, rows, Values(), free)
    assert (attention.v_proj(tokens)[..., rows][..., :free] == 0).all()
    torch.testing.assert_close(written(), before, atol=2e-2, rtol=2e-2)


@pytest.fixture(scope="module")
def places(
    recipe: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[PlacesTrainer]:
    """A trainer that has added the path to a model of one step."""
    out = str(tmp_path_factory.mktemp("places"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("model.training.paths.BATCHES", 20)
        monkeypatch.setattr("model.training.paths.LEVEL", 3)
        few_scenes(recipe, monkeypatch, "--steps", "1").run()
        made = ("--library", str(recipe / "library"), "--encoder", str(recipe / "encoder"))
        words = ("--start", str(recipe / "model"), "--out", out, "--steps", "3", *made)
        yield few_scenes(recipe, monkeypatch, *words, trainer=PlacesTrainer)


def test_heads_that_find_frames_read_the_places_that_v2v_looks_at(places: PlacesTrainer) -> None:
    model = places.crosslmm.model.language_model
    branch, attention = model.layers[V2V[0]].dual_cross_attention.v2v, model.layers[ASKED].self_attn
    batches = [places.batch("held_out", 3, ["direction"], places.rng) for _ in range(10)]
    looked: list[torch.Tensor] = []
    handle = branch.o_proj.register_forward_pre_hook(lambda _, args: looked.append(args[0].float()))
    values = Seen(places, batches).outputs(attention.v_proj)
    handle.remove()
    wanted = torch.cat(
        [x[..., head_rows(branch, V2V[1])][..., :AXES].flatten(0, -2) for x in looked]
    )
    assert wanted.std(0).min() > 0.02  # they are places, and not all the same
    for head in (FIRST, LAST):
        rows = head_rows(attention, head)
        read = torch.cat(
            [
                x[:, batch["packed"].visual_columns(), rows][..., :AXES].flatten(0, 1)
                for x, batch in zip(values, batches, strict=True)
            ]
        )
        for axis in range(AXES):
            pair = torch.stack((read[:, axis], wanted[:, axis]))
            assert torch.corrcoef(pair)[0, 1] > 0.8
    first, last = (
        attention.o_proj.weight[:, head_rows(attention, head)][:, :AXES] for head in (FIRST, LAST)
    )
    assert first.abs().max() > 0 and torch.equal(first, -last)


def test_places_are_those_of_patches(
    places: PlacesTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.training.place_path.PATCHES", 1.0)
    batch = places.batch("train", 3, list(places.curriculum.level), places.rng)
    weight, bias = places._fit_places(Seen(places, [batch]))
    features = batch["video_features"].float()
    with torch.no_grad():
        _, memory = places.crosslmm.model.embed_frames(features, batch["packed"].frame_times)
    side = places.crosslmm.config.original_grid
    told = (memory.double() @ weight + bias).mean((0, 1)).unflatten(0, (side, side))
    # To the right the first number grows and the second does not, downwards the second one.
    across, down = told[:, -1] - told[:, 0], told[-1] - told[0]
    assert across[:, 0].mean() > 0.2 > 2 * across[:, 1].mean().abs()
    assert down[:, 1].mean() > 0.2 > 2 * down[:, 0].mean().abs()


def test_other_answers_are_asked_for_as_they_were(
    places: PlacesTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    while "direction" not in asked or len(asked) < 2:
        batch = places.batch("train", 3, ["direction", "exists"], places.rng)
        asked = {qa.kind for spans in batch["packed"].spans for qa, _, _ in spans}
    places.loss.train()
    loss, packed = places.guided, batch["packed"]
    logits, targets = loss.student(batch, batch["video_features"].float())
    monkeypatch.setattr(loss, "teacher", lambda batch, features: (logits, targets))
    found = loss.each(batch, logits, targets)
    kinds = [
        qa.kind for spans in packed.spans for qa, start, end in spans for _ in range(start, end)
    ]
    right = F.cross_entropy(logits.float(), targets, reduction="none")
    taught = torch.tensor([kind == "direction" for kind in kinds])
    torch.testing.assert_close(found[taught], TAUGHT_WEIGHT * right[taught])
    # As the teacher gives them: nothing but the small weight of what is right is left.
    torch.testing.assert_close(found[~taught], RIGHT_WEIGHT * right[~taught])
    monkeypatch.setattr(loss, "teacher", lambda batch, features: (logits.roll(1, -1), targets))
    assert (loss.each(batch, logits, targets)[~taught] > found[~taught]).all()


def test_only_the_last_layer_is_trained_and_nothing_is_added_twice(places: PlacesTrainer) -> None:
    before = {name: weight.clone() for name, weight in places.crosslmm.state_dict().items()}
    places.run()
    after = places.crosslmm.state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed and all(n.startswith("model.language_model.layers.5.") for n in changed)
    again = PlacesTrainer(places.args)
    assert again.progress.step == 3
    for name, weight in again.crosslmm.state_dict().items():
        assert torch.equal(weight, after[name]), name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "on"], "--start is needed"),
        (["--out", "on", "--start", "m", "--heads-only"], "no heads"),
    ],
)
def test_a_path_says_what_it_cannot_begin_with(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["path", *words])
    with pytest.raises(SystemExit, match=told):
        command(PlacesTrainer)
