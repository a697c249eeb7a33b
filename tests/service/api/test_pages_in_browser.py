"""The page in a real browser: by keyboard, without scripts, as it changes, in both colour schemes, for everybody."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import reports
from browser import Watched
from cutting_proxy import Cut, cutting_proxy
from httpx import Client
from old_reports import old_report
from page_jobs import CONFIG, PageJobs
from playwright.sync_api import Browser, expect

from service.jobs.repository import JobRepository
from service.jobs.states import JobState

pytestmark = pytest.mark.parametrize("storage", ["sqlite-folder"], indirect=True)

Open = Callable[..., Watched]
EVIL = '"><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'


@pytest.fixture
def open_page(chromium: Browser, web: Client) -> Iterator[Open]:
    """Opens an address; nothing may go wrong in any page of it until the test ends."""
    opened: list[Watched] = []

    def go(path: str = "/", expected: tuple[str, ...] = (), at: str = "", **options: Any) -> Watched:
        base = at or str(web.base_url)
        context = chromium.new_context(base_url=base, reduced_motion="reduce", **options)
        context.set_default_timeout(20_000)
        watched = Watched(context.new_page(), urlsplit(base).netloc, expected=expected)
        opened.append(watched)
        watched.page.goto(path)
        return watched

    yield go
    for watched in opened:
        watched.page.context.close()
    assert [fault for watched in opened for fault in watched.faults] == []


def test_every_page_passes_axe_in_light_and_dark(open_page: Open, page_jobs: PageJobs) -> None:
    running, failed = page_jobs.running(), page_jobs.failed("Operator `Hardmax` cannot be captured.")
    done = [page_jobs.succeeded(old_report()) for _ in range(2)]
    page_jobs.queued()
    files = {"report": json.dumps(reports.planned()).encode()}
    planned = page_jobs.end(page_jobs.queued(config={**CONFIG, "dry_run": True}), JobState.SUCCEEDED, files=files)
    report = reports.lossy()
    ranked, worst = page_jobs.succeeded(report), report["sensitivity"]["layers"][0]["layer"]
    watched = open_page("/", expected=("404", "422"))
    paths = [
        "/",
        *(f"/page/jobs/{job_id}" for job_id in (running, failed, done[0], planned)),
        f"/page/jobs/{planned}/report",
        f"/?again={planned}",
        f"/?again={ranked}&layer={worst}",
        f"/page/jobs/{ranked}",
        f"/page/compare?job={done[0]}&job={done[1]}",
        "/page/compare",
        "/page/jobs/none",
        "/errors",
    ]
    found = []
    for path in paths:
        watched.page.goto(path)
        if path == "/":
            watched.page.locator("summary").click()
        found += [f"{path}: {violation}" for violation in watched.violations("light", "dark")]
    assert not found, "\n".join(found)


def test_the_sign_in_form_passes_axe_and_keeps_the_key(
    open_page: Open, make_key: Callable[..., dict[str, str]], page_jobs: PageJobs
) -> None:
    key = make_key("ada")["Authorization"].removeprefix("Bearer ")
    page_jobs.owner = "ada"
    job_id = page_jobs.queued()
    watched = open_page(f"/page/jobs/{job_id}", expected=("401",))
    page = watched.page
    assert watched.violations("dark", "light") == []
    page.get_by_label("API key").fill("aquant_wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not one of this service")
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("residual.onnx")
    assert page.evaluate("document.cookie") == ""
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()


def test_a_layer_is_raised_in_two_clicks(
    open_page: Open, page_jobs: PageJobs, web: Client, onnx_model: bytes, images: bytes
) -> None:
    report = reports.lossy()
    worst = report["sensitivity"]["layers"][0]["layer"]
    form = {"model": ("net.onnx", onnx_model), "calibration": images, "config": (None, json.dumps(CONFIG))}
    job_id = web.post("/jobs", files=form).json()["id"]
    page_jobs.end(job_id, JobState.SUCCEEDED, files={"report": json.dumps(report).encode()})
    page = open_page(f"/page/jobs/{job_id}").page
    page.get_by_role("link", name=f"Again with {worst} raised").click()
    expect(page.get_by_label("Further settings as JSON")).to_have_value(re.compile(f'"{worst}"'))
    # Nothing can be dropped on a field that is not there.
    dropped = page.evaluate_handle(
        "() => { const dropped = new DataTransfer(); dropped.items.add(new File(['x'], 'net.onnx')); return dropped; }"
    )
    page.dispatch_event("#submission", "drop", {"dataTransfer": dropped})
    expect(page.get_by_role("status")).to_have_text("No file that is known here.")
    page.get_by_role("button", name="Quantize").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("net.onnx AQuant, W2A2")
    expect(page.locator("#rest")).to_contain_text(worst)


def test_a_job_is_submitted_by_keyboard_alone(open_page: Open, files: dict[str, Path]) -> None:
    page = open_page("/").page

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id || document.activeElement.className") == name:
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", name
                return
        raise AssertionError(f"{name} cannot be reached")

    tab_to("skip")
    tab_to("weight_bits")
    page.keyboard.press("3")
    tab_to("preset")
    page.keyboard.type("smoke")
    for name, path in files.items():
        tab_to(name)
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Space")
        chooser.value.set_files(path)
    tab_to("main")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("net.onnx AQuant, W3A2")
    expect(page.locator("#standing")).to_contain_text("for a worker to start")


def test_dropped_files_find_their_fields(open_page: Open) -> None:
    page = open_page("/").page
    for target, names in (("#submission", ["b.ONNX", "calib.npz", "eval-set.npz"]), ("#model", ["odd.bin"])):
        dropped = page.evaluate_handle(
            """names => {
                const dropped = new DataTransfer();
                for (const name of names) dropped.items.add(new File(['x'], name));
                return dropped;
            }""",
            names,
        )
        page.dispatch_event(target, "dragover", {"dataTransfer": dropped})
        assert page.locator(".over").count() == 1
        page.dispatch_event(target, "drop", {"dataTransfer": dropped})
        assert page.locator(".over").count() == 0
        chosen = page.evaluate(
            "['model', 'calibration', 'evaluation'].map(n => document.getElementById(n).files[0]?.name)"
        )
        assert chosen == [names[0], "calib.npz", "eval-set.npz"]
    expect(page.get_by_role("status")).to_have_text("odd.bin as model")


def test_of_two_files_for_one_field_the_first_is_kept_and_that_is_said(open_page: Open) -> None:
    page = open_page("/").page
    dropped = page.evaluate_handle(
        """() => {
            const dropped = new DataTransfer();
            for (const name of ['a.onnx', 'b.onnx', 'c.npz']) dropped.items.add(new File(['x'], name));
            return dropped;
        }"""
    )
    page.dispatch_event("#submission", "drop", {"dataTransfer": dropped})
    assert page.evaluate("document.getElementById('model').files[0].name") == "a.onnx"
    left_out = "b.onnx is left out: a.onnx is kept as model"
    expect(page.get_by_role("status")).to_have_text(f"a.onnx as model, c.npz as calibration. {left_out}")
    expect(page.get_by_text(left_out).last).to_be_visible()


def test_what_is_refused_is_said_beside_the_form_which_stays(open_page: Open, files: dict[str, Path]) -> None:
    page = open_page("/", expected=("422",)).page
    for name, path in files.items():
        page.locator(f"#{name}").set_input_files(path)
    page.locator("summary").click()
    page.locator("#config").fill('{"colour": 1}')
    page.get_by_role("button", name="Quantize").click()
    expect(page.get_by_role("alert")).to_contain_text("colour: unknown key")
    expect(page.get_by_role("link", name="config_invalid")).to_have_attribute("href", "/errors#config_invalid")
    page.locator("#config").fill("")
    page.get_by_role("button", name="Quantize").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("net.onnx")


def test_without_scripts_a_refused_form_is_still_there_when_one_goes_back(
    open_page: Open, files: dict[str, Path]
) -> None:
    page = open_page("/", ("422", "404"), java_script_enabled=False).page
    for name, path in files.items():
        page.locator(f"#{name}").set_input_files(path)
    page.get_by_label("Weights").select_option("3")
    page.locator("summary").click()
    page.locator("#architecture").fill("resnet18")
    page.locator("#config").fill('{"colour": 1}')
    page.get_by_role("button", name="Quantize").click()
    expect(page.locator("main")).to_contain_text("When you go back, most browsers still have the form")
    page.go_back()
    expect(page.get_by_label("Weights")).to_have_value("3")
    expect(page.locator("#architecture")).to_have_value("resnet18")
    expect(page.locator("#config")).to_have_value('{"colour": 1}')
    page.goto("/page/jobs/none")
    expect(page.locator("main")).not_to_contain_text("go back")  # nothing was sent


@pytest.mark.parametrize("scripts", [True, False])
def test_a_form_whose_answer_was_lost_is_sent_again_for_the_same_job(
    open_page: Open, web: Client, files: dict[str, Path], scripts: bool
) -> None:
    with cutting_proxy(web.base_url.port or 0) as proxy:
        page = open_page("/", ("ERR_",), proxy.url, java_script_enabled=scripts).page
        for name, path in files.items():
            page.locator(f"#{name}").set_input_files(path)
        # A browser tries again by itself, on each of the connections that it has already.
        proxy.cuts += [Cut("down", b"POST /page/jobs")] * 20
        page.get_by_role("button", name="Quantize").click(no_wait_after=True)
        if scripts:
            expect(page.locator("#sending")).to_contain_text("whether the job was taken in is not known")
        else:
            expect(page).to_have_url(re.compile("^chrome-error:"), timeout=15_000)
        proxy.cuts.clear()
        assert len(web.get("/jobs").json()["jobs"]) == 1
        if scripts:
            page.get_by_role("button", name="Quantize").click()
        else:
            page.reload()  # as its button does, with the form in it
        expect(page.get_by_role("heading", level=1)).to_contain_text("net.onnx")
        page.context.close()  # before the proxy, which waits for its connections
    assert len(web.get("/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize("scripts", [True, False])
def test_a_forecast_is_asked_for_by_a_button(open_page: Open, files: dict[str, Path], scripts: bool) -> None:
    page = open_page("/", java_script_enabled=scripts).page
    for name, path in files.items():
        page.locator(f"#{name}").set_input_files(path)
    page.get_by_role("button", name="Forecast only").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("net.onnx AQuant, W2A2, dry run")


def test_a_forecast_is_one_where_form_data_knows_no_button(open_page: Open, files: dict[str, Path]) -> None:
    page = open_page("/").page
    page.evaluate("() => { window.FormData = class extends FormData { constructor(form) { super(form); } }; }")
    for name, path in files.items():
        page.locator(f"#{name}").set_input_files(path)
    page.get_by_role("button", name="Forecast only").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("net.onnx AQuant, W2A2, dry run")


def test_without_scripts_everything_is_there(open_page: Open, files: dict[str, Path], page_jobs: PageJobs) -> None:
    page = open_page("/", java_script_enabled=False).page
    for name, path in files.items():
        page.locator(f"#{name}").set_input_files(path)
    page.get_by_role("button", name="Quantize").click()
    assert page.locator("h1").inner_text() == "net.onnx AQuant, W2A2"
    assert page.locator("meta[http-equiv=refresh]").count() == 1
    page.locator("#cancel").click()
    assert "Cancelled" in page.locator("#standing").inner_text()
    page.locator(".delete summary").click()
    page.get_by_role("button", name="Delete it for good").click()
    assert "None yet" in page.locator("#list").inner_text()
    for _ in range(2):
        page_jobs.succeeded(old_report())
    page.reload()
    for box in page.get_by_role("checkbox").all():
        box.check()
    page.get_by_role("button", name="Compare the two ticked").click()
    assert page.locator(".lede").inner_text().startswith("B less A: +0.00 points")


@pytest.mark.parametrize("stream", [True, False])
def test_a_page_follows_its_job(open_page: Open, page_jobs: PageJobs, stream: bool) -> None:
    """By events, and where they do not come through by asking."""
    job_id = page_jobs.running(100)
    watched = open_page("/", expected=() if stream else ("500",))
    page = watched.page
    if not stream:
        page.route("**/events", lambda route: route.fulfill(status=500))
    page.goto(f"/page/jobs/{job_id}")
    expect(page.locator("#standing")).to_contain_text("iteration 100 of 300")
    page.locator("#cancel").focus()
    said = page.get_by_role("status")
    page_jobs.go_on(job_id, 200)
    expect(page.locator("#standing")).to_contain_text("iteration 200 of 300")
    assert page.evaluate("document.activeElement.id") == "cancel"
    assert said.inner_text() == ""  # another iteration interrupts nobody
    page_jobs.go_on(job_id, 10, block=4)
    expect(said).to_have_text("Running, reconstruct blocks, AQuant block 4 of 5")
    with page_jobs.sessions.begin() as session:
        JobRepository(session).cancel(job_id)
    expect(said).to_have_text("Stopping")
    expect(page).to_have_title(re.compile("residual.onnx: Stopping"))


@pytest.mark.parametrize("status", [None, 502])
@pytest.mark.parametrize("of_a_job", [True, False])
def test_a_page_says_that_the_service_is_gone_and_that_it_is_back(
    open_page: Open, page_jobs: PageJobs, of_a_job: bool, status: int | None
) -> None:
    job_id = page_jobs.running(100)
    path = f"/page/jobs/{job_id}" if of_a_job else "/"
    page = open_page(path, expected=("ERR_FAILED", "502")).page
    line, said = page.locator("#away"), page.get_by_role("status")
    expect(line).to_be_hidden()
    page.route("**", lambda route: route.abort() if status is None else route.fulfill(status=status))
    page_jobs.go_on(job_id, 200)
    what = "does not answer" if status is None else "answers with status 502"
    words = re.compile(rf"^The service {what}; what is shown is of \d\d:\d\d UTC. Trying again.$")
    expect(line).to_have_text(words, timeout=15_000)
    expect(line).to_be_in_viewport()
    expect(said).to_have_text(words)
    expect(page.locator("#standing" if of_a_job else "#list")).not_to_contain_text("200 of 300")
    page.unroute("**")
    expect(line).to_be_hidden()
    expect(said).to_have_text("The service answers again.")
    if of_a_job:
        expect(page.locator("#standing")).to_contain_text("iteration 200 of 300")


def test_the_list_follows_its_jobs_and_keeps_what_is_ticked(open_page: Open, page_jobs: PageJobs) -> None:
    done = page_jobs.succeeded(old_report())
    running = page_jobs.running(100)
    page = open_page("/").page
    page.locator(f"#tick-{done}").check()
    page_jobs.queued(filename="another.onnx")
    expect(page.get_by_role("link", name="another.onnx")).to_be_visible()
    assert page.locator(f"#tick-{done}").is_checked()
    page.locator(f"#cancel-{running}").click()
    expect(page.locator("#list")).to_contain_text("Stopping")


def test_uploads_cannot_run_scripts(open_page: Open, page_jobs: PageJobs) -> None:
    ids = [page_jobs.failed(EVIL, filename=EVIL), page_jobs.running(filename=EVIL), page_jobs.queued(filename=EVIL)]
    page = open_page("/").page
    for path in ("/", *(f"/page/jobs/{job_id}" for job_id in ids)):
        page.goto(path)
        assert EVIL in page.locator("main").inner_text()
        assert page.evaluate("window.pwned") is None
    page.goto("/")
    page_jobs.queued(filename="later" + EVIL)
    expect(page.locator("main")).to_contain_text("later" + EVIL)  # exchanged, not loaded
    assert page.locator("img").count() == 0
    assert page.evaluate("window.pwned") is None


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_call_is_tried_out_in_the_reference(open_page: Open, page_jobs: PageJobs, scheme: str, width: int) -> None:
    """With everything from here: the fixture fails for a request to elsewhere, and for what the policy forbids."""
    job_id = page_jobs.queued()
    page = open_page("/docs", color_scheme=scheme, viewport={"width": width, "height": 800}).page
    page.locator("#operations-jobs-show_jobs__job_id__get .opblock-summary-control").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_placeholder("job_id").fill(job_id)
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table")).to_contain_text("residual.onnx")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.className") == ("dark-mode" if scheme == "dark" else "")


@pytest.mark.parametrize("width", [320, 1280])
def test_no_page_is_wider_than_the_screen(open_page: Open, page_jobs: PageJobs, width: int) -> None:
    long = "a_rather_long_name_without_any_place_to_break_it_anywhere" * 2 + ".onnx"
    done = [page_jobs.succeeded(old_report(), filename=long) for _ in range(2)]
    running = page_jobs.running(filename=long)
    page = open_page("/", viewport={"width": width, "height": 700}).page
    for path in ("/", f"/page/jobs/{running}", f"/page/jobs/{done[0]}", f"/page/compare?job={done[0]}&job={done[1]}"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_the_plots_of_a_report_fit_pages_of_every_width(open_page: Open, page_jobs: PageJobs) -> None:
    """None is cut off, none scrolls, of two drawings for two widths one is shown, and letters stay legible."""
    job_id = page_jobs.succeeded(reports.run(compare=["qdrop"]))
    page = open_page(f"/page/jobs/{job_id}/report").page
    for width in (320, 390, 704, 768, 1024, 1100, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        plots = page.evaluate(
            """() => [...document.querySelectorAll('.plot')].filter(plot => plot.offsetWidth).map(plot => {
                const svg = [...plot.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width);
                const box = svg[0].getBoundingClientRect(), text = svg[0].querySelector('text');
                const scale = box.width / svg[0].viewBox.baseVal.width;
                return [svg.length, box.right, plot.getBoundingClientRect().right, plot.scrollWidth - plot.clientWidth,
                        scale * parseFloat(getComputedStyle(text).fontSize)];
            })"""
        )
        assert len(plots) >= 4
        for shown, right, end, beyond, letters in plots:
            assert (shown, beyond) == (1, 0), width
            assert right <= end + 0.5, width
            assert letters > 7, width


def test_on_paper_there_are_no_buttons(open_page: Open, page_jobs: PageJobs) -> None:
    job_id = page_jobs.running()
    page = open_page("/").page
    page.emulate_media(media="print")
    for path in ("/", f"/page/jobs/{job_id}"):
        page.goto(path)
        assert page.locator("button:visible, input:visible, nav:visible").count() == 0
        expect(page.get_by_text("residual.onnx").first).to_be_visible()


def test_state_is_told_by_more_than_colour(open_page: Open, page_jobs: PageJobs) -> None:
    page_jobs.running()
    page_jobs.failed("x")
    page = open_page("/", forced_colors="active").page
    for words in ("Running", "Failed"):
        expect(page.locator("td .state", has_text=words)).to_be_visible()
