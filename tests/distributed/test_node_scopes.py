"""Losses whose samples are those of one machine, on two launchers of two processes each, and the speeds of links that
are measured there."""

import json
import socket
import sys
from contextlib import ExitStack

from launched import Launch, limit

RELATIONS = [
    "losses.sp.scope=SCOPE",
    "losses.pkt={preset: repdistiller, pairs: [[layer3, block3]], scope: SCOPE}",
    "losses.cka={weight: 1, pairs: [[layer3, block3]], scope: SCOPE, grid: exchange}",
    "losses.rkd={preset: paper, pairs: [[layer3, block3]], scope: SCOPE}",
    "losses.dist={preset: cifar, scope: SCOPE}",
]
SHORT = ["teacher.weights=random", "train.max_steps=3", "train.precision=fp32", "run.trackers=[]", "data.workers=0"]
SHORT += ["evaluation.agreement=false", "train.micro_batch=16", "data.validation=null"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def on_machines(machines, processes, arguments, log):
    """Run dkd under one launcher for each machine, all on this one."""
    place = ["--nnodes", machines, "--master_addr", "127.0.0.1", "--master_port", free_port()]
    with ExitStack() as stack:
        launches = []
        for machine in range(machines):
            command = [sys.executable, "-m", "torch.distributed.run", *place, "--node_rank", machine]
            words = [*command, "--nproc_per_node", processes, "-m", "dkd", *arguments]
            launches.append(stack.enter_context(Launch(words, f"{log}{machine}")))
        for launch in launches:
            assert launch.wait(limit(120)) == 0, launch.said()[-4000:]


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "sp", "pkt", "cka", "rkd_distance", "rkd_angle", "dist")
    return [{name: line[name] for name in names} for line in lines if "step" in line]


def test_the_scope_of_a_machine_is_that_of_its_ranks(tmp_path):
    """Two launchers of two processes against one of four, whose groups are stated as two ranks: the same groups. The
    grid is chosen by links that were measured."""
    links = tmp_path / "links.json"
    on_machines(2, 2, ["launch-check", "--json", links], tmp_path / "check")
    content = json.loads(links.read_text())
    assert content["problems"] == []
    for link in ("inside", "between"):
        assert content["links"][link]["latency"] > 0
        assert content["links"][link]["bandwidth"] > 0
    runs = {}
    for name, machines, processes, scope in (("nodes", 2, 2, "node"), ("ranks", 1, 4, "2")):
        relations = [setting.replace("SCOPE", scope) for setting in RELATIONS]
        options = [*SHORT, *relations, f"run.dir={tmp_path / name}", f"train.links={links}"]
        on_machines(machines, processes, ["train", "configs/quickstart.yaml", *options], tmp_path / f"log_{name}")
        runs[name] = logged(tmp_path / name)
    assert len(runs["nodes"]) == 3
    assert runs["nodes"] == runs["ranks"]
