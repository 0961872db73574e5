"""The settings of a session: where they are read from, and which are refused."""

import inspect
import threading
import traceback
from typing import Any

import pytest

from promptlayer_exec import ConfigurationError, PollPolicy, Session, StartRequest
from promptlayer_exec._engine.settings import find_api_key, find_base_url

KEY, URL = "PROMPTLAYER_API_KEY", "PROMPTLAYER_BASE_URL"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in (KEY, URL):
        monkeypatch.delenv(name, raising=False)


def test_the_key_argument_takes_precedence(monkeypatch):
    """With an argument, the variable is not even checked."""
    monkeypatch.setenv(KEY, "not a key\n")
    assert find_api_key("pl_arg") == "pl_arg"


def test_empty_key_variable_counts_as_unset(monkeypatch):
    """An empty variable is ignored."""
    monkeypatch.setenv(KEY, "")
    assert find_api_key(None) is None


BAD_KEYS = [
    "pl_secret\n",
    "pl_secret\r\nX-Evil: 1",
    "pl_ secret",
    "pl_\tsecret",
    "   ",
    "pl_sécret",
    "pl_secret\xff",
    "“pl_secret”",
    "pl_secret\udcff",
]


@pytest.mark.parametrize("key", [*BAD_KEYS, "", b"pl_secret", 17], ids=ascii)
def test_malformed_key_argument(key):
    """A key that cannot be sent in a header is refused, and the message does not show it."""
    with pytest.raises(ConfigurationError, match=r"^api_key must be") as caught:
        find_api_key(key)
    assert "cret" not in str(caught.value) + repr(caught.value)
    assert caught.value.__cause__ is None


def test_malformed_key_variable(monkeypatch):
    """A malformed variable is refused, too, and the message names the variable."""
    monkeypatch.setenv(KEY, "pl_ secret")
    with pytest.raises(ConfigurationError, match=rf"^{KEY} must be") as caught:
        find_api_key(None)
    assert "cret" not in str(caught.value)


def test_the_default_base_url(monkeypatch):
    """Without an argument and a variable, the base URL is PromptLayer's; so with an empty one."""
    assert find_base_url(None) == "https://api.promptlayer.com"
    monkeypatch.setenv(URL, "")
    assert find_base_url(None) == "https://api.promptlayer.com"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/", "http://localhost:8000"),
        ("https://api.test/pl/v1", "https://api.test/pl/v1"),
        ("https://api.test/pl/v1/", "https://api.test/pl/v1"),
        ("https://api.test/a%2Fb/", "https://api.test/a%2Fb"),
        ("HTTPS://API.test/Pl", "https://api.test/Pl"),
        ("http://127.0.0.1:0", "http://127.0.0.1:0"),
        ("http://127.0.0.1:65535", "http://127.0.0.1:65535"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
        ("http://[2001:db8::1]", "http://[2001:db8::1]"),
        ("http://bücher.test/ä", "http://xn--bcher-kva.test/%C3%A4"),
        ("https://xn--hqbpi0jcw.test", "https://xn--hqbpi0jcw.test"),  # not valid in IDNA 2003
    ],
)
def test_base_url_is_kept(given, used):
    """Host, port and path prefix are kept, percent-encoded, without the trailing slash."""
    assert find_base_url(given) == used


BAD_URLS = {
    "empty": "",
    "no-scheme": "api.promptlayer.com",
    "path": "/v1",
    "ftp": "ftp://api.test",
    "no-host": "https://",
    "no-slashes": "https:api.test",
    "port-too-large": "http://api.test:65536",
    "port-no-number": "http://api.test:http",
    "open-bracket": "http://[::1",
    "user-and-password": "https://user:hunter2@api.test",
    "query": "https://api.test/?a=1",
    "fragment": "https://api.test/#top",
    "newline": "https://api.test\n",
    "leading-blank": " https://api.test",
    "inner-blank": "https://api test",
    "tab": "https://api.test/\tv1",
    "null": "https://api.test\0",
    "delete": "https://api.test/\x7f",
    "backslash": "https:\\\\api.test",
    "short-address": "http://127.1:8000",
    "no-name": "http://xn--a",
    "surrogate": "https://\ud800",
    "nbsp-in-host": "https://api\xa0test",
}


@pytest.mark.parametrize("url", BAD_URLS.values(), ids=BAD_URLS)
def test_malformed_base_url(url):
    """A value that is not a plain http(s) URL is refused, and the message names the argument."""
    with pytest.raises(ConfigurationError, match=r"^base_url "):
        find_base_url(url)


def test_malformed_base_url_variable(monkeypatch):
    """A malformed variable is refused, too, and the message names the variable."""
    monkeypatch.setenv(URL, "api.promptlayer.com")
    with pytest.raises(ConfigurationError, match=rf"^{URL} must be an http"):
        find_base_url(None)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@api.test",
        "ftp://user:hunter2@api.test",
        "https://user:hunter2@api.test:99999",
        "https://user:hunter2@api.test?a=1",
        "https://user:hunter2@api.test/ v1",
    ],
)
def test_a_password_is_not_shown(url):
    """The message does not show a password in a refused URL."""
    with pytest.raises(ConfigurationError) as caught:
        find_base_url(url)
    assert "hunter2" not in str(caught.value)


# Settings of the wrong kind


