"""experiments.on_gpu: its commands are those of the pages, and it does only what has no record."""

import shlex
import subprocess
from pathlib import Path

import pytest
from test_readme import PROGRAMS, module

from experiments import on_gpu
from support import options

ALL = ["tests", "benchmark", "camvid", "camvid-student", "voc", "voc-student", "cityscapes",
       "cityscapes-student"]


def test_each_listed_command_is_one_that_its_program_takes(capsys):
    on_gpu.main(["--list", "--pool", "my photos", "--camvid", "data/CamVid"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, *_ in on_gpu.steps(on_gpu.Config())] == ALL and len(lines) == len(ALL)
    parsed = []
    for python, *words in lines:
        words = words[1:] if words[0] == "-m" else words
        program = words.pop(0).removesuffix(".py" if words[0] in PROGRAMS else "")
        assert python == "python"
        if program == "pytest":
            assert all(Path(word).exists() for word in words if word.startswith("tests/"))
        else:
            name = program if program in PROGRAMS else f"{program}.py"
            parsed.append(options.parse(module(name).Config, words, ""))
    assert [getattr(cfg, "data_root", None) for cfg in parsed] == [
        None, *["data/CamVid"] * 2, *["VOC"] * 2, *["Cityscapes"] * 2]
    assert [cfg.pool for cfg in parsed if hasattr(cfg, "pool")] == ["my photos"] * 3


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Return the list of commands that were run, in a folder without Cityscapes."""
    monkeypatch.chdir(tmp_path)
    for name in ("CamVid", "VOC", "photos"):
        Path(name).mkdir()
    commands, made = [], {tuple(words): made for _, words, made, _ in on_gpu.steps(on_gpu.Config())}

    def run(command, check):
        commands.append(shlex.join(command[1:]))
        path = made[tuple(word for word in command[1:] if word != "--resume")]
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "config.json").touch()
        if "voc-student" not in commands[-1] or "--resume" in commands[-1]:
            path.write_text(path.name)                       # else it is stopped half-way
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_what_has_a_record_is_not_done_again_and_what_was_stopped_goes_on(ran, capsys):
    assert on_gpu.main([]) == ALL[:5]
    said = capsys.readouterr().out
    assert "voc-student: failed" in said and "cityscapes: left out, there is no folder City" in said
    assert Path("results/gpu/voc.json").read_text() == "teacher.json"
    assert len(ran) == 6 and not any("--resume" in command for command in ran[2:])
    assert on_gpu.main([]) == ALL[:6]
    assert len(ran) == 7 and ran[-1] == ran[-2] + " --resume"
    Path("results/gpu/voc.json").unlink()                    # stopped before it was copied, say
    assert on_gpu.main([]) == ALL[:6] and len(ran) == 7
