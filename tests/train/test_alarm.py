"""One of several processes fails: all end with its reason, or the other runs go on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lorsa.train.checkpoint import checkpoints
from runs import STEP
from safetensors.torch import load_file

OFTEN = {"checkpoint_every_tokens": 2 * STEP}
MASKED = {"loss_mask": "norm>1.1x"}
TWO_LAYERS = {"run": {}, "other": {"layer": 2}}
DRILLS: dict[str, dict[str, Any]] = {
    "alone": {"fault": "none", "runs": TWO_LAYERS},
    "memory": {"fault": "memory", "runs": {"run": OFTEN}},
    "bug": {"fault": "bug", "rank": 0, "runs": {"run": {}}},
    "plan": {"fault": "plan", "runs": {"run": {}}},
    "killed": {"fault": "killed", "runs": {"run": {}}},
    "main-killed": {"fault": "killed", "rank": 0, "runs": {"run": {}}},
    "stays": {"fault": "stays", "grace_s": 1.0, "runs": {"run": {}}},
    "apart": {"fault": "bug", "apart": True, "runs": {"a": {}, "b": {"top_k": 4}}},
    "read": {"fault": "read", "runs": TWO_LAYERS},
    "eval": {"fault": "eval", "runs": TWO_LAYERS},
    "mask": {"fault": "mask", "runs": {"masked": MASKED, "run": {}}},
    "metrics": {"fault": "metrics", "rank": 0, "runs": {"spoilt": {"top_k": 4}, "run": {}}},
    "construction": {"fault": "construction", "runs": {"spoilt": {"top_k": 4}, "run": {}}},
}


class Ended(NamedTuple):
    """What became of a drill."""

    out: Path
    codes: list[int | None]
    """Of the processes; None of one that waited for ever"""
    said: list[str]

    def error(self, rank: int) -> str:
        """Return the error that a process printed as JSON."""
        found = [
            line for line in self.said[rank].splitlines() if '"error":' in line and line[0] == "{"
        ]
        assert len(found) == 1, self.said[rank]
        return str(json.loads(found[0])["error"])

    def errors(self) -> dict[str, str]:
        """Return the errors of the runs, on which both processes agree."""
        assert self.codes == [1, 1], self.said
        first, second = (json.loads(said.splitlines()[-1])["errors"] for said in self.said)
        assert first == second
        return dict(first)


def carry_out(store: Path, out: Path, drills: dict[str, dict[str, Any]]) -> dict[str, Ended]:
    command = [sys.executable, str(Path(__file__).parent.parent / "failing.py"), store, out]
    asked = [{"name": name, "rank": 1} | drill for name, drill in drills.items()]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*map(str, command), json.dumps(asked)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    ended = {}
    for line in map(json.loads, done.stdout.splitlines()):
        said = [(out / line["name"] / f"{rank}.txt").read_text() for rank in range(2)]
        ended[line["name"]] = Ended(out / line["name"], line["codes"], said)
    return ended


@pytest.fixture(scope="module")
def ended(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All drills, carried out in two processes."""
    return carry_out(store_folder, tmp_path_factory.mktemp("drills"), DRILLS)


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(run / "lorsa.safetensors") for run in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_that_fails_on_one_process_ends_all(ended: dict[str, Ended]) -> None:
    """The others waited in their sum for seven days, or ended in gloo's traceback."""
    memory, bug = ended["memory"], ended["bug"]
    assert (memory.codes, bug.codes) == ([1, 1], [70, 1])
    assert memory.error(0).startswith("process 1 of 2 failed: the memory is full; give --micro-")
    assert bug.error(1).startswith("process 0 of 2 failed: ZeroDivisionError: a bug; the same")
    assert "its trace is in " in bug.said[0], "a bug is told where it is"
    assert not any("Traceback" in said for said in (*memory.said, bug.said[1]))


def test_what_one_process_ended_goes_on_to_the_bit(
    store_folder: Path, ended: dict[str, Ended]
) -> None:
    out = ended["memory"].out
    assert checkpoints(out / "run")
    again = carry_out(store_folder, out.parent, {"memory": DRILLS["memory"] | {"fault": "none"}})
    assert again["memory"].codes == [0, 0]
    assert same_weights(out / "run", ended["alone"].out / "run")


def test_a_plan_that_fails_on_one_process_ends_all(ended: dict[str, Ended]) -> None:
    """The other waited to hear of its plan."""
    assert ended["plan"].codes == [1, 70]
    assert ended["plan"].error(0).startswith("process 1 of 2 failed: ZeroDivisionError: a bug")


def test_a_killed_process_is_named(ended: dict[str, Ended]) -> None:
    """The survivor ended in gloo's traceback."""
    killed, main = ended["killed"], ended["main-killed"]
    assert (killed.codes, main.codes) == ([1, -9], [-9, 1])
    assert killed.error(0).startswith("process 1 of 2 was lost: killed, or its machine")
    assert main.error(1).startswith("process 0 of 2 was lost")
    assert "Traceback" not in killed.said[0] + main.said[1]


def test_a_process_is_ended_where_its_collective_does_not_break(ended: dict[str, Ended]) -> None:
    """With NCCL, or where the one that failed stays, nothing ended the others."""
    stays = ended["stays"]
    assert stays.codes == [1, 1]
    assert stays.said[0].startswith("error: process 1 of 2 failed: the memory is full")


def test_of_processes_with_own_runs_one_may_fail(ended: dict[str, Ended]) -> None:
    """The other ends its run first, and waited for seven days then."""
    apart = ended["apart"]
    assert apart.codes == [1, 70]
    assert apart.error(0).startswith("process 1 of 2 failed: ZeroDivisionError: a bug")
    finished = [run for run in "ab" if (apart.out / run / "lorsa.safetensors").exists()]
    assert len(finished) == 1


@pytest.mark.parametrize("name", ["read", "eval"])
def test_what_one_process_cannot_read_fails_its_group_alone(
    name: str, ended: dict[str, Ended]
) -> None:
    """A batch of a step, or held-out tokens: the others waited for that process."""
    drill = ended[name]
    assert drill.errors() == {"run": "process 1 of 2: acts is damaged"}
    assert same_weights(drill.out / "other", ended["alone"].out / "other")


@pytest.mark.parametrize(
    ("name", "run", "error"),
    [
        ("mask", "masked", "process 1 of 2: norms are damaged"),
        ("metrics", "spoilt", "metrics.jsonl cannot be written (Is a directory); put it right"),
        ("construction", "spoilt", "process 1 of 2: the memory is full"),
    ],
)
def test_what_fails_of_one_run_fails_that_run_alone(
    name: str, run: str, error: str, ended: dict[str, Ended]
) -> None:
    """On both processes: the one that noticed went on without the other, or ended."""
    drill = ended[name]
    errors = drill.errors()
    assert list(errors) == [run]
    assert error in errors[run]
    assert same_weights(drill.out / "run", ended["alone"].out / "run")
