"""Whether a server answers, and the network interface through which another machine is reached."""

from __future__ import annotations

import socket
import struct
from contextlib import closing, suppress

SIOCGIFADDR = 0x8915
"""Request of ioctl for an interface's IPv4 address: man 7 netdevice."""


def require_answer(address: str, seconds: float) -> None:
    """Raises OSError if the server there does not respond in time. An HTTP error counts as a response: it may want a login.

    A user and password in the address are left out: urlopen takes the password for the port, and shows it in its error."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.parse import urlsplit
    from urllib.request import urlopen

    try:
        parts = urlsplit(address)
        with urlopen(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), timeout=seconds):
            pass
    except HTTPError:
        pass
    except (HTTPException, ValueError) as error:
        raise OSError(f"no HTTP server at such an address ({type(error).__name__})") from None


def interface_towards(address: str) -> str | None:
    """The name of the interface that packets to this host leave by, such as ens4; None where the system does not tell.

    Gloo would take the one of the address that this machine's own name has, which is 127.0.1.1 on Debian: nobody else reaches
    that.
    """
    try:
        import fcntl

        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.connect((address, 9))  # sends nothing
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address
                    found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    if found[20:24] == own:
                        return name
    except (OSError, ImportError):
        pass
    return None
