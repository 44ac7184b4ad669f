"""Who sits where: ranks on a grid of network levels, and the groups that share or hold a layer's experts.

A world of 8 ranks on 2 nodes is the grid (node 2, local 4). An expert-parallel (EP) group is a regular block
of that grid, as deep inside the node as it can be: EP 2 takes 2 neighbours of one node, EP 8 takes everything.
The ranks at the same place of every block hold the same experts: they are the expert-data-parallel (EDP) group.
"""

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from twohop.comm.diagnose import NoticeBoard, hang_up
from twohop.comm.errors import CommError

LEVEL_NAMES = ("rack", "node", "local")  # the last ones are taken: two levels are (node, local)
TRAFFIC_NAMES = {"rack": "between racks", "node": "between nodes", "local": "inside node"}


@dataclass(frozen=True)
class Axis:
    """One level of an EP group: the ranks that differ from this one in this level's coordinate only."""

    name: str  # rack, node or local
    size: int
    group: Any  # ProcessGroup, or None when size is 1


class Topology:
    """The place of this rank in one EP layout of the world. Make it with `discover`, change EP with `with_ep`.

    Attributes:
        rank, world_size: in the world.
        levels: sizes of the world's levels, outermost first, e.g. (nodes, ranks_per_node).
        ep_size, ep_rank, ep_group: the ranks that share one set of a layer's experts, in world order.
        edp_size, edp_rank, edp_group: the ranks that hold the same experts as this one.
        axes: the levels of the EP group, outermost first, each with the group of one row along it.
        world_group: all ranks; None, as are all groups, when the world is one process.
        mesh: DeviceMesh with the dimensions ("edp", "ep"), for DTensors of expert parameters; None in one process.
        board: where ranks tell of failures; shared by all layouts, None in one process.
    """

    def __init__(
        self,
        levels: tuple[int, ...],
        ep_size: int,
        rank: int,
        timeout_s: float,
        family: dict,
        board: NoticeBoard | None,
    ) -> None:
        self.levels, self.rank, self.timeout_s, self.board = levels, rank, timeout_s, board
        self.world_size = math.prod(levels)
        self._family = family  # ep_size -> Topology, shared by all layouts of this world
        self.block = ep_block(levels, ep_size)
        self.ep_size, self.edp_size = ep_size, self.world_size // ep_size

        ranks_edp_ep = ep_grid(levels, self.block)
        edp_rank, ep_rank = (ranks_edp_ep == rank).nonzero()[0].tolist()
        self.edp_rank, self.ep_rank = int(edp_rank), int(ep_rank)
        self.ep_ranks: list[int] = ranks_edp_ep[self.edp_rank].tolist()
        self.level_names = LEVEL_NAMES[-len(levels) :]

        self.world_group = dist.group.WORLD if self.world_size > 1 else None
        self.ep_group = self._make_group(ranks_edp_ep)
        self.edp_group = self._make_group(ranks_edp_ep.T)
        self.axes = self._make_axes(ranks_edp_ep)
        self.mesh = None
        if self.world_size > 1:
            self.mesh = DeviceMesh.from_group(
                [self.edp_group, self.ep_group],
                device_type=self.device.type,
                mesh=ranks_edp_ep,
                mesh_dim_names=("edp", "ep"),
            )
        family[ep_size] = self

    @classmethod
    def discover(
        cls,
        ranks_per_node: int | None = None,
        ep_size: int | None = None,
        *,
        levels: tuple[int, ...] | None = None,
        timeout_s: float = 120.0,
    ) -> "Topology":
        """Read the layout from torchrun's variables. Every rank of the world must call this, in the same order.

        Args:
            ranks_per_node: emulates nodes on one host; None takes torchrun's LOCAL_WORLD_SIZE.
            ep_size: any divisor of the world; None is the whole world.
            levels: sizes of all levels, outermost first, instead of ranks_per_node, e.g. (racks, nodes, local).
            timeout_s: deadline of every wait in the groups made here, in seconds.

        Without an initialised process group this is a world of one process.

        Raises:
            ValueError: the ranks do not fill the grid, or ep_size does not divide the world.
            CommError: ranks ask for different layouts, died or did not come; names them.
        """
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        board = NoticeBoard(rank, timeout_s) if world_size > 1 else None
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size > 1 else 1
        if board is not None:
            asked = f"levels={levels}, ranks_per_node={ranks_per_node}, ep_size={ep_size}"
            _check_asked(
                board.meet("layout", f"{local_world_size} {asked}", world_size), rank, ranks_per_node or levels
            )
        if levels is None:
            levels = world_levels(world_size, ranks_per_node or local_world_size)
        elif math.prod(levels) != world_size or not 1 <= len(levels) <= len(LEVEL_NAMES):
            raise ValueError(f"levels={levels} hold {math.prod(levels)} ranks, but the world has {world_size}")
        check_ep_size(ep_size or world_size, world_size)
        return cls(levels, ep_size or world_size, rank, timeout_s, {}, board)

    @classmethod
    def one_process(cls) -> "Topology":
        """A world of this process alone, whatever process group there is; no other rank needs to call this."""
        return cls((1, 1), ep_size=1, rank=0, timeout_s=1.0, family={}, board=None)

    def with_ep(self, ep_size: int) -> "Topology":
        """The same ranks with another EP size. Every rank of the world must call this; layouts are made once."""
        if ep_size not in self._family:
            check_ep_size(ep_size, self.world_size)
            if self.board is not None:
                self.board.meet(f"layout of EP {ep_size}", "", self.world_size)
            Topology(self.levels, ep_size, self.rank, self.timeout_s, self._family, self.board)
        return self._family[ep_size]

    @property
    def ranks_per_node(self) -> int:
        """Ranks on one node."""
        return self.levels[-1]

    @property
    def num_nodes(self) -> int:
        """Nodes in the world, over all racks."""
        return self.world_size // self.ranks_per_node

    @property
    def device(self) -> torch.device:
        """Where tensors for this rank's process groups live."""
        on_gpu = self.world_size > 1 and dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def traffic_level(self, peer: int) -> str:
        """Name of the slowest level between this rank and world rank `peer`."""
        for i, name in enumerate(self.level_names):
            inner = math.prod(self.levels[i + 1 :])
            if peer // inner != self.rank // inner:
                return TRAFFIC_NAMES[name]
        return "own rank"

    def hang_up(self) -> None:
        """Close the connections over which rows move, in all layouts, so that no peer waits for this rank. For ever."""
        for layout in self._family.values():
            for group in {layout.ep_group, *(axis.group for axis in layout.axes)} - {None}:
                hang_up(group)

    def _make_group(self, groups_of_ranks: torch.Tensor) -> Any:
        if self.world_size == 1:
            return None
        timeout = timedelta(seconds=self.timeout_s)
        try:
            group, _ = dist.new_subgroups_by_enumeration(groups_of_ranks.tolist(), timeout=timeout)
        except RuntimeError as error:
            assert self.board is not None
            self.board.leave("topology, making groups")
            heard = self.board.listen("topology, making groups", range(self.world_size))
            raise CommError(f"rank {self.rank}, topology: groups cannot be made. {heard} ({error})") from error
        return group

    def _make_axes(self, ranks_edp_ep: torch.Tensor) -> tuple[Axis, ...]:
        blocks = ranks_edp_ep.view(self.edp_size, *self.block)
        axes = []
        for i, (name, size) in enumerate(zip(self.level_names, self.block, strict=True)):
            if size == 1:
                group = None
            elif size == self.ep_size:
                group = self.ep_group
            else:
                group = self._make_group(blocks.movedim(i + 1, -1).reshape(-1, size))
            axes.append(Axis(name, size, group))
        return tuple(axes)

    def __repr__(self) -> str:
        grid = " x ".join(f"{size} {name}" for name, size in zip(self.level_names, self.levels, strict=True))
        return f"Topology(rank {self.rank} of {self.world_size} as {grid}, EP {self.ep_size}, EDP {self.edp_size})"


