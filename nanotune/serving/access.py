"""Access control of the server: checks Host, Origin and the token.

    access = Access("127.0.0.1")
    access.check(headers)           # raises ApiError
    access.check_token(headers)

Pages of other sites must not use a server on the machine of the browser. With DNS rebinding, a site
resolves its own name to this machine; requests from its pages then have that name as Host. Requests
of a site's scripts and forms have the site's address as Origin.
"""
import hmac
import ipaddress
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

from nanotune.serving.api import ApiError


def address_of(host):
    """An IP address, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach a server bound to `host`."""
    address = address_of(host)
    return host == "localhost" or (address is not None and address.is_loopback)


@dataclass
class Access:
    """Access rules: the host that the server is bound to, the token ("": none is needed) and other
    names of the server, e.g. behind a proxy."""
    host: str = "127.0.0.1"
    token: str = ""
    names: tuple[str, ...] = ()

    def check(self, headers: Message) -> None:
        """Raises ApiError for a request to another host, or from another site's page."""
        hosts, origin = headers.get_all("Host", []), headers.get("Origin")
        host = hosts[0] if len(hosts) == 1 else ""
        if not self.knows(hostname(host)):
            raise ApiError(403, f"the host {host[:99]!r} is not this server; if it is, start it "
                           "with --allow_host=NAME")
        site = origin and origin.lower().removeprefix("https://").removeprefix("http://")
        if site not in (None, host.lower()) and hostname(site) not in self.names:
            raise ApiError(403, f"pages of {origin[:99]!r} may not use this server; if it is "
                           "behind a proxy, start it with --allow_host=NAME")

    def knows(self, name):
        """Whether a name or address from a Host header is this server's. If the server is bound to
        all addresses, accepts every IP address: DNS rebinding needs a name."""
        bound = address_of(self.host)
        to_all = bound is not None and bound.is_unspecified
        return (name in (self.host, *self.names) or (to_all and address_of(name) is not None)
                or (is_loopback(name) and (to_all or is_loopback(self.host))))

    def check_token(self, headers: Message) -> None:
        """Raises ApiError if a token is needed and the request does not give it."""
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.token.encode())
        if self.token and not (right and scheme.lower() == "bearer"):
            raise ApiError(401, "give the server's token: Authorization: Bearer TOKEN")


def hostname(host):
    """The name or address of a Host header, without its port; "" if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
