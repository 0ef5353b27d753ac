"""Parts of the bundled model's recipe: painted signs, the curriculum, hidden evidence."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from model.loading import load
from model.map_capture import MapCapture
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training import ablation, bundled, bundled_model
from model.training.ablation import VARIANTS
from model.training.bundled import HEADS_FILE, Trainer
from model.training.curriculum import FIRST, LEVELS, Curriculum
from model.training.encoder import (
    CLASSES,
    COUNT,
    CROP,
    MIDDLE,
    DenseEncoder,
    crop,
    encoder_config,
    look_loss,
    middle_loss,
    mirrored,
)
from model.training.evidence_guide import WAY_WEIGHT, EvidenceGuide, patches_in
from model.training.guided_loss import LINK_WEIGHT, TOGETHER_WEIGHT, GuidedLoss, right_answers
from model.training.library import Shot, Video
from model.training.masking import evidence_stretches, other_stretch
from model.training.order import FAR, MOTIONS, NOWHERE, Order
from model.training.order_guide import NEAR, OrderGuide, place_loss
from model.training.outputs import Outputs
from model.training.packing import IGNORE, Packed, answer_parts, links
from model.training.release import EXAMPLES, release
from model.training.shown import ShownHead
from model.training.sign_crops import SignPainter
from model.training.tokenizer import train_tokenizer
from model.training.world_facts import LONGEST_SIGN, NOUN_IDS, SIGN_CHARACTERS
from model.training.world_parts import Actor, Background, Placed, Scene, Sign
from model.training.world_questions import QA, Evidence, all_texts, questions
from model.types import InputError
from model.video_memory import VideoMemory
from tests.tiny import tiny_frames, tiny_inputs, tiny_model

ROOT = Path(__file__).parent.parent
SIDE, PATCH = 112, 8
GRID = SIDE // PATCH
GREY = Background("plain", ((128, 128, 128),) * 3, 0, 0.1, 0)


def painted(count: int = 40, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Grey frames whose crops get a sign, and the labels of the crops."""
    rng = random.Random(seed)
    frames = np.full((count, SIDE, SIDE, 3), 128, np.uint8)
    labels = np.zeros((count, GRID * GRID, len(CLASSES)), np.uint8)
    pixels, truth, _ = crop(frames, labels, rng, PATCH, SignPainter(rng, SIDE, PATCH, bank=20))
    return pixels, truth.reshape(count, CROP, CROP, -1)


def test_painted_signs_are_where_their_labels_say() -> None:
    pixels, truth = painted()
    shown = 0
    for picture, label in zip(pixels, truth, strict=True):
        signed = label[..., 1] > 0
        contrast = np.abs(picture.astype(int) - 128).max(-1)
        patches = contrast.reshape(CROP, PATCH, CROP, PATCH).mean((1, 3))
        if not signed.any():
            assert patches.max() < 12  # nothing was painted
            continue
        shown += 1
        assert patches[signed].min() > patches[~signed].mean() + 8
    assert shown > 20


def test_painted_labels_spell_the_sign() -> None:
    _, truth = painted()
    for label in truth:
        texts = {tuple(row[2:7]) for row in label.reshape(-1, len(CLASSES)) if row[1] > 0}
        if not texts:
            continue
        (text,) = texts  # all of it on every patch of the sign
        word = "".join(SIGN_CHARACTERS[c - 1] for c in text if c)
        assert (word.isdigit() and len(word) == 3) or (word.isalpha() and len(word) <= LONGEST_SIGN)
        own = label[..., COUNT - 1]
        assert not label[..., COUNT].any()  # a piece does not show the whole frame
        for row in own:
            seen = [c for c in row if c]
            order = [text.index(c) for c in seen]
            assert all(c in text for c in seen)
            if len(set(text)) == len(text):
                assert order == sorted(order)  # characters stand from left to right


def test_a_kind_climbs_only_when_it_is_answered_well() -> None:
    curriculum = Curriculum(("when", "number"))
    rng = random.Random(0)
    for _ in range(400):
        curriculum.record("when", 0, True, 0.05)
        curriculum.record("number", 0, rng.random() < 0.5, 0.05)
    assert curriculum.level["when"] == 1
    assert curriculum.level["number"] == 0
    assert curriculum.kinds_at(1) == ["when"]
    assert curriculum.weight("number") > curriculum.weight("when")
    begun = Curriculum(("when", "number", "count"), 6, new=("count",))
    assert begun.level == {"when": 6, "number": 6, "count": FIRST}
    restored = Curriculum(("when", "number", "count"))
    restored.restore(curriculum.state())
    assert restored.level == {"when": 1, "number": 0, "count": 0}
    curriculum.record("number", 0, False, 0.99)  # late, long videos must not stay unseen
    assert LEVELS[curriculum.level["number"]] >= 48
    # A single frame shows no movement: asked for there, the kind would never be answered.
    assert Curriculum(("when", "direction")).level == {"when": 0, "direction": 1}
    assert Curriculum(("direction",), fixed=True).level == {"direction": 0}


