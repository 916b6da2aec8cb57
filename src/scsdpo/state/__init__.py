"""State that strategies keep over steps, and numbers that change with them."""

from scsdpo.state.pass_rates import DecayedBeta, Instant, MovingAverage, PassRates
from scsdpo.state.plain import plain, restored
from scsdpo.state.schedule import Constant, Ramp, Schedule
from scsdpo.state.stateful import Stateful, all_remembered, memory, nested_state, remember_all

__all__ = [
    "Constant",
    "DecayedBeta",
    "Instant",
    "MovingAverage",
    "PassRates",
    "Ramp",
    "Schedule",
    "Stateful",
    "all_remembered",
    "memory",
    "nested_state",
    "plain",
    "remember_all",
    "restored",
]
