"""Several processes make the same choice, answers and student as one, and one speaks for all.

Most processes here are forked, which is quicker than torchrun. One test starts that.
"""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_random_statistics
from PIL import Image

import distill
import train_teacher
from models import build_model
from support import checkpoint
from support.data import Pool, Views
from support.options import one_sentence

REPOSITORY = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with a teacher and a pool of 70 pictures, of which 66 remain to choose from.

    These are five batches, the last of two: neither two processes nor three divide them.
    """
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    teacher = with_random_statistics(build_model("resnet_tiny", 3, image_size=(32, 48)))
    checkpoint.save_model(teacher, root / "teacher.pt")
    (root / "pool").mkdir()
    for i, small in enumerate(np.random.default_rng(0).integers(0, 256, (70, 3, 4, 3), np.uint8)):
        Image.fromarray(small).resize((50, 40), Image.BICUBIC).save(root / f"pool/{i:02d}.png")
    (root / "pool/33.png").write_bytes(b"not a picture")
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("support.figures.story", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)       # a fork cannot use them


def words(world, out, *more):
    """Return options; 10 files of 3 views each are 8 batches of answers, the last of two."""
    return (f"--dataset none --pool {world}/pool --teacher {world}/teacher.pt --budget 10 "
            f"--steps 8 --views 3 --batch-size 4 --amp off --device cpu --out {out}").split() + [
                *more]


def processes(n, options, folder, work=distill.main):
    """Fork n processes as torchrun starts them, and like it end all when one has failed.

    Return [(exit code, stdout, stderr), ...].
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def process(rank):
        os.environ |= {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                       "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        with (open(folder / f"{rank}.out", "w") as sys.stdout,
              open(folder / f"{rank}.err", "w") as sys.stderr):
            one_sentence(lambda: work(options))()

    for rank in range(n):                            # one may be ended before it begins
        (folder / f"{rank}.out").touch()
        (folder / f"{rank}.err").touch()
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process, args=[rank]) for rank in range(n)]
    for p in started:
        p.start()
    waiting = {p.sentinel: p for p in started}
    while waiting:
        ended = [waiting.pop(sentinel) for sentinel in wait(waiting, timeout=60)]
        for p in ended:
            p.join()
        if not ended or any(p.exitcode for p in ended):
            for p in started[bool(ended):]:
                p.terminate() if ended else p.kill()
    return [(p.exitcode, *((folder / f"{rank}.{name}").read_text() for name in ("out", "err")))
            for rank, p in enumerate(started)]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """Return the folder of a run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.figures.story", lambda *_: None)
        patch.setattr("support.scoring.STORE", out.parent / "scores")
        torch.set_num_threads(1)                     # as in each test, which begins after this
        distill.main(words(world, out))
    return out


def assert_same(a, b):
    for name in ("chosen.csv", "skipped.csv", "curve.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    x, y = (checkpoint.load(out / "student.pt")["state_dict"] for out in (a, b))
    assert all(torch.equal(value, y[name]) for name, value in x.items())


@pytest.mark.parametrize("n", [2, 3])
def test_any_number_of_processes_makes_the_same_choice_and_student(world, alone, tmp_path, n):
    first, *others = processes(n, words(world, tmp_path / "run"), tmp_path)
    assert first[0] == 0 and first[1].count("6 evaluated") == 1
    assert others == [(0, "", "")] * (n - 1)
    assert_same(alone, tmp_path / "run")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"))])
def test_torchrun_ends_well_too(world, alone, tmp_path, device):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           REPOSITORY / "distill.py", *words(world, "run", "--device", device)],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("1 teacher ") == 1, done.stderr
    assert device == "cuda" or (tmp_path / "run/chosen.csv").read_bytes() == (
        alone / "chosen.csv").read_bytes()


def test_a_dead_process_ends_the_run_in_a_sentence_and_any_number_go_on_with_the_rest(
        world, alone, tmp_path, monkeypatch):
    item, run = Pool.__getitem__, tmp_path / "run"

    def dying(self, i):
        if i == 50:                                  # in the second batch of the second process
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, i)

    def noted(self, i):
        with open(tmp_path / "read", "a") as file:
            file.write(f"{i} ")
        return item(self, i)

    monkeypatch.setattr(Pool, "__getitem__", dying)
    (code, _, said), second = processes(2, words(world, run), tmp_path)
    assert code == 2 and second == (-signal.SIGKILL, "", "")
    assert re.search(rf"^error: another process .* is gone.*; go on with: .* --resume --out {run}$",
                     said, re.MULTILINE) and "Traceback" not in said
    assert next(run.glob("*.part")).stat().st_size == 4 * 32
    monkeypatch.setattr(Pool, "__getitem__", noted)
    ended = processes(3, ["--resume", "--out", str(run)], tmp_path)
    assert [code for code, *_ in ended] == [0, 0, 0]
    read = sorted(map(int, (tmp_path / "read").read_text().split()))
    assert read[4:] == list(range(32, 66))           # before them: those held out
    assert_same(alone, run)


@pytest.mark.parametrize(("more", "message"), [
    (["--budget", "1000"], "error: the budget is 1000, but"), (["--kd", "x"], "error: --kd 'x' is"),
    (["--nothing"], "usage: "), (["--device", "cuda:99"], "error: torch cannot compute on"),
    (["--lr", "1e30"], "error: the loss became infinite")])
def test_a_mistake_is_said_once(world, tmp_path, more, message):
    first, *others = processes(3, words(world, tmp_path / "run", *more), tmp_path)
    assert first[0] == 2 and message in first[2]
    assert [said for _, *said in others] == [["", ""]] * 2


def test_what_goes_wrong_in_one_process_only_is_said_by_it(world, tmp_path, monkeypatch):
    source = Views.source

    def failing(self, slot):
        if slot == 7:                                # answered by the second process
            raise ValueError("07.png: vanished")
        return source(self, slot)

    monkeypatch.setattr(Views, "source", failing)
    monkeypatch.setattr("support.together.time.sleep", lambda _: None)
    first, second = processes(2, words(world, tmp_path / "run"), tmp_path)
    assert second == (2, "", "error: 07.png: vanished; put this file right and resume\n")
    assert first[0] == 2 and "error: another process of this run is gone" in first[2]


def test_a_dry_run_and_one_that_keeps_no_answers_end_well(world, tmp_path, monkeypatch):
    monkeypatch.setattr("support.figures.pool_check", lambda *_: None)
    for name, *more in (["dry", "--dry-run"], ["none", "--views", "0"]):
        first, *others = processes(2, words(world, tmp_path / name, *more), tmp_path)
        assert first[0] == 0 and others == [(0, "", "")]


def test_each_process_has_a_gpu_of_its_own_or_none(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: (tmp_path / f"gpu{i}").touch())
    first, *others = processes(3, words(world, tmp_path / "run", "--device", "cuda"), tmp_path)
    assert first[0] == 2 and first[2] == ("error: there are 3 processes but 2 GPUs here; lower "
                                          "--nproc-per-node, or use --device cpu\n")
    assert [said for _, *said in others] == [["", ""]] * 2
    assert sorted(path.name for path in tmp_path.glob("gpu*")) == ["gpu0", "gpu1"]


def test_one_gpu_for_several_processes_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    first, _ = processes(2, words(world, tmp_path / "run", "--device", "cuda:0"), tmp_path)
    assert first[2] == "error: --device cuda:0 is one GPU for all 2 processes; use cuda\n"


def test_a_teacher_is_trained_by_the_first_process(tmp_path):
    for kind, mode in (("images", "RGB"), ("labels", "L")):
        (tmp_path / kind).mkdir()
        for i in range(2):
            Image.new(mode, (48, 32)).save(tmp_path / kind / f"{i}.png")
    first, second = processes(2, (
        f"--dataset folder --data-root {tmp_path} --num-classes 2 --image-size 32 48 --steps 2 "
        f"--amp off --model resnet_tiny --batch-size 2 --out {tmp_path}/teacher").split(), tmp_path,
        train_teacher.main)
    assert first[0] == 0 and second == (0, "", ""), first
    assert (tmp_path / "teacher" / "teacher.pt").exists()


def test_a_program_with_processes_of_its_own_may_distil_in_one_of_them(world, tmp_path):
    def own(_):
        torch.distributed.init_process_group()
        if os.environ["RANK"] == "0":
            networks = [with_random_statistics(build_model("resnet_tiny", 3)) for _ in range(2)]
            distill.distill(*networks, world / "pool", (32, 48), distill.Config(
                budget=4, steps=1, views=1, batch_size=4, amp="off"))
        torch.distributed.barrier()

    assert [code for code, *_ in processes(2, None, tmp_path, own)] == [0, 0]