def test_evidence_is_joined_and_the_other_stretch_touches_none_of_it() -> None:
    spans = tuple(Evidence(*span) for span in ((4.0, 6.0), (5.0, 8.0), (20.0, 21.0)))
    taken = evidence_stretches(QA("after", "?", "a cat", spans))
    assert taken == ((4.0, 8.0), (20.0, 21.0))
    rng = random.Random(1)
    for _ in range(50):
        start, end = other_stretch(taken, 40.0, rng)
        assert round(end - start, 9) == 5.0
        assert 0 <= start <= end <= 40.0
        assert all(end <= a or start >= b for a, b in taken)
    assert other_stretch(((0.0, 30.0),), 40.0, rng) is None


def test_signs_are_to_look_at_what_they_stand_beside() -> None:
    labels = torch.zeros(1, 4, len(CLASSES), dtype=torch.uint8)
    labels[0, 0, 0] = labels[0, 1, 0] = 7  # two patches of an object
    labels[0, 3, 1], labels[0, 3, 0] = 2, 7  # its sign
    weights = torch.full((1, 2, 4, 4), 0.25)
    weights[0, 0, 3] = torch.tensor([0.5, 0.3, 0.1, 0.1])
    found = look_loss({-1: (None, weights)}, labels)
    torch.testing.assert_close(found, -torch.tensor(0.8001).log())
    labels[0, 3, 0] = 0  # unknown
    assert look_loss({-1: (None, weights)}, labels) == 0


def test_frames_without_a_sign_are_mirrored_with_their_labels() -> None:
    frames = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    labels = np.arange(2 * 16 * 2, dtype=np.uint8).reshape(2, 16, 2)
    labels[0, :, 1] = 0  # the first frame has no sign
    turned = 0
    for seed in range(20):
        found, truth = mirrored(frames, labels, random.Random(seed))
        assert (found[1] == frames[1]).all() and (truth[1] == labels[1]).all()
        if (found[0] == frames[0]).all():
            continue
        turned += 1
        assert (found[0] == frames[0][:, ::-1]).all()
        assert (truth[0].reshape(4, 4, 2) == labels[0].reshape(4, 4, 2)[:, ::-1]).all()
    assert 4 < turned < 16


