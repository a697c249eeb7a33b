"""Files up and down through connections that break."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from cutting_proxy import Cut, CuttingProxy
from servers import PAIRS

from service.client import DigestMismatchError, ServiceProblemError, ServiceUnreachableError, transfers
from service.client import patience as patience_module
from service.settings import Settings

pytestmark = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)

DATA = random.Random(0).randbytes(1_500_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
BITS = {"weight_bits": 2, "activation_bits": 2}

Finished = Callable[..., str]


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(DATA)
    return path


def ranges(proxy: CuttingProxy, method: bytes) -> int:
    return sum(line.startswith(method) for line in proxy.requests)


def test_an_upload_goes_on_where_the_connection_broke(
    client: Any, proxy: CuttingProxy, web: httpx.Client, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PIECE_BYTES", 600_000)
    monkeypatch.setattr(patience_module, "FIRST_PAUSE_SECONDS", 1.0)  # until the service has noticed, and stored it
    proxy.cuts += [Cut("up", b"PUT /uploads", 300_000), Cut("up", b"PUT /uploads", 300_000)]
    seen: list[tuple[str, int, int | None]] = []
    assert client.upload(big, lambda *told: seen.append(told)) == SHA256
    assert proxy.cuts == []
    there = [done for _, done, _ in seen]
    assert there[0] == 0
    assert 0 < there[1] < 600_000  # what had come through the first broken connection was not sent again
    assert there == sorted(there)
    assert seen[-1] == ("big", len(DATA), len(DATA))
    assert web.get(f"/uploads/{SHA256}").json()["complete"]
    before = ranges(proxy, b"PUT")
    assert client.upload(big) == SHA256
    assert ranges(proxy, b"PUT") == before  # the service has it


def test_an_upload_whose_last_answer_got_lost_is_complete(client: Any, proxy: CuttingProxy, big: Path) -> None:
    proxy.cuts.append(Cut("down", b"PUT /uploads"))
    assert client.upload(big) == SHA256
    assert proxy.cuts == []


def test_a_file_that_shrinks_while_it_is_sent_is_not_sent(
    client: Any, big: Path, web: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PIECE_BYTES", 600_000)

    def shrink(_name: str, done: int, _size: int | None) -> None:
        if done:
            big.write_bytes(DATA[:1000])

    with pytest.raises(DigestMismatchError, match="became shorter"):
        client.upload(big, shrink)
    assert not web.get(f"/uploads/{SHA256}").json()["complete"]


def test_a_file_that_changes_while_it_is_sent_is_refused(client: Any, big: Path, web: httpx.Client) -> None:
    with pytest.raises(ServiceProblemError) as caught:
        client.upload(big, lambda *_: big.write_bytes(bytes(len(DATA))))
    assert caught.value.problem.code == "digest_mismatch"
    assert web.get(f"/uploads/{SHA256}").status_code == 404


def test_a_file_that_is_too_large_or_empty_is_refused(
    client: Any, settings: Settings, files: dict[str, Path], tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    for size, code in ((settings.max_upload_bytes + 1, "upload_too_large"), (0, "upload_empty")):
        odd.write_bytes(bytes(size))
        with pytest.raises(ServiceProblemError) as caught:
            client.submit(files["model"], odd, BITS)
        assert caught.value.problem.code == code


def test_a_job_is_made_once_though_the_answer_got_lost(
    client: Any, proxy: CuttingProxy, web: httpx.Client, files: dict[str, Path]
) -> None:
    proxy.cuts.append(Cut("down", b"POST /jobs"))
    job = client.submit(*files.values(), BITS, files["calibration"], "cpu")
    assert ranges(proxy, b"POST /jobs") == 2
    (made,) = web.get("/jobs").json()["jobs"]
    assert made["id"] == job.id
    sent = {name: hashlib.sha256(files.get(name, files["calibration"]).read_bytes()).hexdigest() for name in job.files}
    assert {name: file.sha256 for name, file in job.files.items()} == sent
    assert set(sent) == {"model", "calibration", "evaluation"}
    names = {"model": "net.onnx", "calibration": "images.npz", "evaluation": "images.npz"}
    assert {name: file.filename for name, file in job.files.items()} == names


def test_paths_may_be_strings(client: Any, files: dict[str, Path], succeeded: Finished, tmp_path: Path) -> None:
    model, calibration = map(str, files.values())
    job = client.submit(model, calibration, BITS, calibration)
    assert job.files["model"].filename == "net.onnx"
    assert client.upload(model) == job.files["model"].sha256
    assert client.download(succeeded(checkpoint=DATA), str(tmp_path / "q")) == SHA256
    assert (tmp_path / "q").read_bytes() == DATA


def test_an_idempotency_key_of_one_s_own_names_the_job(client: Any, files: dict[str, Path]) -> None:
    first = client.submit(*files.values(), BITS, idempotency_key="nightly")
    assert client.submit(*files.values(), BITS, idempotency_key="nightly").id == first.id
    assert client.submit(*files.values(), BITS).id != first.id
    with pytest.raises(ServiceProblemError) as caught:
        client.submit(*files.values(), {**BITS, "seed": 7}, idempotency_key="nightly")
    assert caught.value.problem.code == "idempotency_key_reused"


def test_a_download_goes_on_where_the_connection_broke(
    client: Any, proxy: CuttingProxy, succeeded: Finished, tmp_path: Path
) -> None:
    job_id, target = succeeded(checkpoint=DATA), tmp_path / "out" / "q"
    target.parent.mkdir()
    proxy.cuts += [Cut("down", b"/checkpoint", 500_000), Cut("down", b"/checkpoint", 500_000)]
    seen: list[int] = []
    assert client.download(job_id, target, transferred=lambda _, done, __: seen.append(done)) == SHA256
    assert proxy.cuts == []
    assert seen == sorted(set(seen))  # no byte twice
    assert seen[-1] == len(DATA)
    assert target.read_bytes() == DATA
    assert list(target.parent.iterdir()) == [target]


def test_what_a_broken_download_has_left_is_used_by_the_next(
    connect: Callable[..., Any], client: Any, proxy: CuttingProxy, succeeded: Finished, tmp_path: Path
) -> None:
    job_id, target = succeeded(checkpoint=DATA, onnx=DATA[1:]), tmp_path / "out" / "q"
    target.parent.mkdir()
    target.write_bytes(b"before")
    impatient = connect(proxy.url, patience=0)
    proxy.cuts.append(Cut("down", b"/checkpoint", 500_000))
    with pytest.raises(ServiceUnreachableError):
        impatient.download(job_id, target)
    assert target.read_bytes() == b"before"
    (left,) = target.parent.glob("*.partial")
    kept = left.stat().st_size
    assert 0 < kept <= 500_000
    seen: list[int] = []
    client.download(job_id, target, transferred=lambda _, done, __: seen.append(done))
    assert min(seen) > kept
    assert target.read_bytes() == DATA
    left.write_bytes(DATA)  # whole, but cut off before it was put in its place
    target.unlink()
    assert client.download(job_id, target) == SHA256
    assert target.read_bytes() == DATA
    left.write_bytes(DATA[:1000])  # of another file than is asked for
    client.download(job_id, target, "onnx")
    assert target.read_bytes() == DATA[1:]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(("size", "refused"), [(1000, True), (len(DATA), False), (len(DATA) + 1, False)])
def test_a_partial_file_that_was_spoilt_spoils_nothing(
    client: Any, succeeded: Finished, tmp_path: Path, size: int, refused: bool
) -> None:
    """What cannot be its beginning is thrown away; what may be is found out in the end, and nothing of it stays."""
    job_id, target = succeeded(checkpoint=DATA), tmp_path / "out" / "q"
    target.parent.mkdir()
    (target.parent / f"q.{SHA256}.partial").write_bytes(bytes(size))
    with pytest.raises(DigestMismatchError) if refused else nullcontext():
        client.download(job_id, target)
    if refused:
        assert list(target.parent.iterdir()) == []
        client.download(job_id, target)
    assert target.read_bytes() == DATA
    assert list(target.parent.iterdir()) == [target]


def test_bytes_that_are_not_those_announced_are_not_kept(
    client: Any, succeeded: Finished, settings: Settings, tmp_path: Path
) -> None:
    job_id, target = succeeded(checkpoint=DATA), tmp_path / "out" / "q"
    target.parent.mkdir()
    target.write_bytes(b"before")
    (stored,) = settings.data_dir.rglob("checkpoint")
    stored.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(DigestMismatchError, match="Download it again"):
        client.download(job_id, target)
    assert target.read_bytes() == b"before"
    assert list(target.parent.iterdir()) == [target]


def test_what_is_not_there_is_told(client: Any, add_job: Callable[[], str], tmp_path: Path) -> None:
    with pytest.raises(ServiceProblemError) as caught:
        client.download(add_job(), tmp_path / "q")
    assert caught.value.problem.code == "artifact_not_ready"
    assert list(tmp_path.glob("q*")) == []
