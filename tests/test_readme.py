"""README.md and results/README.md are true: commands parse, the snippet runs, tables agree."""

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torchvision
from conftest import with_random_statistics
from pictures import coordinates, mask, write

from support import command, options
from support.labelled import CITYSCAPES, VOC

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
RESULTS = (REPOSITORY / "results" / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted(REPOSITORY.glob("docs/*.md"))}
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PROGRAMS = ["distill.py", "train_teacher.py", "export.py", "evaluate.py", "support.scoring",
            "experiments.compare", "experiments.benchmark", "experiments.baselines"]


def module(program):
    return importlib.import_module(program.removesuffix(".py"))


def config_of(program):
    """Return the dataclass of a program's options."""
    elsewhere = {"evaluate.py": command.Evaluation, "support.scoring": command.Inputs}
    return elsewhere.get(program) or module(program).Config


def commands():
    """Return (program, words) of every command line in all pages and in module docstrings."""
    sources = [README, RESULTS, *DOCS.values()]
    sources += [path.read_text().split('"""')[1]
                for where in ("*.py", "experiments/[a-z]*.py") for path in REPOSITORY.glob(where)]
    text = "\n".join(sources).replace("\\\\\n", " ").replace("\\\n", " ")
    start = r"(?:python|torchrun --nproc-per-node \d+) (?:-m )?"
    found = re.findall(start + r"([\w.]+)((?: +(?:\"[^\"]*\"|[\w./,+-]+))*)", text)
    return sorted({(program, words.strip()) for program, words in found
                   if program in PROGRAMS and "..." not in words})


@pytest.mark.parametrize(("program", "words"), commands())
def test_every_printed_command_parses(program, words):
    config = config_of(program)
    assert isinstance(options.parse(config, shlex.split(words), ""), config)


def test_there_are_commands_for_every_program():
    assert {program for program, _ in commands()} == set(PROGRAMS)


def test_the_voc_and_cityscapes_commands_run(tmp_path, voc_tree, cityscapes_tree, pool_folder,
                                             monkeypatch):
    """From the teacher to the table, in order, for one step, with random weights for published."""
    lines = re.findall(r"^python (\S+) (.*--dataset (voc|cityscapes) .*)$",
                       DOCS["data.md"].replace("\\\n", " "), re.MULTILINE)
    assert [program for program, *_ in lines] == 2 * ["train_teacher.py", "distill.py"]
    get_model, mobilenet_v2 = torchvision.models.get_model, torchvision.models.mobilenet_v2
    asked = []

    def random_mobilenet(weights):
        asked.append(("mobilenet_v2", weights))
        return mobilenet_v2(weights=None)

    def random_weights(name, weights=None, weights_backbone=None, num_classes=21):
        asked.append((name, str(weights), weights_backbone))
        return with_random_statistics(get_model(name, weights=None, weights_backbone=None,
                                                num_classes=num_classes, aux_loss=bool(weights)))

    monkeypatch.setattr(torchvision.models, "get_model", random_weights)
    monkeypatch.setattr(torchvision.models, "mobilenet_v2", random_mobilenet)
    monkeypatch.setattr("support.figures.run_figure", lambda *_: None)
    for i, (program, line, dataset) in enumerate(lines):
        root, classes = ((voc_tree, VOC) if dataset == "voc" else (cityscapes_tree, CITYSCAPES))
        line += (f" --data-root {root} --out {tmp_path}/run{i} --image-size 32 32 --steps 1 "
                 "--batch-size 2 --workers 0 --amp off --device cpu")
        if program == "distill.py":
            line += f" --pool {pool_folder} --budget 4"
        if "--teacher " in line:
            line += f" --teacher {tmp_path}/run{i - 1}/teacher.pt"
        metrics = module(program).main(shlex.split(line))
        if program == "distill.py":
            assert 0 <= metrics["student_miou"] <= 1 and metrics["updates"] == 1
            assert [name.strip("_") for name in metrics["iou"]["student"]] == list(classes)
    published = "DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"
    assert ("deeplabv3_resnet50", published, None) in asked
    assert asked.count(("deeplabv3_resnet50", "None", "DEFAULT")) == 2           # both teachers
    assert [x for x in asked if x[0] == "mobilenet_v2"] == [("mobilenet_v2", "DEFAULT"),
                                                            ("mobilenet_v2", None)]


