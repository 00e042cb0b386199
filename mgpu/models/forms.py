"""A MODEL argument as what engines can load: a GGUF for llama.cpp and Ollama, safetensors for vLLM, an Ollama tag."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.errors import BadModel, MgpuError, Missing, UsageError
from mgpu.models.facts import ModelFacts
from mgpu.models.source import (
    GgufFile,
    HubRepository,
    ModelFolder,
    ModelSource,
    OllamaTag,
    ProfileName,
    in_quantisation,
)
from mgpu.units import gib

if TYPE_CHECKING:
    from mgpu.models.hub import HubFiles
    from mgpu.models.remote import RemoteGguf
    from mgpu.profile import GgufSource, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFolder:
    """A repository on Hugging Face that is fetched whole, to be loaded as a folder."""

    repository: str
    revision: str = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model in one form and quantisation.

    `path` is the file or folder on disk; None while it is to be had from `source` only (None for a file of the
    user's). `remote` is what was read of it on the hub, `unconfirmed` why the hub could not be asked again, `remark`
    what the user should know of a plan made from these facts.
    """

    facts: ModelFacts
    path: Path | None = None
    source: GgufSource | HubFiles | HubFolder | OllamaTag | None = None
    remote: RemoteGguf | None = None
    unconfirmed: str | None = None
    remark: str | None = None

    @property
    def parts(self) -> int:
        """Of how many files a GGUF is."""
        from mgpu.models.choice import part_count

        return part_count(Path(self.label).name)

    @property
    def label(self) -> str:
        """What the model is loaded from: a path, or the name that it will have once it is fetched."""
        if self.path:
            return str(self.path)
        match self.source:
            case HubFolder(repository=name):
                return name
            case OllamaTag() as tag:
                return f"{tag.name}:{tag.tag}"
            case None:
                return self.facts.name
            case source:
                return source.files[0] if source.files else f"{self.facts.name}-{self.facts.quantisation}.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model by `name` in all forms it is to be had in, of each the preferred quantisation first; `kind` says in a
    few words what MODEL was."""

    name: str
    kind: str
    gguf: tuple[Weights, ...] = ()
    safetensors: tuple[Weights, ...] = ()
    tag: tuple[Weights, ...] = ()
    profile: Profile | None = None

    def forms(self, backend: str) -> tuple[Weights, ...]:
        """Return what the engine called `backend` can load of it; nothing if there is no such form."""
        whole = tuple(weights for weights in self.gguf if weights.parts == 1)  # Ollama takes no others
        return {"llama.cpp": self.gguf, "vllm": self.safetensors, "ollama": whole or self.tag}[backend]

    def other_quantisations(self, weights: Weights) -> Iterator[ModelFacts]:
        """Yield what the profile holds in the form of `weights`, but in other quantisations."""
        from mgpu.models.shape import facts_from_shape

        if self.profile and weights in self.gguf:
            for quantisation in self.profile.quantisations:
                if quantisation != weights.facts.quantisation:
                    yield facts_from_shape(self.name, self.profile.model, quantisation)
        elif self.profile:
            for other in _safetensors_of(self.profile, None):
                if other.facts.quantisation != weights.facts.quantisation:
                    yield other.facts

    def in_quantisation(self, backend: str, quantisation: str | None) -> Weights:
        """Return what the engine called `backend` loads in `quantisation` (as facts name it): of a profile, any that
        it has. The preferred form where there is no such one."""
        others: Iterator[Weights] = iter(())
        if self.profile and backend == "vllm":
            others = _safetensors_of(self.profile, None)
        elif self.profile and quantisation in self.profile.quantisations:
            others = iter((_gguf_of(self.profile, quantisation),))
        found = (*self.forms(backend), *others)
        return next((weights for weights in found if weights.facts.quantisation == quantisation), found[0])


def find_model(source: ModelSource, quant: str | None, *, backend: str = "auto") -> Model:
    """Return the model that MODEL and `--quant` (None: not given) mean, without fetching weights. Of a repository that
    holds both forms it is the GGUF, unless `backend`, the engine that was asked for, is vLLM.

    Raises UsageError where `quant` is none of its quantisations, Missing for what is not there, BadModel for what is
    no model.
    """
    match source:
        case ProfileName(name):
            return _profiled(name, quant, backend)
        case GgufFile(path):
            _refuse_quantisation(quant, path)
            return _gguf_file(path)
        case ModelFolder(path):
            _refuse_quantisation(quant, path)
            return _folder(path)
        case HubRepository():
            return _on_hub(in_quantisation(source, quant), safetensors=backend == "vllm")
        case OllamaTag():
            return _tagged(source, quant)


def choose_quantisation(profile: Profile, quant: str | None) -> tuple[str, GgufSource]:
    """Return the GGUF quantisation that `--quant` means (None: the profile's own choice) and where it is to be had.

    Raises UsageError if the profile has none by that name.
    """
    wanted = profile.default_quantisation if quant is None else quant.upper()
    for name, source in profile.quantisations.items():
        if name == wanted:
            return wanted, source
    raise _no_quantisation(profile, str(quant))


def _profiled(name: str, quant: str | None, backend: str) -> Model:
    from mgpu.profile import load_profile

    profile = load_profile(name).profile
    gguf = (_gguf_of(profile, quant),) if quant is None or quant.upper() in profile.quantisations else ()
    safetensors = tuple(_safetensors_of(profile, quant))
    if not gguf and not safetensors:
        raise _no_quantisation(profile, str(quant), backend)
    return Model(name=name, kind="a profile", gguf=gguf, safetensors=safetensors, profile=profile)


def _gguf_of(profile: Profile, quant: str | None) -> Weights:
    from mgpu.models.fetch import find_local
    from mgpu.models.gguf_facts import facts_from_gguf
    from mgpu.models.shape import facts_from_shape

    wanted, source = choose_quantisation(profile, quant)
    path = find_local(source, quantisation=wanted)
    if path:
        return Weights(facts=replace(facts_from_gguf(path), name=profile.name), path=path, source=source)
    return Weights(facts=facts_from_shape(profile.name, profile.model, wanted), source=source)


def _safetensors_of(profile: Profile, quant: str | None) -> Iterator[Weights]:
    from mgpu.models.folder import find_local_folder
    from mgpu.models.hf import facts_from_folder
    from mgpu.models.hf_config import is_called
    from mgpu.models.vllm_shape import facts_for_vllm

    for each in profile.vllm:
        source = HubFolder(repository=each.repository)
        path = find_local_folder(each.repository)
        if path:
            facts = replace(facts_from_folder(path), name=profile.name)
        else:
            facts = facts_for_vllm(profile.name, profile.model, each.quantisation, source=each.repository)
        if quant is None or each.quantisation == quant.lower() or is_called(facts.quantisation, quant):
            yield Weights(facts=facts, path=path, source=source)


def _gguf_file(path: Path) -> Model:
    from mgpu.models.gguf_facts import facts_from_gguf

    if path.is_dir():
        return _folder(path)
    facts = facts_from_gguf(path)
    name = path.name.removesuffix(".gguf")
    return Model(name=name, kind="a GGUF file", gguf=(Weights(facts=replace(facts, name=name), path=path.absolute()),))


def _folder(path: Path) -> Model:
    from mgpu.models.hf import facts_from_folder

    if not path.exists():
        on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path))
        hint = f"on Hugging Face it would be hf:{path}" if on_hub else "check the path"
        raise Missing(f"there is no file or folder {path}", code="model-missing", hint=hint)
    if path.is_dir() and not (path / "config.json").exists():
        raise BadModel(
            f"{path} is a folder without a config.json: there is no model in it that vLLM could load",
            code="model-missing",
            hint=f"for llama.cpp, give one file: ls {path}/*.gguf",
        )
    facts = facts_from_folder(path)
    return Model(
        name=facts.name, kind="a model in safetensors", safetensors=(Weights(facts=facts, path=path.absolute()),)
    )


def _on_hub(source: HubRepository, *, safetensors: bool) -> Model:
    """The model from what is on disk of it, else from the first megabytes of it on the hub."""
    from mgpu.models.fetch import find_local
    from mgpu.models.folder import find_local_folder
    from mgpu.models.gguf_facts import facts_from_gguf
    from mgpu.models.hf import facts_from_folder
    from mgpu.models.hf_config import is_called
    from mgpu.models.remote import RemoteConfig, facts_from_remote, folder_on_hub, model_on_hub

    name = source.repository.split("/")[1].removesuffix("-GGUF")
    if not safetensors and (path := find_local(source)):
        weights = Weights(facts=replace(facts_from_gguf(path), name=name), path=path)
        return Model(name=name, kind="a GGUF file", gguf=(weights,))
    if path := find_local_folder(source.repository):
        facts = facts_from_folder(path)
        if not source.quantisation or is_called(facts.quantisation, source.quantisation):
            weights = Weights(facts=replace(facts, name=name), path=path)
            return Model(name=name, kind="a model in safetensors", safetensors=(weights,))
    found = folder_on_hub(source) if safetensors else model_on_hub(source)
    if isinstance(found, RemoteConfig):
        facts = facts_from_remote(found, name)
        weights = Weights(facts=facts, source=HubFolder(repository=source.repository), unconfirmed=found.unconfirmed)
        return Model(name=name, kind="a model in safetensors", safetensors=(weights,))
    weights = Weights(
        facts=replace(found.facts, name=name), source=found.files, remote=found, unconfirmed=found.unconfirmed
    )
    return Model(name=name, kind="a GGUF file", gguf=(weights,))


def _tagged(tag: OllamaTag, quant: str | None) -> Model:
    from mgpu.models.ollama_library import find_tag

    if quant:
        raise UsageError(
            f"--quant {quant} chooses among files; of {tag} the tag says it",
            hint=f"see https://ollama.com/library/{tag.name}/tags, then ollama:{tag.name}:TAG",
        )
    found = find_tag(tag)
    name = f"{tag.name.rsplit('/', 1)[-1]}-{tag.tag}" if tag.tag != "latest" else tag.name.rsplit("/", 1)[-1]
    projector = f"its vision projector ({gib(found.projector_bytes)}) is not in the plan"
    weights = Weights(
        facts=replace(found.facts, name=name),
        source=tag,
        path=found.path,
        unconfirmed=found.unconfirmed,
        remark=projector if found.projector_bytes else None,
    )
    return Model(name=name, kind="an Ollama model", tag=(weights,))


def _refuse_quantisation(quant: str | None, path: Path) -> None:
    if quant:
        raise UsageError(f"--quant {quant} chooses among a profile's files; {path} is one model", hint="leave it out")


def _no_quantisation(profile: Profile, quant: str, backend: str = "auto") -> UsageError:
    """The error for a quantisation that is not there, with the nearest of those that `backend` loads."""
    for_vllm = list(dict.fromkeys(source.quantisation for source in profile.vllm))
    for_gguf: list[str] = [*profile.quantisations]
    every = [*for_gguf, *for_vllm]
    there = (every if backend == "auto" else for_vllm if backend == "vllm" else for_gguf) or every
    by_name = {name.lower(): name for name in there}
    near = difflib.get_close_matches(quant.lower(), by_name, n=1, cutoff=0.5)
    usual = profile.default_quantisation if profile.default_quantisation in there else there[0]
    also = f"; for vLLM {', '.join(for_vllm)}" if for_vllm else ""
    return UsageError(
        f"profile {profile.name} has no quantisation {quant}; it has {', '.join(for_gguf)}{also}",
        hint=f"--quant {by_name[near[0]] if near else usual}",
    )


def missing_form(model: Model, backend: str) -> MgpuError:
    """Return the error for a model that the engine called `backend` cannot load in any of its forms: of a profile, in
    the quantisation that was asked for."""
    if backend == "ollama" and model.gguf:
        return Missing(
            f"{model.name} is in {model.gguf[0].parts} parts, and Ollama takes only whole files",
            code="split-model",
            hint="join them with llama-gguf-split --merge, or use --backend llama.cpp",
        )
    if profile := model.profile:
        there = [source.quantisation for source in profile.vllm] if backend == "vllm" else [*profile.quantisations]
        if there:
            return UsageError(
                f"profile {model.name} has no such quantisation for {backend}; it has {', '.join(there)}",
                hint=f"--quant {there[0]}, or leave --backend out",
            )
        return Missing(
            f"profile {model.name} names no repository that {backend} can load",
            code="form-unsupported",
            hint="leave --backend out, or give hf:ORG/REPO",
        )
    wanted = {"llama.cpp": "a GGUF file", "vllm": "safetensors", "ollama": "a GGUF file or an Ollama tag"}[backend]
    hints = {
        "llama.cpp": "give a .gguf file or a repository with GGUF files; or --backend vllm",
        "vllm": "give a repository with safetensors (hf:ORG/REPO) or a folder; or leave --backend out",
        "ollama": "give a .gguf file or ollama:NAME",
    }
    return Missing(
        f"{model.name} is {model.kind}, and {backend} wants {wanted}", code="form-unsupported", hint=hints[backend]
    )
