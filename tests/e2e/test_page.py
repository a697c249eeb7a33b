"""The example job by the page alone: submitted, followed, its report read, its checkpoint downloaded.

With ``--pictures FOLDER`` the job takes longer, and the pictures of the documents are made of it on the way.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import Watched
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from service.local import Stack, local_stack
from service.settings import Settings

pytestmark = pytest.mark.e2e

EXAMPLE = Path(__file__).parents[2] / "examples/fashion_mnist"
FILES = {"model": "residual.onnx", "calibration": "calibration.npz", "evaluation": "evaluation.npz"}
PATIENCE = 240_000


@pytest.fixture(scope="module")
def stack(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    assert chromium  # without one nothing need be started
    with local_stack(Settings(data_dir=tmp_path_factory.mktemp("stack"), broker_url=None, port=0)) as stack:
        yield stack


@pytest.fixture(scope="module")
def pictures(request: pytest.FixtureRequest) -> Path | None:
    folder: Path | None = request.config.getoption("pictures")
    return folder


def picture(page: Page, folder: Path | None, name: str, scheme: str, height: int) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 1280, "height": height})
    shot = Image.open(io.BytesIO(page.screenshot()))
    shot.quantize(128).save(folder / f"{name}.png", optimize=True)


@pytest.mark.timeout(1800)  # pictures are made of a job of minutes
def test_the_example_goes_from_the_form_to_the_checkpoint(
    chromium: Browser, stack: Stack, pictures: Path | None, tmp_path: Path
) -> None:
    context = chromium.new_context(base_url=stack.url)
    watched = Watched(context.new_page(), stack.url.removeprefix("http://"))
    page = watched.page
    page.goto("/")
    for field, name in FILES.items():
        page.locator(f"#{field}").set_input_files(EXAMPLE / name)
    page.get_by_label("Preset").select_option("smoke" if pictures is None else "fast")
    page.locator("summary").click()
    page.get_by_label("Further settings as JSON").fill('{"compare": ["nearest", "aquant_no_border"]}')
    page.get_by_role("button", name="Quantize").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("residual.onnx AQuant, W2A2")
    standing, address = page.locator("#standing"), page.url
    expect(standing.locator("[aria-current=step]")).to_have_text("Reconstruct blocks", timeout=PATIENCE)
    expect(standing).to_contain_text("Time left")
    if pictures is not None:
        expect(standing.locator(".facts")).to_contain_text("Block 5 of", timeout=PATIENCE)
        expect(standing.locator(".facts")).to_contain_text(re.compile(r"iteration 2\d\d of"), timeout=PATIENCE)
        picture(page, pictures, "page-run", "light", 760)
        page.goto("/")
        picture(page, pictures, "page", "light", 830)
        page.goto(address)
    expect(standing.locator(".state")).to_have_text("Succeeded", timeout=4 * PATIENCE)
    assert page.url == address  # it came by itself

    with page.expect_download() as download:
        page.get_by_role("link", name="Checkpoint").click()
    job_id = address.rpartition("/")[2]
    assert download.value.suggested_filename == f"aquant-{job_id}.safetensors"
    download.value.save_as(tmp_path / "checkpoint")
    document = httpx.get(f"{stack.url}/jobs/{job_id}").json()
    digest = hashlib.sha256((tmp_path / "checkpoint").read_bytes()).hexdigest()
    assert digest == document["files"]["checkpoint"]["sha256"]

    page.get_by_role("link", name="Report", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("AQuant, 2-bit weights, 2-bit activations")
    accuracy = httpx.get(f"{stack.url}/jobs/{job_id}/report").json()["accuracy"]
    assert f"{100 * accuracy['quantized']['top1']:.2f}" in page.locator("header").inner_text()
    assert watched.violations("light", "dark") == []
    picture(page, pictures, "report-light", "light", 1100)
    picture(page, pictures, "report-dark", "dark", 1100)
    assert watched.faults == []
    context.close()
