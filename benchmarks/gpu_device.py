"""The device under measurement behind one thin class: captured graphs, events, properties.

`Cuda` is the instrument. `StandIn` has the same methods on the CPU, so that everything around the
instrument runs in the tests; what it times is no measurement, and the report shows nothing of it.
"""

import gc
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CYCLES_PER_S = 2e9  # about the SM clock: torch.cuda._sleep counts cycles


def tensors(result) -> tuple[Tensor, ...]:
    """What a call returned, as a tuple of detached tensors."""
    found = (result,) if isinstance(result, Tensor) else result
    return tuple(t.detach() for t in found if t is not None)


@dataclass
class Graph:
    replay: Callable[[], None]
    results: list[tuple[Tensor, ...]]  # of the last calls: memory that each replay writes again
    calls: int
    seconds: float = 0.0  # of one replay, roughly
    lead: float = 0.0  # seconds that the host needs to queue one replay


class Cuda:
    """One GPU. Everything runs on one side stream: autograd runs a backward on the stream of its
    forward, and a backward on the default stream cannot be captured."""

    stand_in = False

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self.l2_bytes = properties.L2_cache_size
        self.memory_bytes = properties.total_memory
        self.multiprocessors = properties.multi_processor_count
        self.compiled = {}
        self.stream = torch.cuda.Stream(self.device)
        torch.cuda.synchronize()
        torch.cuda.set_stream(self.stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def healthy(self) -> bool:
        """False after an error that stays, such as an illegal address, or a broken capture."""
        try:
            torch.cuda.synchronize()
            return bool(torch.randn(8, device=self.device).isfinite().all().item())
        except Exception:
            return False

    def compile(self, function: Callable, mode: str | None = None) -> Callable:
        """One wrapper per function and mode, so that a second buffer compiles nothing."""
        if (function, mode) not in self.compiled:
            self.compiled[function, mode] = torch.compile(function, dynamic=False, mode=mode)
        return self.compiled[function, mode]

    def capture(self, calls: list[Callable], keep: int) -> Graph:
        """One graph of all calls in a row. They must have run before: no compilation in a capture.

        The results of the last `keep` calls stay alive, so that a call does not write where the one
        before it wrote, and the rotation covers outputs as well as inputs.
        """
        self.synchronize()
        graph, results = torch.cuda.CUDAGraph(), deque(maxlen=keep)
        gc.collect()
        gc.disable()  # a collection may free CUDA objects, which a capture forbids
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for call in calls:
                    results.append(tensors(call()))
        finally:
            gc.enable()
        self.synchronize()
        graph.replay()  # the first one also uploads the graph
        self.synchronize()
        start = time.perf_counter()
        graph.replay()
        lead = time.perf_counter() - start
        self.synchronize()
        captured = Graph(graph.replay, list(results), len(calls), lead=lead)
        captured.seconds = self.time({"": captured}, 1)[""][0]
        return captured

    def time(self, graphs: dict[str, Graph], turns: int, warm: bool = False) -> dict[str, list]:
        """Seconds per replay, in turns A B, B A, …; warm: an untimed replay goes before each.

        The GPU sleeps while the host queues event, graph and event, so that no launch is timed.
        """
        marks = {name: [] for name in graphs}
        for turn in range(turns):
            for name in list(graphs)[:: -1 if turn % 2 else 1]:
                graph = graphs[name]
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if warm:
                    graph.replay()
                wait = min(3 * graph.lead + 50e-6, 5e-3)
                torch.cuda._sleep(int(wait * CYCLES_PER_S))
                begin.record()
                graph.replay()
                end.record()
                marks[name].append((begin, end))
        self.synchronize()
        return {name: [b.elapsed_time(e) / 1e3 for b, e in m] for name, m in marks.items()}

    def sdpa_default(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """The back end that scaled_dot_product_attention takes by itself for these tensors."""
        try:
            from torch.nn.attention import SDPBackend

            return SDPBackend(torch._fused_sdp_choice(q, k, v)).name.lower()
        except Exception:  # a private function, and only a remark
            return None

    def state(self) -> dict:
        """Clocks, temperature and power now, as nvidia-smi tells them; {} where it does not."""
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,"
        fields += "power.draw,power.limit,utilization.gpu"
        if shutil.which("nvidia-smi") is None:
            return {}
        uuid = str(getattr(torch.cuda.get_device_properties(self.device), "uuid", ""))
        chosen = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
        query = [f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        for which in (chosen, []):
            try:
                done = subprocess.run(
                    ["nvidia-smi", *which, *query], capture_output=True, text=True, timeout=20
                )
            except (OSError, subprocess.TimeoutExpired):
                return {}
            if done.returncode == 0 and done.stdout.strip():
                values = done.stdout.splitlines()[0].split(", ")
                return dict(zip(fields.split(","), values, strict=False))
        return {}


class StandIn:
    """The CPU in the GPU's place: same calls, no measurement."""

    stand_in = True
    name, l2_bytes, memory_bytes, multiprocessors = "stand-in", 4096, 2**31, 1
    device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        pass

    def healthy(self) -> bool:
        return True

    def compile(self, function: Callable, mode: str | None = None) -> Callable:
        return function

    def capture(self, calls: list[Callable], keep: int) -> Graph:
        results = deque((tensors(call()) for call in calls), maxlen=keep)

        def replay() -> None:
            for i, call in enumerate(calls):
                at = i - len(calls) + len(results)
                for kept, new in zip(results[at] if at >= 0 else (), tensors(call()), strict=False):
                    kept.copy_(new)

        return Graph(replay, list(results), len(calls), seconds=1e-3)

    def time(self, graphs: dict[str, Graph], turns: int, warm: bool = False) -> dict[str, list]:
        taken = {name: [] for name in graphs}
        for _ in range(turns):
            for name, graph in graphs.items():
                start = time.perf_counter()
                graph.replay()
                taken[name].append(time.perf_counter() - start)
        return taken

    def sdpa_default(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return None

    def state(self) -> dict:
        return {}
