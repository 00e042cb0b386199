"""Asking NVML through nvidia-ml-py, so that a question without an answer costs that answer alone.

A question has three outcomes: a value, "this card or driver has none" and "may not be asked"; the last two
are None, and neither loses the rest of the card.
"""

from __future__ import annotations

from typing import Any

# nvmlReturn_t: invalid argument (a port the card does not have), not supported, function not found, and of cards that
# are lost, of which more is said elsewhere.
_NO_ANSWER = frozenset({2, 3, 13, 15, 16})


class Nvml:
    """NVML's functions, with None for whatever cannot be answered; `failure` is the last NVML error, and `refused` the
    error of each function that was refused for another reason than that card or driver have no answer."""

    def __init__(self, pynvml: Any) -> None:
        self.pynvml = pynvml
        self.failure: int | None = None
        self.refused: dict[str, int] = {}

    def ask(self, function: str, *arguments: object) -> Any:
        """Call a function by name; None where binding or driver are too old to have it, or NVML refuses."""
        try:
            return getattr(self.pynvml, function)(*arguments)
        except self.pynvml.NVMLError as error:
            self.failure = getattr(error, "value", None)
            if self.failure is not None and self.failure not in _NO_ANSWER:
                self.refused.setdefault(function, self.failure)
        except Exception:
            # Bindings and drivers of unequal age fail in ways of their own: ctypes.ArgumentError,
            # AttributeError, names that are not UTF-8.
            self.failure = None
        return None


class NvmlCard:
    """Questions about one card. `fatal` is the error when it was lost while being asked."""

    def __init__(self, nvml: Nvml, handle: Any) -> None:
        self.nvml = nvml
        self.handle = handle
        self.fatal: int | None = None

    def ask(self, function: str, *arguments: object) -> Any:
        """Call a function with this card as its first argument; None as in `Nvml.ask`."""
        self.nvml.failure = None
        answer = self.nvml.ask(function, self.handle, *arguments)
        if self.nvml.failure in (15, 16):
            self.fatal = self.nvml.failure
        return answer

    def integer(self, function: str, *arguments: object) -> int | None:
        """Return the answer where it is one integer of at most 64 bits, else None."""
        answer = self.ask(function, *arguments)
        if not isinstance(answer, int) or isinstance(answer, bool):
            return None
        return answer if -(2**63) <= answer < 2**64 else None

    def text(self, function: str) -> str | None:
        """Return the answer as printable text, None where there is none."""
        answer = self.ask(function)
        answer = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer
        return "".join(filter(str.isprintable, answer)).strip() or None if isinstance(answer, str) else None

    def field(self, field: int) -> int | None:
        """Return one of NVML's numbered fields of the card."""
        return self.fields((field, None))[0]

    def fields(self, *wanted: tuple[int, int | None]) -> tuple[int | None, ...]:
        """Return several fields, each of the card or of one of its NVLink ports, in one call."""
        keys = [field if port is None else (field, port) for field, port in wanted]
        answer = self.ask("nvmlDeviceGetFieldValues", keys)
        return (None,) * len(wanted) if answer is None else tuple(map(self._value, answer))

    def _value(self, entry: Any) -> int | None:
        if entry.nvmlReturn != 0:
            if entry.nvmlReturn not in _NO_ANSWER:
                self.nvml.refused.setdefault(f"nvmlDeviceGetFieldValues {entry.fieldId}", int(entry.nvmlReturn))
            return None
        # nvmlValueType_t: 0 is a double; the signed ones are 4 and 5.
        members = {1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}
        return getattr(entry.value, members.get(entry.valueType, ""), None)


def thousandth(value: int | None) -> float | None:
    """Return NVML's milliwatts as watts."""
    return None if value is None else value / 1000


def pci_address(info: Any) -> str | None:
    """Return the PCI address as sysfs writes it: NVML's has eight digits of domain and capitals."""
    if info is None:
        return None
    return f"{int(info.domain):04x}:{int(info.bus):02x}:{int(info.device):02x}.0"
