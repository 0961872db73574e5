"""The pytest plugin under the package's name. Pytest also loads it by its entry point."""

from pytest_promptlayer_exec import promptlayer_simulator

__all__ = ["promptlayer_simulator"]
