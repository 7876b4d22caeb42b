"""Ranks and links that are lost in the middle of a training: who is left ends in time and says who is missing, and the
run goes on."""

import functools
import os
import platform
import re
import signal
import time

import pytest
from launched import ROOT, Launch, accelerate_command, ranks, until
from small_run import Run, write_recipe
from two_hosts import TwoHosts, missing

pytestmark = pytest.mark.cluster
STEPS = 60
TIMEOUT = 10  # seconds: run.collective_timeout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("lost") / "recipe.yaml", STEPS, TIMEOUT)


def train(processes, recipe, run, *options):
    return accelerate_command(processes, *options, "-m", "dkd", "train", recipe, f"run.dir={run.folder}")


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """The student of a run of 2 or, on two hosts, 4 processes: a function of their number."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def student(processes):
        run = Run(folder / str(processes))
        with Launch(train(processes, recipe, run), folder / f"log{processes}") as launch:
            assert launch.wait(120) == 0, launch.said()
        return run.student()

    return student


def kill_one_and_finish(recipe, folder, undisturbed, trial):
    run = Run(folder / f"run{trial}")
    with Launch(train(2, recipe, run, "--max_restarts", 3), folder / f"log{trial}") as launch:
        run.until_step(12 + trial, launch)
        os.kill(ranks(run.folder)[trial % 2], signal.SIGKILL)
        assert launch.wait(150) == 0, launch.said()
        said = launch.said()
    assert run.is_finished(), said
    assert len(run.starts()) == 2, (run.starts(), said)
    assert run.starts()[1] >= 10
    assert run.student() == undisturbed(2)
    assert f"rank {trial % 2} on {platform.node()}: no heartbeat" in said, said


@pytest.mark.short
def test_a_killed_rank_is_restarted_and_the_run_finishes(recipe, undisturbed, tmp_path):
    kill_one_and_finish(recipe, tmp_path, undisturbed, 0)


def test_ten_times_of_ten(recipe, undisturbed, tmp_path):
    for trial in range(10):
        kill_one_and_finish(recipe, tmp_path, undisturbed, trial)


def test_a_stopped_rank_is_named_by_the_others_at_the_timeout(recipe, tmp_path):
    run = Run(tmp_path / "run")
    with Launch(train(2, recipe, run), tmp_path / "log") as launch:
        run.until_step(10, launch)
        os.kill(ranks(run.folder)[1], signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda: "dkd: rank 0 cannot continue" in launch.said(), TIMEOUT + 10, launch)
        assert time.monotonic() - stopped > 0.5 * TIMEOUT
        # The launcher kills the stopped rank, half a minute after it has asked it to end.
        assert launch.wait(60) == 1
        said = launch.said()
    assert re.search(rf"rank 1 on {platform.node()}: no heartbeat, last seen at .*step \d+", said), said
    assert re.search(rf"this is rank 0 on {platform.node()}: .*step \d+", said), said


def start_on(hosts, host, how, recipe, run, folder):
    """One host's part of the documented commands."""
    head = hosts.address(0)
    if how == "torchrun":
        script = ROOT / "launch" / "torchrun" / "machines.sh"
        command = [
            "env",
            f"HEAD={head}",
            "MACHINES=2",
            "PROCESSES=2",
            "MAX_RESTARTS=0",
            script,
            recipe,
            f"run.dir={run.folder}",
        ]
    else:
        where = ["--num_machines", 2, "--machine_rank", host, "--main_process_ip", head]
        words = ["-m", "dkd", "train", recipe, f"run.dir={run.folder}"]
        command = accelerate_command(4, *where, *words, port=29511)
    return Launch(hosts.on(host, *map(str, command)), folder / f"log{host}")


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("how", [pytest.param("torchrun", marks=pytest.mark.short), "accelerate"])
def test_a_cut_link_ends_all_ranks_in_time_and_the_next_start_finishes(how, recipe, undisturbed, tmp_path):
    run = Run(tmp_path / "run")
    with TwoHosts(tmp_path) as hosts:
        with (
            start_on(hosts, 0, how, recipe, run, tmp_path) as first,
            start_on(hosts, 1, how, recipe, run, tmp_path) as second,
        ):
            run.until_step(15, first)
            assert sorted(ranks(run.folder)) == [0, 1, 2, 3]
            hosts.cut()
            cut = time.monotonic()
            until(lambda: not ranks(run.folder), TIMEOUT + 10 + 5)
            took = time.monotonic() - cut
            # The launchers end later: torchrun's on the second host waits a minute or more for its own store.
        assert took < TIMEOUT + 10
        for launch, own, other in ((first, 0, 1), (second, 1, 0)):
            said = launch.said()
            for rank in (2 * own, 2 * own + 1):
                # A host ends its other ranks when one has ended; each that got as far names the other host.
                lines = [line for line in said.splitlines() if f"dkd: rank {rank} cannot continue" in line]
                for line in lines:
                    assert hosts.name(other) in line or hosts.address(other) in line, line
            assert "cannot continue" in said, said
        assert not run.is_finished()
        hosts.join()
        with (
            start_on(hosts, 0, how, recipe, run, tmp_path) as first,
            start_on(hosts, 1, how, recipe, run, tmp_path) as second,
        ):
            assert first.wait(120) == 0, first.said()[-4000:]
            assert second.wait(30) == 0, second.said()[-4000:]
    assert run.is_finished()
    assert run.starts()[1] >= 10
    assert run.student() == undisturbed(4)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_two_machines_restart_by_themselves_when_a_rank_of_one_is_killed(recipe, undisturbed, tmp_path):
    run = Run(tmp_path / "run")
    script = ROOT / "launch" / "torchrun" / "machines.sh"
    with TwoHosts(tmp_path) as hosts:
        words = [
            "env",
            f"HEAD={hosts.address(0)}",
            "MACHINES=2",
            "PROCESSES=2",
            "MAX_RESTARTS=3",
            str(script),
            str(recipe),
        ]
        launches = [Launch(hosts.on(host, *words, f"run.dir={run.folder}"), tmp_path / f"log{host}") for host in (0, 1)]
        with launches[0] as first, launches[1] as second:
            run.until_step(15, first)
            os.kill(ranks(run.folder)[3], signal.SIGKILL)
            assert first.wait(150) == 0, first.said()[-6000:] + second.said()[-3000:]
            assert second.wait(30) == 0, second.said()[-4000:]
    assert run.starts()[1] >= 10
    assert run.student() == undisturbed(4)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_launch_check_says_in_under_a_minute_what_is_wrong(recipe, tmp_path):
    """Two hosts of which one has another recipe."""
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("lr: 0.05", "lr: 0.1"))
    with TwoHosts(tmp_path) as hosts:

        def check(host, words):
            where = ["--num_machines", 2, "--machine_rank", host, "--main_process_ip", hosts.address(0)]
            command = accelerate_command(4, *where, "-m", "dkd", "launch-check", *words, port=29512)
            return Launch(hosts.on(host, *map(str, command)), tmp_path / f"log{host}")

        place = f"run.dir={tmp_path / 'run'}"
        begun = time.monotonic()
        with check(0, [recipe, place]) as first, check(1, [other, place]) as second:
            assert first.wait(60) == second.wait(60) == 1
        assert time.monotonic() - begun < 60
        assert "the recipe differs: " in first.said()
        assert " on rank 0, 1 (host0); " in first.said()
        assert " on rank 2, 3 (host1)" in first.said()
        assert "launch-check: this launch cannot train" in first.said()
        assert not (tmp_path / "run").exists()


