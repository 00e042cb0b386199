"""Checks of the engines that are installed, against the cards that they are to use."""

from __future__ import annotations

import re
from dataclasses import replace

from mgpu.backends.engine import INSTALL_LLAMA_CPP
from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.commands import Task, steps
from mgpu.doctor.facts import settings, unread, usable_cards
from mgpu.machine.inspection import Inspection, InstalledEngine
from mgpu.machine.layout import on_bus
from mgpu.machine.sysfs import INTEL

_INSTALL = {
    "llama.cpp": INSTALL_LLAMA_CPP,
    "vllm": "mgpu backends install vllm",
    "ollama": "curl -fsSL https://ollama.com/install.sh | sh",
}
# Since CUDA 12.8, PyTorch's wheels begin with Turing; NVML's way to write 12.8 is 12080.
_FIRST_WITHOUT_VOLTA, _TURING = 12080, (7, 5)
# Its CUDA 12 runs on any driver of CUDA 12. The architectures are those in vLLM's Dockerfile.rocm.
_FIRST_CUDA_OF_VLLM = 12000
_ROCM_WHEELS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1150", "gfx1151", "gfx1200", "gfx1201")
_FIRST_SOUND_NCCL = (2, 27, 5)


@check("engine-missing", Area.engines, "A")
def engine_missing(inspection: Inspection, purpose: Purpose) -> Said:
    """No engine to run models with, or one whose program does not run.

    Read: llama-server, vllm and ollama where mgpu looks for them, and whether the interpreter and the libraries that
    they ask for are there. None of them is started.
    Rule: fail when the engine that is named is absent or does not run; else warn when there is none at all, or when
    one of them does not run.
    Why: mgpu plans and starts engines, it has none of its own.
    Do: install one; llama.cpp is the smallest. vLLM's wheel is built for CUDA 12.8 or later, so that it runs on no
    NVIDIA card before compute capability 7.5, with no driver of CUDA 11, and on no card of AMD's or Intel's; it has
    wheels of its own for ROCm, for some Radeons and Instincts.
    """
    if missed := [each for each in inspection.unread if "engine" in each.what.lower()]:
        yield unread(inspection, missed[0].what, missed[0].what)
        if not inspection.engines:
            return
    for engine in inspection.engines:
        if engine.problem:
            yield Finding(
                severity=Severity.fail if engine.backend == purpose.backend else Severity.warn,
                summary=f"{engine.backend[:20]} is installed but does not run",
                evidence=(Evidence(path=engine.path or engine.backend, value=engine.problem[:200]),),
                fix=_install(inspection, engine.backend),
            )
    names = {engine.backend for engine in inspection.engines}
    wanted = purpose.backend
    if wanted is not None and wanted not in names:
        yield Finding(
            severity=Severity.fail,
            summary=f"{wanted[:20]} is not installed",
            evidence=(Evidence(path=wanted, value="not found"),),
            fix=_install(inspection, wanted),
        )
    elif not names:
        yield Finding(
            severity=Severity.warn,
            summary="no engine is installed: neither llama.cpp nor vLLM nor Ollama",
            evidence=tuple(Evidence(path=name, value="not found") for name in _INSTALL),
            fix=(
                _INSTALL["llama.cpp"],
                *(() if _no_vllm(inspection) else (f"{_INSTALL['vllm']}  # instead",)),
                f"{_INSTALL['ollama']}  # instead",
            ),
        )


def _install(inspection: Inspection, backend: str) -> tuple[str, ...]:
    why = _no_vllm(inspection) if backend == "vllm" else None
    if why is None:
        return (_INSTALL.get(backend, "install that engine"),)
    return (f"{why}; llama.cpp runs there:", _INSTALL["llama.cpp"])


def _no_vllm(inspection: Inspection) -> str | None:
    """Why the vLLM that mgpu installs runs on none of the cards, None where it may. An unknown fact forbids nothing."""
    nvidia, amd = usable_cards(inspection, "nvidia"), usable_cards(inspection, "amd")
    if nvidia:
        cuda = inspection.driver.cuda_version
        if cuda is not None and cuda < _FIRST_CUDA_OF_VLLM:
            return f"vLLM's wheel needs a driver of CUDA 12 or later, this one has {cuda // 1000}.{cuda % 1000 // 10}"
        known = [_numbers(gpu.compute_capability) for gpu in nvidia]
        if all(version is not None and version < _TURING for version in known):
            return "vLLM's wheel does not run on these cards: it begins with compute capability 7.5"
        return None
    if amd:
        if any(gpu.gfx is None or gpu.gfx in _ROCM_WHEELS for gpu in amd):
            return "vLLM's wheel is built for CUDA (https://docs.vllm.ai tells of the one for ROCm)"
        return "vLLM's wheels do not run on these cards, neither CUDA's nor ROCm's"
    if usable_cards(inspection, "intel") or on_bus(inspection, INTEL):
        return "vLLM's wheel does not run on Intel's cards"
    return None


