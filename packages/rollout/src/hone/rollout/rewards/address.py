"""Where responses may be sent: which URLs are refused when they are read, and which addresses when a name is looked up.

A reward URL is the user's word; what is refused is what makes a server choose another destination: user parts, disguised
numbers, link-local addresses (a cloud's metadata service), and a public name that later points into the local network.
"""

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from hone.rollout.errors import RewardError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_url(url: str, *, allowed_hosts: str | None) -> SplitResult:
    """The parts of a reward URL; RewardError (which never repeats a secret in it) where it must not or cannot be asked."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RewardError(f"reward URL cannot be read: {error}; write http://HOST:PORT/get_reward") from error
    if parts.scheme not in ("http", "https"):
        raise RewardError(f"reward URL has the scheme {parts.scheme!r}; write http://HOST:PORT/get_reward or https://")
    if parts.username is not None or parts.password is not None:
        raise RewardError(
            f"reward URL of host {parts.hostname!r} holds a user or password, which would be seen in logs and process lists; "
            "put a bearer token into the environment variable HONE_REWARD_TOKEN and take them out of the URL"
        )
    host = parts.hostname
    if not host or port == 0 or re.search(r"[\s\\]|[^\x21-\x7e]", url):
        raise RewardError(f"reward URL {shown_url(parts)} has no host, port 0 or characters no URL has; write http://HOST:PORT/get_reward")
    allowed = hosts(allowed_hosts)
    if allowed is not None and host not in allowed:
        raise RewardError(
            f"reward URL {shown_url(parts)} goes to host {host!r}, which reward.allowed_hosts ({allowed_hosts}) does not name; add it"
        )
    address = literal(host)
    # Other spellings of a number (2130706433, 0x7f.1, 0177.0.0.1) are addresses to the system's resolver, and hide which.
    if address is None and re.fullmatch(r"(0x[0-9a-f]*|\d+)", host.rpartition(".")[2]):
        raise RewardError(
            f"reward URL has the host {host!r}, a number that hides an address; write it as four decimal numbers or as a name"
        )
    if address is not None and allowed is None and never(address):
        raise RewardError(refusal(host, address))
    return parts


def hosts(allowed_hosts: str | None) -> frozenset[str] | None:
    """The hosts of the setting, in lower case; None where it is not set."""
    return None if allowed_hosts is None else frozenset(host.strip().lower().strip("[]") for host in allowed_hosts.split(","))


def shown_url(parts: SplitResult) -> str:
    """A URL for messages: without user, query and fragment."""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def literal(host: str) -> Address | None:
    """The address a host is, if it is one and no name; an IPv4 address in IPv6 clothes is that IPv4 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def never(address: Address) -> bool:
    """Whether responses go there only by an explicit word."""
    return address.is_link_local or address.is_multicast or address.is_unspecified


def refusal(host: str, address: Address) -> str:
    """The message for an address that is `never` asked."""
    return (
        f"reward host {host!r} is at {address}, a link-local, multicast or unspecified address, where machines keep their credentials; "
        "if it is meant, name it in reward.allowed_hosts"
    )
