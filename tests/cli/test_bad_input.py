"""Whatever is typed: a sentence, a next step, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import re
import shlex
import socket
import struct
import sys
from pathlib import Path

import pytest

from mgpu.profile import shipped_profile_folder

from .program import Ended, Mgpu

TWO_CARDS = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)"
)
PROFILE = (shipped_profile_folder() / "llama-8b.yaml").read_text()
# Ten to the power of eight entries, were it unfolded.
UNFOLDING = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def files(tmp_path: Path, tiny: Path) -> Path:
    """A folder of models, snapshots and programs with something wrong in each."""
    folder = tmp_path / "files"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder.gguf").mkdir()
    with tiny.open("rb") as file:
        start = file.read(2_000_000)
    texts = {"empty.gguf": "", "text.gguf": "hello, I am no model", "object.json": "{}", "list.json": "[]"}
    texts |= {"no.json": "{captured_at: 1}", "numbers.json": '{"captured_at": NaN}', "unrunnable": "x"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name, content in {
        "header.gguf": start[:4000],
        "half.gguf": start,
        "tensors.gguf": b"GGUF" + struct.pack("<IQQ", 3, 10**18, 0),
        "string.gguf": b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 40) + b"general",
        "binary.json": b"\xff\xfe\0",
    }.items():
        (folder / name).write_bytes(content)
    for name, text in {
        "failing": "#!/bin/sh\necho libcuda.so.1: cannot open shared object file >&2\nexit 127\n",
        "silent": "#!/bin/sh\n",
        "no-program": "I am a text",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def profiles() -> Path:
    """Profiles of the user's own, with something wrong in each."""
    folder = Path(os.environ["XDG_CONFIG_HOME"]) / "mgpu" / "profiles"
    folder.mkdir(parents=True)
    for name, text in {
        "a-list": "- a\n- b\n",
        "twice": f"{PROFILE}\nname: twice\n",
        "nul": f"{PROFILE}\0\n",
        "unfolding": UNFOLDING,
        "unknown-key": PROFILE.replace("\nmodel:", "\nctxx: 4096\nmodel:"),
        "unknown-quant": PROFILE.replace("Q5_K_M", "Q5_K_X"),
        "not-a-number": re.sub(r"layers: \d+", "layers: many", PROFILE),
        "empty": "",
        "other-name": PROFILE,
    }.items():
        own_name = text if name == "other-name" else re.sub(r"(?m)^name: llama-8b", f"name: {name}", text)
        (folder / f"{name}.yaml").write_text(own_name)
    return folder


