"""What it means that OTLP cannot be sent, and what to change: for failures that stay until somebody changes something.

The libraries of gRPC and HTTP say what they saw, in words of their own; some servers just hang up. Then one connection
with Python's own TLS tells more.
"""

from __future__ import annotations

import re
import socket
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .otel_settings import Destination

_PREFIX = "OTEL_EXPORTER_OTLP_"
_LOOK_S = 1.0

_PLAIN = (
    f"that port does not speak TLS: begin the endpoint with http:// (or {_PREFIX}INSECURE=true), or name the port"
    " of the backend that does"
)
_SECURE = "that port speaks TLS: begin the endpoint with https://"
_UNTRUSTED = (
    "nobody who is trusted here has signed its certificate, or it has expired:"
    f" {_PREFIX}CERTIFICATE names the file of who signed it"
)
_OTHER_NAME = "its certificate is of another name: use a name that the certificate has in the endpoint"
_NO_VERSION = "it and this machine have no version of TLS in common: one of them is to be updated"
_NO_GRPC = (
    f"that port does not speak gRPC: set {_PREFIX}PROTOCOL=http/protobuf, or name the backend's port of gRPC"
    " (4317 of most)"
)
_GRPC = f"that port speaks gRPC: set {_PREFIX}PROTOCOL=grpc, or name the backend's port of HTTP (4318 of most)"
_CREDENTIALS = f"it does not let these spans in: {_PREFIX}HEADERS takes the credentials that it wants, as key=value"
_NO_TRACES = "it takes no traces there: check the host, port and path of the endpoint"

# In the libraries' words, the first that is found.
_SIGNS = {
    r"Hostname Verification Check failed|Hostname mismatch|IP address mismatch": _OTHER_NAME,
    r"CERTIFICATE_VERIFY_FAILED": _UNTRUSTED,
    r"WRONG_VERSION_NUMBER": _PLAIN,
    r"PROTOCOL_VERSION|UNSUPPORTED_PROTOCOL": _NO_VERSION,
    r"Failed parsing HTTP/2|http1\.x server": _NO_GRPC,
    r"BadStatusLine": _GRPC,
    r"^(UNAUTHENTICATED|PERMISSION_DENIED)|^it answers 40[13]\b": _CREDENTIALS,
    r"^UNIMPLEMENTED|^it answers (404|405|415|501)\b": _NO_TRACES,
}
# What TLS says where the client's own certificate is asked for.
_CLIENT = r"ALERT_(CERTIFICATE|UNKNOWN_CA|BAD_CERTIFICATE|UNSUPPORTED_CERTIFICATE|HANDSHAKE_FAILURE|ACCESS_DENIED)"
_HUNG_UP = r"Socket closed|Connection reset|RemoteDisconnected|EOF occurred|Broken pipe"


def remedy(why: str, destination: Destination) -> str:
    """What to change so that a request is taken that was not; empty where waiting may help, or nothing is known."""
    for sign, found in _SIGNS.items():
        if re.search(sign, why):
            return found
    if re.search(_CLIENT, why):
        return _about_client(destination)
    return _look(destination) if re.search(_HUNG_UP, why) else ""


def _about_client(destination: Destination) -> str:
    if destination.client_certificate:
        return (
            f"it does not accept the client's certificate, {destination.client_certificate}:"
            f" {_PREFIX}CLIENT_CERTIFICATE and {_PREFIX}CLIENT_KEY must be of an authority that it trusts"
        )
    return (
        "it wants a certificate of the client (mutual TLS):"
        f" {_PREFIX}CLIENT_CERTIFICATE and {_PREFIX}CLIENT_KEY name its files"
    )


def _look(destination: Destination) -> str:
    """What a connection of our own finds where the server hung up."""
    host, port = destination.host_and_port()
    context = ssl.create_default_context(cafile=destination.certificate or None)
    if not destination.secure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif destination.client_certificate:
        context.load_cert_chain(destination.client_certificate, destination.client_key or None)
    if destination.protocol == "grpc":
        context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), _LOOK_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            if not destination.secure:
                return _SECURE
            # In TLS 1.3 a server looks at the client's certificate after the client is done.
            return "" if connection.recv(1) else _about_client(destination)
    except ssl.SSLError as error:
        if re.search(_CLIENT, str(error)):
            return _about_client(destination) if destination.secure else _SECURE
    except (OSError, ValueError):
        pass  # it waits for us, or is not there
    return ""