class _Acquirable:
    async def acquire(self) -> None:
        """Never wait."""


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("poll", 1.0, "poll must be a PollPolicy, such as PollPolicy.fixed(2.0), got 1.0"),
        ("poll", PollPolicy, "poll must be a PollPolicy"),
        ("retry", 3, "retry must be a RetryPolicy, such as RetryPolicy(outage=10.0), got 3"),
        ("limiter", 5, "limiter must be an object with `async def acquire(self)`, got 5"),
        ("limiter", _Acquirable, "limiter must be an object"),
        ("http", "x", "http must be an aiohttp.ClientSession, got 'x'"),
        ("converter", 5, "converter must be a cattrs.Converter, got 5"),
        ("observers", [5], "observers must be callables that are not async, got 5"),
        ("observers", iter([print]), "observers must be a list of callables, got <list_iterator"),
        ("observers", [_Acquirable().acquire], "observers must be callables that are not async"),
        ("limiter", threading.Semaphore(), "limiter must be an object with `async def acquire"),
        ("observers", print, "observers must be a list of callables, got <built-in"),
        ("observers", "abc", "observers must be callables that are not async, got 'a'"),
        ("trust_env", "no", "trust_env must be True or False, got 'no'"),
        ("push", 1, "push must be None, True or False, got 1"),
        ("check_inputs", 1, "check_inputs must be True or False, got 1"),
        ("check_inputs", None, "check_inputs must be True or False, got None"),
        ("callbacks", "https://a.test", "callbacks must be a promptlayer_exec.webhooks.Callbacks"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(name: str, value: Any, meant: str) -> None:
    """When the session is made, with what is meant."""
    with pytest.raises(ConfigurationError) as caught:
        Session("a-key-to-test", **{name: value})
    assert meant in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "by_default", "turned_on"),
    [
        ("1", True, True),
        ("TRUE", True, True),
        ("0", False, False),
        ("off", False, False),
        ("", None, True),
    ],
)
def test_the_environment_can_turn_push_on_by_default_and_off(
    monkeypatch: pytest.MonkeyPatch, variable: str, by_default: bool | None, turned_on: bool
) -> None:
    """Off even where a program turned it on, and never on where that turned it off."""
    assert Session("a-key-to-test")._settings.push is None
    monkeypatch.setenv("PROMPTLAYER_EXEC_PUSH", variable)
    for push, expected in ((None, by_default), (True, turned_on), (False, False)):
        assert Session("a-key-to-test", push=push)._settings.push is expected


def test_an_unclear_switch_of_push_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PROMPTLAYER_EXEC_PUSH` must be 1 or 0."""
    monkeypatch.setenv("PROMPTLAYER_EXEC_PUSH", "maybe")
    with pytest.raises(ConfigurationError, match="PROMPTLAYER_EXEC_PUSH must be 1 or 0"):
        Session("a-key-to-test")


@pytest.mark.parametrize(
    "proxy",
    ["http://me:hunter2@proxy:port", "me:hunter2@:1", "http://me:hunter2@", "ftp://me:hunter2@p"],
)
async def test_an_invalid_proxy_is_refused_when_the_session_opens(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """The error names the variable, not the password, and NO_PROXY=* helps."""
    session = Session("a-key-to-test")
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY must be a URL") as caught:
        await session.get_results(787)
    assert caught.value.execution_id == 787
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("NO_PROXY", "*")
    async with session:
        assert repr(session).endswith(", open>")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("timeout", "Session has wait_timeout= for a wait, and request_timeout= for one HTTP att"),
        ("throw_on_error", "errors are always raised here"),
        ("cache_ttl_seconds", "there is no cache"),
        ("enable_tracing", "see promptlayer_exec.opentelemetry"),
        ("max_retries", r"it is retry=RetryPolicy\(...\) here"),
    ],
)
def test_another_client_s_setting_is_answered_with_ours(theirs: str, ours: str) -> None:
    """The vendor's SDK and others have such arguments; any other unknown name is Python's error."""
    with pytest.raises(TypeError, match=f"unexpected argument {theirs}=: {ours}"):
        Session(**{theirs: 5})
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Session(unknown=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("theirs", "ours"), [("workflow_label_name", "label"), ("workflow_version", "version")]
)
async def test_the_vendor_s_name_of_an_argument_is_answered_with_ours(
    theirs: str, ours: str
) -> None:
    """For those who come from the vendor's SDK; any other unknown name is Python's own error."""
    arguments: dict[str, Any] = {theirs: None}
    session = Session("a-key-to-test")
    with pytest.raises(TypeError, match=f"unexpected argument {theirs}=: it is {ours}= here"):
        await session.start("name", **arguments)
    with pytest.raises(TypeError, match=f"unexpected argument {theirs}=: it is {ours}= here"):
        StartRequest("name", **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        await session.start("name", unknown=None)  # type: ignore[arg-type]


async def test_a_traceback_has_no_frame_that_only_checks_names() -> None:
    """An error leads from the caller straight to the call."""

    def functions_of(error: BaseException) -> list[str]:
        return [frame.name for frame in traceback.extract_tb(error.__traceback__)][1:]

    with pytest.raises(ConfigurationError) as malformed:
        Session(base_url="not a url")
    assert functions_of(malformed.value)[:2] == ["__init__", "__init__"]  # the settings' own

    session = Session("a-key-to-test")
    for name in ("start", "run"):
        call = getattr(session, name)
        with pytest.raises(ValueError, match="version") as refused:
            await call("name", version=0)
        assert functions_of(refused.value)[:2] == [name, "_start"]
        assert inspect.iscoroutinefunction(call)
        assert "_unknown" not in inspect.signature(call).parameters
