"""The variables of engines' services: from the files that systemd would read, and no others than those that matter."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from mgpu.machine.host_facts import read_host_facts
from mgpu.machine.service_units import read_unit_variables
from tests.fakes.sysfs_tree import SysfsTree
from tests.ordinary_user import as_ordinary_user

ETC, LIB = "etc/systemd/system", "usr/lib/systemd/system"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")


def unit(*lines: str) -> str:
    return "\n".join(
        ("[Unit]", "Description=An engine", "[Service]", *lines, "[Install]", "Environment=OLLAMA_DEBUG=9")
    )


def read(root: Path) -> dict[str, str]:
    found, unread = read_unit_variables(root)
    assert unread == ()
    return {
        f"{each.unit} {each.name}": f"{each.value} {each.path.removeprefix('/etc/systemd/system/')}" for each in found
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, {}, id="no service"),
        pytest.param(
            {
                f"{ETC}/ollama.service": unit(
                    'Environment="PATH=/bin" OLLAMA_DEBUG=1', "Environment='NCCL_ALGO=Ring' X=1"
                )
            },
            {"ollama.service OLLAMA_DEBUG": "1 ollama.service", "ollama.service NCCL_ALGO": "Ring ollama.service"},
            id="one that the installer wrote",
        ),
        pytest.param({f"{ETC}/nginx.service": unit("Environment=NCCL_DEBUG=TRACE")}, {}, id="of something else"),
        pytest.param(
            {
                f"{LIB}/ollama.service": unit("Environment=OLLAMA_DEBUG=1 NCCL_P2P_DISABLE=1"),
                f"{ETC}/ollama.service.d/b.conf": "[Service]\nEnvironment=OLLAMA_DEBUG=0\n",
                f"{ETC}/ollama.service.d/a.conf": "[Service]\nEnvironment=OLLAMA_DEBUG=2\n",
            },
            {
                "ollama.service NCCL_P2P_DISABLE": "1 /usr/lib/systemd/system/ollama.service",
                "ollama.service OLLAMA_DEBUG": "0 ollama.service.d/b.conf",
            },
            id="drop-ins of the administrator",
        ),
        pytest.param(
            {
                f"{LIB}/ollama.service": unit("Environment=NCCL_DEBUG=TRACE"),
                f"{ETC}/ollama.service": unit("Environment=NCCL_DEBUG=WARN"),
            },
            {"ollama.service NCCL_DEBUG": "WARN ollama.service"},
            id="one unit in place of another",
        ),
        pytest.param(
            {
                f"{ETC}/vllm@.service": unit(
                    "Environment=NCCL_DEBUG=TRACE", "EnvironmentFile=-/etc/vllm.env", "EnvironmentFile=-/etc/none.env"
                ),
                "etc/vllm.env": '# NCCL_ALGO=Ring\nNCCL_DEBUG="WARN"\nHF_TOKEN=hf_secret\nNCCL_SHM_DISABLE=1\n',
            },
            {"vllm@.service NCCL_DEBUG": "WARN /etc/vllm.env", "vllm@.service NCCL_SHM_DISABLE": "1 /etc/vllm.env"},
            id="files of variables",
        ),
        pytest.param(
            {
                f"{ETC}/vllm.service": unit(
                    "Environment=NCCL_DEBUG=TRACE \\", "  NCCL_ALGO=Ring", "UnsetEnvironment=NCCL_ALGO"
                ),
                f"{ETC}/vllm.service.d/x.conf": "[Service]\nEnvironment=\nEnvironment=NCCL_PROTO=LL\n",
            },
            {"vllm.service NCCL_PROTO": "LL vllm.service.d/x.conf"},
            id="all that came before taken back",
        ),
        pytest.param(
            {f"{ETC}/vllm.service": unit('Environment="NCCL_DEBUG=TRACE', "EnvironmentFile=relative", "Environment")},
            {},
            id="quotation marks that are left open",
        ),
        pytest.param({f"{ETC}/vllm.service": b"\xff\x00[Service]\n" * 9}, {}, id="garbage"),
    ],
)
def test_what_a_service_is_given_is_read(
    tmp_path: Path, files: dict[str, str | bytes], expected: dict[str, str]
) -> None:
    SysfsTree(tmp_path).files(files)
    assert read(tmp_path) == expected


def test_a_users_own_service_is_told_from_the_systems(tmp_path: Path) -> None:
    text = unit("Environment=NCCL_P2P_DISABLE=1", "EnvironmentFile=%h/vllm.env")
    SysfsTree(tmp_path).files(
        {"home/ada/.config/systemd/user/vllm.service": text, "home/ada/vllm.env": "NCCL_DEBUG=TRACE"}
    )
    found, _ = read_unit_variables(tmp_path)
    assert {(each.user, each.name, each.path) for each in found} == {
        (True, "NCCL_P2P_DISABLE", "/home/ada/.config/systemd/user/vllm.service"),
        (True, "NCCL_DEBUG", "/home/ada/vllm.env"),
    }
    assert read_host_facts(tmp_path)[0].unit_variables == found


def test_a_masked_service_sets_nothing(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path).files({f"{LIB}/ollama.service": unit("Environment=OLLAMA_DEBUG=1")})
    (tree.root / ETC).mkdir(parents=True)
    (tree.root / ETC / "ollama.service").symlink_to("/dev/null")
    assert read(tree.root) == {}


def test_a_file_that_only_root_may_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the folder may be entered, the file in it may not be read
        tree = SysfsTree(Path(folder)).files(
            {f"{ETC}/vllm.service": unit("EnvironmentFile=/etc/vllm.env"), "etc/vllm.env": "NCCL_DEBUG=TRACE"}
        )
        (tree.root / "etc/vllm.env").chmod(0)
        with as_ordinary_user():
            found, unread = read_unit_variables(tree.root)
    assert found == ()
    assert [(each.what, each.needs_root) for each in unread] == [("/etc/vllm.env (vllm.service)", True)]


def test_a_pipe_in_place_of_a_unit_does_not_block(tmp_path: Path) -> None:
    (tmp_path / ETC).mkdir(parents=True)
    os.mkfifo(tmp_path / ETC / "vllm.service")
    found, unread = read_unit_variables(tmp_path)
    assert (found, len(unread)) == ((), 1)