def world_levels(world_size: int, ranks_per_node: int) -> tuple[int, int]:
    """(nodes, ranks per node), or a ValueError when the ranks do not fill whole nodes."""
    if ranks_per_node < 1 or world_size % ranks_per_node:
        raise ValueError(
            f"ranks_per_node={ranks_per_node} does not divide the world of {world_size} ranks: "
            "every node must hold the same number of ranks"
        )
    return world_size // ranks_per_node, ranks_per_node


def check_ep_size(ep_size: int, world_size: int) -> None:
    """Raise a ValueError unless `ep_size` divides the world."""
    if ep_size < 1 or world_size % ep_size:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(f"ep_size={ep_size} does not divide the world of {world_size} ranks: use one of {divisors}")


def ep_block(levels: tuple[int, ...], ep_size: int) -> tuple[int, ...]:
    """Shape of an EP group on the grid: innermost levels are filled first, each by a divisor of its size.

    Taking the greatest common divisor at each level leaves a rest that divides the outer levels, so that every
    divisor of the world has a regular block: EP 2 on 2 nodes of 3 ranks is one rank of each node.
    """
    block: list[int] = []
    for size in reversed(levels):
        share = math.gcd(ep_size, size)
        block.insert(0, share)
        ep_size //= share
    return tuple(block)


def ep_grid(levels: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
    """World ranks as [EDP, EP]: one row for each EP group, one column for each EDP group, in world order."""
    split = [n for size, share in zip(levels, block, strict=True) for n in (size // share, share)]
    grid = torch.arange(math.prod(levels)).view(split)
    outer, inner = range(0, 2 * len(levels), 2), range(1, 2 * len(levels), 2)
    return grid.permute(*outer, *inner).reshape(-1, math.prod(block))


def _check_asked(asked: list[str], rank: int, emulated: object) -> None:
    """Refuse, on every rank alike, what would make each compute another grid and wait for groups of its own."""
    sizes, layouts = zip(*(words.split(" ", 1) for words in asked), strict=True)
    if len(set(layouts)) > 1:
        by_layout = {layout: [r for r, other in enumerate(layouts) if other == layout] for layout in layouts}
        listed = "; ".join(f"ranks {ranks} ask for {layout}" for layout, ranks in by_layout.items())
        raise CommError(f"rank {rank}, topology, layout: {listed}")
    if not emulated and len(set(sizes)) > 1:
        raise ValueError(
            f"ragged nodes: the ranks see {sorted(map(int, set(sizes)))} ranks on their nodes; "
            "start the same number of ranks on every node, or set ranks_per_node"
        )