def _numbers(capability: str | None) -> tuple[int, ...] | None:
    found = re.fullmatch(r"(\d{1,3})\.(\d)", capability or "")
    return (int(found[1]), int(found[2])) if found else None


@check("arch-unsupported", Area.engines, "A", about=(subjects.nvidia_card, subjects.engine))
def arch_unsupported(inspection: Inspection, purpose: Purpose) -> Said:
    """An engine that was not built for a card.

    Read: the compute capability of NVIDIA's cards, and for which the CUDA code in libggml-cuda.so (llama.cpp) or
    libtorch_cuda.so (vLLM) was compiled, by the headers of its first 32 parts. Where vLLM's cannot be read, its CUDA
    version: from 12.8 on, PyTorch's wheels begin with compute capability 7.5.
    Rule: fail for the engine that is named, info for others. Code in PTX form (compute_XX, and whatever llama.cpp
    lists) runs on every later card, compiled code (sm_XX) on cards of the same generation.
    Why: "no kernel image is available" at the first token, or on the Tesla P40 and V100 no vLLM at all.
    Do: llama.cpp or Ollama on old cards, a newer engine for new ones.
    """
    cards = [gpu for gpu in usable_cards(inspection, "nvidia") if gpu.compute_capability is not None]
    # Ollama brings code for everything since Maxwell.
    engines = [each for each in inspection.engines if not (each.problem or each.cpu_build or each.backend == "ollama")]
    nameless = [gpu.index for gpu in usable_cards(inspection, "nvidia") if gpu.compute_capability is None]
    if nameless and engines:
        yield unread(inspection, "the compute capability", "ComputeCapability", of=nameless)
    if not cards:
        return
    unknown: list[str] = []
    for engine in engines:
        if not engine.architectures_known and not _is_new_vllm(engine):
            unknown.append(engine.backend)
            continue
        missing = [gpu for gpu in cards if not _runs_on(engine, gpu.compute_capability or "")]
        if missing:
            names = sorted({f"{gpu.compute_capability} ({gpu.name})" for gpu in missing})
            listed = " ".join(engine.architectures) or f"CUDA {engine.cuda_runtime}: 7.5 and later"
            yield Finding(
                severity=Severity.fail if engine.backend == purpose.backend else Severity.info,
                summary=f"this {engine.backend[:20]} was not built for {_listed(sorted({g.name for g in missing}))}",
                evidence=(
                    Evidence(path=f"architectures of {engine.path or engine.backend}", value=listed[:200]),
                    *(Evidence(path="compute capability", value=name) for name in names),
                ),
                fix=(_other_engine(engine),),
                gpus=tuple(gpu.index for gpu in missing),
                confidence="read" if engine.architectures_known else "inferred",
            )
    if unknown and not nameless:
        skip = unread(inspection, f"architectures of {', '.join(unknown)}", "architectures", *unknown)
        known = ": " in skip.reason
        yield skip if known else replace(skip, reason=f"no CUDA code is found in {', '.join(unknown)}: a CUDA build?")


def _is_new_vllm(engine: InstalledEngine) -> bool:
    return engine.backend == "vllm" and (engine.cuda_runtime or 0) >= _FIRST_WITHOUT_VOLTA


def _runs_on(engine: InstalledEngine, capability: str) -> bool:
    card = re.fullmatch(r"(\d{1,3})\.(\d)", capability)
    if not card:
        return True
    have = (int(card[1]), int(card[2]))
    if not engine.architectures_known:
        return have >= _TURING
    built = [known for name in engine.architectures if (known := _architecture(name))]
    if not built:  # for AMD's cards, or named in words that are unknown here
        return not engine.architectures or any(name.startswith("gfx") for name in engine.architectures)
    return any(
        have >= version and (portable or have[0] == version[0]) and (not exact or have == version)
        for version, portable, exact in built
    )


def _architecture(name: str) -> tuple[tuple[int, int], bool, bool] | None:
    """The version, whether later cards run it (PTX), and whether no other card does (`sm_90a`).

    Numbers alone are llama.cpp's: 860 for 8.6, and it does not say which of them are PTX.
    """
    match = re.fullmatch(r"(sm_|compute_)?(\d{2,4})([af]?)(?:-(?:real|virtual))?|(\d{1,2})\.(\d)(?:\+PTX)?", name)
    if not match:
        return None
    if match[4]:
        return (int(match[4]), int(match[5])), True, False
    number = int(match[2])
    number = number // 10 if number >= 300 else number
    return divmod(number, 10), match[1] != "sm_", match[3] == "a"


def _listed(names: list[str]) -> str:
    first = names[0].removeprefix("NVIDIA ")[:36]
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _other_engine(engine: InstalledEngine) -> str:
    if engine.backend == "vllm":
        return f"{_INSTALL['llama.cpp']} (llama.cpp runs on old cards), or a newer vLLM for new ones"
    return "cmake -B build -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native, built on this computer"


