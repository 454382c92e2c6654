"""Broker URLs and store settings: what each form means, what each mistake says, and that no secret shows."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from relay_core.errors import InvalidArgument, InvalidUrl
from relay_core.settings import Durability, StoreSettings, StoreUrl, parse_durability, parse_url

SECRET = "hunter2-of-all-things"

WORDS = ["relay", "redis", "valkey"]
TLS_WORDS = ["relays", "rediss", "valkeys"]


@pytest.mark.parametrize("word", WORDS)
def test_a_host_and_port_name_a_single_server_without_tls(word: str) -> None:
    url = parse_url(f"{word}://example.org:7000/3")
    assert (url.topology, url.hosts, url.db, url.tls) == ("standalone", (("example.org", 7000),), 3, False)


@pytest.mark.parametrize("word", TLS_WORDS)
@pytest.mark.parametrize(
    ("suffix", "rest", "topology"),
    [("", "h:1/0", "standalone"), ("+sentinel", "h:1/s/0", "sentinel"), ("+cluster", "h:1", "cluster")],
)
def test_each_word_with_an_s_asks_for_tls_in_each_topology(word: str, suffix: str, rest: str, topology: str) -> None:
    url = parse_url(f"{word}{suffix}://{rest}")
    assert url.tls
    assert url.topology == topology


@pytest.mark.parametrize("word", WORDS)
def test_each_word_names_sockets_sentinels_and_clusters(word: str) -> None:
    unix = parse_url(f"{word}+unix:///run/a%20b/s.sock?db=4")
    assert (unix.topology, unix.path, unix.db) == ("unix", "/run/a b/s.sock", 4)
    sentinel = parse_url(f"{word}+sentinel://a:1,b/main/2")
    assert (sentinel.hosts, sentinel.service, sentinel.db) == ((("a", 1), ("b", 26379)), "main", 2)
    cluster = parse_url(f"{word}+cluster://a,b:2,[::1]:3")
    assert cluster.hosts == (("a", 6379), ("b", 2), ("::1", 3))


def test_ports_and_databases_have_defaults() -> None:
    url = parse_url("relay://example.org")
    assert (url.hosts, url.db) == ((("example.org", 6379),), 0)


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert parse_url("relay://[2001:db8::1]:7000/0").hosts == (("2001:db8::1", 7000),)
    assert parse_url("relay://[::1]").hosts == (("::1", 6379),)


def test_no_host_means_the_embedded_server_in_its_usual_folder() -> None:
    url = parse_url("relay://")
    assert (url.topology, url.path) == ("embedded", "./.relay")


def test_the_embedded_server_may_have_another_folder() -> None:
    url = parse_url("relay://?dir=/var/lib/my%20jobs")
    assert (url.topology, url.path) == ("embedded", "/var/lib/my jobs")


def test_a_tilde_before_the_folder_means_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert parse_url("relay://?dir=~/jobs").path == "/home/ann/jobs"


def test_an_embedded_url_becomes_one_of_a_unix_socket() -> None:
    url = parse_url("relay://?dir=/data").at_socket("/data/s.sock")
    assert (url.topology, url.path, url.db) == ("unix", "/data/s.sock", 0)
    assert parse_url(url.safe()) == url


def test_user_and_password_are_percent_decoded() -> None:
    url = parse_url("relay://us%40er:p%40ss%3Aw%2Frd%3F%23%25@h/0")
    assert (url.username, url.password) == ("us@er", "p@ss:w/rd?#%")


def test_a_password_needs_no_user() -> None:
    url = parse_url("relay://:secret@h/0")
    assert (url.username, url.password) == (None, "secret")


def test_sentinels_have_credentials_of_their_own() -> None:
    url = parse_url("relay+sentinel://u:p@h/main/0?sentinel_username=su&sentinel_password=sp")
    assert (url.username, url.password, url.sentinel_username, url.sentinel_password) == ("u", "p", "su", "sp")


def test_tls_options_are_kept_with_their_types() -> None:
    url = parse_url("relays://h/0?ssl_ca_certs=/ca.pem&ssl_check_hostname=false&ssl_cert_reqs=none")
    assert dict(url.ssl) == {"ssl_ca_certs": "/ca.pem", "ssl_check_hostname": False, "ssl_cert_reqs": "none"}


@pytest.mark.parametrize(
    "text",
    [
        "relay://",
        "relay://?dir=/x%20y",
        "relay://h:1/2",
        "relay://[::1]:1/2",
        "relays://h:1/0?ssl_ca_certs=/ca.pem",
        "relay+unix:///a/b%20c?db=1",
        "valkey+sentinel://a:1,b:2/main/3",
        "rediss+cluster://a:1,b:2",
    ],
)
def test_a_url_without_credentials_is_printed_so_that_it_parses_to_the_same(text: str) -> None:
    url = parse_url(text)
    assert parse_url(url.safe()) == url


@pytest.mark.parametrize(
    "text",
    [
        f"relay://me:{SECRET}@h:1/0",
        f"relay://:{SECRET}@h:1/0",
        f"relay+unix://me:{SECRET}@/a/b?db=1",
        f"relays+cluster://me:{SECRET}@a:1,b:2",
        f"relay+sentinel://h/main/0?sentinel_password={SECRET}",
        f"relay+sentinel://me:{SECRET}@h/main/0?sentinel_username={SECRET}&sentinel_password={SECRET}",
    ],
)
def test_nothing_that_prints_a_url_shows_a_credential(text: str) -> None:
    url = parse_url(text)
    for shown in (str(url), repr(url), url.safe(), f"{url}", repr([url])):
        assert SECRET not in shown
        assert "***" in shown


WRONG = [
    (f"http://me:{SECRET}@h/0", "http"),
    (f"relay+magic://me:{SECRET}@h/0", "relay+magic"),
    (f"relay://me:{SECRET}@h:0/0", "port 0"),
    (f"relay://me:{SECRET}@h:70000/0", "70000"),
    (f"relay://me:{SECRET}@h:abc/0", "port"),
    (f"relay://me:{SECRET}@:6379/0", "host"),
    (f"relay://me:{SECRET}@h/one", "'one'"),
    (f"relay://me:{SECRET}@h/-1", "'-1'"),
    (f"relay://me:{SECRET}@h/0?db=x", "'x'"),
    (f"relay://me:{SECRET}@h/0?timeout=3", "'timeout'"),
    (f"relay://me:{SECRET}@h/0?ssl_ca_certs=/x", "TLS"),
    (f"relays://me:{SECRET}@h/0?ssl_cert_reqs=maybe", "maybe"),
    (f"relays://me:{SECRET}@h/0?ssl_check_hostname=maybe", "maybe"),
    (f"relay://me:{SECRET}@h/0?dir=/x", "'dir'"),
    (f"relay://me:{SECRET}@h,g/0", "2 hosts"),
    (f"relay+sentinel://me:{SECRET}@h:1", "service"),
    (f"relay+sentinel://me:{SECRET}@/main/0", "no host"),
    (f"relay+cluster://me:{SECRET}@", "no host"),
    (f"relay+cluster://me:{SECRET}@h/3", "database 0"),
    (f"relay+unix://me:{SECRET}@", "socket"),
    (f"rediss+unix://me:{SECRET}@/s", "TLS"),
    (f"relay://me:{SECRET}@", "host"),
    (f"relay://me:{SECRET}/x@h/0", "%2F"),
    (f"relay://me:{SECRET}#x@h/0", "%23"),
    (f"relay://me:{SECRET}:x@h/0/1", "too many"),
    (f"me:{SECRET}@h", "://"),
    ("redis://", "host"),
    ("", "://"),
]


@pytest.mark.parametrize(("text", "named"), WRONG)
def test_a_url_with_a_mistake_says_which_and_never_shows_the_password(text: str, named: str) -> None:
    with pytest.raises(InvalidUrl) as caught:
        parse_url(text)
    assert named in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("value", [None, 5, b"relay://h", ["relay://h"]])
def test_what_is_not_text_is_refused_by_its_type(value: Any) -> None:
    with pytest.raises(InvalidUrl, match=type(value).__name__):
        parse_url(value)


def test_a_misspelt_option_is_answered_with_the_right_one() -> None:
    with pytest.raises(InvalidUrl, match="did you mean 'ssl_ca_certs'"):
        parse_url("relays://h/0?ssl_ca_cert=/x")


def test_an_option_that_stands_twice_or_empty_is_refused() -> None:
    with pytest.raises(InvalidUrl, match="twice"):
        parse_url("relay+unix:///s?db=1&db=2")
    with pytest.raises(InvalidUrl, match="no value"):
        parse_url("relay+unix:///s?db=")


def test_a_url_is_frozen_and_can_be_a_key() -> None:
    url = parse_url("relay://h:1/0")
    assert isinstance(url, StoreUrl)
    assert {url: 1}[parse_url("relay://h:1/0")] == 1
    with pytest.raises(AttributeError):
        url.db = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("none", Durability()), ("aof", Durability(aof=True)), ("replica:2", Durability(replicas=2))],
)
def test_durability_is_nothing_a_number_of_replicas_or_the_disk(text: str, meaning: Durability) -> None:
    assert parse_durability(text) == meaning
    assert StoreSettings(durability=text).durability == text


BAD_SETTINGS: list[tuple[str, Any]] = [
    ("socket_timeout", 0),
    ("socket_timeout", -1.0),
    ("socket_timeout", "5"),
    ("socket_timeout", float("nan")),
    ("connect_timeout", True),
    ("connect_timeout", float("inf")),
    ("retry_for", -0.1),
    ("retry_for", None),
    ("durability", "replica"),
    ("durability", "replica:0"),
    ("durability", "replica:x"),
    ("durability", "disk"),
    ("durability", None),
    ("durability_timeout", 0.0),
    ("max_connections", 0),
    ("max_connections", 1.5),
    ("max_connections", True),
    ("client_name", "two words"),
    ("client_name", ""),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        StoreSettings(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def test_retrying_may_be_turned_off() -> None:
    assert StoreSettings(retry_for=0).retry_for == 0


def test_a_credential_provider_must_be_callable_and_is_not_shown() -> None:
    with pytest.raises(InvalidArgument, match=r"credential_provider.*str"):
        StoreSettings(credential_provider="secret")  # type: ignore[arg-type]

    class Provider:
        def __call__(self) -> tuple[str | None, str]:
            return None, SECRET

        def __repr__(self) -> str:
            return SECRET

    assert SECRET not in repr(StoreSettings(credential_provider=Provider()))


def test_only_tls_arguments_pass_as_tls_arguments() -> None:
    assert StoreSettings(ssl={"ssl_min_version": 3}).ssl["ssl_min_version"] == 3
    with pytest.raises(InvalidArgument, match="'host'"):
        StoreSettings(ssl={"host": "x"})
    for kind in (True, "required", None):
        with pytest.raises(InvalidArgument, match=r"got a (bool|str|NoneType); a URL that begins with relays://"):
            StoreSettings(ssl=kind)  # type: ignore[arg-type]


def test_the_password_of_a_key_file_is_not_shown() -> None:
    assert SECRET not in repr(StoreSettings(ssl={"ssl_password": SECRET}))
