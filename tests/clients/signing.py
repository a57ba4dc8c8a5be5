"""Who signs models with the signing tool of OpenSSF, and what a server is told of them."""

import datetime
import json
import subprocess
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from wire import call

TOOL_TIMEOUT = 60
DAY = datetime.timedelta(days=1)


class Signer:
    """Somebody with a key, and the signing tool."""

    def __init__(self, home, name="ada", curve=ec.SECP256R1):
        self.key = ec.generate_private_key(curve())
        self.private, self.public = home / f"{name}.key", home / f"{name}.pub"
        self.private.write_bytes(private_pem(self.key))
        self.public.write_bytes(
            self.key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def sign(self, folder, *options):
        tool("sign", "key", folder, "--private_key", self.private, *options)

    def accepts(self, folder):
        """Whether the tool does."""
        return accepts("key", folder, "--public_key", self.public)


class Certified:
    """Somebody with a certificate, by an authority between them and a root."""

    def __init__(self, home, since=0, until=30):
        root, between, signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.root, chain = home / "root.pem", home / "chain.pem"
        self.private, self.certificate = home / "signer.key", home / "signer.pem"
        of_root = certificate("root", root, "root", root, authority=1)
        of_between = certificate("between", between, "root", root, authority=0)
        own = certificate("ada", signer, "between", between, since=since, until=until)
        for path, issued in ((self.root, of_root), (chain, of_between), (self.certificate, own)):
            path.write_bytes(issued.public_bytes(serialization.Encoding.PEM))
        self.private.write_bytes(private_pem(signer))
        self.chain = chain

    def sign(self, folder):
        own = ["--private_key", self.private, "--signing_certificate", self.certificate]
        tool("sign", "certificate", folder, *own, "--certificate_chain", self.chain)

    def accepts(self, folder):
        return accepts("certificate", folder, "--certificate_chain", self.root)


def private_pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate(subject, key, issuer, by, authority=None, since=100, until=100):
    """Valid from `since` days ago for `until` days; an authority's when it says how many follow."""
    name = lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])  # noqa: E731
    now = datetime.datetime.now(datetime.UTC)
    is_signer = authority is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - since * DAY)
        .not_valid_after(now + until * DAY)
        .add_extension(x509.BasicConstraints(not is_signer, authority), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=is_signer,
                key_cert_sign=not is_signer,
                crl_sign=not is_signer,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if is_signer:
        mail = x509.SubjectAlternativeName([x509.RFC822Name(f"{subject}@example.org")])
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
        builder = builder.add_extension(mail, critical=False).add_extension(usage, critical=False)
    return builder.sign(by, hashes.SHA256())


def tool(*arguments):
    """One run of the signing tool on a version's folder, which its signature lies in."""
    action, method, folder, *options = arguments
    command = [sys.executable, "-m", "model_signing", action, method, folder]
    done = subprocess.run(
        [*command, "--signature", folder / "model.sig", *options],
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT,
    )
    assert action == "verify" or done.returncode == 0, done.stderr
    return done


def accepts(method, folder, *options):
    return tool("verify", method, folder, *options).returncode == 0


def policy(name, **trusted):
    """The server's configuration: one entry, for all models unless it says otherwise."""
    entry = {"models": "*"} | {key: value for key, value in trusted.items() if value is not None}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items())
    return f'[signatures]\npolicy = "{name}"\n[[signatures.trusted]]\n{text}'


def keys(*signers):
    return [str(signer.public) for signer in signers]


def details(server, version, model="plus"):
    reply = call(server.ops, "GET", f"/admin/v1/models/{model}/versions/{version}")
    return json.loads(reply.body) if reply.status == 200 else None


def only(server, model="plus"):
    """What is known of the model's one version."""
    path = f"/admin/v1/models/{model}"
    (version,) = json.loads(call(server.ops, "GET", path).body)["versions"]
    return details(server, version["version"], model)
