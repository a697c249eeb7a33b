"""What the API process must not weigh: no torch, and no memory that grows with an upload."""

from __future__ import annotations

import subprocess
import sys

from service.settings import Settings

NO_TORCH = """
import sys, threading, time
import httpx, uvicorn
from service.main import create_app
from service.settings import Settings

app = create_app(Settings.model_validate_json(sys.argv[1]))
server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started and thread.is_alive():
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]
with httpx.Client(base_url=f"http://127.0.0.1:{port}") as web:
    assert web.get("/health/ready").status_code == 200
    assert web.get("/openapi.json").status_code == 200
    config = (None, '{"weight_bits": 2, "activation_bits": 2}')
    assert web.post("/jobs", files={"config": config}).status_code == 400
server.should_exit = True
thread.join()
heavy = {"torch", "cupy", "numpy", "onnx", "numba", "cupy_kernels", "worker"}
print(sorted(name for name in sys.modules if name.split(".")[0] in heavy or
             name.startswith("aquant_core.") and not name.startswith(("aquant_core.config", "aquant_core.report."))
             and name != "aquant_core.report"))
"""

FROZEN = """
import gc
from service.main import application

app = application()
print(any(one is app for one in gc.get_objects()))
"""

CONSTANT_MEMORY = """
import asyncio, os, resource, sys
from service.api.forms import FormStream
from service.artifacts import open_artifacts
from service.settings import Settings

async def body(count):
    yield b'--b\\r\\nContent-Disposition: form-data; name="model"; filename="m"\\r\\n\\r\\n'
    for _ in range(count):
        yield bytes(64 * 1024)
    yield b"\\r\\n--b--\\r\\n"

async def store(artifacts, count):
    form = FormStream(body(count), "multipart/form-data; boundary=b")
    async for part in form.parts():
        stored = await artifacts.put_stream("jobs/a/model", part.chunks(10**10))
        assert stored.size == count * 64 * 1024

artifacts = open_artifacts(Settings.model_validate_json(sys.argv[1]).artifacts)
asyncio.run(store(artifacts, 16 * 32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
asyncio.run(store(artifacts, 16 * 320))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, flush=True)
os._exit(0)  # the store's native threads may still be winding down, which aborts an orderly exit now and then
"""


def _run(program: str, settings: Settings) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, settings.model_dump_json()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_collector_leaves_the_application_alone(settings: Settings) -> None:
    assert _run(FROZEN, settings) == "False"


def test_api_starts_and_answers_without_torch(settings: Settings) -> None:
    assert _run(NO_TORCH, settings) == "[]"


def test_upload_ten_times_the_size_takes_no_more_memory(settings: Settings) -> None:
    # 32 MiB, then 320 MiB: what is allowed is a few pieces of the store's 5 MiB.
    assert int(_run(CONSTANT_MEMORY, settings)) < 40