def assert_explained(ended: Ended, exit_code: int, message: str, hint: str) -> None:
    """See that the exit code is right, and that message and hint hold these words ("…" stands between them)."""
    assert ended.exit_code == exit_code, ended
    assert ended.out == "", ended
    found = re.search(r"(?ms)^error +(\S.*?)\nnext +(\S.*?)$", ended.err)
    assert found, ended
    for words, text in ((message, found[1]), (hint, found[2])):
        pattern = ".*".join(map(re.escape, words.split("…")))
        assert re.search(pattern, " ".join(text.split())), (words, text)


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        # Models
        pytest.param("{files}/missing.gguf", 3, "there is no file…missing.gguf", "", id="a file that is not there"),
        pytest.param("{files}/header.gguf", 3, "header is cut off", "download it again", id="half a header"),
        pytest.param("{files}/half.gguf", 3, "download is incomplete", "download it again", id="half a file"),
        pytest.param("{files}/empty.gguf", 3, "is empty", "download it again", id="an empty file"),
        pytest.param("{files}/text.gguf", 3, "no GGUF file", "another file", id="a text"),
        pytest.param("{files}/folder", 3, "is a folder", "*.gguf", id="a folder"),
        pytest.param("{files}/folder.gguf", 3, "is a folder", "*.gguf", id="a folder named like a file"),
        pytest.param("{files}/tensors.gguf", 3, "1,000,000,000,000,000,000 tensors", "", id="10^18 tensors"),
        pytest.param("{files}/string.gguf", 3, "points past the file", "", id="a string longer than its file"),
        pytest.param("{files}/nowhere/model", 3, "no file or folder", "check the path", id="a path that is not there"),
        pytest.param("''", 2, "MODEL is empty", "mgpu profiles list", id="an empty name"),
        pytest.param("a..b", 2, "neither a profile's name nor a path", "", id="a name that is none"),
        pytest.param("'a\nb'", 2, "cannot be printed", "", id="a line break"),
        pytest.param(f"{'x' * 600}.gguf", 2, "605 characters long", "", id="a name of six hundred characters"),
        pytest.param("https://huggingface.co/a/b", 2, "web address", "hf:a/b", id="a web address"),
        pytest.param("hf:a", 2, "is not hf:ORG/REPO", "for example", id="half a repository"),
        pytest.param("ollama:a", 3, "ollama:a:latest cannot be read", "", id="a registry out of reach"),
        pytest.param(
            "llama-80b", 2, "no profile 'llama-80b'; the nearest are llama-8b", "mgpu profiles list", id="a slip"
        ),
        pytest.param(
            "/etc/hostname", 3, "neither a .gguf file nor a folder", "a .gguf file", id="a file of another kind"
        ),
        pytest.param("llama-8b --quant Q4_K_N", 2, "no quantisation Q4_K_N", "--quant Q4_K_M", id="no such file"),
        pytest.param("llama-8b --quant FOO", 2, "no quantisation FOO", "--quant Q4_K_M", id="a file like none"),
        pytest.param("llama-8b --quant fp4 --backend llama.cpp", 2, "fp4", "--quant Q4_K_M", id="no such GGUF"),
        pytest.param("llama-8b --quant fp4 --backend vllm", 2, "fp4", "--quant fp8", id="no file for vLLM"),
        pytest.param(
            "llama-8b --quant awq --backend llama.cpp", 2, "for llama.cpp; it has Q4_K_M, ", "Q4_K_M", id="vLLM's file"
        ),
        pytest.param("{tiny} --quant Q4_K_M", 2, "is one model", "leave it out", id="a choice among one file"),
        # Profiles
        pytest.param("a-list", 2, "a-list.yaml:1:1: is a list", "profiles check", id="a profile that is a list"),
        pytest.param("twice", 2, "twice.yaml:…name: is set twice", "profiles check", id="a key set twice"),
        pytest.param("nul", 2, "nul.yaml:…NUL byte", "profiles check", id="a NUL byte"),
        pytest.param("unfolding", 2, "unfolding.yaml:1:…anchors", "profiles check", id="anchors that unfold for ever"),
        pytest.param("unknown-key", 2, "unknown-key.yaml:…did you mean 'ctx'", "profiles check", id="an unknown key"),
        pytest.param("unknown-quant", 2, "Q5_K_X…did you mean 'Q5_K_", "profiles check", id="an unknown quantisation"),
        pytest.param("not-a-number", 2, "model.layers: expected a whole number, found 'many'", "", id="a wrong type"),
        pytest.param("empty", 2, "empty.yaml:1:1: is empty", "profiles check", id="an empty profile"),
        pytest.param("other-name", 2, "other-name.yaml:…'llama-8b'", "profiles check", id="the name of another"),
        # Cards
        pytest.param("{tiny} --gpus 3", 3, "asks for 3 cards; this machine has 2", "gpu0", id="three cards of two"),
        pytest.param("{tiny} --gpus 0", 2, "asks for no card", "--gpus none", id="no cards"),
        pytest.param("{tiny} --gpus x", 2, "'x' is not a card", "a count", id="a card that is none"),
        pytest.param("{tiny} --gpus ''", 2, "is not a card", "a count", id="an empty choice of cards"),
        pytest.param("{tiny} --gpus 0,0", 2, "names gpu0 twice", "", id="a card twice"),
        pytest.param("{tiny} --gpus 0,7", 3, "no such card", "gpu1", id="a card that is not there"),
        pytest.param("{tiny} --gpus GPU-ffff", 3, "no such card", "gpu1", id="a UUID that is not there"),
        pytest.param("{tiny} --gpus=-1", 2, "is not a card", "", id="a negative count"),
        pytest.param(f"{{tiny}} --gpus {'9' * 400}", 2, "no machine has", "mgpu gpus", id="more cards than atoms"),
        # Other machines
        pytest.param("{tiny} --machine 2x", 2, "a card's name is missing", "2x3090+4090", id="a count of nothing"),
        pytest.param("{tiny} --machine ''", 2, "name is missing", "2x3090+4090", id="an empty machine"),
        pytest.param("{tiny} --machine 0x4090", 2, "at least 1", "--machine none", id="no card of a kind"),
        pytest.param("{tiny} --machine 999x4090", 2, "at most 64 cards", "8xH100", id="too many cards"),
        pytest.param("{tiny} --machine 2x4091", 2, "'4091'…RTX 4090", "mgpu gpus --json", id="an unknown card"),
        pytest.param("{tiny} --machine {files}/none.json", 2, "No such file", "mgpu gpus --json", id="no snapshot"),
        pytest.param("{tiny} --machine {files}/object.json", 2, "captured_at: missing", "", id="an empty snapshot"),
        pytest.param("{tiny} --machine {files}/list.json", 2, "expected an object", "", id="a snapshot that is a list"),
        pytest.param("{tiny} --machine {files}/no.json", 2, "is not JSON: line 1", "", id="a snapshot that is no JSON"),
        pytest.param("{tiny} --machine {files}/numbers.json", 2, "NaN", "", id="a snapshot with no number"),
        pytest.param("{tiny} --machine {files}/binary.json", 2, "UTF-8", "", id="a snapshot that is no text"),
        pytest.param("{tiny} --machine {files}/folder", 2, "Is a directory", "", id="a snapshot that is a folder"),
        # Sizes and shares
        pytest.param("{tiny} --ctx 0", 2, "--ctx '0' is not positive", "--help", id="a context of nothing"),
        pytest.param("{tiny} --ctx=-5", 2, "--ctx '-5' is not", "--help", id="a negative context"),
        pytest.param("{tiny} --ctx 8kk", 2, "--ctx '8kk' is not", "--help", id="a context of no number"),
        pytest.param("{tiny} --ctx ''", 2, "--ctx '' is not", "--help", id="an empty context"),
        pytest.param(f"{{tiny}} --ctx {'9' * 20}", 2, "--ctx 9…is too large…8k", "--help", id="a context of 20 digits"),
        pytest.param("{tiny} --headroom lots", 2, "--headroom 'lots' is not a size", "--help", id="headroom in words"),
        pytest.param("{tiny} --headroom=-1GiB", 2, "is not a size", "--help", id="negative headroom"),
        pytest.param("{tiny} --tensor-split a,b", 2, "not a list of proportions such as 3,1", "", id="shares in words"),
        pytest.param("{tiny} --tensor-split 1,-1", 2, "not a list of proportions", "", id="a negative share"),
        pytest.param("{tiny} --tensor-split nan,1", 2, "not a list of proportions", "", id="a share that is no number"),
        pytest.param("{tiny} --tensor-split 0,0", 2, "not a list of proportions", "", id="shares of nothing"),
        pytest.param("{tiny} --tensor-split ''", 2, "not a list of proportions", "", id="empty shares"),
        pytest.param(
            "{tiny} --tensor-split 1,2,3", 2, "3 proportions for 2 cards", "one for each", id="a share too many"
        ),
        pytest.param("{tiny} --tensor-split 1,2 --gpus 1", 2, "2 proportions for 1 card", "", id="shares for one card"),
        pytest.param("{tiny} --parallel 0", 2, "--parallel…it wants 1 or more", "plan --help", id="nobody at a time"),
        pytest.param("{tiny} --parallel 9999", 2, "--parallel…it wants 1024 or less", "plan --help", id="a crowd"),
        pytest.param("{tiny} --parallel many", 2, "--parallel…it wants a whole number", "--help", id="users in words"),
        pytest.param("{tiny} --parallel 2.5", 2, "--parallel…it wants a whole number", "--help", id="half a user"),
        pytest.param("{tiny} --paralel 2", 2, "--paralel; did you mean --parallel", "--help", id="a slip in an option"),
        pytest.param("{tiny} --kv q8_0", 2, "--kv; did you mean --kv-type?", "--help", id="half an option"),
        pytest.param("{tiny} --kv-type q9_0", 2, "--kv-type…q9_0…q8_0", "--help", id="an unknown KV type"),
        pytest.param("{tiny} --kv-type fp8", 2, "--kv-type fp8 is vLLM's", "q8_0", id="a KV type of another engine"),
        pytest.param("{tiny} --split-mode row", 2, "--split-mode…row…layer", "--help", id="an unknown split"),
        pytest.param(
            "{tiny} --split-mode tensor --backend ollama",
            2,
            "Ollama knows no --split-mode tensor",
            "layer split",
            id="a split of another engine",
        ),
        pytest.param("{tiny} --backend exllama", 2, "--backend…exllama…llama.cpp", "--help", id="an unknown engine"),
        pytest.param("{tiny} --backend vllm", 3, "vllm wants safetensors", "--backend", id="another engine's form"),
        pytest.param(
            "{tiny} --flash-attn off --kv-type q8_0", 2, "without flash attention", "f16", id="a contradiction"
        ),
        pytest.param("{tiny} --ubatch 0", 2, "--ubatch", "--help", id="a micro-batch of nothing"),
        pytest.param("{tiny} --offload maybe", 2, "--offload…maybe…allow", "--help", id="an unknown permission"),
    ],
)
def test_what_cannot_be_planned_is_explained(
    mgpu: Mgpu, tiny: Path, files: Path, profiles: Path, words: str, exit_code: int, message: str, hint: str
) -> None:
    ended = mgpu("plan", *shlex.split(words.format(tiny=tiny, files=files)), FAKE_DEVICES=TWO_CARDS)
    assert_explained(ended, exit_code, message, hint)
    mgpu.assert_nothing_left()


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        pytest.param("--port 80000", 2, "--port 80000 is not a port…65535", "", id="too high a port"),
        pytest.param("--port 0", 2, "--port 0 is not a port", "", id="port 0"),
        pytest.param("--port=-1", 2, "--port -1 is not a port", "", id="a negative port"),
        pytest.param("--port http", 2, "--port", "mgpu run --help", id="a port in words"),
        pytest.param("--name a/b", 2, "--name 'a/b' cannot name", "letters, digits", id="a name with a slash"),
        pytest.param("--name ..", 2, "'..' cannot name", "letters, digits", id="a name that leads elsewhere"),
        pytest.param("--name ''", 2, "'' cannot name", "letters, digits", id="an empty instance name"),
        pytest.param(f"--name {'x' * 100}", 2, "cannot name", "63", id="a name of a hundred characters"),
        pytest.param("--name '[red]x'", 2, "'[red]x' cannot name", "", id="a name that would be a colour"),
        pytest.param("--host nonsense.invalid", 2, "'nonsense.invalid' is not an address", "127.0.0.1", id="no host"),
        pytest.param("--host ''", 2, "'' is not an address", "127.0.0.1", id="an empty host"),
        pytest.param(
            "--host 0.0.0.0",
            2,
            "everybody in the network",
            "--api-key-file FILE, or export MGPU_API_KEY=… first; --insecure",
            id="open",
        ),
        pytest.param("--host ::", 2, "everybody in the network", "--insecure", id="open to IPv6 as well"),
        pytest.param("--host 192.0.2.1", 3, "192.0.2.1 cannot be used", "127.0.0.1", id="the address of another"),
        pytest.param("--ask ''", 2, "--ask is empty", "--ask", id="no question"),
        pytest.param("--ask '  '", 2, "--ask is empty", "--ask", id="a blank question"),
        pytest.param("--interval 0", 2, "--interval", "mgpu run --help", id="no time between lines"),
        pytest.param("--interval nan", 2, "--interval", "mgpu run --help", id="a time that is no number"),
        pytest.param("--stall-timeout soon", 2, "--stall-timeout", "mgpu run --help", id="patience in words"),
        pytest.param("--machine 2x4090", 2, "--machine", "mgpu run --help", id="running on another machine"),
        pytest.param("--gpus 3", 3, "this machine has 2", "gpu0", id="more cards than there are"),
        pytest.param("--ctx 100m", 1, "does not fit", "add --ctx", id="more context than memory"),
        pytest.param("-- -m other.gguf", 2, "-m after -- would contradict", "MODEL", id="another model"),
        pytest.param("-- --port 1", 2, "--port after --", "--port", id="another port"),
        pytest.param("-- -c 4096", 2, "-c after --", "--ctx", id="another context"),
        pytest.param("-- --tensor-split=1,1", 2, "--tensor-split after --", "--tensor-split", id="another split"),
        pytest.param("-- --api-key secret", 2, "--api-key after --", "LLAMA_API_KEY", id="a key others could read"),
        pytest.param("-- --rpc", 2, "--rpc wants servers", "", id="servers left out"),
        pytest.param("-- --rpc 127.0.0.1:1", 3, "127.0.0.1:1 does not answer", "ggml-rpc-server", id="a server gone"),
        pytest.param("-- --no-such-flag", 4, "does not know the option --no-such-flag", "--help", id="an unknown flag"),
        pytest.param("-- --threads many", 4, "value of --threads", "--help", id="a flag's wrong value"),
    ],
)
def test_what_cannot_be_run_is_explained(
    mgpu: Mgpu, tiny: Path, words: str, exit_code: int, message: str, hint: str
) -> None:
    ended = mgpu("run", tiny, *shlex.split(words), FAKE_DEVICES=TWO_CARDS, FAKE_FAIL="exit0")
    assert_explained(ended, exit_code, message, hint)
    mgpu.assert_nothing_left()


