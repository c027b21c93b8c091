"""Which texts name a server, and which addresses may be dialed."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from multiverse_gateway.core.addresses import (
    AddressPolicy,
    AddressRefusal,
    Endpoint,
    EndpointError,
    parse_endpoint,
    parse_root,
    refusal,
    refusal_of_any,
    with_opening,
)

CLOSED = AddressPolicy()
PRIVATE = AddressPolicy(allow_private=True)

URLS_NEVER_READ = [
    # other spellings of an IPv4 address
    "http://2130706433/",
    "http://2130706433:8000",
    "http://0x7f000001/",
    "http://0X7F000001/",
    "http://0x7f.1/",
    "http://0x7f.0x0.0x0.0x1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.0x1/",
    "http://0177.0.0.1/",
    "http://0177.0.0.01/",
    "http://017700000001/",
    "http://00000000177.0.0.1/",
    "http://127.000.000.001/",
    "http://127.0.0.01/",
    "http://0/",
    "http://0x/",
    "http://0x0/",
    "http://00/",
    "http://1.2.3/",
    "http://10.1/",
    "http://0xa.0.0.1/",
    "http://012.0.0.1/",
    "http://0xa9fea9fe/",
    "http://2852039166/",
    "http://0xA9.0xFE.0xA9.0xFE/",
    "http://0251.0376.0251.0376/",
    "http://169.254.43518/",
    "http://169.16689662/",
    "http://425.510.425.510/",
    "http://256.256.256.256/",
    "http://4294967296/",
    "http://127.0.0.1.1/",
    "http://1.1.1.1.0x7f/",
    "http://foo.127/",
    "http://example.0x7f/",
    "http://-1/",
    "http://127.0.0.1./",
    "http://127.0.0.1../",
    "http://.127.0.0.1/",
    "http://127..0.0.1/",
    "http://127.0.0.1%00/",
    "http://127.0.0.1%2f@example.com/",
    "http://%31%32%37.0.0.1/",
    "http://127%2e0%2e0%2e1/",
    "http://１２７.０.０.１/",  # noqa: RUF001
    "http://127。0。0。1/",
    "http://127．0．0．1/",  # noqa: RUF001
    "http://①②⑦.⓪.⓪.①/",
    "http://¹²⁷.0.0.1/",
    "http://¹.1.1.1/",
    # other spellings of localhost
    "http://localhost./",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
    "http://ｌｏｃａｌｈｏｓｔ/",  # noqa: RUF001
    "http://local\u00adhost/",
    "http://local\u200bhost/",
    "http://local\u200dhost/",
    "http://loc%61lhost/",
    "http://ſtraße.example/",  # noqa: RUF001
    # IPv6
    "http://::1/",
    "http://[::1/",
    "http://::1]/",
    "http://[[::1]]/",
    "http://[::1]x/",
    "http://[::1]:8000:8000/",
    "http://[::1%25lo]/",
    "http://[::1%lo]/",
    "http://[fe80::1%eth0]/",
    "http://[fe80::1%251]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[0:0:0:0:0:ffff:169.254.169.254]/",
    "http://[::FFFF:0xa.0.0.1]/",
    "http://[127.0.0.1]/",
    "http://[localhost]/",
    "http://[]/",
    "http://[:::1]/",
    "http://[v1.fe80]/",
    "http://[::１]/",  # noqa: RUF001
    # users, queries, fragments
    "http://127.0.0.1@example.com/",
    "http://example.com@127.0.0.1/",
    "http://example.com:80@127.0.0.1/",
    "http://user:pass@example.com/",
    "http://@example.com/",
    "http://:@example.com/",
    "http://a@b@example.com/",
    "http://example.com?",
    "http://example.com#",
    "http://example.com/?x=1",
    "http://example.com#@127.0.0.1/",
    "http://example.com?@127.0.0.1/",
    "http://127.0.0.1#.example.com/",
    "http://127.0.0.1?.example.com/",
    # two parsers, two hosts
    "http://example.com\\@127.0.0.1/",
    "http://127.0.0.1\\.example.com/",
    "http:\\\\127.0.0.1\\",
    "http:/\\127.0.0.1/",
    "http://example.com /",
    "http://exam ple.com/",
    "http://127.0.0.1\t.example.com/",
    "http://127.0.0.1\r\nHost: example.com/",
    "http://127.0.0.1\n.example.com",
    "http://example.com/\r\nX-Evil: 1",
    "http://example.com\x00.evil.example/",
    "http://example.com\x7f/",
    "http://example.com\u2028/",
    "http://example.com\u00a0.evil/",
    "http://example.com\ufeff/",
    "http://example.com\u202e/",
    "http://example.com\ud800/",
    "http://example.com;127.0.0.1/",
    "http://example.com,127.0.0.1/",
    "http://example.com&127.0.0.1/",
    "http://{127.0.0.1}/",
    "http://<127.0.0.1>/",
    "http://127.0.0.1`/",
    "http://$(hostname)/",
    "http://*.example.com/",
    "http:///127.0.0.1/",
    "http:////127.0.0.1/",
    "http:/127.0.0.1/",
    "http:127.0.0.1/",
    "https:8000",
    "//127.0.0.1/",
    "/127.0.0.1/",
    "127.0.0.1",
    "localhost:8000",
    "[::1]:8000",
    "url:http://127.0.0.1/",
    # schemes
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_INFO",
    "ftp://example.com/",
    "dict://127.0.0.1:11211/",
    "ldap://127.0.0.1/",
    "tftp://127.0.0.1/",
    "sftp://example.com/",
    "unix:///var/run/docker.sock",
    "http+unix://%2fvar%2frun%2fdocker.sock/",
    "ws://example.com/",
    "data:text/plain,hello",
    "javascript:alert(1)",
    "jar:http://example.com!/",
    "httpſ://example.com/",  # noqa: RUF001
    "://example.com",
    "1http://example.com",
    # ports
    "http://example.com:",
    "http://example.com:0",
    "http://example.com:1",
    "http://example.com:22",
    "http://example.com:25",
    "http://example.com:079",
    "http://example.com:0080",
    "http://example.com:1023",
    "http://example.com:65536",
    "http://example.com:99999",
    "http://example.com:65616",
    "http://example.com:-80",
    "http://example.com:+80",
    "http://example.com:8e3",
    "http://example.com:0x50",
    "http://example.com:８０",  # noqa: RUF001
    "http://example.com:80:80",
    "http://example.com:http",
    # hosts that are no names
    "",
    "   ",
    "http://",
    "http:// /",
    "http://:8000",
    "http://./",
    "http://../",
    "http://.example.com/",
    "http://example..com/",
    "http://-example.com/",
    "http://example-.com/",
    "http://exa!mple.com/",
    "http://bücher..example/",
    "http://b\u00fc*.example/",
    "http://" + "\u00e9" * 60 + ".example/",
    "http://" + "a" * 64 + ".example/",
    "http://" + "a." * 127 + "example/",
    "http://example.com/" + "a" * 2048,
    # paths that lead elsewhere
    "http://example.com/../admin",
    "http://example.com/a/..",
    "http://example.com/./a",
    "http://example.com/%2e%2e/admin",
    "http://example.com/.%2E/admin",
    "http://example.com/a%2fb",
    "http://example.com/a%5cb",
    "http://example.com/a%00",
    "http://example.com/a%0d%0aHost:b",
    "http://example.com/a%252f",
    "http://example.com/a%2",
    "http://example.com/a%zz",
    "http://example.com//",
    "http://example.com//evil.example/",
    "http://example.com/a//b",
    "http://example.com/ä",
    "http://example.com/a|b",
    "http://example.com/a{b}",
]

ADDRESSES_NEVER_DIALLED = {
    "unspecified": ["0.0.0.0", "0.0.0.1", "0.1.2.3", "0.255.255.255", "::", "0:0:0:0:0:0:0:0"],
    "link-local": ["169.254.0.0", "169.254.0.1", "169.254.169.253", "169.254.170.2", "169.254.255.255", "fe80::", "fe80::1", "febf::1"],
    "metadata address": [
        "169.254.169.254",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd00:0ec2:0:0:0:0:0:0254",
        "FD00:EC2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:42::42",
    ],
    "multicast": ["224.0.0.0", "224.0.0.1", "239.255.255.250", "239.255.255.255", "ff00::", "ff02::1", "ff0e::1"],
    "broadcast": ["255.255.255.255"],
    "reserved": [
        "192.0.0.0",
        "192.0.0.8",
        "192.0.0.170",
        "192.0.0.255",
        "192.0.2.0",
        "192.0.2.255",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.175.48.1",
        "198.18.0.0",
        "198.19.255.255",
        "198.51.100.7",
        "203.0.113.7",
        "240.0.0.0",
        "250.1.2.3",
        "255.255.255.254",
        "::2",
        "::127.0.0.1",
        "::7f00:1",
        "::fffe:0:0",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",
        "100::1",
        "100:0:0:1::1",
        "1fff:ffff::1",
        "2001::1",
        "2001:0:7f00:1::",
        "2001:2::1",
        "2001:10::1",
        "2001:20::1",
        "2001:1ff:ffff::1",
        "2001:db8::1",
        "2001:db8:ffff::1",
        "2002::1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "3fff::1",
        "3fff:fff:ffff::1",
        "4000::1",
        "5f00::1",
        "fbff::1",
        "fec0::1",
        "fe00::1",
    ],
    "v4-mapped address": ["::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:8.8.8.8", "::FFFF:10.0.0.1", "0:0:0:0:0:ffff:a9fe:a9fe"],
    "scoped address": ["fe80::1%eth0", "::1%lo", "2606:4700::1%1", "127.0.0.1%lo", "%"],
    "not an address": [
        "",
        "localhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.0.0.01",
        "127.0.0.1.",
        " 127.0.0.1",
        "127.0.0.1\n",
        "127.0.0.1:80",
        "[::1]",
        ":::1",
        "::1::",
        "::ffff:0x7f.0.0.1",
        "１２７.０.０.１",  # noqa: RUF001
        "10.0.0.0/8",
        "256.0.0.1",
    ],
}
ADDRESSES_OF_A_CAMPUS = {
    "private address": [
        "10.0.0.0",
        "10.255.255.255",
        "172.16.0.0",
        "172.31.255.255",
        "192.168.0.1",
        "192.168.255.255",
        "100.64.0.0",
        "100.100.100.199",
        "100.127.255.255",
        "fc00::",
        "fd00:ec2::253",
        "fdff:ffff::1",
    ],
    "loopback": ["127.0.0.0", "127.0.0.1", "127.1.2.3", "127.255.255.255", "::1", "0:0:0:0:0:0:0:1"],
}
ADDRESSES_IN_PUBLIC = [
    "1.0.0.0",
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "168.63.129.15",
    "168.63.129.17",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "192.0.3.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2000::",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2001:db7:ffff::1",
    "2001:db9::1",
    "2003::1",
    "2606:4700:4700::1111",
    "2a00::1",
    "3ffe:ffff::1",
    "3fff:1000::1",
]


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(address, reason) for reason, addresses in table.items() for address in addresses]


@pytest.mark.parametrize("text", URLS_NEVER_READ)
def test_a_url_that_two_programs_could_read_differently_is_refused(text: str) -> None:
    """Every spelling of a hidden address, user, scheme, port or path is refused with advice (X01)."""
    with pytest.raises(EndpointError, match=r"(?s)[;,] .+|Write .+"):
        parse_endpoint(text)


def test_the_list_of_hostile_urls_and_addresses_is_long() -> None:
    """At least 120 payloads are tried against each of the two gates (X01)."""
    assert len(set(URLS_NEVER_READ)) >= 120
    assert len(pairs(ADDRESSES_NEVER_DIALLED) + pairs(ADDRESSES_OF_A_CAMPUS)) >= 120


@pytest.mark.parametrize(
    ("text", "endpoint", "url"),
    [
        ("http://gpu7", Endpoint("http", "gpu7", 80), "http://gpu7"),
        ("http://gpu_7:8000", Endpoint("http", "gpu_7", 8000), "http://gpu_7:8000"),
        ("  https://Example.COM/v1/ \n", Endpoint("https", "example.com", 443), "https://example.com"),
        ("HTTPS://example.com:443/v1", Endpoint("https", "example.com", 443), "https://example.com"),
        ("http://example.com:443", Endpoint("http", "example.com", 443), "http://example.com:443"),
        ("https://example.com:80/", Endpoint("https", "example.com", 80), "https://example.com:80"),
        ("http://example.com:65535", Endpoint("http", "example.com", 65535), "http://example.com:65535"),
        ("http://example.com:1024", Endpoint("http", "example.com", 1024), "http://example.com:1024"),
        ("http://192.0.2.7:11434/", Endpoint("http", "192.0.2.7", 11434), "http://192.0.2.7:11434"),
        ("http://[2001:0DB8::0001]", Endpoint("http", "2001:db8::1", 80), "http://[2001:db8::1]"),
        ("https://[2001:db8::1]:8443/api/", Endpoint("https", "2001:db8::1", 8443, "/api"), "https://[2001:db8::1]:8443/api"),
        ("http://example.com/api/v1", Endpoint("http", "example.com", 80, "/api"), "http://example.com/api"),
        ("http://example.com/v1/v1", Endpoint("http", "example.com", 80), "http://example.com"),
        ("http://example.com/apiv1", Endpoint("http", "example.com", 80, "/apiv1"), "http://example.com/apiv1"),
        ("http://example.com/v1beta/openai", Endpoint("http", "example.com", 80, "/v1beta/openai"), "http://example.com/v1beta/openai"),
        ("http://h/user/a%40b.example/x", Endpoint("http", "h", 80, "/user/a%40b.example/x"), "http://h/user/a%40b.example/x"),
        ("http://h/user/a@b", Endpoint("http", "h", 80, "/user/a@b"), "http://h/user/a@b"),
        ("http://Bücher.example:8080", Endpoint("http", "xn--bcher-kva.example", 8080), "http://xn--bcher-kva.example:8080"),
        ("http://xn--bcher-kva.example", Endpoint("http", "xn--bcher-kva.example", 80), "http://xn--bcher-kva.example"),
        ("http://大学.example", Endpoint("http", "xn--pss25c.example", 80), "http://xn--pss25c.example"),
        ("http://4chan.example.1a", Endpoint("http", "4chan.example.1a", 80), "http://4chan.example.1a"),
        ("http://cafe.dead", Endpoint("http", "cafe.dead", 80), "http://cafe.dead"),
    ],
)
def test_a_url_is_read_and_written_canonically(text: str, endpoint: Endpoint, url: str) -> None:
    """Case, default ports, "/" and "/v1" at the end do not make another server."""
    assert parse_endpoint(text) == endpoint
    assert endpoint.url == url


@pytest.mark.parametrize(
    ("text", "authority", "tls"),
    [
        ("http://h", "h", False),
        ("https://h", "h", True),
        ("https://h:80/api", "h:80", True),
        ("http://[2001:db8::1]:8000", "[2001:db8::1]:8000", False),
        ("https://[2001:db8::1]", "[2001:db8::1]", True),
    ],
)
def test_the_host_header_follows_from_the_endpoint(text: str, authority: str, tls: bool) -> None:
    """The authority leaves out the default port and puts IPv6 into brackets."""
    endpoint = parse_endpoint(text)
    assert (endpoint.authority, endpoint.tls) == (authority, tls)


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://host:8000/v1/chat/completions", "http://host:8000"),
        ("http://host:8000/v1/chat/completions/", "http://host:8000"),
        ("http://host:8000/chat/completions", "http://host:8000"),
        ("http://host:8000/proxy/v1/embeddings", "http://host:8000/proxy"),
        ("http://host:8000/v1/models", "http://host:8000"),
        ("http://host:8000/v1/v1/completions", "http://host:8000"),
        ("http://host:11434/api/chat", "http://host:11434"),
        ("http://host:8000/v1/messages/count_tokens", "http://host:8000"),
        ("http://host:8000/v1/audio/speech", "http://host:8000"),
        ("http://host:8000/v1/images/generations", "http://host:8000"),
    ],
)
def test_the_url_of_a_call_is_no_root(url: str, root: str) -> None:
    """The message names the root; a URL of an older registry is read as before."""
    with pytest.raises(EndpointError, match=f"root, {root}$"):
        parse_root(url)
    assert parse_endpoint(url).prefix
    assert parse_root(root).url == root


@pytest.mark.parametrize(
    "url", ["http://host/embeddings", "http://host/v1/account/name/openai", "http://host/api", "http://host/mychat/completions2"]
)
def test_a_path_of_a_proxy_may_be_a_root(url: str) -> None:
    """A server may live below any other path."""
    assert parse_root(url).url == url


def test_a_missing_scheme_is_explained() -> None:
    """The commonest mistake is answered with the way to repair it."""
    with pytest.raises(EndpointError, match="put http:// or https:// in front"):
        parse_endpoint("localhost:8000")


PIECES = [
    "http",
    "https",
    "://",
    "//",
    "/",
    "v1",
    "[",
    "]",
    "::1",
    "127.0.0.1",
    "example.com",
    ":",
    "8000",
    "@",
    "?",
    "#",
    "%",
    "\\",
    "ä",
    ".",
]


@given(
    st.one_of(
        st.text(), st.lists(st.sampled_from(PIECES)).map("".join), st.lists(st.sampled_from(PIECES)).map(lambda p: "http://" + "".join(p))
    )
)
@example("http://example.com/v1/v1/")
def test_any_text_is_read_canonically_or_refused(text: str) -> None:
    """Whatever the text: an endpoint whose URL reads as itself, or an EndpointError, and nothing else."""
    try:
        endpoint = parse_endpoint(text)
    except EndpointError:
        return
    assert parse_endpoint(endpoint.url) == endpoint
    assert endpoint.url.isascii()
    assert endpoint.host == endpoint.host.lower()
    assert endpoint.port in (80, 443) or 1024 <= endpoint.port <= 65535
    assert not endpoint.prefix.endswith(("/", "/v1"))


@pytest.mark.parametrize(("address", "reason"), pairs(ADDRESSES_NEVER_DIALLED))
def test_some_addresses_stay_closed_whatever_is_allowed(address: str, reason: str) -> None:
    """Link-local, metadata, multicast, mapped and reserved addresses are refused even where everything is opened (X01)."""
    everything = AddressPolicy(networks=(ip_network("0.0.0.0/0"), ip_network("::/0")))
    assert refusal(address, 8000, CLOSED) == reason
    assert refusal(address, 8000, PRIVATE) == reason
    assert refusal(address, 8000, everything) == reason


@pytest.mark.parametrize(("address", "reason"), pairs(ADDRESSES_OF_A_CAMPUS))
def test_private_addresses_open_by_setting_only(address: str, reason: str) -> None:
    """Private ranges and loopback are closed by default and open with ALLOW_PRIVATE_NETWORKS=true (X01)."""
    assert refusal(address, 8000, CLOSED) == reason
    assert refusal(address, 8000, PRIVATE) is None


@pytest.mark.parametrize("address", ADDRESSES_IN_PUBLIC)
def test_public_addresses_are_open(address: str) -> None:
    """The neighbors of every closed range may be dialed."""
    assert refusal(address, 443, CLOSED) is None


def test_a_listed_network_opens_itself_only() -> None:
    """A list of networks opens what lies in them; loopback needs its own."""
    campus = AddressPolicy.parse("10.20.0.0/16, fd12::/16")
    assert refusal("10.20.3.4", 8000, campus) is None
    assert refusal("fd12::7", 8000, campus) is None
    assert refusal("10.21.0.1", 8000, campus) == "private address"
    assert refusal("fd13::7", 8000, campus) == "private address"
    assert refusal("127.0.0.1", 8000, campus) == "loopback"
    assert refusal("127.0.0.1", 8000, AddressPolicy.parse("127.0.0.0/8")) is None
    assert refusal("::1", 8000, AddressPolicy.parse("127.0.0.0/8")) == "loopback"
    assert refusal("::1", 8000, AddressPolicy.parse("::1")) is None


@pytest.mark.parametrize(
    ("text", "allow_private", "networks"),
    [
        ("", False, ()),
        (" False ", False, ()),
        ("TRUE", True, ()),
        ("10.0.0.0/8", False, (IPv4Network("10.0.0.0/8"),)),
        ("192.168.1.5,FD00::/8", False, (IPv4Network("192.168.1.5/32"), IPv6Network("fd00::/8"))),
    ],
)
def test_the_setting_is_read(text: str, allow_private: bool, networks: tuple[IPv4Network | IPv6Network, ...]) -> None:
    """ALLOW_PRIVATE_NETWORKS is a word or a list of networks."""
    own = frozenset({("127.0.0.1", 8000)})
    assert AddressPolicy.parse(text, own=own) == AddressPolicy(allow_private, networks, own)


@pytest.mark.parametrize(
    "text",
    ["yes", "10.0.0.0/33", "10.0.0.1/8", "true,10.0.0.0/8", "10.0.0.0/8,", "0.0.0.0/0", "169.254.0.0/16", "8.8.8.8", "fe80::/10", "::/0"],
)
def test_a_setting_that_opens_nothing_or_too_much_is_refused(text: str) -> None:
    """A typing error must not open or silently fail to open a network."""
    with pytest.raises(ValueError, match="write true"):
        AddressPolicy.parse(text)


def test_own_listeners_stay_closed() -> None:
    """A server that is the gateway itself is refused, at that port only, whatever is allowed."""
    policy = AddressPolicy(allow_private=True, own=frozenset({("127.0.0.1", 8000), ("93.184.215.14", 443), ("0:0:0:0:0:0:0:1", 9000)}))
    assert refusal("127.0.0.1", 8000, policy) == "own listener"
    assert refusal("93.184.215.14", 443, policy) == "own listener"
    assert refusal("::1", 9000, policy) == "own listener"
    assert refusal("127.0.0.2", 8000, policy) is None
    assert refusal("127.0.0.1", 8001, policy) is None


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_a_wildcard_listener_covers_loopback_and_every_own_address(wildcard: str) -> None:
    """A listener on all interfaces is reachable through each of them."""
    policy = AddressPolicy(allow_private=True, own=frozenset({(wildcard, 8000), ("10.0.0.5", 9000)}))
    for address in ("127.0.0.1", "127.9.9.9", "::1", "10.0.0.5"):
        assert refusal(address, 8000, policy) == "own listener"
    assert refusal("10.0.0.6", 8000, policy) is None
    assert refusal("127.0.0.1", 9000, policy) is None


def test_own_listeners_are_addresses() -> None:
    """A name among the own listeners would protect nothing."""
    with pytest.raises(ValueError, match="localhost"):
        AddressPolicy(own=frozenset({("localhost", 8000)}))


def test_one_bad_answer_condemns_the_name() -> None:
    """A resolver that mixes public and private answers is refused, in any order; so is an empty answer (X01)."""
    assert refusal_of_any(["8.8.8.8", "2606:4700::1"], 443, CLOSED) is None
    assert refusal_of_any(["8.8.8.8", "10.0.0.1"], 443, CLOSED) == "private address"
    assert refusal_of_any(["::1", "8.8.8.8"], 443, CLOSED) == "loopback"
    assert refusal_of_any([], 443, CLOSED) == "no address"


@given(st.ip_addresses(v=4))
def test_no_open_ipv4_address_is_special(address: IPv4Address) -> None:
    """What is open by default is global in the standard library's view, too."""
    if refusal(str(address), 443, CLOSED) is None:
        assert address.is_global
        assert not address.is_multicast


