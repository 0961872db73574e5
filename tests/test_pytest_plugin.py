"""The pytest plugin: in sessions of pytest of their own, as a user's."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

SYNCHRONOUS = """
    import urllib.request

    def test_synchronous(promptlayer_simulator):
        request = urllib.request.Request(
            promptlayer_simulator.base_url + "/workflows/w",
            headers={"X-API-KEY": promptlayer_simulator.api_key},
        )
        try:
            urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            assert error.code == 404
            error.close()
        assert promptlayer_simulator.request_count == 1
"""
ASYNCHRONOUS = """
    import pytest
    from promptlayer_exec import Session
    from promptlayer_exec.simulator import Scenario, SimNode

    @pytest.mark.{mark}
    async def test_asynchronous(promptlayer_simulator):
        sim = promptlayer_simulator
        id_ = sim.add_execution(Scenario([SimNode("Answer", "42", is_output_node=True)]))
        async with Session(sim.api_key, base_url=sim.base_url) as session:
            assert await session.execution(id_).output() == "42"
"""


def test_the_fixture_serves_every_kind_of_test(pytester: pytest.Pytester) -> None:
    """Synchronous ones, those of pytest-asyncio and those of anyio, side by side."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'")
    pytester.makepyfile(
        test_synchronous=SYNCHRONOUS,
        test_asyncio=ASYNCHRONOUS.format(mark="asyncio"),
        test_anyio=ASYNCHRONOUS.format(mark="anyio"),
    )
    # By its documented path, as those name it who load no plugin by entry point.
    named = ("-p", "no:promptlayer_exec", "-p", "promptlayer_exec.pytest_plugin")
    pytester.runpytest_subprocess("-W", "error", *named).assert_outcomes(passed=3)


def test_unused_it_costs_no_import(pytester: pytest.Pytester) -> None:
    """Neither the package nor a dependency of it is imported, though the plugin is active."""
    pytester.makepyfile(
        """
        import sys

        def test_unused(request):
            assert request.config.pluginmanager.has_plugin("promptlayer_exec")
            ours = ("promptlayer_exec", "aiohttp", "cattrs")
            assert [name for name in ours if name in sys.modules] == []
        """
    )
    # Coverage, where the suite itself is measured, imports the package to find its files.
    pytester.runpytest_subprocess(
        "-p", "no:hypothesispytest", "-p", "no:schemathesis"
    ).assert_outcomes(passed=1)


def test_installed_it_is_there(promptlayer_simulator) -> None:  # type: ignore[no-untyped-def]
    """Nobody names it for this suite."""
    assert promptlayer_simulator.base_url.startswith("http://127.0.0.1:")
