"""An Ollama that somebody else runs, in place of one of mgpu's own: what of a plan it will follow."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mgpu.backends.ollama import INSTALL_OLLAMA
from mgpu.cli.options import Backend
from mgpu.errors import Missing, UsageError
from mgpu.planning.wants import DEFAULT_HEADROOM_BYTES
from mgpu.running.ollama_attach import HOST_VARIABLE, Attached, Foreign
from mgpu.running.ports import is_loopback, is_this_machine

if TYPE_CHECKING:
    from mgpu.cli.prepared import Prepared
    from mgpu.cli.screens import RunScreen
    from mgpu.cli.serving import Endpoint


def running_ollama(prepared: Prepared, endpoint: Endpoint, screen: RunScreen) -> Attached | None:
    """The Ollama that already runs, where that is the chosen engine: it is used as it is.

    Raises Missing where something else answers at the address that the user's OLLAMA_HOST names.
    """
    if prepared.backend != Backend.ollama:
        return None
    found = prepared.running
    if isinstance(found, Foreign):
        if os.environ.get(HOST_VARIABLE) or prepared.engine is None:
            raise Missing(
                f"there is no Ollama at {found.url}: {found.why}",
                code="not-ollama",
                hint=f"unset {HOST_VARIABLE}, or set it to where Ollama runs"
                if os.environ.get(HOST_VARIABLE)
                else INSTALL_OLLAMA,
            )
        screen.warn([f"{found.url} is not Ollama: {found.why}; mgpu starts one of its own on another port"])
        return None
    if found and not is_this_machine(urlsplit(found.url).hostname or ""):
        raise UsageError(
            f"the Ollama at {found.url} runs on another machine, whose cards mgpu cannot plan",
            hint=f"unset {HOST_VARIABLE} for an Ollama on this one, or run mgpu there",
        )
    if found and (told := _for_an_own_ollama(prepared, endpoint)):
        raise UsageError(
            f"an Ollama runs at {found.url} and is used as it is: {told}",
            hint="leave that out, or stop that Ollama and mgpu starts one of its own",
        )
    return found


def _for_an_own_ollama(prepared: Prepared, endpoint: Endpoint) -> str | None:
    """What was asked for and can only be told to an Ollama that mgpu starts, in a clause; None if nothing was."""
    wants = prepared.plan.chosen.wants
    if endpoint.port is not None:
        return f"--port {endpoint.port} cannot move it"
    if not is_loopback(endpoint.host):
        return f"--host {endpoint.host} cannot move it"
    if endpoint.api_key:
        return "it asks for no API key"
    if prepared.ways[prepared.backend].arguments:
        return "it takes no variables after --"
    asked = {
        f"--parallel {wants.parallel}": wants.parallel != 1,
        "--headroom": wants.headroom_bytes != DEFAULT_HEADROOM_BYTES,
        "--offload allow": wants.offload,
        "--split-mode": wants.split_mode,
        "--tensor-split": wants.tensor_split,
        f"--kv-type {wants.kv_type_k}": wants.kv_type_k != "f16",
        f"--flash-attn {wants.flash_attention}": wants.flash_attention != "auto",
    }
    return next((f"{option} cannot be told to it" for option, given in asked.items() if given), None)


def as_it_is(prepared: Prepared, screen: RunScreen) -> Prepared:
    """The plan that a running Ollama will follow, which mgpu does not reconfigure."""
    own = prepared.left_to_itself()
    wanted, taken = len(prepared.plan.chosen.devices), len(own.plan.chosen.devices)
    if own.plan.best is None:
        screen.warn([f"by the plan it does not fit: {'; '.join(own.plan.chosen.reasons)}"])
    if wanted != taken:
        screen.warn([f"planned were {wanted} cards; the Ollama that runs already takes {taken} by its own rules"])
    return own
