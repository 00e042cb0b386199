"""What `mgpu run` shows while it works: steps, progress, the ready line, the status; or the same as JSON events."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
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
    from mgpu.cli.prepared import Prepared
    from mgpu.models.fetch import Progress
    from mgpu.planning.candidates import Candidate
    from mgpu.running.client import Answer, Canary
    from mgpu.running.instance import Instance
    from mgpu.running.ollama_attach import Attached
    from mgpu.running.process import EngineProcess
    from mgpu.running.start import Loading

# Often enough for a terminal to look alive, seldom enough to cost nothing.
_SAMPLE_EVERY_S = 1.0
# Often enough to notice an engine that hangs.
_UNSEEN_SAMPLE_EVERY_S = 5.0
_HISTORY = 12
# A sample that comes a little early is not another interval late.
_NEARLY = 0.9


class RunScreen:
    """The narrator of one `mgpu run`. Steps go to stderr; the ready line, status and answers to stdout.

    When a question is asked the answer alone goes to stdout, so that it can be piped on. A `detached` one writes a log:
    its lines have times, and no status. Without `streams` there are no JSON events.
    """

    def __init__(
        self, out: Output, *, asked: bool, interval_s: float, detached: bool = False, streams: bool = True
    ) -> None:
        self._out = out
        self._detached = detached
        self._streams = streams
        self._shown_at = -math.inf
        self._asked = asked
        self._interval_s = interval_s
        self._memory: Mapping[int, DeviceMemory] = {}
        self._candidate: Candidate | None = None
        self._planned = ""
        self._ready_at = time.monotonic()
        self._answering = False
        self._drains = False

    @property
    def as_json(self) -> bool:
        """Whether a program reads."""
        return self._out.as_json

    @property
    def sample_every_s(self) -> float:
        """Seconds between two readings of the engine's counters."""
        longest = _SAMPLE_EVERY_S if self._out.redraws() else _UNSEEN_SAMPLE_EVERY_S
        return min(longest, self._interval_s)

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
        reach: str | None = None,
    ) -> None:
        """Print the ready line: scripts wait for it. `model` is what clients must ask for, where it is not `name`, and
        `reach` who else than this machine can."""
        self._ready_at = time.monotonic()
        cards = sum(1 for device in candidate.devices if not device.idle)
        used = "CPU" if not cards else f"{cards} GPU" + ("s" if cards > 1 else "")
        pid = process.pid if process else None
        # Where an engine that somebody else runs has put the model is not known.
        how = f"{used}, pid {pid}" if pid else "not started by mgpu"
        line = f"ready: {name} on {url}/v1  ({candidate.backend}, {how}, {seconds(took_s)}{_more(reach)})"
        self._event("ready", name=name, url=f"{url}/v1", model=model or name, pid=pid, seconds=round(took_s, 3))
        if not self._out.as_json:
            self._out.lines(self._when() + line, error=self._asked)
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
            self._step("answer", view.answer_line(answer, self._candidate))

    @contextlib.contextmanager
    def following(self) -> Iterator[Callable[[Sample | None, Rates | None], None]]:
        """Show the status; yields what to call with each sample (None when the engine did not answer)."""
        history: deque[float] = deque(maxlen=_HISTORY)
        terminal = self._out.redraws()
        with self._live(error=False) as draw:

            def show(sample: Sample | None, rates: Rates | None) -> None:
                if self._detached or not (terminal or self._is_due()):
                    return
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

    def became(self, before: Instance, after: Instance) -> None:
        """Say what recovery does: a change that is tried, one that was refused, a restart and what it is for."""
        for place, change in enumerate(after.changes):
            known = before.changes[place] if place < len(before.changes) else None
            if known is None:
                self._event("changed", setting=change.setting, value=change.value, cause=change.cause)
                was = f" instead of {change.before}" if change.before else ""
                self._step("change", f"{change.words}{was}, because of {change.cause}")
            elif change.refused and not known.refused:
                self._event("change-refused", setting=change.setting, value=change.value, reason=change.refused)
                self._step("change", f"{change.words} is no way out: {change.refused.splitlines()[0]}")
        again = after.recent_restarts > before.recent_restarts or after.trouble != before.trouble
        if after.trouble and again:
            why = after.trouble.message
            after_s = after.remaining_s or 0.0
            self._event("restarting", restarts=after.recent_restarts, after_s=after_s, cause=after.trouble.code)
            when = f"in {seconds(after_s)}" if after_s else "now"
            self._step("restart", f"{when}, after: {why}")

    def left_running(self, instance: Instance, took_s: float, reach: str | None = None) -> None:
        """Print the ready line of an instance that goes on by itself, and what to type next."""
        cards = len(instance.gpus)
        used = "CPU" if not cards else f"{cards} GPU" + ("s" if cards > 1 else "")
        how = f"{used}, pid {instance.engine.pid}" if instance.engine else "not started by mgpu"
        if not self._out.as_json:
            about = f"{instance.backend}, {how}, {seconds(took_s)}{_more(reach)}"
            self._out.lines(f"ready: {instance.name} on {instance.url}/v1  ({about})")
        if not self._out.as_json:  # there they are in the result
            self.warn(instance.warnings)
        if instance.served_as not in (None, instance.name):
            self._step("model", f"clients ask for {instance.served_as}")
        self._step("logs", f"mgpu logs {instance.name} -f")
        self._step("stop", f"mgpu stop {instance.name}")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[Instance], None]]:
        """Show how another process starts an instance; yields what to call with its record."""
        last: list[Instance] = []
        begun = time.monotonic()
        with self._live(error=True) as draw:

            def show(instance: Instance) -> None:
                before = last[-1] if last else instance
                last[:] = [instance]
                self.became(before, instance)
                if instance.engine and (before is instance or instance.engine != before.engine):
                    log = view.home_path(Path(instance.log_path or ""))
                    self._step("start", f"{Path(instance.argv[0]).name}, pid {instance.engine.pid}, log {log}")
                elif instance.phase != before.phase and not self._out.redraws(error=True):
                    self._phase(before.phase, instance.phase)
                draw(lambda width: view.phase_line(instance, time.monotonic() - begun, width))

            yield show

    def _phase(self, before: str | None, now: str | None) -> None:
        """A line for each tenth of a fetch; other phases are soon over."""
        name, _, percent = (now or "").partition(", ")
        if name == "downloading" and percent[:-3] != (before or "").partition(", ")[2][:-3]:
            self._step("fetch", percent)

    def _is_due(self) -> bool:
        """Whether it is time for another line of the status."""
        now = time.monotonic()
        if now - self._shown_at < self._interval_s * _NEARLY:
            return False
        self._shown_at = now
        return True

    def stopping(self, name: str) -> None:
        """Say that the engine is being asked to end."""
        self._event("stopping", name=name)
        self._drains = False
        if not self._out.as_json:
            self._out.write_text(f"{self._when()}{'stop':<8} {name} … ", error=True)

    def draining(self, answers: int, left_s: float) -> None:
        """Say, once, that it is not asked to end before its answers have."""
        if not self._drains and not self._out.as_json:
            many = f"{answers} answers are" if answers > 1 else "1 answer is"
            at_once = "" if self._detached else ", Ctrl-C ends it now"
            self._out.write_text(f"{many} being given, {seconds(left_s)} left{at_once} … ", error=True)
        self._drains = True

    def stopped(self, name: str, took_s: float, cut_off: int = 0, *, early: bool = False) -> None:
        """Say that it has ended and what it gave back; `cut_off` are the answers that had not ended, and `early` says
        that it was not ready yet."""
        held = sum(memory.total_bytes for memory in self._memory.values())
        self._event("stopped", name=name, seconds=round(took_s, 3), freed_bytes=held)
        freed = f", {gib(held)} given back" if held else ""
        lost = f", {cut_off} answer{'s were' if cut_off > 1 else ' was'} cut off" if cut_off else ""
        self._out.note(f"stopped {'before it was ready, ' if early else ''}in {seconds(took_s)}{lost}{freed}")

    def _step(self, label: str, text: str) -> None:
        self._out.note(f"{self._when()}{label:<8} {text}")

    def _when(self) -> str:
        """What each line of a log begins with; a terminal's reader knows what time it is."""
        return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z " if self._detached else ""

    def _event(self, event: str, **data: Any) -> None:
        if self._out.as_json and self._streams:
            at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self._out.json_line(envelope(Result(command="run", data={"event": event, "at": at, **data})))

    def _live(self, *, error: bool) -> AbstractContextManager[Draw]:
        return live(self._out, error=error)


def _more(words: str | None) -> str:
    return f", {words}" if words else ""
