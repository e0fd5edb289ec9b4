"""The picker's certificate: given, or self-signed as gateways expect of an endpoint picker by default."""

from __future__ import annotations

import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kvist.picker.settings import PickerSettings


def server_context(settings: PickerSettings) -> ssl.SSLContext | None:
    """None without `secure_serving`. Raises ValueError for a certificate that cannot be loaded."""
    if not settings.secure_serving:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    if settings.cert_path:
        _load(context, Path(settings.cert_path))
    else:
        with tempfile.TemporaryDirectory() as folder:
            _self_signed(Path(folder))
            _load(context, Path(folder))
    return context


def _load(context: ssl.SSLContext, folder: Path) -> None:
    try:
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    except (OSError, ssl.SSLError) as error:
        raise ValueError(
            f"cert_path {folder}: {error}: it must hold tls.crt and tls.key in PEM form"
        ) from None


def _self_signed(folder: Path) -> None:
    """A certificate that says nothing: the data plane encrypts, and trusts the service's address."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ModuleNotFoundError:
        raise ValueError(
            "secure_serving without cert_path makes a certificate, for which it needs cryptography: "
            "pip install 'kvist[picker]'"
        ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kvist-picker")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "tls.key").write_bytes(private)