@pytest.mark.parametrize(
    ("variables", "exit_code", "message", "hint"),
    [
        pytest.param({"MGPU_LLAMA_SERVER": "{files}/nothing"}, 3, "not a program", "unset", id="an engine that is not"),
        pytest.param({"MGPU_LLAMA_SERVER": "{files}/folder"}, 3, "a folder without", "unset", id="an engine's folder"),
        pytest.param(
            {"MGPU_LLAMA_SERVER": "{files}/unrunnable"}, 3, "not a program", "unset", id="an unrunnable engine"
        ),
        pytest.param(
            {"MGPU_LLAMA_SERVER": "{files}/failing"},
            4,
            "cannot run here…status 127: libcuda.so.1",
            "--list-devices",
            id="an engine that lacks a library",
        ),
        pytest.param({"MGPU_LLAMA_SERVER": "{files}/no-program"}, 4, "Exec format error", "pip", id="a text as engine"),
        pytest.param({"MGPU_LLAMA_SERVER": "{files}/silent"}, 4, "not answer as a llama-server", "pip", id="no engine"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "7"}, 3, "CUDA_VISIBLE_DEVICES 'gpu7'", "gpu0", id="a mask of no card"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "x"}, 2, "CUDA_VISIBLE_DEVICES 'x'", "", id="a mask that is none"),
        pytest.param({"XDG_STATE_HOME": "/proc/nowhere"}, 3, "state folder /proc", "XDG_STATE_HOME", id="no state"),
        pytest.param({"LLAMA_ARG_RPC": "127.0.0.1:1"}, 3, "127.0.0.1:1 does not answer", "", id="a server gone"),
        pytest.param({"MGPU_API_KEY": " key"}, 2, "the API key", "", id="a key that cannot be sent"),
    ],
)
def test_a_wrong_environment_is_explained(
    mgpu: Mgpu, tiny: Path, files: Path, variables: dict[str, str], exit_code: int, message: str, hint: str
) -> None:
    given = {name: value.format(files=files) for name, value in variables.items()}
    environment = {"FAKE_DEVICES": TWO_CARDS, "FAKE_FAIL": "exit0", **given}
    assert_explained(mgpu("run", tiny, **environment), exit_code, message, hint)
    mgpu.assert_nothing_left()


