"""How soon the page is on the screen: first contentful paint in headless Chromium, over loopback, many loads.

Every load is a browser context of its own, so nothing is in its cache. The list has as many jobs as a page of it shows,
put into the database; no job runs meanwhile.

    python benchmarks/page.py --loads 30
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import Browser
from record import RESULTS, about, write
from sqlalchemy.orm import sessionmaker

from service.artifacts import open_artifacts
from service.jobs.database import migrate, open_database
from service.local import local_stack
from service.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
import browser
from page_jobs import PageJobs

JOBS = 25
PAINT = """() => new Promise(done => new PerformanceObserver(list => {
    for (const entry of list.getEntries()) if (entry.name === 'first-contentful-paint') done(entry.startTime);
}).observe({type: 'paint', buffered: true}))"""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--loads", type=int, default=30)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder, browser.chromium() as found:
        if isinstance(found, str):
            print(found, file=sys.stderr)
            return 1
        settings = Settings(data_dir=Path(folder), broker_url=None, port=0)
        running = put_in_jobs(settings)
        with local_stack(settings) as stack:
            pages = {"list": "/", "running job": f"/page/jobs/{running}"}
            measured = {name: measure(found, stack.url + path, options.loads) for name, path in pages.items()}
        results = about(torch.device("cpu"), browser=f"Chromium {found.version}", loads=options.loads, jobs=JOBS)
    write(RESULTS / "page.json", {**results, "pages": measured})
    for name, page in measured.items():
        print(f"{name}: first contentful paint {page['median_ms']} ms (median), {page['highest_ms']} ms (highest)")
    return 0


def put_in_jobs(settings: Settings) -> str:
    """Fill the list; the id of one that runs, for a worker that does not exist."""
    migrate(settings)
    engine = open_database(settings)
    jobs = PageJobs(sessionmaker(engine, expire_on_commit=False), open_artifacts(settings.artifacts))
    for _ in range(JOBS - 1):
        jobs.failed("An operator that cannot be captured.")
    running = jobs.running()
    engine.dispose()
    return running


def measure(chromium: Browser, url: str, loads: int) -> dict[str, float | int]:
    """Milliseconds from the start of the navigation, and what was transferred."""
    paints, sizes = [], []
    for _ in range(loads):
        context = chromium.new_context()
        page = context.new_page()
        page.goto(url)
        paints.append(page.evaluate(PAINT))
        entries = "['navigation', 'resource'].flatMap(kind => performance.getEntriesByType(kind))"
        sizes.append(page.evaluate(f"{entries}.reduce((sum, entry) => sum + entry.transferSize, 0)"))
        context.close()
    return {
        "median_ms": round(statistics.median(paints), 1),
        "lowest_ms": round(min(paints), 1),
        "highest_ms": round(max(paints), 1),
        "bytes": int(statistics.median(sizes)),
    }


if __name__ == "__main__":
    sys.exit(main())
