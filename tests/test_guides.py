"""What the bundled recipe asks of attention and of visual tokens, and what of answers."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from model.map_capture import MapCapture
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.training.evidence_guide import WAY_WEIGHT, EvidenceGuide, patches_in
from model.training.guided_loss import LINK_WEIGHT, TOGETHER_WEIGHT, GuidedLoss
from model.training.library import Shot, Video
from model.training.order import FAR, MOTIONS, NOWHERE, Order
from model.training.order_guide import NEAR, OrderGuide, place_loss
from model.training.outputs import Outputs
from model.training.packing import IGNORE, Packed, answer_parts, links
from model.training.shown import ShownHead
from model.training.world_facts import NOUN_IDS
from model.training.world_parts import Actor, Background, Placed, Scene, Sign
from model.training.world_questions import QA, Evidence, questions
from model.video_memory import VideoMemory
from tests.tiny import tiny_frames, tiny_inputs, tiny_model

GREY = Background("plain", ((128, 128, 128),) * 3, 0, 0.1, 0)


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