def test_an_engine_that_never_answers_is_given_up(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    engine = tmp_path / "hanging"
    engine.write_text("#!/bin/sh\nsleep 600 & wait\n")
    engine.chmod(0o755)
    impatient = "import mgpu.backends.engine as e, mgpu.cli.main as m; e._ANSWER_TIMEOUT_S = 0.5; m.run_main()"
    mgpu.command = lambda *words: [sys.executable, "-c", impatient, *map(str, words)]  # type: ignore[method-assign]
    ended = mgpu("run", tiny, MGPU_LLAMA_SERVER=str(engine))
    assert_explained(ended, 4, "did not answer within 0.5 s", "by hand")
    mgpu.assert_nothing_left()


@pytest.mark.parametrize("words", ["run", "run --dry-run"])
def test_a_chosen_port_that_is_busy_is_explained(mgpu: Mgpu, tiny: Path, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = mgpu(*words.split(), tiny, "--port", port)
    assert_explained(ended, 3, f"port {port} is already in use", "choose another --port")
    mgpu.assert_nothing_left()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("gpus extra", "extra", id="gpus takes no argument"),
        pytest.param("backends --what", "--what", id="backends has no such option"),
        pytest.param("profiles show llama-80b", "the nearest are llama-8b", id="a slip in a profile's name"),
        pytest.param(
            "profiles check {profiles}/a-list.yaml llama-8b", "is a list", id="a wrong profile beside a right"
        ),
        pytest.param("profiles new llama_/x", "cannot name a profile", id="a name that is none"),
        pytest.param("profiles new mine --from nothing", "no profile 'nothing'", id="a profile made from nothing"),
        pytest.param("profiles new empty", "already there", id="a profile that is there already"),
        pytest.param("plans llama-8b", "No such command 'plans'", id="a slip in a command"),
    ],
)
def test_other_commands_explain_themselves(mgpu: Mgpu, profiles: Path, words: str, message: str) -> None:
    ended = mgpu(*words.format(profiles=profiles).split())
    assert ended.exit_code == 2
    assert re.search(r"(?m)^next +\S", ended.err), ended
    assert message in ended.err
    mgpu.assert_nothing_left()