def test_an_earlier_layer_is_asked_for_the_middles_of_objects() -> None:
    net = DenseEncoder(encoder_config())
    middle = net.middle.requires_grad_(False)
    middle.bias.zero_()
    middle.weight.zero_()[:, 0] = torch.tensor([-9.0, 9.0])  # a middle has a large first feature
    labels = torch.zeros(1, 4, MIDDLE + 1)
    assert middle_loss(net, labels) == 0
    labels[0, :3, MIDDLE] = torch.tensor([1.0, 2.0, 1.0])
    hidden = torch.zeros(1, 4, 128)
    hidden[..., 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # the last one is no object
    net.hidden["middle"] = hidden
    assert middle_loss(net, labels) < 1e-3
    net.hidden["middle"] = -hidden
    assert middle_loss(net, labels) > 5


def test_visual_tokens_are_asked_what_came_last_and_what_before_it() -> None:
    def shown(*nouns: str) -> Scene:
        places = [(0.7 - 0.3 * i, 0.5) * 2 for i in range(len(nouns))]
        things = (Actor(n, 0.2, 0.2, *way, 0, 3) for n, way in zip(nouns, places, strict=True))
        return Scene(3.0, GREY, tuple(things))

    scenes = [shown(), shown("cat"), shown(), shown("owl"), shown("dog", "pig"), shown("bee")]
    placed = tuple(Placed(scene, 3.0 * i) for i, scene in enumerate(scenes))
    times = np.arange(18) + 0.5
    order = Order.of(Video(placed, times, np.arange(18)))
    cat, owl, bee, dog, pig = (NOUN_IDS[noun] for noun in ("cat", "owl", "bee", "dog", "pig"))
    assert order.came(0)[::3].tolist() == [0, cat, cat, owl, pig, bee]  # the leftmost
    assert order.came(1)[::3].tolist() == [0, 0, 0, 0, dog, 0]
    assert order.came(2)[::3].tolist() == [0] * 6
    assert order.previous[::3].tolist() == [0, 0, 0, cat, IGNORE, IGNORE]
    assert order.crowded[::3].tolist() == [False, False, False, False, True, False]
    assert order.news[::3].tolist() == [IGNORE, 3, 3, 9, 12, 15]
    asked = {  # of the three heads: where an object comes in, or what the one is needed for
        ("when", "When does the cat appear?"): [(3, IGNORE, IGNORE)],
        ("count", "how many bees are there"): [(NOWHERE, NOWHERE, 15)],
        ("before", "What comes before the bee?"): [(15, NOWHERE, NOWHERE)],
        ("after", "What comes after the owl?"): [(NOWHERE, 12, NOWHERE)],
        ("after", "What comes after the bee?"): [(NOWHERE, IGNORE, NOWHERE)],
        ("after", "What comes after the pig?"): [],  # not alone
        ("direction", "Which way does the owl move?"): [(9, NOWHERE, 11)],
        ("absent", "Is there a boat?"): [],
        ("outside", "Who are you?"): [],
        ("scenes", "What happens?"): [
            (NOWHERE, frame, frame) for frame in (3, 9, 12, 12, 15, NOWHERE)
        ],
    }
    for (kind, question), wanted in asked.items():
        assert order.asked(QA(kind, question, "")) == wanted


def test_parts_of_a_list_begin_at_their_separators() -> None:
    comma, and_ = 7, 8
    ids = torch.tensor([1, 1, 2, 3, comma, 2, 3, and_, 3, comma, 5, 0])
    parts = answer_parts(ids, 2, 12, (comma, and_))
    assert parts == [range(2, 4), range(4, 7), range(7, 9), range(9, 11)]
    assert answer_parts(ids, 2, 5, (comma, and_)) == [range(2, 4)]  # its end is none
    assert links(ids, 2, 12, (comma, and_)) == [4, 7, 9, 11]


def test_a_separator_and_the_end_of_a_list_weigh_more_while_training() -> None:
    loss = GuidedLoss(tiny_model(), separators=(7,))
    labels = torch.full((1, 12), IGNORE)
    labels[0, 2:7], labels[0, 9:12] = torch.tensor([3, 4, 7, 5, 0]), torch.tensor([3, 7, 0])
    spans = [[(QA("scenes", "?", ""), 2, 7), (QA("word", "?", ""), 9, 12)]]
    packed = Packed(*[None] * 5, video_start=0, text_start=1, spans=spans)
    batch = {"labels": labels, "packed": packed}
    more = LINK_WEIGHT
    assert loss.train()._weights(batch).tolist() == [1, 1, more, 1, more, 1, 1, 1]
    assert loss.eval()._weights(batch).tolist() == [1] * 8


def test_names_at_one_time_weigh_more_while_training() -> None:
    loss = GuidedLoss(tiny_model(), separators=(7, 8))
    labels = torch.full((1, 12), IGNORE)
    labels[0, 2:10] = torch.tensor([3, 4, 8, 5, 7, 3, 6, 0])
    spans = [[(QA("scenes", "?", "0:01 a cat and a dog, 0:04 a bee"), 2, 10)]]
    packed = Packed(*[None] * 5, video_start=0, text_start=1, spans=spans)
    names, link = [TOGETHER_WEIGHT] * 2, LINK_WEIGHT
    wanted = [*names, link, TOGETHER_WEIGHT, link, 1, 1, link]
    assert loss.train()._weights({"labels": labels, "packed": packed}).tolist() == wanted


def evenly_looking() -> tuple[EvidenceGuide, CrossLMMForConditionalGeneration, Video]:
    """A guide by a model whose text looks at all 4 x 36 patches of a video alike."""
    model = tiny_model(pooled_grid=1, text={"num_hidden_layers": 6})
    for layer in model.config.dcal_layers:
        branch = model.model.language_model.layers[layer].dual_cross_attention.t2v
        for weight in branch.q_proj.parameters():
            weight.data.zero_()  # every patch of 4 x 36 is looked at alike
    guide, inputs = EvidenceGuide(model, (7,)), tiny_inputs(model.config, frames=4)
    assert guide.layers == [2, 4]
    with torch.no_grad():
        model(**inputs)
    return guide, model, Video((Placed(Scene(4.0, GREY), 0.0),), np.arange(4) + 0.5, np.arange(4))


def evidence_packed(kind: str, evidence: tuple[Evidence, ...], ids: list[int]) -> Packed:
    """A batch with one answer, of the last of these six tokens."""
    parts = dict.fromkeys(("attention_mask", "position_ids", "labels", "frame_times"))
    spans = [[(QA(kind, "?", "up", evidence), 8, 12)]]
    return Packed(torch.tensor([[5] * 6 + ids]), **parts, video_start=2, text_start=6, spans=spans)


def test_a_way_is_looked_for_in_its_first_frame_by_one_head() -> None:
    guide, _, video = evenly_looking()
    branch = guide.branches[4]
    heads, keys, width = 4, branch.k_proj.out_features // branch.head_dim, branch.head_dim
    query, key = torch.randn(1, 7, heads * width), torch.randn(1, 144, keys * width)
    guide.seen[4, "q_proj"], guide.seen[4, "k_proj"] = query, key
    whole = torch.zeros(4, 36, dtype=torch.bool)
    whole[1:, :18] = True  # the upper half of three frames
    evidence, weights = (Evidence(1.0, 4.0, (0.0, 0.0, 1.0, 0.5)),), []
    for head in range(heads):
        rows = key[0].unflatten(1, (keys, width))[:, head * keys // heads].double()
        scores = rows @ query[0, 1].unflatten(0, (heads, width))[head].double()
        weights.append((scores * branch.scaling).softmax(0).unflatten(0, (4, 36)))
    each = [-x[2:, :18].sum().log() for x in weights]  # the later half of the frames that show it
    each[0] = -weights[0][1, :18].sum().log()  # one head: of the first one
    together = -torch.stack([x[whole].sum() for x in weights]).mean().log()
    even = -torch.tensor(54 / 144).log()  # in the layer before, for all kinds
    wanted = {
        "direction": (even + WAY_WEIGHT * torch.stack(each).mean()) / (1 + WAY_WEIGHT),
        "where": (even + together) / 2,
    }
    for kind, loss in wanted.items():
        packed = evidence_packed(kind, evidence, [5, 5, 5, 5, 5, 0])
        packed.spans[0][0] = (packed.spans[0][0][0], 8, 10)  # an answer of one token
        torch.testing.assert_close(guide.loss(packed, [video]), loss.float(), atol=2e-3, rtol=0)


def test_each_name_of_a_list_is_looked_for_where_it_is() -> None:
    guide, _, video = evenly_looking()
    half, frame = Evidence(0.0, 1.0, (0.0, 0.0, 1.0, 0.5)), Evidence(3.0, 4.0, part=1)
    packed = evidence_packed("scenes", (half, frame), [5, 5, 5, 7, 5, 0])
    wanted = -(torch.tensor([18 / 144, 36 / 144, 36 / 144]) + 1e-4).log().mean()
    torch.testing.assert_close(guide.loss(packed, [video]), wanted)
    assert guide.patches(packed.spans[0][0][0], video).sum() == 54


def test_a_scene_played_backwards_is_true_of_its_frames_in_the_opposite_order() -> None:
    actor = Actor("cat", 0.2, 0.2, 0.2, 0.5, 0.8, 0.4, 0.9, 5.5)
    sign = Sign("428", "red", "number", (0.1, 0.1, 0.4, 0.27), 1.2, 3.1, "cat")
    shot = Shot(Scene(7.3, GREY, (actor,), sign), 0.4, 100, 7)
    turned = shot.backwards()
    assert list(turned.frames(0, 7)) == [106, 105, 104, 103, 102, 101, 100]
    assert list(turned.frames(2, 3)) == [104, 103, 102] and list(shot.frames(2, 2)) == [102, 103]
    for there, back in zip(range(7), range(6, -1, -1), strict=True):
        t, u = shot.phase + there, turned.phase + back
        for one, other in ((actor, turned.scene.actors[0]), (sign, turned.scene.sign)):
            assert one.visible(t) == other.visible(u)
        assert actor.box(t) == pytest.approx(turned.scene.actors[0].box(u))
    again = turned.backwards()
    assert again.phase == pytest.approx(shot.phase) and again.frames(0, 7) == shot.frames(0, 7)
    video = [Placed(turned.scene, 0.0)]
    (way,) = questions(video, random.Random(0), ["direction"], [turned.phase + i for i in range(7)])
    assert way.answer == "left"


def test_frames_know_how_what_came_last_moved_and_how_many_there_are() -> None:
    ways = ((0.5, 0.5, 0.5, 0.5), (0.2, 0.5, 0.8, 0.6), (0.5, 0.8, 0.5, 0.3))
    actors = [Actor("cat", 0.2, 0.2, *way, 0, 3) for way in ways]
    creeping = Actor("cat", 0.2, 0.2, 0.5, 0.5, 0.5 + 2.5 * FAR, 0.5, 0, 3)
    pair = (actors[1], Actor("owl", 0.2, 0.2, *ways[0], 1, 3))
    twins = (actors[0], Actor("cat", 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 3))
    shown = {
        (actors[0],): (["it stands still"] * 2, [1, 1, 1]),
        (actors[1],): (["right"] * 2, [1, 1, 1]),
        (actors[2],): (["up"] * 2, [1, 1, 1]),
        (creeping,): ([None, "right"], [1, 1, 1]),  # too little in the first second
        pair: ([None, "it stands still"], [1, 1, 1]),  # of the second one, since it came
        twins: ([None] * 2, [2, 2, 2]),
    }
    for things, (moves, copies) in shown.items():
        scene = Scene(3.0, GREY, things)
        order = Order.of(Video((Placed(scene, 0.0),), np.arange(3) + 0.5, np.arange(3)))
        known = [IGNORE if move is None else MOTIONS.index(move) for move in moves]
        assert order.motion.tolist() == [IGNORE, *known]
        assert order.copies.tolist() == copies
        alone = [things != twins] * 3
        assert (~order.places.isnan()).all(1).tolist() == alone
        if things == (actors[2],):
            places = torch.tensor([[0.5, 0.8 - t / 6] for t in (0.5, 1.5, 2.5)])
            torch.testing.assert_close(order.places, places)


def test_a_video_without_objects_has_no_order() -> None:
    video = Video((Placed(Scene(9.0, GREY), 0.0),), np.arange(4) + 0.5, np.arange(4))
    order = Order.of(video)
    assert order.came(0).tolist() == order.came(2).tolist() == order.previous.tolist() == [0] * 4
    assert order.places.isnan().all() and order.motion.tolist() == [IGNORE] * 4
    assert order.news.tolist() == [IGNORE] * 4
    assert order.asked(QA("scenes", "?", "")) == [(NOWHERE,) * 3]


def test_attention_of_a_shown_head_is_that_of_transformers() -> None:
    model = tiny_model(attn_implementation="eager")
    seen = Outputs()
    head, weights, outputs = ShownHead(model, 1, 3, seen), [], []
    layer = model.model.language_model.layers[1].self_attn
    layer.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    layer.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    ids = torch.randint(5, 50, (2, 9))
    places = torch.arange(9).expand(2, -1) + torch.tensor([[0], [3]])
    with torch.no_grad():
        model(input_ids=ids, position_ids=places)
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    packed = Packed(ids, causal, places, *[None] * 2, video_start=2, text_start=6, spans=[])
    shares, read = head.attention(slice(5, 9, 3), packed, frames=2)  # two frames of two tokens
    wanted = weights[0][:, 3, 5:9:3, 2:6].unflatten(-1, (2, 2)).sum(-1)
    torch.testing.assert_close(shares, wanted)
    torch.testing.assert_close(read, outputs[0].unflatten(-1, (4, -1))[:, 5:9:3, 3])


def test_order_is_read_from_the_last_token_of_each_frame() -> None:
    guide = OrderGuide(tiny_model(), separators=(0,))
    width, count = guide.heads["latest"].in_features, 4
    head = guide.heads["latest"]  # certain of "nothing" where the first feature is the largest
    head.requires_grad_(False)
    head.bias.zero_()
    head.weight.zero_()[0, 0] = 9.0
    hidden = torch.zeros(1, 3 + 2 * count + 5, width)  # two tokens per frame
    hidden[:, 4 : 3 + 2 * count : 2, 0] = 1.0
    packed = Packed(*[None] * 5, video_start=3, text_start=3 + 2 * count, spans=[])
    nothing = torch.zeros(1, count, dtype=torch.long)
    guide.hidden["latest"] = hidden
    assert guide.label_loss("latest", packed, nothing) < 1e-3
    assert guide.label_loss("latest", packed, nothing + IGNORE) == 0
    guide.hidden["latest"] = hidden.roll(1, dims=1)  # now in the other token of each frame
    assert guide.label_loss("latest", packed, nothing) > 1


def one_answer(qa: QA) -> Packed:
    """Four frames of one token, and an answer: two tokens and the end, told by columns 8 to 10."""
    return Packed(
        input_ids=torch.full((1, 12), 9),
        attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool).tril(),
        position_ids=torch.arange(12)[None],
        labels=None,
        frame_times=None,
        video_start=2,
        text_start=6,
        spans=[[(qa, 9, 12)]],
    )


def test_shown_heads_are_judged_by_their_share_on_what_they_are_to_look_at() -> None:
    model = tiny_model(text={"num_hidden_layers": 5})
    for layer in model.model.language_model.layers:
        for part in layer.self_attn.q_proj.parameters():
            part.data.zero_()  # every token looks at all before it alike
    guide = OrderGuide(model, separators=(7,))
    guide.looks = []  # a test of its own follows
    scenes = [Scene(2.0, GREY, (Actor(noun, *[0.3] * 6, 0, 2),)) for noun in ("cat", "owl")]
    placed = tuple(Placed(scene, 2.0 * i) for i, scene in enumerate(scenes))
    video = Video(placed, np.arange(4) + 0.5, np.arange(4))
    answer = QA("after", "What comes after the cat?", "an owl")
    packed = one_answer(answer)
    with torch.no_grad():
        model(input_ids=packed.input_ids, position_ids=packed.position_ids)
        found = guide.loss(packed, [Order.of(video)])[1]
        reader = guide.readers["latest"]
        reader.weight.zero_()
        reader.bias.zero_()[NOUN_IDS["owl"]] = 9.0  # certain of the answer
        order = Order.of(video)
        latest, previous = order.came(0)[None], order.previous[None]
        _, right = guide.question_loss(packed, [order], 1, {"latest": latest})
        _, wrong = guide.question_loss(packed, [order], 1, {"latest": previous})
        _, unread = guide.question_loss(packed, [order], 0, {"previous": previous})
    assert right < 0.1 and wrong > 5 and unread == 0
    # Of all columns so far; frame t is column t + 2.
    neighbour = [1 / 4, 1 / 5, 1 / 6]  # of all frames but the first, in two layers
    news = [1 / 3, 1 / 4, 1 / 5, 1 / 6]  # the cat's first frame, then the owl's
    asked, away = [1 / 9, 1 / 10], [5 / 9, 6 / 10]  # both tokens of the answer: one head, and two
    looks = (neighbour, neighbour, news, asked, away, away)
    means = [-(torch.tensor(x) + 1e-4).log().mean() for x in looks]
    torch.testing.assert_close(found, sum(means))


def test_places_are_judged_by_their_distance() -> None:
    places = torch.tensor([[0.2, 0.6], [0.5, 0.5], [torch.nan, torch.nan]])
    told = torch.tensor([[0.2, 0.63], [0.2, 0.6], [0.0, 0.0]])
    far = (0.3 - NEAR / 2) + (0.1 - NEAR / 2)
    wanted = torch.tensor((0.03**2 / (2 * NEAR) + far) / 4 / NEAR)
    torch.testing.assert_close(place_loss(told, places), wanted)
    assert place_loss(told, places + torch.nan) == 0


def test_places_are_read_where_an_answer_about_a_movement_looks() -> None:
    model = tiny_model(text={"num_hidden_layers": 5})
    guide = OrderGuide(model, separators=(7,))
    scenes = [Scene(30.0, GREY, (Actor(noun, *[0.3] * 6, 0, 30),)) for noun in ("cat", "owl")]
    placed = tuple(Placed(scene, 30.0 * i) for i, scene in enumerate(scenes))
    order = Order.of(Video(placed, np.arange(4) * 15.0, np.arange(4)))
    way = QA("direction", "Where does the owl go?", "up")
    packed = one_answer(way)
    for reader in guide.places.values():
        reader.requires_grad_(False)
        reader.weight.zero_()
        reader.bias.copy_(torch.tensor([0.3, 0.3]))  # where they are
    with torch.no_grad():
        model(input_ids=packed.input_ids, position_ids=packed.position_ids)
        assert guide.reading_loss(packed, [order], order.places[None]) < 1e-6
        guide.places["2"].bias[1] += 4 * NEAR
        found = guide.reading_loss(packed, [order], order.places[None])
        torch.testing.assert_close(found, torch.tensor(3.5 / 2))
        packed.spans[0][0] = (QA("count", "How many owls?", "1"), 9, 12)
        assert guide.reading_loss(packed, [order], order.places[None]) == 0


def test_what_text_to_visual_attention_brings_must_tell_ways_and_counts() -> None:
    guide = OrderGuide(tiny_model(), separators=(0,))
    width = guide.answers["direction"].in_features
    spans = [[(QA("direction", "?", "up"), 8, 10), (QA("count", "?", "2"), 13, 15)]]
    packed = Packed(*[None] * 5, video_start=2, text_start=6, spans=spans)
    for kind, wanted in (("direction", MOTIONS.index("up")), ("count", 1)):
        reader = guide.answers[kind].requires_grad_(False)
        reader.bias.zero_()
        reader.weight.zero_()[wanted, 0] = 9.0  # certain of it where the first feature is large
    guide.hidden["brought"] = torch.zeros(1, 12, width)
    unsure = guide.answer_loss(packed)
    torch.testing.assert_close(unsure, torch.tensor([5.0, 5.0]).log().sum())
    guide.hidden["brought"][0, [1, 6], 0] = 1.0  # what predicts the first token of each
    assert guide.answer_loss(packed) < 0.01


def test_answers_must_tell_the_object_that_is_asked_for() -> None:
    guide = OrderGuide(tiny_model(), separators=(0,))
    width, cat = guide.asked_for.in_features, NOUN_IDS["cat"]
    cats = QA("when", "When does the cat appear?", "0:03")
    spans = [[(cats, 8, 10), (QA("outside", "Who are you?", "-"), 13, 15)]]
    packed = Packed(*[None] * 5, video_start=2, text_start=6, spans=spans)
    reader = guide.asked_for.requires_grad_(False)
    reader.bias.zero_()
    reader.weight.zero_()[cat, 0] = 9.0
    guide.hidden["asked for"] = torch.zeros(1, 16, width)
    unsure = torch.tensor(float(len(NOUN_IDS) + 1)).log()
    torch.testing.assert_close(guide.asked_for_loss(packed), unsure)
    guide.hidden["asked for"][0, 7, 0] = 1.0  # what predicts the first of its two tokens
    torch.testing.assert_close(guide.asked_for_loss(packed), unsure / 2, atol=0.01, rtol=0)
    guide.hidden["asked for"][0, [8, 12, 13], 0] = 1.0
    assert guide.asked_for_loss(packed) < 0.01
    nothing = dataclasses.replace(packed, spans=[spans[0][1:]])
    assert guide.asked_for_loss(nothing) == 0


def test_looks_at_what_came_last_are_those_that_the_page_shows() -> None:
    crosslmm = tiny_model(pooled_grid=1)
    guide, frames = OrderGuide(crosslmm, separators=(0,)), 3
    capture = MapCapture(v2v=True)
    memory = VideoMemory(crosslmm, capture=capture)
    with torch.no_grad():
        memory.append(tiny_frames(crosslmm.config, 1, frames)[0], torch.arange(frames).float())
    wanted = torch.rand(1, frames, 36, generator=torch.Generator().manual_seed(0)) > 0.7
    for look in guide.looks:
        (shown,) = capture.v2v_patches[look.layer]  # (n, H, N)
        mass = (shown[:, 0].float() * wanted[0]).sum(-1)
        torch.testing.assert_close(look.mass(wanted)[0], mass, atol=2e-3, rtol=0)
    assert [look.layer for look in guide.looks] == [0, 2]


def test_looks_are_judged_on_the_newest_object_of_a_frame() -> None:
    def thing(noun: str, place: float, start: int) -> Actor:
        return Actor(noun, 0.3, 0.3, *[place] * 4, start, 3)

    scene = Scene(3.0, GREY, (thing("cat", 0.2, 0), thing("owl", 0.8, 1)))
    video = Video((Placed(scene, 0.0),), np.arange(3) + 0.5, np.arange(3))
    order = Order.of(video)
    (cat,), (owl,), _ = order.boxes
    assert cat[2] < 0.5 < owl[0]
    guide = OrderGuide(tiny_model(pooled_grid=1), separators=(0,))
    wanted = torch.stack([patches_in(boxes, 6).flatten() for boxes in order.boxes])
    assert wanted.sum(1).tolist() == [4, 4, 4] and wanted[0].nonzero()[0] == 0
    for look in guide.looks:
        look.mass = lambda patches: patches.float().mean(-1)
    torch.testing.assert_close(
        guide.object_loss([order], None), -2 * torch.tensor(4 / 36 + 1e-4).log()
    )
    kept = torch.tensor([[[0, 1], [0, 1], [34, 35]]])  # the owl's frames: one has none of it
    torch.testing.assert_close(
        guide.object_loss([order], kept), -2 * torch.tensor(1 + 1e-4).log(), atol=1e-3, rtol=0
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random encoder, for the third part of the recipe."""
    out = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_size=16,
            image_size=64,
            vision_use_head=False,
        )
    ).save_pretrained(out / "encoder")
    return out


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The recipe's tokenizer, trained on fewer texts, once."""
    return train_tokenizer([*all_texts(100), "user\n", "assistant\n", "system\n"])


def few_scenes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, *more: str, trainer: type[Trainer] = Trainer
) -> Trainer:
    """The recipe's third part, or what goes on from it, on 60 scenes."""
    monkeypatch.setattr(bundled, "HELD_OUT_SCENES", 20)
    monkeypatch.setattr(bundled, "FRAMES_PER_STEP", 6)
    monkeypatch.setattr(bundled_model, "all_texts", lambda worlds: ())
    monkeypatch.setattr(bundled_model, "train_tokenizer", lambda texts: tokenizer())
    words = ["--out", str(recipe), "--scenes", "60", "--processes", "1", "--cpu", *more]
    return trainer(bundled.arguments(words))


def test_the_recipe_trains_saves_and_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = few_scenes(recipe, monkeypatch, "--steps", "3")
    first.run()
    assert first.progress.step == 3 and first.done == 1
    again = few_scenes(recipe, monkeypatch, "--steps", "5")
    assert again.progress.step == 3 and again.progress.seconds == first.progress.seconds
    assert again.curriculum.count == first.curriculum.count and again.curriculum.count
    for name, weight in again.crosslmm.state_dict().items():
        assert torch.equal(weight, first.crosslmm.state_dict()[name]), name
    for name, weight in again.guided.order.state_dict().items():
        assert torch.equal(weight, first.guided.order.state_dict()[name]), name
    again.run()
    before, after = first.crosslmm.state_dict(), again.crosslmm.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert "model.language_model.layers.0.dual_cross_attention.t2v.q_proj.weight" in changed
    assert not any(".vision_tower." in name for name in changed)
    kept = CrossLMMForConditionalGeneration.from_pretrained(recipe / "model")
    for name, weight in kept.state_dict().items():
        assert torch.equal(weight, after[name]), name
    assert set(again.evaluate(0, batches=2)) <= set(bundled.TRAINED_KINDS)
    released = recipe / "released"
    release(recipe / "model", released, show=["when"])
    loaded = load(str(released))
    assert loaded.info.examples == (EXAMPLES["when"],) and loaded.info.trained
    card = json.loads((released / "card.json").read_text())
    assert card["kinds"] == list(bundled.TRAINED_KINDS)


def test_two_processes_train_one_model(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few_scenes(recipe, monkeypatch)  # the library
    more = ["--out", tmp_path, "--encoder", recipe / "encoder", "--library", recipe / "library"]
    launch = "torch.distributed.run --standalone --nproc-per-node 2 -m -- tests.side_by_side"
    for steps in (3, 5):  # the second one resumes
        argv = [sys.executable, "-m", *launch.split(), recipe, *more, "--steps", steps]
        subprocess.run([str(x) for x in argv], cwd=ROOT, check=True)
        one, two = (json.loads((tmp_path / f"process-{i}.json").read_text()) for i in (0, 1))
        asked = one.pop("answers"), two.pop("answers")
        assert one == two and one["step"] == steps and one["curriculum"]["count"]
        assert asked[0] != asked[1]
    kept = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    assert [w.double().sum().item() for w in kept.values()] == one["weights"]
    alone = few_scenes(recipe, monkeypatch, *map(str, more), "--steps", "6")
    assert alone.progress.step == 5
    for name, weight in alone.crosslmm.state_dict().items():
        assert torch.equal(weight, kept[name]), name


def test_an_ablation_starts_from_a_model_with_more_branches(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = few_scenes(recipe, monkeypatch, "--steps", "3")
    folder = tmp_path / "model"
    whole.crosslmm.save_pretrained(folder)
    whole.processor.tokenizer.model_max_length = 1234
    whole.processor.save_pretrained(folder)
    # As a released model says it; a run leaves `kinds.json`.
    (folder / "card.json").write_text(json.dumps({"kinds": ["when", "number"]}))
    more = ("--out", str(tmp_path), "--library", str(recipe / "library"))
    more += ("--encoder", str(recipe / "encoder"), "--start", str(folder))
    part = few_scenes(recipe, monkeypatch, *more, "--override", '{"t2v": false}')
    # Its weights know its own tokens only, whatever today's texts would give.
    assert part.processor.tokenizer.model_max_length == 1234
    weights = part.crosslmm.state_dict()
    assert not any(".t2v." in name for name in weights)
    for name, weight in weights.items():
        if ".vision_tower." not in name:
            assert torch.equal(weight, whole.crosslmm.state_dict()[name]), name
    part.crosslmm.save_pretrained(folder)  # as after the paper's first stage
    both = few_scenes(recipe, monkeypatch, *more)
    missing = set(both.crosslmm.state_dict()) - set(weights)
    assert missing and all(".t2v." in name for name in missing)
    with pytest.raises(InputError, match="another model"):
        few_scenes(recipe, monkeypatch, *more, "--override", '{"patch_position": "none"}')
    words = ["--start", str(folder), "--out", str(tmp_path / "on")]
    bundled.make_encoder(bundled.arguments(words))
    taken = SiglipVisionModel.from_pretrained(tmp_path / "on" / "encoder").state_dict()
    for name, weight in SiglipVisionModel.from_pretrained(recipe / "encoder").state_dict().items():
        assert torch.equal(weight, taken[name]), name


def test_another_run_goes_on_with_the_heads_that_it_has_in_common(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = ("--library", str(recipe / "library"), "--encoder", str(recipe / "encoder"))
    (tmp_path / "first").mkdir()
    first = few_scenes(recipe, monkeypatch, *made, "--out", str(tmp_path / "first"))
    first.save()
    heads = load_file(tmp_path / "first" / HEADS_FILE)
    fewer = {k: v for k, v in heads.items() if not k.startswith("heads.third.")}
    save_file(fewer | {"heads.copies.bias": torch.zeros(2)}, tmp_path / "first" / HEADS_FILE)
    (tmp_path / "second").mkdir()
    start = ("--out", str(tmp_path / "second"), "--start", str(tmp_path / "first" / "model"))
    own = few_scenes(recipe, monkeypatch, *made, *start, "--seed", "1").guided.order.state_dict()
    differ = {name for name, tensor in own.items() if not torch.equal(tensor, heads[name])}
    assert differ == {"heads.third.weight", "heads.third.bias", "heads.copies.bias"}


def test_half_of_the_videos_for_lists_have_things_that_come_together(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "FRAMES_PER_STEP", 36)
    made = ("--library", str(recipe / "library"), "--encoder", str(recipe / "encoder"))
    (recipe / "lists").mkdir()
    trainer = few_scenes(recipe, monkeypatch, *made, "--out", str(recipe / "lists"))
    trainer.library.shots = trainer.shots["train"]

    def lists(share: float) -> float:
        monkeypatch.setattr(bundled, "TOGETHER", share)
        batches = [trainer.batch("train", 3, ["scenes"], random.Random(i)) for i in range(40)]
        spans = [span for batch in batches for row in batch["packed"].spans for span in row]
        asked = [qa.answer for qa, _, _ in spans if qa.kind == "scenes"]
        return sum(" and " in answer for answer in asked) / len(asked)

    assert lists(1.0) > lists(0.0) + 0.3


def test_answers_are_right_when_every_token_is() -> None:
    qa = [QA("when", "?", "0:12"), QA("where", "?", "top")]
    labels = torch.full((1, 9), IGNORE)
    labels[0, 2:5], labels[0, 7:9] = torch.tensor([11, 12, 2]), torch.tensor([13, 2])
    packed = Packed(*[None] * 5, 0, 0, spans=[[(qa[0], 2, 5), (qa[1], 7, 9)]])
    batch = {"labels": labels, "packed": packed}
    told = right_answers(batch, torch.tensor([11, 12, 2, 13, 2]))
    assert told == [(qa[0], True), (qa[1], True)]
    told = right_answers(batch, torch.tensor([11, 12, 5, 13, 2]))  # goes on instead of ending
    assert told == [(qa[0], False), (qa[1], True)]


def test_patches_are_left_out_of_the_memory_only_while_training() -> None:
    loss = GuidedLoss(tiny_model(), separators=(0,))
    features = torch.randn(1, 3, 16, loss.crosslmm.config.vision_config.hidden_size)
    loss.keep = 0.5
    cat = Actor("cat", 0.2, 0.2, *[0.3] * 4, 1, 3)
    sign = Sign("428", "red", "number", (0.5, 0.5, 0.9, 0.7), 2.0, 3.0, "cat")
    placed = (Placed(Scene(3.0, GREY, (cat,), sign), 0.0),)
    loss.orders = [Order.of(Video(placed, np.arange(3) + 0.5, np.arange(3)))]
    loss.evidence.grid = 4
    memory = loss.train().crosslmm.model.embed_frames(features, torch.zeros(1, 3))[1]
    assert memory.shape[2] == 8 and loss.kept.shape == (1, 3, 8)
    assert all(len(set(frame)) == 8 for frame in loss.kept[0].tolist())
    boxes = ((), (cat.box(1.5),), (cat.box(2.5), sign.box))  # what is shown always stays
    for frame, seen in zip(loss.kept[0].tolist(), boxes, strict=True):
        shown = patches_in(seen, 4).flatten().nonzero().flatten().tolist()
        assert len(shown) == (len(seen) * 2 - 1 if seen else 0) and set(shown) <= set(frame)
    whole = loss.eval().crosslmm.model.embed_frames(features, torch.zeros(1, 3))[1]
    assert whole.shape[2] == 16 and loss.kept is None


def test_two_stages_of_an_ablation_share_its_steps(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few_scenes(recipe, monkeypatch)  # makes the library
    monkeypatch.setattr(ablation, "TESTS", 3)
    monkeypatch.setattr(ablation, "FINE", ("exists",))
    args = argparse.Namespace(
        out=tmp_path, encoder=recipe / "encoder", library=recipe / "library", steps=3, level=1,
        kinds=["exists", "outside"], start=None,
    )  # fmt: skip
    found = ablation.train(args, "both, in two stages", 0)
    assert set(found["kinds"]) == {"exists", "outside"} and len(found["gates"]) == 3
    first, second = (
        load_file(tmp_path / n / "model/model.safetensors") for n in ("stage_1", "run")
    )
    assert second.keys() - first.keys() == {name for name in second if ".t2v." in name} != set()
    steps = [sorted((tmp_path / n / "checkpoints").iterdir())[-1].name for n in ("stage_1", "run")]
    assert steps == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_ablation_is_a_model(variant: str) -> None:
    ids = {"eos": 0, "pad": 1, "video": 2}
    config = bundled_model.model_config(SiglipVisionModel(encoder_config()), 64, ids)
    for name, value in VARIANTS[variant].items():
        setattr(config, name, value)
    config.validate_choices()
    crosslmm = CrossLMMForConditionalGeneration(config)
    tokens = crosslmm.config.pooled_tokens_per_frame
    assert tokens == config.pooled_grid**2
    if variant == "no pooling":
        assert tokens == config.original_grid**2
