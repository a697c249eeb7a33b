"""Iterations on a GPU without waiting for it: captured as CUDA graphs, losses read behind."""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

_EAGER_STEPS = 3
"""Run before a capture, so that libraries have set themselves up (as the CUDA graphs tutorial advises)."""
_READINGS_BEHIND = 2


class Replay:
    """An iteration, captured once a phase and replayed; its tensors must keep their addresses."""

    def __init__(self, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        self._optimizer, self._generator = optimizer, generator
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, iterate: Callable[[], None], phase: Hashable) -> None:
        """Does one iteration: ``iterate`` as it was when its ``phase`` first came."""
        if phase not in self._graphs:
            self._graphs[phase] = self._capture(iterate)
        self._graphs[phase].replay()

    def _capture(self, iterate: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Captures without a trace: parameters, optimizer and generator are afterwards as before."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in parameters]
        states = [{k: v.clone() for k, v in self._optimizer.state.get(p, {}).items()} for p in parameters]
        random = self._generator.get_state()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_EAGER_STEPS):
                iterate()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for parameter, value, state in zip(parameters, kept, states, strict=True):
                parameter.copy_(value)
                for name, tensor in self._optimizer.state[parameter].items():
                    if name in state:
                        tensor.copy_(state[name])
                    else:
                        tensor.zero_()  # made by the first eager step
        self._generator.set_state(random)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with _no_garbage_collection(), torch.cuda.graph(graph):
            iterate()
        return graph


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Another graph that is collected during a capture frees memory, which invalidates the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class LossReadings:
    """Tells of the loss without stopping the device: on a GPU, a reading is told when the next but one is taken."""

    def __init__(self, loss: Tensor, told: Callable[[int, float], None]) -> None:
        self._loss, self._told = loss, told
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()

    def take(self, step: int) -> None:
        """Reads the loss of ``step``, which has just been launched."""
        if self._loss.device.type == "cpu":
            self._told(step, self._loss.item())
            return
        value = torch.empty((), pin_memory=True)
        value.copy_(self._loss, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((step, value, event))
        if len(self._pending) > _READINGS_BEHIND:
            self._tell_oldest()

    def finish(self) -> None:
        """Tells what is left."""
        while self._pending:
            self._tell_oldest()

    def _tell_oldest(self) -> None:
        step, value, event = self._pending.popleft()
        event.synchronize()
        self._told(step, value.item())
