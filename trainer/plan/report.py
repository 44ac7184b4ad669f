"""A plan as tables on the terminal, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from twohop.comm.simulate import Simulated
from twohop.trainer.plan.hardware import GIB
from twohop.trainer.plan.search import Candidate, Found
from twohop.trainer.plan.shape import LayerShape
from twohop.trainer.plan.steptime import Timer

LEVELS = ("between nodes", "inside node")
WIDTH = 118  # where the terminal does not say


def as_dict(timer: Timer, found: Found, simulated: Sequence[Simulated]) -> dict[str, Any]:
    """Everything that `show` prints."""
    shape, best, config = timer.shape, found.best, timer.config
    targets = config.global_batch * shape.targets
    return {
        "model": {"name": shape.config.name, "parameters": shape.total, "active": shape.active},
        "cluster": asdict(config.cluster),
        "best": _candidate(best),
        "step_s": best.step_s,
        f"{_unit(timer)}_per_s": targets / best.step_s,
        "mfu": shape.target_flops * targets / (best.step_s * config.cluster.world * timer.peak_flops),
        "traffic": {
            level: {"bytes": total[0], "messages": total[1]}
            for level, total in _traffic(timer, best, simulated).items()
        },
        "simulated_dispatch_s": best.accumulation * sum(s.forward_s + s.backward_s for s in simulated) - best.experts_s,
        "others": {
            choice: {str(value): other and _candidate(other) for value, other in others.items()}
            for choice, others in found.others.items()
        },
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        **asdict(candidate),
        "recompute": candidate.recompute.value,
        "ways": [{"dispatcher": w.algorithm, "chunks": w.chunks, "wire": w.wire} for w in candidate.ways],
        "memory": asdict(candidate.memory) | {"peak": candidate.memory.peak},
        "step_s": candidate.step_s,
    }


def _traffic(timer: Timer, best: Candidate, simulated: Sequence[Simulated]) -> dict[str, tuple[float, int]]:
    """Bytes and messages of all ranks in a step, by level."""
    nodes = timer.config.cluster.nodes
    totals = {level: [s.total(level) for s in simulated] for level in LEVELS}
    return {
        level: (
            sum(sent for sent, _ in total) * nodes * best.accumulation,
            sum(messages for _, messages in total) * nodes * best.accumulation,
        )
        for level, total in totals.items()
    }


def show(timer: Timer, found: Found, simulated: Sequence[Simulated]) -> None:
    """Print the plan."""
    console, values, best = _console(), as_dict(timer, found, simulated), found.best
    cluster = timer.config.cluster
    print(
        f"{timer.shape.config.name}: {timer.shape.total:,} parameters, {timer.shape.active:,} used by a token; "
        f"{cluster.nodes} nodes × {cluster.gpus_per_node} {cluster.gpu}, {_batch(timer)} a step, "
        f"{timer.config.precision.value}"
    )
    console.print(_memory_table(timer, found))
    console.print(_time_table(timer, values, best))
    console.print(_choice_table(timer, found))
    print(_assumed(timer))


def _unit(timer: Timer) -> str:
    """What a model is trained for."""
    return "images" if timer.config.model.vision is not None else "tokens"


def _batch(timer: Timer) -> str:
    seq_len, source_len = timer.config.lengths
    of_each = f"{timer.config.global_batch} × {seq_len}"
    if timer.config.model.vision is not None:
        return f"{of_each} patches"
    return f"{of_each} tokens" + (f" from sources of {source_len}" if source_len is not None else "")


def _assumed(timer: Timer) -> str:
    cluster, gpu = timer.config.cluster, timer.gpu
    cards = cluster.nics_per_node or cluster.gpus_per_node
    sentences = (
        f"a node has {cards} cards of {cluster.inter_gbps:g} Gbit/s, a GPU a port of {gpu.link_bytes_s / 1e9:.0f} GB/s "
        "inside it, each used in full",
        f"a message between nodes takes {cluster.message_us:g} µs of a processor, {cluster.latency_us:g} µs on its way",
        f"matrix products reach {cluster.efficiency:.0%} of {timer.peak_flops / 1e12:.0f} TFLOP/s{_fp8(timer)}",
        "gradients are summed after the last backward pass (ddp, zero), or beside dense arithmetic (fsdp)",
        f"{timer.config.optimizer}; {_routing(timer)}; ranks in step",
    )
    return "assumed:\n" + "\n".join(f"- {sentence}" for sentence in sentences)


def _routing(timer: Timer) -> str:
    load = timer.config.rank_load
    if not load:
        return "uniform routing"
    return (
        f"uniform routing, but the busiest rank's experts get {'/'.join(f'{x:g}' for x in load)} times the mean, and "
        "all wait for them: memory and arithmetic are that rank's"
    )


def _fp8(timer: Timer) -> str:
    if timer.expert_flops == timer.flops:
        return ""
    return f", those of experts, in fp8, of {timer.expert_flops / timer.config.cluster.efficiency / 1e12:.0f}"


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _memory_table(timer: Timer, found: Found) -> Table:
    parts = ("weights", "gradients", "moments", "activations", "plans", "buffers", "peak")
    chosen = ("micro-batch", "EP", "recompute")
    table = _table("GiB of a rank when it holds most, each engine at its best", "engine", *chosen, *parts)
    for engine, candidate in sorted(found.others["engine"].items()):
        if candidate is None:
            table.add_row(engine, *["–"] * (len(chosen) + len(parts) - 1), "does not fit")
            continue
        numbers = [f"{getattr(candidate.memory, part) / GIB:.2f}" for part in parts]
        table.add_row(engine, str(candidate.micro_batch), _ep(candidate), candidate.recompute.value, *numbers)
    return table


def _time_table(timer: Timer, values: dict[str, Any], best: Candidate) -> Table:
    table = _table("a step of the best", "", "ms", "", "")
    rows = [
        ("dense arithmetic", best.dense_s, f"{best.accumulation} micro-batches of {best.micro_batch} on each rank"),
        ("experts", best.experts_s, ""),
        ("dispatch, beside experts", best.dispatch_s, f"{values['simulated_dispatch_s'] * 1e3:.1f} by simulation"),
        ("gradients", best.gradients_s, ""),
        ("optimizer", best.update_s, ""),
    ]
    for name, seconds, remark in rows:
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / best.step_s:.0%}", remark)
    table.add_section()
    unit = _unit(timer)
    speed = f"{values[f'{unit}_per_s']:,.0f} {unit}/s, MFU {values['mfu']:.1%}"
    table.add_row("together", f"{best.step_s * 1e3:.1f}", "", speed)
    for level, traffic in values["traffic"].items():
        table.add_row(level, "", "", f"{traffic['bytes'] / 1e9:,.1f} GB in {traffic['messages']:,} messages, all ranks")
    return table


def _choice_table(timer: Timer, found: Found) -> Table:
    """The reasons: what each other value costs, with all else at its best."""
    table = _table("choices, and what the others cost", "choice", "best", "others")
    table.columns[1].justify = table.columns[2].justify = "left"
    for choice, others in found.others.items():
        value = next(v for v, candidate in others.items() if candidate == found.best)
        costs = [_cost(other, candidate, found.best) for other, candidate in others.items() if other != value]
        costs += _not_looked_at(timer, found, choice)
        table.add_row(choice, str(value), ", ".join(costs) or "–")
    for layer, index in _distinct_layers(timer):
        ways = timer.ways(index, found.best.ep_sizes[index], found.best.micro_batch, found.best.recompute)
        for choice, key in (("dispatcher", "algorithm"), ("chunks", "chunks"), ("wire", "wire")):
            fastest: dict[Any, float] = {}
            for way in ways:  # the fastest come first
                fastest.setdefault(getattr(way, key), way.seconds)
            value, *rest = fastest
            costs = [f"{other} +{fastest[other] / ways[0].seconds - 1:.1%} of the layer" for other in rest]
            which = " ".join([*filter(None, [layer.side]), f"{layer.num_experts} experts"])
            table.add_row(f"{choice}, {which}", str(value), ", ".join(costs) or "–")
    return table


def _not_looked_at(timer: Timer, found: Found, choice: str) -> list[str]:
    """Values that were not compared, and why."""
    if choice == "engine":
        return [f"{engine} refuses {why}" for engine, why in found.refused.items()]
    left_out = [
        m.value for m in timer.config.recompute if choice == "recompute" and m.value not in found.others[choice]
    ]
    return [f"{', '.join(left_out)} not needed: the fastest of all fits"] if left_out else []


def _cost(value: Any, candidate: Candidate | None, best: Candidate) -> str:
    if candidate is None:
        return f"{value} does not fit"
    slower = candidate.step_s / best.step_s - 1
    return f"{value} +{slower:.1%}" if slower >= 5e-4 else f"{value} as fast, {_more(candidate, best)}"


def _more(candidate: Candidate, best: Candidate) -> str:
    return f"{(candidate.memory.peak - best.memory.peak) / GIB:+.1f} GiB"


def _distinct_layers(timer: Timer) -> list[tuple[LayerShape, int]]:
    """A layer of each shape, and its index."""
    first: dict[LayerShape, tuple[LayerShape, int]] = {}
    for index, layer in enumerate(timer.shape.layers):
        first.setdefault(layer, (layer, index))
    return list(first.values())


def _ep(candidate: Candidate) -> str:
    """EP sizes in the order of layers, runs of equal ones as one."""
    return "/".join(str(size) for size, _ in groupby(candidate.ep_sizes))