def test_the_printed_sequence_runs_as_a_whole(tmp_path, pool_folder, monkeypatch):
    """Each line finds what the lines before it wrote, where they wrote it; only sizes are small."""
    (block,) = [body for _, body in BLOCKS if "--out runs/student" in body]
    lines = [line.split() for line in block.replace("\\\n", " ").splitlines()]
    assert [line[1] for line in lines] == ["train_teacher.py", *["distill.py"] * 3,
                                           *["evaluate.py"] * 2, "export.py"]
    pool_folder.rename(tmp_path / "photos")
    labels = mask(*[[3, 0] * 24] * 31, [11] * 48)
    for part in ("train", "val", "test"):
        for i in range(2):
            write(tmp_path / "CamVid" / part / f"{i}.png", coordinates(48, 32, blue=i))
            write(tmp_path / "CamVid" / f"{part}annot" / f"{i}.png", labels)
    monkeypatch.chdir(tmp_path)
    for _, program, *words in lines:
        small = {"train_teacher.py": "--steps 2 --batch-size 2 --image-size 32 48",
                 "distill.py": "--steps 2 --batch-size 2 --budget 5"}.get(program, "")
        module(program).main([*words, *small.split()])
    assert (tmp_path / "runs/fit/pool.png").exists() and (tmp_path / "student.pt2").exists()
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 30
    unlabelled = json.loads((tmp_path / "runs/unlabelled/metrics.json").read_text())
    assert unlabelled["student_miou"] is None


def test_the_python_snippet_runs(tmp_path, pool_folder, monkeypatch, capsys):
    (code,) = [body for language, body in BLOCKS if language == "python"]
    pool_folder.rename(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "is the nearest photo" in capsys.readouterr().out
    assert (tmp_path / "student.pt2").exists()


def test_the_equation_table_and_the_file_list_name_what_exists():
    names = re.findall(r"`(\w+\.py):(\w+)`", README)
    assert len(names) >= 8
    assert all(callable(getattr(module(file), name)) for file, name in names)
    assert all((REPOSITORY / "tests" / test).exists()
               for test in re.findall(r"`(test_\w+\.py)`", README))
    listed = set(re.findall(r"^(\w+\.py) ", README, re.MULTILINE))
    assert listed == {path.name for path in REPOSITORY.glob("*.py")}


@pytest.mark.parametrize(("text", "folder"), [(README, "."), (RESULTS, "results"),
                                              *((text, "docs") for text in DOCS.values())])
def test_every_link_and_every_record_that_is_named_exists(text, folder):
    for target in re.findall(r"\]\((?!https?:)([^)#]*)", text):
        assert not target or (REPOSITORY / folder / target).exists(), target
    for record in re.findall(r"`(results/\S+?\.(?:json|csv|png))`", text):
        assert (REPOSITORY / record).exists(), record


@pytest.mark.parametrize(("name", "numbers"), [
    ("bn_stats", "10.000 3.656"), ("ads_sampler", "1.33"), ("priority", "2.98 2.57"),
    ("kd_loss", "0.1212 0.2747"), ("colours", "0.2 0.6"), ("evaluate", "")])
def test_a_file_to_copy_needs_torch_only_and_prints_its_worked_example(name, numbers, capsys):
    path = REPOSITORY / f"{name}.py"
    _, lesson, code = path.read_text().split('"""', 2)
    code = code.split("\ndef write_masks")[0]    # the command of evaluate.py needs the repository
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", code, re.MULTILINE))
    assert imported <= {"torch", *sys.stdlib_module_names}
    assert path.read_text().count("\n") <= 200
    if numbers:
        runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    for number in numbers.split():
        assert number in said and number.rstrip("0").rstrip(".") in lesson


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_every_option_with_its_default(program, capsys):
    with pytest.raises(SystemExit):
        module(program).main(["--help"])
    text = capsys.readouterr().out
    for name, field in config_of(program).__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.default is None or field.default is False or str(field.default) in text
    assert all(len(line) <= 79 for line in text.splitlines())
