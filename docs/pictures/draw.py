"""python docs/pictures/draw.py

Draws the pictures of the documentation. What can be computed is: the routes from `twohop.comm.routes`, the groups from
`twohop.comm.topology`, the schedule from `twohop.comm.schedule`; tests/docs holds the files to what this draws.
"""

from collections.abc import Sequence
from html import escape
from itertools import pairwise, product
from pathlib import Path

from twohop.comm.routes import ROUTES, Hop
from twohop.comm.schedule import Turn, schedule
from twohop.comm.topology import ep_block, ep_grid

INK, FAINT, PAPER, FRAME = "#24303f", "#5f6f84", "#f8fafc", "#d3dce8"
BETWEEN, INSIDE, EXPERTS, PLAIN = "#2f6db3", "#1f8a7d", "#b9770e", "#8290a3"
TINTS = {BETWEEN: "#e3edf8", INSIDE: "#def1ee", EXPERTS: "#fbeed8", PLAIN: "#edf1f6"}
GROUP_TINTS = ("#e3edf8", "#def1ee", "#fbeed8", "#f1e6f5")

Point = tuple[float, float]


class Picture:
    """A drawing on paper of its own, so that it reads the same on a light and on a dark page."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, size: int = 12, colour: str = INK, anchor: str = "middle") -> None:
        """Words on one line; y is the line on which they stand."""
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}>{escape(words)}</text>")

    def box(self, x: float, y: float, w: float, h: float, words: str, colour: str = PLAIN, tint: str = "") -> Point:
        """A box with one or several lines of words; returns its centre."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" '
            f'fill="{tint or TINTS[colour]}" stroke="{colour}"/>'
        )
        lines = words.split("\n")
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 4 + 15 * (i - (len(lines) - 1) / 2), line)
        return x + w / 2, y + h / 2

    def frame(self, x: float, y: float, w: float, h: float, words: str) -> None:
        """A dashed frame with its name above."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" fill="none" stroke="{FAINT}" '
            'stroke-dasharray="4 4"/>'
        )
        self.text(x + w / 2, y - 6, words, 12, FAINT)

    def bar(self, x: float, y: float, w: float, h: float, colour: str) -> None:
        """A filled strip."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2" fill="{colour}"/>')

    def arrow(self, start: Point, end: Point, colour: str = PLAIN, width: float = 1.6) -> None:
        """A straight arrow."""
        self.parts.append(
            f'<line x1="{start[0]:g}" y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}" stroke="{colour}" '
            f'stroke-width="{width:g}" marker-end="url(#head{colour[1:]})"/>'
        )

    def svg(self) -> str:
        """The file's text."""
        width, height = self.size
        heads = "".join(
            f'<marker id="head{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{c}"/></marker>'
            for c in TINTS
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<defs>{heads}</defs>",
                f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" fill="{PAPER}" '
                f'stroke="{FRAME}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def token_way() -> Picture:
    """From the router of the home rank to the experts and back, by `dedup`."""
    p = Picture(1010, 338, "A token's way: home rank, the other node, the expert's rank, and back")
    p.frame(12, 42, 504, 280, "home rank: node 0, local 0")
    p.frame(594, 42, 130, 280, "node 1, local 0")
    p.frame(802, 42, 196, 280, "expert's rank: node 1, local 1")

    at_home = [
        (22, 56, "token\nx", PLAIN),
        (98, 86, "router\nids, weights", PLAIN),
        (204, 84, "capacity\ndrops: −1", PLAIN),
        (308, 94, "plan: counts\nare agreed", PLAIN),
        (422, 84, "copy once\nper node", BETWEEN),
    ]
    for x, w, words, colour in at_home:
        p.box(x, 70, w, 52, words, colour)
    for (x, w, *_), (next_x, *_) in pairwise(at_home):
        p.arrow((x + w + 2, 96), (next_x - 2, 96))
    p.text(300, 148, "ids and weights travel beside the rows", 11, FAINT)
    p.box(606, 70, 106, 52, "copy once\nper rank", INSIDE)
    p.box(818, 70, 164, 52, "copy once per expert,\nsort by expert", EXPERTS)
    p.box(818, 156, 164, 52, "experts", EXPERTS)
    p.box(818, 242, 164, 52, "× weight, add up\na token's experts", EXPERTS)
    p.box(606, 242, 106, 52, "add up the\nnode's ranks", INSIDE)
    p.box(422, 242, 84, 52, "add up\nthe nodes", BETWEEN)
    p.box(250, 242, 144, 52, "+ shared expert,\nresidual MLP", PLAIN)
    p.box(138, 242, 84, 52, "y", PLAIN)
    p.text(322, 230, "computed beside the first hop", 11, FAINT)
    for y, forth in ((96, True), (268, False)):
        ends = [((508, y), (604, y), BETWEEN), ((714, y), (816, y), INSIDE)]
        for start, end, colour in ends:
            p.arrow(start if forth else end, end if forth else start, colour, 2.4)
        for x, colour, words in ((555, BETWEEN, ("between", "nodes")), (763, INSIDE, ("inside", "a node"))):
            for line, word in zip((-10, 18, 32), ("hop", *words), strict=True):
                p.text(x, y + line, word, 11, colour)
    p.arrow((900, 124), (900, 154), EXPERTS)
    p.arrow((900, 210), (900, 240), EXPERTS)
    p.arrow((420, 268), (396, 268))
    p.arrow((248, 268), (224, 268))
    p.text(659, 180, "one row crosses,", 11, FAINT)
    p.text(659, 195, "each way", 11, FAINT)
    return p


def moves(hops: Sequence[Hop], block: tuple[int, ...], expert_ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, hop) of every row that leaves a rank, for a token of rank 0 whose experts live on `expert_ranks`."""
    coordinates = list(product(*map(range, block)))
    rows, made = [(0, tuple(expert_ranks))], []
    for number, hop in enumerate(hops):
        arrived = []
        for at, wanted in rows:
            depth = max(hop.spread, default=-1) + 1
            children: dict[tuple, list[int]] = {}
            for rank in wanted:
                children.setdefault(coordinates[rank][:depth], []).append(rank)
            for ranks in children.values():
                place = tuple(
                    coordinates[ranks[0]][axis] if axis in hop.exchange else coordinates[at][axis]
                    for axis in range(len(block))
                )
                to = coordinates.index(place)
                made += [(at, to, number)] if to != at else []
                arrived.append((to, tuple(ranks)))
        rows = arrived
    return made


def routes() -> Picture:
    """A token of rank 0 and its four experts, on every route; rank r holds the experts 2r and 2r + 1."""
    p = Picture(1010, 292, "Who sends what: one token of rank 0 on two nodes of two ranks")
    experts = (1, 4, 5, 7)
    expert_ranks = [expert // 2 for expert in experts]
    panels = {"copy per expert": [(0, rank, 0) for rank in expert_ranks if rank]}
    panels |= {name: moves(route(2), (2, 2), expert_ranks) for name, route in ROUTES.items()}
    for i, (name, made) in enumerate(panels.items()):
        left = 18 + 250 * i
        p.text(left + 112, 28, name, 15)
        places = []
        for rank in range(4):
            node, local = divmod(rank, 2)
            if local == 0:
                p.frame(left + 128 * node, 66, 96, 164, f"node {node}")
            wanted = " ".join(f"e{expert}" for expert in experts if expert // 2 == rank)
            words = f"rank {rank}\n{wanted}" if wanted else f"rank {rank}"
            places.append(p.box(left + 10 + 128 * node, 80 + 84 * local, 76, 50, words, EXPERTS if wanted else PLAIN))
        drawn: dict[tuple[int, int], int] = {}
        for start, end, _ in made:
            shift = 12 * drawn.get((start, end), 0) - (6 if made.count((start, end, 0)) > 1 else 0)
            drawn[start, end] = drawn.get((start, end), 0) + 1
            (x1, y1), (x2, y2) = places[start], places[end]
            if start // 2 == end // 2:
                p.arrow((x1, y1 + 27), (x2, y2 - 27), INSIDE, 2.4)
            else:
                p.arrow((x1 + 40, y1 + shift), (x2 - 40, y2 + shift), BETWEEN, 2.4)
        crossing = sum(start // 2 != end // 2 for start, end, _ in made)
        inside = len(made) - crossing
        p.text(left + 112, 254, f"{crossing} row{'s'[: crossing != 1]} between nodes", 12, BETWEEN)
        p.text(left + 112, 272, f"{inside} row{'s'[: inside != 1]} inside a node" if inside else "", 12, INSIDE)
    return p


def groups() -> Picture:
    """EP and EDP groups of three layers on 2 nodes of 4 ranks."""
    p = Picture(1010, 232, "Expert-parallel groups of layers with 2, 4 and 8 experts on two nodes of four ranks")
    levels = (2, 4)
    for i, ep_size in enumerate((2, 4, 8)):
        left = 22 + 330 * i
        ranks_edp_ep = ep_grid(levels, ep_block(levels, ep_size)).tolist()
        edp_size = len(ranks_edp_ep)
        p.text(left + 152, 28, f"{ep_size} experts: EP {ep_size}, EDP {edp_size}", 15)
        for group, ranks in enumerate(ranks_edp_ep):
            for place, rank in enumerate(ranks):
                node, local = divmod(rank, levels[1])
                tint = GROUP_TINTS[group]
                words = f"rank {rank}\ne{place}"
                p.box(left + 8 + 73 * local, 70 + 82 * node, 67, 48, words, PLAIN, tint=tint)
        for node in range(2):
            p.frame(left, 62 + 82 * node, 303, 64, f"node {node}")
    return p


def pipeline() -> Picture:
    """The turns of four chunks on a route of two hops, from `schedule`."""
    hops, chunks = 2, 4
    turns = schedule(hops, chunks)
    p = Picture(1010, 262, "In which order one rank works on four chunks, and which exchanges are under way meanwhile")
    left, step, top, height = 92, 44, 52, 36
    stages = ("copy", "pass on", "experts", "pass back", "add up")
    colours = (BETWEEN, INSIDE, INSIDE, BETWEEN)  # of the exchange that a stage starts
    for chunk in range(chunks):
        y = top + 42 * chunk
        p.text(left - 12, y + 23, f"chunk {chunk}", 12, INK, "end")
        own = [turns.index(Turn(stage, chunk)) for stage in range(len(stages))]
        for (start, end), colour in zip(pairwise(own), colours, strict=True):
            p.bar(left + step * (start + 1), y + 13, step * (end - start - 1), 10, colour)
        for stage, turn in enumerate(own):
            colour = EXPERTS if stage == hops else PLAIN
            p.box(left + step * turn + 2, y, step - 4, height, str(stage), colour)
    for turn in range(len(turns)):
        p.text(left + step * (turn + 0.5), top - 10, str(turn + 1), 11, FAINT)
    p.text(left - 12, top - 10, "turn", 11, FAINT, "end")
    y, x = 244, 30
    for i, name in enumerate(stages):
        p.text(x, y, f"{i} {name}", 12, EXPERTS if i == hops else FAINT, "start")
        x += 34 + 8 * len(name)
    for name, colour in (("exchange between nodes may be under way", BETWEEN), ("exchange inside the node", INSIDE)):
        x += 14
        p.bar(x, y - 9, 26, 10, colour)
        p.text(x + 34, y, name, 12, FAINT, "start")
        x += 46 + 6.5 * len(name)
    return p


PICTURES = {"token_way": token_way, "routes": routes, "groups": groups, "pipeline": pipeline}


def main() -> None:
    """Write every picture beside this file."""
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
