"""What `mgpu run` shows while it works: steps, progress, the ready line, the status; or the same as JSON events."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mgpu.cli.live import Draw, live
from mgpu.cli.output import Output
from mgpu.cli.pace import Pace
from mgpu.cli.result import Result, envelope
from mgpu.cli.views import status as view
from mgpu.cli.views.words import sizes
from mgpu.units import gib, seconds

if TYPE_CHECKING:
    from mgpu.backends.backend import DeviceMemory
    from mgpu.backends.engine import Engine
    from mgpu.backends.samples import Rates, Sample
    from mgpu.cli.prepare import Prepared
    from mgpu.models.fetch import Progress
    from mgpu.planning.candidates import Candidate
    from mgpu.running.client import Answer, Canary
    from mgpu.running.ollama_attach import Attached
    from mgpu.running.process import EngineProcess
    from mgpu.running.start import Loading

# Often enough for a terminal to look alive, seldom enough to cost nothing.
_SAMPLE_EVERY_S = 1.0
_HISTORY = 12


class RunScreen:
    """The narrator of one `mgpu run`. Steps go to stderr; the ready line, status and answers to stdout.

    When a question is asked the answer alone goes to stdout, so that it can be piped on.
    """

    def __init__(self, out: Output, *, asked: bool, interval_s: float) -> None:
        self._out = out
        self._asked = asked
        self._interval_s = interval_s
        self._memory: Mapping[int, DeviceMemory] = {}
        self._candidate: Candidate | None = None
        self._planned = ""
        self._ready_at = time.monotonic()
        self._answering = False

    @property
    def sample_every_s(self) -> float:
        """Seconds between two readings of the engine's counters."""
        terminal = self._out.redraws()
        return min(_SAMPLE_EVERY_S, self._interval_s) if terminal else self._interval_s

    def warn(self, warnings: Sequence[str]) -> None:
        """Say what the user should know before anything starts."""
        for warning in warnings:
            self._event("warning", message=warning)
            self._out.warn(warning)

    def planned(self, prepared: Prepared) -> None:
        """Say what is going to be started."""
        candidate = prepared.plan.chosen
        self._event(
            "planned",
            model=prepared.name,
            backend=candidate.backend,
            quant=candidate.quant,
            ctx_tokens=candidate.ctx_tokens,
            why=prepared.plan.why,
        )
        self._planned = view.plan_line(candidate)
        self._step("plan", self._planned)
        if prepared.plan.why:
            self._step("engine", prepared.plan.why)
        for reason in candidate.reasons:
            self._step("", reason)

    def planned_again(self, prepared: Prepared) -> None:
        """Say what is going to be started after all, where that is not what was said."""
        if self._planned != view.plan_line(prepared.plan.chosen):
            self.planned(prepared)

    @contextlib.contextmanager
    def fetching(self) -> Iterator[Callable[[Progress], None]]:
        """Show a fetch; yields what to call with its progress. Nothing is shown when there is nothing to fetch."""
        begun = time.monotonic()
        last: list[Progress] = []
        pace = Pace()
        with self._live(error=True) as draw:

            def on_progress(progress: Progress) -> None:
                if not last:
                    self._event("fetching", name=progress.name, total_bytes=progress.total_bytes)
                last[:] = [progress]
                rate = pace.look(progress.stage, progress.done_bytes, time.monotonic())
                draw(lambda width: view.fetch_line(progress, rate, width))

            yield on_progress
        if last:
            self._event("fetched", name=last[0].name, seconds=round(time.monotonic() - begun, 3))
            done = last[0].total_bytes or last[0].done_bytes
            label = "fetch" if last[0].stage in ("downloading", "checking", "unpacking") else "import"
            self._step(label, f"{last[0].name}  {sizes(done)} in {seconds(time.monotonic() - begun)}")

    def started(self, process: EngineProcess, engine: Engine) -> None:
        """Say which process was started."""
        self._event("started", pid=process.pid, log_path=str(process.log_path))
        self._step("start", f"{engine.path.name}, pid {process.pid}, log {view.home_path(process.log_path)}")

    def asking_for_flags(self, engine: Engine) -> None:
        """Say that the program is asked what it knows, which may take a while."""
        self._step("flags", f"asking {engine.path.name} which it knows, once for each version")

    def attached(self, found: Attached) -> None:
        """Say which engine is used that somebody else started."""
        held = ", ".join(model.name for model in found.loaded or ()) or "nothing"
        self._event("attached", url=found.url, version=found.version, loaded=[m.name for m in found.loaded or ()])
        self._step("attach", f"Ollama {found.version} at {found.url}, which holds {held}; used as it is")

    @contextlib.contextmanager
    def loading(self, file_bytes: int | None) -> Iterator[Callable[[Loading], None]]:
        """Show how loading goes on; yields what to call with its progress. `file_bytes` is None where nothing tells how
        much of the model is in memory."""
        phase: list[str] = []
        with self._live(error=True) as draw:

            def on_loading(loading: Loading) -> None:
                if phase != [loading.phase]:
                    phase[:] = [loading.phase]
                    self._event("loading", phase=loading.phase)
                draw(lambda width: view.load_line(loading, file_bytes, width))

            yield on_loading

    def checked(
        self, candidate: Candidate, memory: Mapping[int, DeviceMemory], canary: Canary, complaints: Sequence[str]
    ) -> None:
        """Say what the engine really allocated and that it answered; warn of the `complaints` about that."""
        self._candidate, self._memory = candidate, memory
        self._event(
            "checked",
            devices=view.actual_data(candidate, memory),
            answer_seconds=round(canary.seconds, 3),
            generation_tok_s=canary.generation_tok_s,
        )
        self._step("check", view.check_line(candidate, memory, canary))
        self.warn(complaints)

    def ready(
        self,
        name: str,
        url: str,
        process: EngineProcess | None,
        candidate: Candidate,
        took_s: float,
        *,
        model: str | None = None,
    ) -> None:
        """Print the ready line: scripts wait for it. `model` is what clients must ask for, where it is not `name`."""
        self._ready_at = time.monotonic()
        cards = sum(1 for device in candidate.devices if not device.idle)
        used = "CPU" if not cards else f"{cards} GPU" + ("s" if cards > 1 else "")
        pid = process.pid if process else None
        # Where an engine that somebody else runs has put the model is not known.
        how = f"{used}, pid {pid}" if pid else "not started by mgpu"
        line = f"ready: {name} on {url}/v1  ({candidate.backend}, {how}, {seconds(took_s)})"
        self._event("ready", name=name, url=f"{url}/v1", model=model or name, pid=pid, seconds=round(took_s, 3))
        if not self._out.as_json:
            self._out.lines(line, error=self._asked)
            if model and model != name:
                self._step("model", f"clients ask for {model}")

    def answer_text(self, piece: str) -> None:
        """Write a piece of an answer as it comes."""
        self._answering = True
        self._event("answer", text=piece)
        if not self._out.as_json:
            self._out.write_text(view.printable(piece))

    def thought(self, piece: str) -> None:
        """Write a piece of what a reasoning model thinks: to stderr, since it is not the answer."""
        self._event("thinking", text=piece)
        if not self._out.as_json:
            self._out.write_text(view.printable(piece), error=True)

    def answer_broke_off(self) -> None:
        """End the line of an answer that will not go on."""
        if self._answering and not self._out.as_json:
            self._out.write_text("\n")

    def answered(self, answer: Answer) -> None:
        """Say how fast the answer came, by the engine's own count."""
        self._event(
            "answered",
            generated_tokens=answer.generated_tokens,
            generation_tok_s=answer.generation_tok_s,
            prompt_tokens=answer.prompt_tokens,
            prompt_tok_s=answer.prompt_tok_s,
            finish_reason=answer.finish_reason,
        )
        if not self._out.as_json:
            self._out.write_text("\n")
            self._step("answer", view.answer_line(answer))

    @contextlib.contextmanager
    def following(self) -> Iterator[Callable[[Sample | None, Rates | None], None]]:
        """Show the status; yields what to call with each sample (None when the engine did not answer)."""
        history: deque[float] = deque(maxlen=_HISTORY)
        terminal = self._out.redraws()
        with self._live(error=False) as draw:

            def show(sample: Sample | None, rates: Rates | None) -> None:
                history.append((rates.generation_tok_s if rates else None) or 0.0)
                up_s = time.monotonic() - self._ready_at
                assert self._candidate
                self._event("status", **view.status_data(sample, rates, up_s, self._candidate, self._memory))
                cards = view.cards_line(self._candidate, self._memory)
                if terminal:
                    draw(lambda width: view.status_lines(sample, rates, up_s, tuple(history), cards, width))
                elif not self._out.as_json:
                    self._out.lines("   ".join(filter(None, (view.status_line(sample, rates, up_s), cards))))

            yield show

    def stopping(self, name: str) -> None:
        """Say that the engine is being asked to end."""
        self._event("stopping", name=name)
        if not self._out.as_json:
            self._out.write_text(f"{'stop':<8} {name} … ", error=True)

    def stopped(self, name: str, took_s: float) -> None:
        """Say that it has ended and what it gave back."""
        held = sum(memory.total_bytes for memory in self._memory.values())
        self._event("stopped", name=name, seconds=round(took_s, 3), freed_bytes=held)
        freed = f", {gib(held)} given back" if held else ""
        self._out.note(f"stopped in {seconds(took_s)}{freed}")

    def _step(self, label: str, text: str) -> None:
        self._out.note(f"{label:<8} {text}")

    def _event(self, event: str, **data: Any) -> None:
        if self._out.as_json:
            at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self._out.json_line(envelope(Result(command="run", data={"event": event, "at": at, **data})))

    def _live(self, *, error: bool) -> AbstractContextManager[Draw]:
        return live(self._out, error=error)
