"""Files of TLS that a destination is given: checked before anything is sent, so that a mistake is told at once."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .otel_settings import Destination

_PREFIX = "OTEL_EXPORTER_OTLP_"


def check_files(destination: Destination) -> None:
    """Raises ValueError where they cannot be used: it names the variable, the file, what is wrong and what to do."""
    authority, certificate, key = destination.certificate, destination.client_certificate, destination.client_key
    for variable, path in (("CERTIFICATE", authority), ("CLIENT_CERTIFICATE", certificate), ("CLIENT_KEY", key)):
        try:
            if path:
                Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{_PREFIX}{variable}: {path} cannot be read ({error.strerror})") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority:
        try:
            context.load_verify_locations(authority)
        except ssl.SSLError as error:
            raise ValueError(f"{_PREFIX}CERTIFICATE: {authority} holds no certificate in PEM form") from error
    if key and not certificate:
        raise ValueError(f"{_PREFIX}CLIENT_KEY needs {_PREFIX}CLIENT_CERTIFICATE: the certificate of that key")
    if certificate:
        try:
            context.load_cert_chain(certificate, key or None, _no_password)
        except ssl.SSLError as error:
            raise ValueError(_wrong_pair(certificate, key, error)) from error


def _no_password() -> NoReturn:
    """Instead of a question at the terminal."""
    raise ValueError(f"{_PREFIX}CLIENT_KEY: the key is encrypted; give it without a password (openssl pkey -in KEY)")


def _wrong_pair(certificate: str, key: str, error: ssl.SSLError) -> str:
    if not key:
        return f"{_PREFIX}CLIENT_CERTIFICATE: {certificate} holds no key: name its file in {_PREFIX}CLIENT_KEY"
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{_PREFIX}CLIENT_KEY: {key} is not the key of {certificate}"
    return f"{_PREFIX}CLIENT_CERTIFICATE, _CLIENT_KEY: {certificate} and {key} are no certificate and key in PEM form"
