"""What is owed on a GPU, by one command that can be stopped and started again.

Idea
    In this order: the tests that need a GPU, the benchmark, and the commands of docs/data.md, which
    are read from there: CamVid, Pascal VOC, Cityscapes. Each leaves a record; what has one is not
    done again, and a training that was stopped goes on. Delete a record to repeat its step.

Use it (in the repository's root)
    python -m experiments.on_gpu --list                           # print the commands, no more
    python -m experiments.on_gpu --camvid CamVid --pool photos    # hours, on one GPU
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.options import Options, one_sentence, option, parse

DOCS = Path(__file__).parents[1] / "docs" / "data.md"


@dataclass(frozen=True)
class Config(Options):
    camvid: str = option("CamVid", "CamVid", kind="FOLDER")
    voc: str = option("VOC", "Pascal VOC; into an empty folder it is downloaded", kind="FOLDER")
    cityscapes: str = option("Cityscapes", "Cityscapes", kind="FOLDER")
    pool: str = option("photos", "unlabelled photographs", kind="FOLDER")
    out: str = option("results/gpu", "folder for the records", kind="FOLDER")
    list: bool = option(False, "print the commands and stop")


def steps(cfg):
    """Yield (name, words after `python`, the file that makes the record, folders it needs)."""
    made = Path("runs/gpu")
    tests = [f"tests/test_{name}.py" for name in ("training", "distill", "together")]
    yield ("tests", ["-m", "pytest", *tests, "-k", "gpu or cuda", "--junit-xml",
                     f"{made}/tests.xml"], made / "tests.xml", [])
    yield ("benchmark", ["-m", "experiments.benchmark", "--out", str(made)],
           made / "benchmark_cuda.json", [])
    folders = {"CamVid": cfg.camvid, "VOC": cfg.voc, "Cityscapes": cfg.cityscapes,
               "photos": cfg.pool}                            # by their names in docs/data.md
    text = DOCS.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^python ((?:train_teacher|distill)\.py .*)$", text, re.MULTILINE):
        program, *words = shlex.split(line)
        out = Path(words[words.index("--out") + 1])
        yield (out.name, [program, *(folders.get(word, word) for word in words)],
               out / ("metrics.json" if program == "distill.py" else "teacher.json"),
               [folders[word] for word in words if word in folders])


def main(argv=None):
    """Do what has no record yet; return the names of the steps that have one now."""
    cfg, done = parse(Config, argv, __doc__.split("\n")[0]), []
    for name, words, made, needed in steps(cfg):
        record = Path(cfg.out) / f"{name}{made.suffix}"
        missing = [folder for folder in needed if not Path(folder).is_dir()]
        if cfg.list:
            print(shlex.join(["python", *words]))
        elif missing and not record.exists():
            print(f"{name}: left out, there is no folder {' nor '.join(missing)}")
        else:
            if not record.exists() and not made.exists():
                begun = (made.parent / "config.json").exists()
                subprocess.run([sys.executable, *words, *["--resume"] * begun], check=False)
            if made.exists() and not record.exists():
                record.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(made, record)
            print(f"{name}: " + (f"see {record}" if record.exists() else "failed"))
            done += [name] * record.exists()
    return done


if __name__ == "__main__":
    one_sentence(main)()
