"""The preflight card, and plans on their way through the worker."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from app.choices import Choices
from app.plans import MOST_SENT, MOST_WAITING, Plans
from app.preflight import adjust, plan_card
from app.settings import Settings
from app.worker import Worker
from model.types import AskRequest, InputError, PlanRequest, VideoInfo, VideoPlan
from tests.app_server import FAKE, PATIENCE

VIDEO = VideoInfo("/v.mp4", "mp4", "h264", 640, 360, 24.0, 25.0, 600, 0, 1000)
PLAN = VideoPlan(128, 320, 0.4, 25_088, 128, 1, (1, 4), "int8", 1, 159_000_000, 10**9, 6.4)


def test_the_card_tells_all_figures_and_offers_what_can_be_chosen() -> None:
    card = plan_card(PLAN, ("A <b>notice</b>.",))
    for told in (
        "one every 2.5 s",
        "25,088 visual tokens, 128 after pooling",
        "about 6 s to read",
        "159 MB of memory",
        "keys and values at 8 bits",
        'value="128"',
        '<option value="4">',
        "A &lt;b&gt;notice&lt;/b&gt;.",
    ):
        assert told in card
    assert "<input" not in plan_card(None, ("Wait.",))


def test_controls_change_the_choices_and_nonsense_does_not() -> None:
    assert adjust(Choices(), "frames:64") == Choices(max_frames=64)
    assert adjust(Choices(64), "tokens:4") == Choices(64, pooled_tokens=4)
    assert adjust(Choices(), "frames:-3") == Choices(max_frames=1)
    for nonsense in ("frames:", "frames:many", "max_new_tokens:1", "frames:" + "9" * 30):
        with pytest.raises(InputError):
            adjust(Choices(), nonsense)


def test_a_plan_does_not_wait_for_a_running_answer() -> None:
    worker = Worker(Settings(engine=FAKE, stop_grace_seconds=20))
    try:
        plans = [worker.plan(PlanRequest(VIDEO))]  # before the model is loaded
        assert plans[0].result(PATIENCE).frames == 48
        job = worker.submit(AskRequest("/v.mp4", "slow"))
        next(job.events(PATIENCE))
        plans = [worker.plan(PlanRequest(VIDEO, max_frames=n)) for n in range(1, 31)]
        assert [plan.result(PATIENCE).frames for plan in plans] == list(range(1, 31))
        assert not job.done
        job.cancel()
    finally:
        worker.close()
    with pytest.raises(InputError, match="shutting down"):
        worker.plan(PlanRequest(VIDEO)).result(PATIENCE)


def test_a_model_that_cannot_be_loaded_has_no_plans() -> None:
    worker = Worker(Settings(engine=FAKE, model="missing"))
    try:
        with pytest.raises(InputError, match="no model at"):
            worker.plan(PlanRequest(VIDEO)).result(PATIENCE)
    finally:
        worker.close()


def test_plans_outlive_a_child_and_are_bounded() -> None:
    plans, sent = Plans(), []
    futures: list[Future[VideoPlan]] = [Future() for _ in range(MOST_WAITING + 1)]
    for number, future in enumerate(futures):
        plans.add(PlanRequest(VIDEO, max_frames=number + 1), future)
    with pytest.raises(InputError, match="Too many"):
        futures[0].result(0)
    send = lambda number, request: sent.append((number, request.max_frames))  # noqa: E731 (short)
    plans.hand_out(send)
    assert [frames for _, frames in sent] == list(range(2, 2 + MOST_SENT))
    plans.begin_again()  # the child died; the next one gets the same, in order
    plans.hand_out(send)
    assert [frames for _, frames in sent[MOST_SENT:]] == list(range(2, 2 + MOST_SENT))
    plans.arrived(sent[0][0], PLAN)  # the dead child's last words
    assert not futures[1].done()
    plans.arrived(sent[MOST_SENT][0], PLAN)
    assert futures[1].result(0) is PLAN
    plans.fail("Over.")
    assert all(future.done() for future in futures)
