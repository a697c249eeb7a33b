"""What a job's page says of how far it has come."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, get_args

import pytest

from aquant_core.progress import Stage
from aquant_core.report.schema import Target
from service.jobs.schemas import JobDocument
from service.pages.progress import STAGES, Happened, blocks_of, facts_of, in_short, settings_of, stages_of, waiting_for

AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
FORECAST = {
    "seconds": 9.0,
    "peak_bytes": 1,
    "blocks": [
        {"name": name, "seconds": 3.0, "peak_bytes": 1, "placement": "memory", "learned": name != "mean"}
        for name in ("stem", "mean", "body", "fc")
    ],
}


def job(**changes: Any) -> JobDocument:
    document = {
        "id": "1", "state": "running", "stage": "reconstruct", "attempt": 1, "created_at": AT, "started_at": AT,
        "config": {"weight_bits": 2, "activation_bits": 4, "seed": 3, "layers": {"fc": {"weight_bits": 8}}},
        "progress": {
            "method": "aquant", "block": 2, "blocks": 3, "iteration": 5, "iterations": 20, "loss": 0.5,
            "eta_seconds": 61.4, "forecast": FORECAST,
        },
        "links": {"self": "/jobs/1", "events": "/jobs/1/events"},
    }  # fmt: skip
    return JobDocument.model_validate(document | changes)


def test_blocks_have_the_names_of_those_that_are_learned() -> None:
    """Progress counts no others, so the mean is not a block here."""
    finished = [Happened("aquant", 1, 0.25), Happened("qdrop", 2, 9.0)]
    rows = [(row.name, row.state, row.loss) for row in blocks_of(job(), finished)]
    assert rows == [("stem", "finished", 0.25), ("body", "under way", 0.5), ("fc", "to come", None)]


def test_the_stages_are_those_of_the_core_in_its_order() -> None:
    assert list(STAGES) == list(get_args(Stage))
    bits = {"weight_bits": 2, "activation_bits": 2}
    assert list(stages_of(job())) == [name for name in STAGES if name != "search"]
    assert list(stages_of(job(config=bits | {"dry_run": True}))) == ["intake", "capture", "forecast"]
    assert list(stages_of(job(config={"target": {"max_accuracy_drop": 0.5}}))) == list(STAGES)


def test_blocks_have_numbers_until_they_have_names() -> None:
    progress = {"block": 1, "blocks": 2}
    assert [row.name for row in blocks_of(job(progress=progress), [])] == ["block 1", "block 2"]


def test_a_screen_reader_is_told_of_blocks_and_not_of_seconds() -> None:
    assert in_short(job()) == "Running, reconstruct blocks, AQuant block 2 of 3"
    assert in_short(job(state="cancelling")) == "Stopping"
    assert in_short(job(state="succeeded", stage="save")) == "Succeeded"


@pytest.mark.parametrize(
    ("workers", "position", "words"),
    [(0, 3, "for a worker to start"), (1, 0, "first in line"), (2, 4, "number 5 in line")],
)
def test_what_a_queued_job_waits_for(workers: int, position: int, words: str) -> None:
    assert waiting_for(job(state="queued", workers=workers, queue_position=position)) == words


def test_the_facts_of_a_job_go_with_its_state() -> None:
    assert [(name, value) for name, value, _ in facts_of(job())] == [
        ("Stage", "Reconstruct blocks"),
        ("AQuant", "Block 2 of 3"),
        ("Time left", "61\N{NO-BREAK SPACE}s"),
    ]
    ended = job(state="succeeded", stage="save", attempt=2, finished_at=AT.replace(minute=3))
    assert facts_of(ended) == [("Took", "3.0\N{NO-BREAK SPACE}min", "in 2 attempts")]
    assert [name for name, _, _ in facts_of(job(state="queued", stage=None, progress={}))] == ["Waits"]


@pytest.mark.parametrize(
    ("changes", "left", "remark"),
    [
        ({"stage": "nearest"}, "not known yet", "until all blocks are done"),
        ({"stage": "evaluate"}, "not estimated", "all blocks are done"),
        (
            {"stage": "sensitivity", "iteration": 7, "iterations": 9},
            "not estimated",
            "all blocks are done, width 7 of 9",
        ),
        ({"stage": "sensitivity"}, "not estimated", "all blocks are done"),
        ({"stage": "save", "blocks": 0}, "not estimated", ""),
        ({"stage": "forecast", "dry_run": True}, "not estimated", ""),
    ],
)
def test_time_is_left_only_while_there_are_blocks_to_learn(changes: dict[str, Any], left: str, remark: str) -> None:
    config = {"weight_bits": 2, "activation_bits": 2, "dry_run": changes.pop("dry_run", False)}
    stage = changes.pop("stage")
    facts = facts_of(job(stage=stage, config=config, progress={"blocks": 3, "method": "aquant"} | changes))
    assert facts[-1] == ("Time left", left, remark)


@pytest.mark.parametrize(
    ("held", "metric", "remark"),
    [
        (True, "top1", "a drop of 0.25 points of top-1, at most 0.5 wanted"),
        (False, "agreement", "a drop of 0.25 points of agreement, at most 0.5 wanted"),
    ],
)
def test_whether_a_target_was_held_is_a_fact(held: bool, metric: str, remark: str) -> None:
    target = Target(
        max_accuracy_drop=0.5, metric=metric, n=10, held=held, drop=0.25, interval=[0.0, 0.5], candidates=[], chosen=0
    )
    ended = job(state="succeeded", stage="save", finished_at=AT)
    assert facts_of(ended, target)[-1] == ("Target", "Held" if held else "Not held", remark)


def test_settings_that_go_without_saying_are_left_out() -> None:
    assert settings_of(job()) == {
        "method": "aquant",
        "weight_bits": 2,
        "activation_bits": 4,
        "preset": "fast",
        "protocol": "paper",
        "seed": 3,
        "layers": {"fc": {"weight_bits": 8, "activation_bits": None}},
    }
