"""Machines by name, what they are made of, and what is said where they cannot be had. Nothing is fetched here."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
from diffusette.runtimes.machines import arm64, install
from diffusette.runtimes.machines.debian import Archive, archives
from diffusette.runtimes.machines.lock import read_lock
from diffusette.runtimes.machines.machine import Machine
from diffusette.runtimes.machines.registry import known_machines, machine_named, machines_named
from diffusette.stages.errors import MissingTool, UsageError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def here_is_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here_is_x86: None) -> Path:
    """A folder that looks as if the set-up had run."""
    monkeypatch.setenv(arm64.FOLDER, str(tmp_path))
    folder = tmp_path / "arm64"
    folder.mkdir()
    (folder / arm64.INSTALLED).write_text(json.dumps({"lock": read_lock().digest}))
    return folder


def test_an_emulated_processor_starts_its_own_python_with_its_own_packages(set_up: Path) -> None:
    machine = machine_named("arm64:neoverse-n1")
    assert machine.python == (str(set_up / "usr/bin/python3"),)
    environment = machine.environment_of({"LD_PRELOAD": "theirs.so", "PYTHONPATH": "theirs", "HOME": "kept"})
    assert environment["QEMU_CPU"] == "neoverse-n1"
    assert environment["HOME"] == "kept"
    assert "LD_PRELOAD" not in environment
    link, wheels = environment["PYTHONPATH"].split(":")
    assert (Path(link) / "diffusette").resolve() == ROOT
    assert wheels == str(set_up / "wheels")
    assert machine_named("arm64") == machine_named("arm64:cortex-a76")


def test_a_machine_that_is_named_twice_is_run_once(set_up: Path) -> None:
    assert [machine.name for machine in machines_named(["arm64", "arm64:cortex-a76"])] == ["arm64:cortex-a76"]


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("riscv", "no machine named 'riscv'", "arm64:cortex-a76"),
        ("arm64:cortex-x9", "no AArch64 processor named 'cortex-x9'", "cortex-a72: neither"),
        ("native", "this one is x86_64", "--machine arm64"),
    ],
)
def test_an_unknown_machine_is_refused_with_those_that_there_are(set_up: Path, name: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        machine_named(name)
    assert hint in caught.value.hint


def test_on_an_aarch64_computer_nothing_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert machine_named("native") == Machine("native")
    with pytest.raises(UsageError) as caught:
        machine_named("arm64")
    assert caught.value.hint == "--machine native"
    with pytest.raises(UsageError, match="nothing needs to be emulated"):
        install.set_up_arm64(print)


def test_what_is_not_set_up_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here_is_x86: None) -> None:
    monkeypatch.setenv(arm64.FOLDER, str(tmp_path))
    with pytest.raises(MissingTool, match="no AArch64 machine is set up") as caught:
        machine_named("arm64")
    assert "diffusette machine setup arm64" in caught.value.hint
    assert caught.value.exit_code == 3
    assert all(not known.to_json()["ready"] for known in known_machines())


@pytest.mark.parametrize(
    ("content", "said"), [('{"lock": "of another day"}', "another version"), ("{", "cannot be read")]
)
def test_a_set_up_of_another_version_or_a_damaged_one_is_named(set_up: Path, content: str, said: str) -> None:
    (set_up / arm64.INSTALLED).write_text(content)
    with pytest.raises(MissingTool, match=said):
        machine_named("arm64")


def test_apts_sources_are_read_in_both_formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    (tmp_path / "sources.list").write_text(
        "# a comment\ndeb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main contrib\n"
        "deb-src http://a.example/debian bookworm main\n"
    )
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/b.sources").write_text(
        "Types: deb deb-src\nURIs: http://b.example/debian-security\nSuites: bookworm-security\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian.gpg\n\nEnabled: no\nTypes: deb\nURIs: http://off.example\nSuites: x\n"
    )
    (tmp_path / "sources.list.d/c.list.disabled").write_text("deb http://off.example/debian bookworm main\n")
    assert archives(tmp_path) == (
        Archive("http://a.example/debian", "/k.gpg", False),
        Archive("http://b.example/debian-security", "/usr/share/keyrings/debian.gpg", True),
    )


def test_a_computer_without_apt_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingTool, match="apt-get") as caught:
        archives(tmp_path)
    assert "Debian container" in caught.value.hint


def test_the_lock_pins_each_file_by_version_and_sha256_and_wheels_as_the_tests_have_them() -> None:
    lock = read_lock()
    pinned = [*lock.userland, *lock.emulator.values(), *lock.wheels]
    assert all(len(each.sha256) == 64 and each.version for each in pinned)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    assert {each.name: each.version for each in lock.wheels} == {
        each.name: tested[each.name.lower().replace("_", "-")] for each in lock.wheels
    }
