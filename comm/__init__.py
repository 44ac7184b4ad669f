"""Expert dispatch: tokens reach their experts in at most two hops and cross the slow network once.

Knows no model, no config and no logging; process groups are passed in through a `Topology`. Names are imported on
first use, so that the command line can answer without torch.
"""

from typing import TYPE_CHECKING

from twohop.comm.lazy import lazily

if TYPE_CHECKING:
    from twohop.comm.all_to_all import build_all_to_all
    from twohop.comm.build import build_dispatcher
    from twohop.comm.clock import PhaseClock
    from twohop.comm.cost import CostModel
    from twohop.comm.diagnose import announce_failure
    from twohop.comm.dispatcher import Dispatched, Planned, TokenDispatcher
    from twohop.comm.errors import CommError, NotFiniteError
    from twohop.comm.probe import fit_cost_model
    from twohop.comm.topology import Topology
    from twohop.comm.traffic import TrafficMeter
    from twohop.comm.way import AutoOptions
    from twohop.comm.wiring import HopWires, Wires

_HOME = {
    "build_all_to_all": "all_to_all",
    "build_dispatcher": "build",
    "PhaseClock": "clock",
    "CostModel": "cost",
    "AutoOptions": "way",
    "Dispatched": "dispatcher",
    "Planned": "dispatcher",
    "TokenDispatcher": "dispatcher",
    "announce_failure": "diagnose",
    "CommError": "errors",
    "NotFiniteError": "errors",
    "fit_cost_model": "probe",
    "Topology": "topology",
    "TrafficMeter": "traffic",
    "HopWires": "wiring",
    "Wires": "wiring",
}
__all__ = [
    "AutoOptions",
    "CommError",
    "CostModel",
    "Dispatched",
    "HopWires",
    "NotFiniteError",
    "PhaseClock",
    "Planned",
    "TokenDispatcher",
    "Topology",
    "TrafficMeter",
    "Wires",
    "announce_failure",
    "build_all_to_all",
    "build_dispatcher",
    "fit_cost_model",
]


__getattr__ = lazily(__name__, _HOME)
