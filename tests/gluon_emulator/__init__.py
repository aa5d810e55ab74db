"""Runs Gluon kernels for Hopper on CPU tensors, with barriers, copies and products under a random schedule."""

from tests.gluon_emulator.launch import launch as launch
from tests.gluon_emulator.ordering import RaceError as RaceError
from tests.gluon_emulator.scheduler import DeadlockError as DeadlockError
