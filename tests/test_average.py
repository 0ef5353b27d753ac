"""The mean of several models' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.average import average
from model.types import InputError
from tests.tiny import tiny_model


def test_the_mean_of_two_models_is_a_model(tmp_path: Path) -> None:
    models = [tiny_model() for _ in range(2)]
    for place, model in enumerate(models):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / str(place))
    average(tmp_path / "mean", [tmp_path / "0", tmp_path / "1"])
    found = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "mean").state_dict()
    first, second = (model.state_dict() for model in models)
    for name, weight in found.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)
    average(tmp_path / "again", [tmp_path / "mean"])
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], found[name]) for name in again)


def test_models_of_other_shapes_have_no_mean(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "one")
    tiny_model(text={"num_hidden_layers": 5}).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"other is not like .*layers\.4\..* differs"):
        average(tmp_path / "mean", [tmp_path / "one", tmp_path / "other"])
    assert not (tmp_path / "mean").exists()