def test_launch_check_names_a_rank_that_does_not_come(recipe, tmp_path):
    program = tmp_path / "one_late.py"
    program.write_text(
        "import os, sys, time\n"
        "from dkd.cli import main\n"
        "if os.environ['RANK'] == '1':\n"
        "    time.sleep(100)\n"
        "sys.exit(main(['launch-check', '--seconds', '15', *sys.argv[1:]]))\n"
    )
    begun = time.monotonic()
    with Launch(accelerate_command(2, program, recipe, f"run.dir={tmp_path / 'run'}"), tmp_path / "log") as launch:
        assert launch.wait(60) == 1
        assert f"rank 1 did not arrive within 10 s; this is rank 0 on {platform.node()}" in launch.said()
    assert time.monotonic() - begun < 60


def test_a_rank_that_cannot_start_is_named_on_the_others(recipe, tmp_path):
    """Data that one machine alone does not have: all ranks end with the reason, none waits for `start_timeout`."""
    program = tmp_path / "one_without.py"
    program.write_text(
        "import os, sys\n"
        "from dkd.cli import main\n"
        f"data = 'data.train={tmp_path}/absent.parquet' if os.environ['RANK'] == '1' else 'data.train=digits'\n"
        "sys.exit(main(['train', *sys.argv[1:], data]))\n"
    )
    begun = time.monotonic()
    # One launcher for each rank, as on two machines: a launcher of both would end the other.
    with Launch(accelerate_command(2, program, recipe, f"run.dir={tmp_path / 'run'}"), tmp_path / "log") as launch:
        assert launch.wait(60) == 1
        said = launch.said()
    assert time.monotonic() - begun < 45
    assert f"rank 1 on {platform.node()}: data.train: no file matches" in said, said
    assert not (tmp_path / "run").exists()
