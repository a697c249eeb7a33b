"""Quantizes the residual example net to 2 bits through the real service, and shows what that cost in accuracy.

Broker, API and worker are started on free ports of this machine, the job is submitted over HTTP, followed to its end,
and everything is stopped again. Report and checkpoint stay in the folder ``out``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.client import Client
from service.jobs.schemas import JobDocument
from service.local import local_stack
from service.settings import Settings

EXAMPLES = Path(__file__).parent
METHODS = {"float": "float model", "nearest": "rounding to nearest", "quantized": "AQuant"}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--network", default="residual", choices=["residual", "inverted_residual"])
    arguments.add_argument("--weight-bits", type=int, default=2)
    arguments.add_argument("--activation-bits", type=int, default=2)
    arguments.add_argument("--preset", default="fast", choices=["smoke", "fast", "paper"])
    arguments.add_argument("--out", type=Path, default=Path("out"), help="folder for report and checkpoint")
    options = arguments.parse_args()
    console = Console()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aquant-demo-") as folder:
        console.print("Starting broker, API and worker ...")
        with local_stack(Settings(data_dir=Path(folder), port=0)) as stack, Client(stack.url) as client:
            console.print(f"The service runs at {stack.url}. Submitting {options.network}.onnx ...")
            config = {
                "method": "aquant",
                "weight_bits": options.weight_bits,
                "activation_bits": options.activation_bits,
                "preset": options.preset,
            }
            job = client.submit(
                EXAMPLES / f"{options.network}.onnx",
                EXAMPLES / "calibration.npz",
                config,
                EXAMPLES / "evaluation.npz",
            )
            job = follow(client, job, console)
            if job.state != "succeeded":
                console.print(f"The job ended as {job.state}: {job.error.detail if job.error else ''}", style="red")
                return 1
            report = client.report(job.id)
            report_path, checkpoint_path = options.out / "report.json", options.out / "quantized.safetensors"
            report_path.write_text(json.dumps(report, indent=2) + "\n")
            digest = client.download(job.id, checkpoint_path)
    show(report, console)
    console.print(f"report      {report_path}")
    console.print(f"checkpoint  {checkpoint_path}  (sha256 {digest})")
    console.print(f"            load it: model = aquant_core.load({str(checkpoint_path)!r})")
    console.print(f"Everything is stopped again; {time.monotonic() - started:.0f} seconds in all.")
    return 0


def follow(client: Client, job: JobDocument, console: Console) -> JobDocument:
    """Shows the job's progress until it has finished."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn())
    shown = ""
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("queued", total=1.0, detail="")
        for job in client.watch(job.id):  # noqa: B020 - the newest document replaces the one before
            now = job.progress
            stage = job.stage or str(job.state)
            detail = ""
            if now.blocks and now.block:
                done = (now.block - 1 + now.iteration / max(now.iterations, 1)) / now.blocks
                progress.update(task, completed=done)
                detail = f"block {now.block} of {now.blocks}, {now.iteration}/{now.iterations}"
                if now.loss is not None:
                    detail += f", loss {now.loss:.4g}"
                if now.eta_seconds is not None:
                    detail += f", {now.eta_seconds:.0f} s left"
            progress.update(task, description=stage, detail=detail)
            line = stage if not now.block else f"{stage}: block {now.block} of {now.blocks}"
            if line != shown and not console.is_terminal:  # a log has no bar: one line a step instead
                console.print(line + (f" (loss {now.loss:.4g})" if now.loss is not None else ""))
                shown = line
        if job.state == "succeeded":
            progress.update(task, completed=1.0, description="done", detail="")
    return job


def show(report: dict, console: Console) -> None:
    """The accuracy table, and the size."""
    config, size = report["config"], report["size"]
    title = f"W{config['weight_bits']}A{config['activation_bits']}, {report['accuracy']['float']['n']} test images"
    table = Table("", "top-1", "95 % interval", "top-5", title=title)
    for key, name in METHODS.items():
        row = report["accuracy"][key]
        low, high = row["interval"]
        table.add_row(name, f"{row['top1']:.2%}", f"{low:.2%} - {high:.2%}", f"{row['top5']:.2%}")
    console.print(table)
    console.print(
        f"{size['float_bytes'] / 1e3:.0f} kB of float weights became {size['quantized_bytes'] / 1e3:.0f} kB, "
        f"{size['border_bytes'] / 1e3:.0f} kB of them borders. First and last layer have "
        f"{config['first_last_bits']} bits."
    )


if __name__ == "__main__":
    sys.exit(main())