@check("nccl-version", Area.engines, "B", about=(subjects.nvidia_pair,))
def nccl_version(inspection: Inspection, purpose: Purpose) -> Said:
    """An NCCL that shadows the engine's own, or an old one.

    Read: LD_PRELOAD and VLLM_NCCL_SO_PATH in the environment and in the units of engines, and the version that is
    written in the NCCL that llama.cpp would load.
    Rule: warn when either variable names an NCCL; warn below 2.27.5 when llama.cpp is to cut a model over cards.
    Why: a preloaded library of another version hangs or crashes in the first collective; llama.cpp's tensor split gave
    wrong results before 2.27.5.
    Do: unset the variable; pip install -U nvidia-nccl-cu12 and build again.
    """
    for each in settings(inspection):
        if each.name in ("LD_PRELOAD", "VLLM_NCCL_SO_PATH") and "nccl" in each.value:
            yield Finding(
                severity=Severity.warn,
                summary=f"{each.name} in {each.place[:24]} puts another NCCL before the engine's own",
                evidence=(Evidence(path=each.path, value=f"{each.name}={each.value[:200]}"),),
                fix=each.removal,
            )
    if purpose.backend != "llama.cpp" or (purpose.tensor_parallel or 1) < 2:
        return
    for engine in inspection.engines:
        if engine.backend != "llama.cpp" or not engine.nccl:
            continue
        version = tuple(int(part) for part in re.findall(r"\d{1,6}", engine.nccl_version or "")[:3])
        if not version:
            yield unread(inspection, "the version of llama.cpp's NCCL", "nccl")
        elif version < _FIRST_SOUND_NCCL:
            yield Finding(
                severity=Severity.warn,
                summary="llama.cpp's tensor split is faulty with an NCCL older than 2.27.5",
                evidence=(Evidence(path="libnccl.so.2", value=(engine.nccl_version or "")[:40]),),
                fix=(*steps(inspection, Task.newer_nccl), "build llama.cpp again"),
            )


@check("llama-no-nccl", Area.engines, "B", about=(subjects.nvidia_pair, subjects.for_llama_cpp, subjects.cut))
def llama_no_nccl(inspection: Inspection, _purpose: Purpose) -> Said:
    """A llama.cpp without NCCL that is to cut every layer over several cards.

    Read: whether the CUDA backend of the installed llama.cpp was linked to libnccl.
    Rule: warn when llama.cpp is named with two cards or more for one model; whole layers on each card need no NCCL.
    Why: it says "multi GPU performance will be suboptimal" itself: sums then pass through copies between the cards.
    Do: build with -DGGML_CUDA_NCCL=ON, or give each card whole layers.
    """
    for engine in inspection.engines:
        if engine.backend != "llama.cpp" or engine.problem or engine.cpu_build:
            continue
        if engine.nccl is None:
            yield unread(inspection, "whether llama.cpp was built with NCCL", "nccl", "llama")
        elif not engine.nccl:
            yield Finding(
                severity=Severity.warn,
                summary="llama.cpp was built without NCCL: cutting layers over cards is slow",
                evidence=(Evidence(path=engine.path or "llama-server", value="not linked to libnccl"),),
                fix=("cmake -B build -DGGML_CUDA=ON -DGGML_CUDA_NCCL=ON", "or keep whole layers: --split-mode layer"),
            )


@check("custom-allreduce-gate", Area.engines, "B", about=(subjects.nvidia_pair, subjects.for_vllm))
def custom_allreduce_gate(inspection: Inspection, purpose: Purpose) -> Said:
    """A notice of vLLM that looks like a fault and is none.

    Read: how the cards are linked.
    Rule: info when vLLM is to cut a model over three cards or more that are not all joined by NVLink.
    Why: vLLM then says "Custom allreduce is disabled because it's not supported on more than two PCIe-only GPUs". It is
    right to: forcing it gained 15 % in decoding in one case, and lost in the time to the first token.
    Do: nothing; --disable-custom-all-reduce silences it.
    """
    cards = {gpu.index for gpu in usable_cards(inspection, "nvidia")}
    if min(len(cards), purpose.tensor_parallel or len(cards)) < 3:
        return
    links = [link for link in inspection.machine.links if link.a in cards and link.b in cards]
    if not links or any(link.kind == "unknown" for link in links):
        yield unread(inspection, "how the cards are linked", "Topology", "NvLink")
    elif any(link.kind != "NVLink" for link in links):
        yield Finding(
            severity=Severity.info,
            summary='vLLM will say "Custom allreduce is disabled", as it should on these cards',
            evidence=(Evidence(path="links", value=", ".join(sorted({link.kind for link in links}))),),
            fix=("nothing to do (--disable-custom-all-reduce silences it)",),
        )


CHECKS: tuple[Check, ...] = (engine_missing, arch_unsupported, nccl_version, llama_no_nccl, custom_allreduce_gate)
