"""Data parallel over MPI: the same steps as one process takes, in the documented order; and ranks that go wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import fake_run
import numpy as np
import pytest
import ranks
from small_run import bits, flags, trainer, write_text

from anert import checkpoint, dist
from anert import events as ev
from anert.board import Board, frame
from anert.cli import main
from anert.errors import InputError
from anert.report import rank_text
from anert.tokenizer import ByteBPETokenizer
from anert.train import Trainer

PROGRAM = Path(__file__).with_name("rank_program.py")
ENDS_WITHIN_S = 30
STEPS = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "small.txt")


def options(text, out, **more):
    text = more.pop("data", text)
    return flags(text, out, **{**dict(steps=STEPS, grad_accum=4, precision="fp32", eval_every=4, save_every=4), **more})


def logged(out: Path, kind: str) -> list[dict]:
    lines = (out / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    """A run of two ranks."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = ranks.run(2, "run", *options(text, out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.parametrize("n", [2, 3])
def test_collectives(n, tmp_path):
    done = ranks.run(n, "collectives", str(tmp_path), program=PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank done") == n


def test_sums_begin_behind_the_backward_pass(text, two, tmp_path):
    """Once a step, in its last micro-batch; and the buckets' size changes no bit."""
    done = ranks.run(2, "overlap", "run", *options(text, tmp_path / "run"), program=PROGRAM)
    assert done.returncode == 0, done.stderr
    begun = [int(n) for n in re.findall(r"rank \d: (\d+) buckets under way", done.stdout)]
    assert len(begun) == 2 * STEPS and min(begun) >= 2
    assert bits(tmp_path / "run") == bits(two[0])


def test_all_ranks_go_back_together(text, tmp_path):
    out = tmp_path / "run"
    done = ranks.run(2, "astray", "run", *options(text, out, patience=2), program=PROGRAM)
    assert done.returncode == 0, done.stderr
    assert "step-00000008, on with the data that follow (1 of 2 times)" in done.stdout
    assert logged(out, "RunDone")[0]["summary"]["rollbacks"] == 1 and checkpoint.load(out).step == STEPS
    assert checkpoint.load(out).state["data"]["windows"] == (STEPS + 4) * 8


def test_ranks_that_differ_are_named():
    done = ranks.run(3, "differ", program=PROGRAM)
    assert len(re.findall(r"rank \d: weights of rank 1 differ from rank 0's", done.stdout)) == 3


class TwoInOne(Trainer):
    """One process that adds gradients as two ranks do: even micro-batches, odd ones, then both."""

    def _gradients(self):
        net, scale, sums, losses = self.net, self.scale.scale, [], []
        batches = [tuple(a.copy() for a in next(self.batches)) for _ in range(self.accum)]
        for rank in range(2):
            net.zero_grad()
            losses.append(0.0)
            for tokens, targets in batches[rank::2]:
                losses[rank] += net.loss_backward(tokens, targets, scale)
            sums.append(self.store.grads.copy())
        self.store.grads[...] = sums[0] + sums[1]
        self.store.grads_written()
        return (losses[0] + losses[1]) / (self.accum // 2) / 2, 0.0, ()


def test_two_ranks_have_the_bits_of_the_documented_order(text, two, tmp_path):
    run = trainer(text, tmp_path / "run", steps=STEPS, grad_accum=4, precision="fp32", eval_every=4, save_every=4)
    run.__class__ = TwoInOne
    steps = [e for e in run.run() if isinstance(e, ev.StepDone)]
    mine = {k: v for k, v in bits(tmp_path / "run").items() if not k.startswith(("val", "best"))}
    other = {k: v for k, v in bits(two[0]).items() if not k.startswith(("val", "best"))}
    assert mine == other
    assert [(e.loss, e.grad_norm) for e in steps] == [(e["loss"], e["grad_norm"]) for e in logged(two[0], "StepDone")]


def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(text, two, tmp_path):
    """Half the accumulation each: the same windows, summed in another order. float32 has 24 bits."""
    assert main(["run", *options(text, tmp_path / "one")]) == 0
    one = {e["step"]: e for e in logged(tmp_path / "one", "StepDone")}
    for e in logged(two[0], "StepDone"):
        assert e["loss"] == pytest.approx(one[e["step"]]["loss"], rel=2e-6 if e["step"] < 3 else 2e-4), e["step"]
        assert e["tokens"] == one[e["step"]]["tokens"] == 2 * 4 * 32
    a, b = (checkpoint.load(d) for d in (tmp_path / "one", two[0]))
    assert a.state["data"] == b.state["data"]
    assert b.state["val_loss"] == pytest.approx(a.state["val_loss"], rel=1e-4)


def test_rank_0_alone_tells_and_saves(two):
    out, said = two
    assert said.count("done: all steps") == 1 and said.count("validation at step 16") == 1
    assert "2 ranks of 1 threads" in said and re.search(r"ranks \d+\.\d \d+\.\d ms", said)
    start, steps = logged(out, "RunStarted"), logged(out, "StepDone")
    assert len(start) == 1 and start[0]["ranks"] == 2 and len(steps) == STEPS
    assert all(len(e["rank_ms"]) == 2 and min(e["rank_ms"]) > 0 and "allreduce" in e["ms"] for e in steps)
    assert logged(out, "RunDone")[0]["summary"]["ranks"] == 2
    assert sorted(p.name for p in out.glob("step-*")) == [f"step-{s:08}" for s in (8, 12, 16)]


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_dashboard_shows_every_rank(size):
    board = Board()
    board.update(fake_run.started(ranks=2, threads=1))
    for n in range(1, 9):
        board.update(fake_run.step(n, rank_ms=(61.25, 73.94), ms={"forward": 50.0, "allreduce": 6.4}))
    lines = ["".join(text for text, _ in line) for line in frame(board.snapshot(), *size)]
    assert any("ranks 61.2 73.9 ms" in line for line in lines) and any("allreduce " in line for line in lines)
    assert all(len(line) <= size[0] for line in lines) and len(lines) == size[1]
    assert size[0] < 100 or "2 ranks x 1 thread" in lines[0]
    assert rank_text(fake_run.step(1, rank_ms=tuple(range(10, 30)))) == "10.0 to 29.0 ms"


def test_an_interrupt_stops_all_ranks_saved(text, tmp_path):
    """Ctrl-C reaches the launcher, which passes it on."""
    out = tmp_path / "run"
    process = ranks.start(2, "run", *options(text, out, steps=100_000))
    deadline = time.monotonic() + 120
    while not checkpoint_there(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
    assert "interrupted and saved" in said, said + err
    done = logged(out, "RunDone")[0]
    assert done["reason"] == "interrupted" and checkpoint.load(out).step == done["summary"]["steps"]


def test_a_batch_is_divided_where_accumulation_is_not(text, tmp_path):
    done = ranks.run(2, "run", *options(text, tmp_path / "run", grad_accum=1, steps=4))
    assert done.returncode == 0, done.stderr
    assert main(["run", *options(text, tmp_path / "one", grad_accum=1, steps=4)]) == 0
    for a, b in zip(logged(tmp_path / "run", "StepDone"), logged(tmp_path / "one", "StepDone"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["tokens"] == b["tokens"]


def test_portions():
    assert dist.portion(2, 4, 2) == (2, 2) and dist.portion(4, 1, 2) == (2, 1) and dist.portion(3, 5, 1) == (3, 5)
    with pytest.raises(InputError, match="2 ranks share a step of --batch 3 and --grad-accum 1: one of"):
        dist.portion(3, 1, 2)


def test_resume_with_another_number_of_ranks(text, two, tmp_path):
    """8 steps of two ranks, then one; then three, whose share is a third of the batch."""
    out = tmp_path / "run"
    done = ranks.run(2, "run", *options(text, out, steps=8))
    assert done.returncode == 0, done.stderr
    assert main(["run", *options(text, out, init="resume")]) == 0
    resumed = {e["step"]: e for e in logged(out, "StepDone")}
    straight = {e["step"]: e for e in logged(two[0], "StepDone")}
    assert resumed.keys() == straight.keys()
    # A cosine to step 8 is another schedule than one to step 16: what is alike are the data.
    assert checkpoint.load(out).state["data"] == checkpoint.load(two[0]).state["data"]
    done = ranks.run(4, "run", *options(text, out, steps=20, init="resume"))
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(out).step == 20 and "resume  from step 16" in done.stdout


def test_a_resumed_run_of_two_ranks_has_the_bits_of_the_straight_one(text, two, tmp_path):
    out = tmp_path / "run"
    process = ranks.start(2, "kill", "run", *options(text, out), program=PROGRAM)
    process.communicate(timeout=120)
    assert checkpoint.load(out).step == 4
    done = ranks.run(2, "run", *options(text, out, init="resume"))
    assert done.returncode == 0, done.stderr
    assert bits(out) == bits(two[0])


FAULTS = {
    "kill": "KILLED BY SIGNAL: 9|signal 9",
    "raise": "RuntimeError: a bug on rank 1",
    "error": "anert: rank 1: something of rank 1 is wrong",
    "stop": r"anert: rank 0: rank 1 was not heard for \d+ s: it is cut off or has stopped; the last checkpoint stays",
    "drift": "weights of rank 1 differ from rank 0's",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_goes_wrong_ends_the_job(fault, text, tmp_path):
    """Within 30 s, in words, with a checkpoint to go on from."""
    out = tmp_path / "run"
    process = ranks.start(2, fault, "run", *options(text, out, steps=10_000), program=PROGRAM)
    deadline = time.monotonic() + 120
    while not checkpoint_there(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    start = time.monotonic()
    said, err = process.communicate(timeout=120)
    assert time.monotonic() - start < ENDS_WITHIN_S, err
    assert process.returncode != 0
    assert re.search(FAULTS[fault], said + err), said + err
    assert checkpoint.load(out).step in (4, 8)
    for name, weight in checkpoint.load(out).model.items():
        assert np.isfinite(weight).all(), name


def checkpoint_there(out: Path) -> bool:
    return (out / "last").exists()


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(text, tmp_path):
    """Longer than a silence: it computes, and its pulse goes on."""
    done = ranks.run(2, "slow", "run", *options(text, tmp_path / "run", steps=6), program=PROGRAM)
    assert done.returncode == 0, done.stderr


# ---- tokenize


def tokenized(n, out, *more, **settings):
    arguments = ["tokenize", *map(str, more), "-o", str(out), "--json", "--shard-mb", "0.005", "--split", "line"]
    return ranks.run(n, *arguments, **settings)


def test_ranks_share_the_shards_of_a_text(text, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text(text.read_text().replace(" fox ", "\n"))
    ByteBPETokenizer.train([text.read_text()], 280).save(tmp_path / "t.json")
    outcomes = {}
    for n in (1, 3):
        done = tokenized(n, tmp_path / str(n), lines, "--tokenizer", tmp_path / "t.json")
        assert done.returncode == 0, done.stderr
        outcomes[n] = json.loads(done.stdout)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).glob("shard-*.bin")} for n in ("1", "3")]
    assert files[0] == files[1] and len(files[0]) >= 6
    same = ("documents", "tokens", "bytes", "shards", "complete")
    assert [outcomes[1][k] for k in same] == [outcomes[3][k] for k in same] and outcomes[3]["complete"]
    assert len(outcomes[3]["files"]) == outcomes[3]["shards"] == len(files[0])
    assert (tmp_path / "3" / "manifest.json").read_text() == (tmp_path / "1" / "manifest.json").read_text()
    again = tokenized(3, tmp_path / "3", lines, "--tokenizer", tmp_path / "t.json")
    assert json.loads(again.stdout)["skipped"] == outcomes[3]["shards"]


@pytest.mark.parametrize(
    ("out", "more", "says"),
    [("a.bin", (), "2 ranks write shards"), ("dir", ("--shard", "0/2"), "without a launcher")],
)
def test_ranks_refuse_what_is_for_one(text, tmp_path, out, more, says):
    ByteBPETokenizer.train([text.read_text()], 280).save(tmp_path / "t.json")
    done = tokenized(2, tmp_path / out, text, "--tokenizer", tmp_path / "t.json", *more, timeout=120)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


# ---- bench mpi

BENCH = ["bench", "mpi", "--rounds", "2", "--warmup", "1", "--no-wait", "--max-spread", "1e9", "--json"]


def test_bench_mpi_tells_the_sums_and_the_scaling():
    done = ranks.run(2, *BENCH[:2], f"{ranks.ROOT}/plugins/stories.py:tiny", *BENCH[2:], "--seq-len", "32")
    assert done.returncode == 0, done.stderr
    found = {r["name"]: r for r in json.loads(done.stdout)["results"]}
    sums = [name for name in found if name.startswith("allreduce")]
    assert len(sums) == 4 and all(found[name]["gbps"] > 0 and found[name]["notes"]["ranks"] == 2 for name in sums)
    assert found["train, 2 ranks"]["baseline"] == "train, 1 rank" and found["train, 2 ranks"]["ratio"] > 0
    assert found["train, 1 rank"]["notes"]["tokens_per_step"] == 64 and found["train, 1 rank"]["flops"] > 0


def test_bench_mpi_refuses_sums_that_are_wrong():
    done = ranks.run(2, "broken-sum", *BENCH, program=PROGRAM, timeout=120)
    assert done.returncode == 1 and "the sum over ranks of 64 kB is wrong" in done.stderr


def test_bench_mpi_on_one_rank_says_how_to_start_it(capsys):
    assert main(BENCH) == 2
    assert "mpiexec -n 2 python -m mpi4py -m anert bench mpi" in capsys.readouterr().err


# ---- two machines


@pytest.fixture
def hosts(tmp_path):
    if not ranks.namespaces():
        pytest.skip("two network namespaces need root")
    with ranks.Hosts(tmp_path) as found:
        yield found


def test_two_hosts_have_the_bits_of_two_processes(hosts, text, two, tmp_path):
    done = ranks.run(2, "run", *options(text, tmp_path / "run"), hosts=hosts, env=hosts.env)
    assert done.returncode == 0, done.stderr
    assert bits(tmp_path / "run") == bits(two[0])


def test_a_cut_wire_ends_the_job(hosts, text, tmp_path):
    out = tmp_path / "run"
    process = ranks.start(2, "run", *options(text, out, steps=100_000), hosts=hosts, env=hosts.env)
    deadline = time.monotonic() + 120
    while not checkpoint_there(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    hosts.cut()
    start = time.monotonic()
    said, err = process.communicate(timeout=120)
    assert time.monotonic() - start < ENDS_WITHIN_S, err
    assert process.returncode != 0
    assert "rank 1 was not heard for" in said + err and f"go on from it by --resume {out}" in said + err
    step = checkpoint.load(out).step
    assert main(["run", *options(text, out, init="resume", steps=step + 2, grad_accum=4)]) == 0
    assert checkpoint.load(out).step == step + 2


# ---- bad input

BAD = {
    "shares": (dict(grad_accum=3, batch=3), 2, "2 ranks share a step of --batch 3 and --grad-accum 3"),
    "data": (dict(data="nowhere.txt"), 2, "nowhere.txt"),
    "ane": (dict(backend="ane"), 3, "Neural Engine"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_its_exit_code(case, text, tmp_path):
    more, code, says = BAD[case]
    done = ranks.run(2, "run", *options(text, tmp_path / "run", **more), timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("anert:")]
    assert done.returncode == code and len(lines) == 1 and says in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_without_mpi4py_are_told_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        InputError, match=r"2 processes were started but MPI does not load .*pip install 'anert\[mpi\]'"
    ):
        dist.Mpi(2)


def test_one_process_needs_no_mpi(monkeypatch):
    monkeypatch.delenv("PMI_SIZE", raising=False)
    world = dist.world()
    assert isinstance(world, dist.Solo) and world.sum([1.5]) == [1.5] and world.share({"a": 1}) == {"a": 1}
    assert world.gradient_sum(np.zeros(3, np.float32)) is None and os.environ.get("PMI_SIZE") is None
