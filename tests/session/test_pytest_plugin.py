"""The pytest plugin, in pytest runs of its own, like a user's."""

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


def test_the_fixture_works_in_every_kind_of_test(pytester: pytest.Pytester) -> None:
    """Synchronous tests and those of pytest-asyncio and anyio can use it in one run."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'")
    pytester.makepyfile(
        test_synchronous=SYNCHRONOUS,
        test_asyncio=ASYNCHRONOUS.format(mark="asyncio"),
        test_anyio=ASYNCHRONOUS.format(mark="anyio"),
    )
    # Loaded by its documented path, without the entry point.
    named = ("-p", "no:promptlayer_exec", "-p", "promptlayer_exec.pytest_plugin")
    pytester.runpytest_subprocess("-W", "error", *named).assert_outcomes(passed=3)


def test_the_fixture_needs_no_proxy(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session reaches it although the environment names proxies, which do not exist."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    pytester.makepyfile(ASYNCHRONOUS.format(mark="asyncio"))
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_an_unused_plugin_imports_nothing(pytester: pytest.Pytester) -> None:
    """The active plugin imports neither the package nor its dependencies."""
    pytester.makepyfile(
        """
        import sys

        def test_unused(request):
            assert request.config.pluginmanager.has_plugin("promptlayer_exec")
            ours = ("promptlayer_exec", "aiohttp", "cattrs")
            assert [name for name in ours if name in sys.modules] == []
        """
    )
    # Under coverage, coverage itself imports the package to find its files.
    pytester.runpytest_subprocess("-p", "no:hypothesispytest").assert_outcomes(passed=1)


def test_the_entry_point_loads_the_plugin(promptlayer_simulator) -> None:  # type: ignore[no-untyped-def]
    """This suite does not name the plugin."""
    assert promptlayer_simulator.base_url.startswith("http://127.0.0.1:")
