"""Whatever happens to one rank, every other one raises a CommError that names it, in time, and no process aborts."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.faults import ASTRAY, LOST, Fault, accused, judge, run_fault
from tests.distributed import run_distributed
from twohop.comm import CommError, Topology, build_all_to_all, diagnose
from twohop.comm.diagnose import NoticeBoard

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from netlab_cluster import Cluster, NetlabError, check_machine  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        ("killed before", "counts"),
        ("killed within", "dispatch"),
        ("killed within", "combine backward"),
        ("stopped within", "combine"),
    ],
)
def test_a_lost_rank_is_named(kind: str, phase: str) -> None:
    fault = Fault(kind, world=4, culprit=2, phase=phase, timeout_s=3)
    answers = run_fault(fault)
    assert judge(fault, answers) == []
    for given in answers:
        assert given is None or "No word from rank 2:" in given["message"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("skips a layer", "rank 3 came to layer 2, counts"),
        ("detaches a layer", "gradients of ['weights']"),
        ("other width", "[N, 16]"),
        ("other top-k", "to 1 of 8 experts"),
        ("other dtype", "torch.float64"),
        ("other weights", "torch.float64 weights"),
        ("other chunks", "in 2 chunks"),
        ("other wire", "bf16/bf16 for combine"),
        ("not finite", "was given rows that are not finite"),
        ("unknown expert", "was given expert ids that the layer does not have"),
        ("fails in an expert", "rank 3 stopped: layer 1, experts: ArithmeticError: broken expert"),
        ("fails in an expert's backward", "rank 3 stopped: step, backward: ArithmeticError: broken backward"),
        ("returns too few rows", "rank 3 stopped: layer 1, experts: ValueError: the experts made rows"),
    ],
)
def test_a_rank_astray_is_named_at_once(kind: str, words: str) -> None:
    fault = Fault(kind, world=4, culprit=3, timeout_s=60)
    answers = run_fault(fault)
    assert judge(fault, answers) == []
    for given in answers[:3]:
        assert words in given["message"]
        assert given["seconds"] < fault.timeout_s / 2


@pytest.mark.parametrize(
    ("kind", "algorithm", "words"),
    [
        ("skips a combine", "flat", "rank 1 came to layer 2, counts, flat dispatch"),
        ("skips a backward", "dedup", "rank 1 came to layer 0, counts, dedup dispatch"),
        ("other algorithm", "dedup", "rank 1 came to layer 1, counts, flat dispatch"),
    ],
)
def test_a_rank_in_another_phase_is_named_at_the_deadline(kind: str, algorithm: str, words: str) -> None:
    fault = Fault(kind, world=4, culprit=1, algorithm=algorithm, timeout_s=2)
    answers = run_fault(fault)
    assert judge(fault, answers) == []
    assert all(words in given["message"] for rank, given in enumerate(answers) if rank != 1)


@pytest.mark.parametrize("algorithm", ["flat", "dedup"])
def test_wrong_splits_are_named_by_all(algorithm: str) -> None:
    fault = Fault("wrong splits", world=4, culprit=0, algorithm=algorithm, timeout_s=60)
    answers = run_fault(fault)
    assert judge(fault, answers) == []
    assert answers[0]["type"] == "ValueError"
    assert "do not add up to the 8 rows" in answers[0]["message"]
    for given in answers[1:]:
        assert "was given counts that do not fit its rows" in given["message"]


def fail_twice_on_this_rank() -> list[str]:
    """First the rows disagree; then rank 1 stays away; a third topology works."""
    messages = []
    exchange = build_all_to_all("flat", Topology.discover(timeout_s=20))
    for _ in range(2):
        with pytest.raises(CommError) as error:
            exchange(torch.ones(2, 2 + dist.get_rank()), torch.tensor([1, 1]))
        messages.append(str(error.value))
    exchange = build_all_to_all("flat", Topology.discover(timeout_s=1))
    if dist.get_rank() == 0:
        with pytest.raises(CommError) as error:
            exchange(torch.ones(2, 3), torch.tensor([1, 1]))
        messages.append(str(error.value))
    dist.barrier()
    received, _ = build_all_to_all("flat", Topology.discover(timeout_s=20))(torch.ones(2, 3), torch.tensor([1, 1]))
    assert torch.equal(received, torch.ones(2, 3))
    return messages


def test_words_of_an_earlier_failure_are_not_read_again() -> None:
    first, again, second = run_distributed(fail_twice_on_this_rank, 2)[0]
    assert "rank 1 came to counts, about to do flat all-to-all of torch.float32 rows [3]" in first
    assert "this topology has failed before; discover a new one" in again
    assert "No word from rank 1:" in second


def discover_on_this_rank(timeout_s: float, options: list[dict[str, Any] | None]) -> str:
    own = options[dist.get_rank()]
    if own is None:
        return ""
    with pytest.raises(CommError) as error:
        Topology.discover(timeout_s=timeout_s, **own)
    return str(error.value)


def test_ranks_that_want_other_layouts_are_named() -> None:
    messages = run_distributed(discover_on_this_rank, 3, 60, [{"ranks_per_node": 1}, {"ranks_per_node": 3}, {}])
    for rank, message in enumerate(messages):
        assert message.startswith(f"rank {rank}, topology, layout: ranks [0] ask for levels=None, ranks_per_node=1")


def test_a_rank_that_does_not_come_to_discover_is_named() -> None:
    messages = run_distributed(discover_on_this_rank, 3, 1, [{}, None, {}])
    assert messages[0] == "rank 0, topology, layout: ranks [1] did not come within 1 s"


def test_a_store_that_is_silent_until_the_roll_call_ends_is_not_taken_for_silent_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board, moments = object.__new__(NoticeBoard), iter((0.0, 100.0))
    board.rank, board.deadline_s, board._deaf = 0, 1.0, False
    monkeypatch.setattr(board, "_read", lambda key: setattr(board, "_deaf", True))
    monkeypatch.setattr(diagnose, "time", SimpleNamespace(monotonic=lambda: next(moments), sleep=lambda seconds: None))
    assert board.listen("layer 1, counts", [0, 1]) == diagnose.UNREACHABLE


def test_what_is_accused() -> None:
    message = "rank 0, layer 1, counts: the exchange among ranks [0, 1, 2] failed. rank 4 is. ranks [5, 6] are"
    assert accused(message) == [{4}, {5, 6}]


def test_every_kind_of_fault_exists_once() -> None:
    assert len({*LOST, *ASTRAY}) == len(LOST) + len(ASTRAY)


def why_no_cluster() -> str | None:
    try:
        check_machine()
    except NetlabError as error:
        return str(error)
    trial = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    return None if trial.returncode == 0 else "no network namespaces here"


REASON = why_no_cluster()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(
    "cut_off",
    [
        lambda cluster: cluster.set_link(1, up=False),
        lambda cluster: cluster.blackhole(1),
    ],
    ids=["link down", "blackhole"],
)
def test_a_node_that_is_cut_off_is_named(cut_off: Callable[[Cluster], None]) -> None:
    """Real processes on two nodes, the store on the first; both end by themselves, with an exit code that is not 0."""
    program = [sys.executable, "-m", "tests.comm.faults", "2"]
    with Cluster(nodes=2, rate="1gbit") as cluster:
        ranks = [
            cluster.start(
                node,
                program,
                env={"RANK": str(node), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for node in range(2)
        ]
        for rank in ranks:
            assert rank.stdout
            assert rank.stdout.readline() == "stepped\n"
        cut_off(cluster)
        errors = [rank.communicate(timeout=40)[1] for rank in ranks]
    for rank in range(2):
        assert f"CommError: rank {rank}, layer " in errors[rank]
        assert ranks[rank].returncode == 1
    assert "No word from rank 1:" in errors[0]
    assert "The store of the rendezvous does not answer: this node is cut off" in errors[1]
