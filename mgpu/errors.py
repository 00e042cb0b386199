"""Every expected failure of mgpu, with its exit code.

    MgpuError
    ├── UsageError        2   the command line is wrong
    │   └── ProfileError  2   a profile is wrong
    ├── NoAnswer          1   the answer is no: does not fit, nothing by that name
    ├── Missing           3   engine, model file, driver, GPU or disk space is missing
    │   └── BadModel      3   the model file is there but is not a usable model
    ├── EngineFailed      4   the engine did not become ready, died, or answered wrongly
    └── Interrupted     130   Ctrl-C

`code` is a stable word for scripts, `message` says what happened and what it means, `hint` is the next
command to type, and `log_reference` the place in a log that tells more, if there is one. The exit codes are
documented in the README; anything else that escapes is a bug (70).
"""

from __future__ import annotations


class MgpuError(Exception):
    """An expected failure: shown as a sentence and a hint, never as a traceback."""

    exit_code = 70
    default_code = "error"

    def __init__(self, message: str, *, code: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.log_reference: str | None = None


class UsageError(MgpuError):
    """The command line is wrong."""

    exit_code = 2
    default_code = "usage"


class ProfileError(UsageError):
    """A profile file is wrong; the message names file, line and key."""

    default_code = "profile-invalid"


class NoAnswer(MgpuError):
    """The answer to the question is no: the model does not fit, nothing by that name runs."""

    exit_code = 1
    default_code = "no"


class Missing(MgpuError):
    """Something outside mgpu is missing: engine, model file, driver, GPU, disk space."""

    exit_code = 3
    default_code = "missing"


class BadModel(Missing):
    """A model file is there but is truncated, corrupt, or not a model."""

    default_code = "model-unusable"


class EngineFailed(MgpuError):
    """The engine did not become ready, died, or answered wrongly; `code` names the cause."""

    exit_code = 4
    default_code = "engine-failed"


class Interrupted(MgpuError):
    """The user pressed Ctrl-C (or the process was asked to end) before the work was done."""

    exit_code = 130
    default_code = "interrupted"
