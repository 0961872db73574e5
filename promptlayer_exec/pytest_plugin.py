"""The pytest plugin, for those who name it: installed, it is there without being named."""

from pytest_promptlayer_exec import promptlayer_simulator

__all__ = ["promptlayer_simulator"]