@given(st.one_of(st.ip_addresses(v=6), st.ip_addresses(network="2000::/3")))
def test_no_ipv6_address_outside_global_unicast_is_open(address: IPv4Address | IPv6Address) -> None:
    """What is open by default lies in 2000::/3 and in none of its four exceptions."""
    closed = [ip_network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
    expected = address in ip_network("2000::/3") and not any(address in network for network in closed)
    assert (refusal(str(address), 443, CLOSED) is None) == expected


@given(st.ip_addresses(), st.integers(1, 65535))
def test_opening_never_closes(address: IPv4Address | IPv6Address, port: int) -> None:
    """What a closed policy dials, an open one dials as well; what private opens lies in a private range or loopback."""
    if refusal(str(address), port, CLOSED) is None:
        assert refusal(str(address), port, PRIVATE) is None
    elif refusal(str(address), port, PRIVATE) is None:
        assert address.is_private or address in ip_network("100.64.0.0/10")


@given(st.text())
def test_no_text_breaks_the_gate(text: str) -> None:
    """Whatever a resolver answers is judged, not raised."""
    reason = refusal(text, 443, CLOSED)
    assert reason is not None or str(ip_address(text))


@pytest.mark.parametrize(("address", "openable"), [("127.0.0.1", True), ("10.1.2.3", True), ("169.254.169.254", False), ("fe80::1", False)])
def test_only_what_a_setting_opens_is_said_to_be_openable(address: str, openable: bool) -> None:
    """Nobody is sent to the operator for what no operator can allow."""
    reason = refusal(address, 80, AddressPolicy())
    assert reason is not None
    assert reason.is_openable is openable
    assert (refusal(address, 80, AddressPolicy(allow_private=True)) is None) is openable


HERE = AddressPolicy(honors_openings=True, own=frozenset({("127.0.0.1", 8000)}))
"""The policy of a gateway that only its own computer can reach."""


@pytest.mark.parametrize(
    ("url", "opened_address", "is_opened"),
    [
        ("http://127.0.0.1:11434", "127.0.0.1:11434", True),
        ("http://127.0.0.1:11434/v1", "127.0.0.1:11434", True),
        ("http://127.0.0.1:11434", None, False),
        ("http://127.0.0.1:11434", "", False),
        ("http://127.0.0.1:11435", "127.0.0.1:11434", False),
        ("http://127.0.0.1", "127.0.0.1:11434", False),
        ("http://127.0.0.2:11434", "127.0.0.1:11434", False),
        ("http://127.0.0.2:11434", "127.0.0.2:11434", False),
        ("http://localhost:11434", "127.0.0.1:11434", False),
        ("http://localhost:11434", "localhost:11434", False),
        ("http://rebound.example:11434", "127.0.0.1:11434", False),
        ("http://[::1]:11434", "127.0.0.1:11434", False),
        ("http://[::1]:11434", "::1:11434", False),
        ("http://10.0.0.5:11434", "10.0.0.5:11434", False),
        ("http://169.254.169.254", "169.254.169.254:80", False),
    ],
)
def test_an_opening_is_for_one_literal_address_and_port(url: str, opened_address: str | None, is_opened: bool) -> None:
    """A name never counts, because it can lead elsewhere tomorrow, and nothing but 127.0.0.1 can be opened."""
    endpoint = parse_endpoint(url)
    marked = with_opening(endpoint, opened_address)
    assert marked.is_opened is is_opened
    assert marked.url == endpoint.url
    assert not parse_endpoint(marked.url).is_opened, "no URL can say that it is opened"


@pytest.mark.parametrize(
    ("address", "port", "policy", "expected"),
    [
        ("127.0.0.1", 11434, HERE, None),
        ("127.0.0.1", 8000, HERE, AddressRefusal.OWN_LISTENER),
        ("127.0.0.1", 11434, CLOSED, AddressRefusal.CLOSED_AGAIN),
        ("127.0.0.1", 11434, PRIVATE, None),
        ("127.0.0.1", 11434, AddressPolicy.parse("127.0.0.1/32"), None),
        ("127.0.0.1", 11434, AddressPolicy.parse("10.0.0.0/8"), AddressRefusal.CLOSED_AGAIN),
        ("127.0.0.2", 11434, HERE, AddressRefusal.LOOPBACK),
        ("::1", 11434, HERE, AddressRefusal.LOOPBACK),
        ("::ffff:127.0.0.1", 11434, HERE, AddressRefusal.V4_MAPPED),
        ("10.0.0.5", 11434, HERE, AddressRefusal.PRIVATE),
        ("169.254.169.254", 80, HERE, AddressRefusal.METADATA),
        ("0.0.0.0", 11434, HERE, AddressRefusal.UNSPECIFIED),
    ],
)
def test_an_opened_endpoint_leads_only_to_the_address_that_was_opened(
    address: str, port: int, policy: AddressPolicy, expected: AddressRefusal | None
) -> None:
    """And only while no other computer can reach the gateway; without the mark every one of them is judged as before."""
    assert refusal(address, port, policy, is_opened=True) is expected
    assert refusal_of_any([address], port, policy, is_opened=True) is expected
    if not policy.allow_private and not policy.networks:
        assert refusal(address, port, policy) is not None


def test_one_forbidden_address_closes_an_opened_endpoint() -> None:
    assert refusal_of_any(["127.0.0.1", "10.0.0.5"], 11434, HERE, is_opened=True) is AddressRefusal.PRIVATE
