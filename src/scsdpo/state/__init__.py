"""State: what is remembered over steps, and what changes with them."""

from scsdpo.state.pass_rates import DecayedBeta, Instant, MovingAverage, PassRates
from scsdpo.state.schedule import Constant, Ramp, Schedule
from scsdpo.state.stateful import Stateful, memory, nested_state

__all__ = [
    "Constant",
    "DecayedBeta",
    "Instant",
    "MovingAverage",
    "PassRates",
    "Ramp",
    "Schedule",
    "Stateful",
    "memory",
    "nested_state",
]
