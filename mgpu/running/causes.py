"""What kind of cause a failure has, by its code: each kind has a ladder of its own (`mgpu.running.recovery`)."""

from __future__ import annotations

from enum import Enum

from mgpu.backends.failure import Failure
from mgpu.errors import MgpuError


class Kind(Enum):
    """What kind of cause a failure has; each has a ladder of its own."""

    DETERMINISTIC = "the same command would fail again"
    ENVIRONMENT = "something outside is in the way"
    OUT_OF_MEMORY = "memory was refused"
    HANG = "it computes nothing, or nonsense"
    LOST_DEVICE = "a card is gone"
    CRASH = "it ended, and may not do so again"


KINDS = {
    **dict.fromkeys(
        (
            *("bad-host", "port-unusable", "bad-flag", "bad-value", "bad-device", "illegal"),
            *("split-unsupported", "flash-attention-required", "projection-refused"),
            *("model-missing", "model-corrupt", "model-not-gguf", "model-unusable", "model-incomplete"),
            *("model-unreadable", "architecture-unknown", "split-model"),
            *("form-unsupported", "quantisation-unknown", "size-unknown", "file-too-large", "file-differs"),
            *("not-found", "not-supported", "gated", "token-rejected", "checksum-mismatch"),
            *("bad-environment", "configuration-invalid", "profile-unknown", "snapshot-invalid"),
            *("card-unknown", "card-ambiguous", "gpu-unseen"),
            *("engine-broken", "engine-missing", "engine-too-old", "not-ollama"),
            *("bug", "os-error"),
        ),
        Kind.DETERMINISTIC,
    ),
    **dict.fromkeys(
        (
            *("port-in-use", "state-folder", "temporary-folder", "folder-unwritable", "disk-full"),
            *("no-resources", "reaper-failed", "orphaned"),
            *("offline", "hub-unreachable", "rate-limited", "bad-server", "fetch-failed"),
            *("download-interrupted", "pull-failed", "create-failed"),
        ),
        Kind.ENVIRONMENT,
    ),
    **dict.fromkeys(("out-of-memory", "host-out-of-memory", "does-not-fit"), Kind.OUT_OF_MEMORY),
    **dict.fromkeys(("stalled", "no-answer", "hung", "nccl-hang", "garbage", "cards-unreachable"), Kind.HANG),
    **dict.fromkeys(("device-lost", "device-missing", "gpu-missing"), Kind.LOST_DEVICE),
    **dict.fromkeys(
        ("killed", "stopped", "crashed", "exited", "engine-died", "load-failed", "wrong-answer"), Kind.CRASH
    ),
}
"""The kind of every code that can be the cause of an end."""


def kind_of(failure: Failure) -> Kind:
    """Return the kind of a failure. Of a plain end the failure itself says whether it would come again; a code that
    is not known is a plain end."""
    kind = KINDS.get(failure.code, Kind.CRASH)
    if kind in (Kind.DETERMINISTIC, Kind.CRASH):
        return Kind.DETERMINISTIC if failure.deterministic else Kind.CRASH
    return kind


def failure_from(error: MgpuError) -> Failure:
    """Return an error of mgpu's own as a failure; an unknown code would fail again."""
    deterministic = KINDS.get(error.code, Kind.DETERMINISTIC) is Kind.DETERMINISTIC
    return Failure(code=error.code, message=error.message, hint=error.hint, deterministic=deterministic)
