"""Uploads pass through the sandboxed child, or are refused with a reason."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from job_rows import not_overdue
from servers import STORES
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.graph import CapturedModel
from aquant_core.images import ImageSet
from service.artifacts import Artifacts
from service.jobs.repository import Claim, JobRepository
from service.settings import Settings
from worker import admission
from worker.admission import IntakeFailedError, IntakeLostError, admit
from worker.lease import JobCancelledError, Lease
from worker.sandbox import Outcome

in_a_folder = pytest.mark.parametrize("storage", STORES[:1], indirect=True)  # the child sees no store

Claimed = Callable[..., Claim]
Sessions = sessionmaker[Session]


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    """A convolution and a linear layer on 1 x 8 x 8 images, as ONNX."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], name="relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
            helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
            helper.make_node("Gemm", ["f", "fc.weight"], ["y"], name="fc", transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 10])],
        [
            onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
            for name, shape in {"conv.weight": (4, 1, 3, 3), "fc.weight": (10, 4)}.items()
        ],
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    )


@pytest.fixture
def images() -> bytes:
    return npz(images=np.random.default_rng(1).integers(0, 256, (64, 1, 8, 8)).astype(np.uint8))


@pytest.fixture
def enter(
    settings: Settings, sessions: Sessions, artifacts: Artifacts, tmp_path: Path
) -> Callable[[Claim], admission.Intake]:
    def enter(claim: Claim) -> admission.Intake:
        (tmp_path / "work").mkdir()
        with sessions() as session:
            job = JobRepository(session).get("job")
        with Lease(claim, settings, sessions, not_overdue) as lease:
            return admit(job, lease, tmp_path / "work", artifacts, settings)

    return enter


def test_sound_uploads_come_out_as_the_cores_own_files(
    enter: Callable[[Claim], admission.Intake], claimed: Claimed, model: bytes, images: bytes, tmp_path: Path
) -> None:
    intake = enter(claimed(model=("onnx", model), calibration=("npz", images), evaluation=("npz", images)))
    captured = CapturedModel.load(intake.captured)
    assert tuple(captured.input_shape) == (1, 8, 8)
    assert ImageSet.load(intake.calibration).images.shape == (64, 1, 8, 8)
    assert intake.evaluation is not None
    assert ImageSet.load(intake.evaluation).labels is None
    assert not list((tmp_path / "work").glob("model.*"))


@in_a_folder
def test_fault_is_told_with_the_cores_code(
    enter: Callable[[Claim], admission.Intake], claimed: Claimed, model: bytes
) -> None:
    spoilt = np.zeros((64, 1, 8, 8), np.float32)
    spoilt[3, 0, 2, 2] = np.nan
    with pytest.raises(IntakeFailedError) as caught:
        enter(claimed(model=("onnx", model), calibration=("npz", npz(images=spoilt))))
    assert caught.value.problem.code == "values_not_finite"
    assert not isinstance(caught.value, IntakeLostError)


@in_a_folder
def test_cancel_ends_the_child(
    enter: Callable[[Claim], admission.Intake],
    claimed: Claimed,
    sessions: Sessions,
    model: bytes,
    images: bytes,
) -> None:
    claim = claimed(model=("onnx", model), calibration=("npz", images))
    with sessions.begin() as session:
        JobRepository(session).cancel("job")
    with pytest.raises(JobCancelledError):
        enter(claim)


@in_a_folder
@pytest.mark.parametrize(
    ("outcome", "code", "lost"),
    [
        (Outcome(-signal.SIGKILL, timed_out=True, stopped=False, stderr=""), "intake_timeout", False),
        (Outcome(-signal.SIGXCPU, timed_out=False, stopped=False, stderr=""), "intake_timeout", False),
        (Outcome(-signal.SIGKILL, timed_out=False, stopped=False, stderr=""), "intake_killed", True),
        (Outcome(-signal.SIGSEGV, timed_out=False, stopped=False, stderr=""), "intake_crashed", False),
        (Outcome(0, timed_out=False, stopped=False, stderr=""), "intake_crashed", False),
    ],
)
def test_wordless_end_has_a_reason(
    enter: Callable[[Claim], admission.Intake],
    claimed: Claimed,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
    code: str,
    lost: bool,
) -> None:
    monkeypatch.setattr(admission.sandbox, "run", lambda *_: outcome)
    with pytest.raises(IntakeFailedError) as caught:
        enter(claimed(model=("onnx", b"x"), calibration=("npz", b"x")))
    assert (caught.value.problem.code, isinstance(caught.value, IntakeLostError)) == (code, lost)


@in_a_folder
def test_only_the_childs_own_words_are_kept(
    enter: Callable[[Claim], admission.Intake],
    claimed: Claimed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A child that an upload has taken over says what it likes."""

    def run(_argv: object, _folder: object, _limits: object, on_line: Callable[[str], None], _stop: object) -> Outcome:
        for line in ("[" * 100_000, "no JSON", "[1]", '"word"', '{"confined": ["limits"]}', '{"confined": ["all"]}'):
            on_line(line)
        on_line('{"junk": 1, "problem": {"title": "T", "code": "c", "detail": "d\\u0000", "remedy": "r"}}')
        return Outcome(1, timed_out=False, stopped=False, stderr="")

    monkeypatch.setattr(admission.sandbox, "run", run)
    with pytest.raises(IntakeFailedError) as caught, caplog.at_level("INFO"):
        enter(claimed(model=("onnx", b"x"), calibration=("npz", b"x")))
    assert (caught.value.problem.code, caught.value.problem.detail) == ("c", "d ")
    assert "does not confine the intake in its files, system calls, privileges" in caplog.text
    assert caplog.text.count("is confined in its") == 1
