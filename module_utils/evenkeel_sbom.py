# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""The bill of materials of a release, as CycloneDX JSON. It is never shipped to a host."""

from __future__ import annotations

import hashlib
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

from ansible.module_utils.evenkeel_venv import file_digest, wheel_identity
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

LONGEST_LICENCE = 100  # beyond that it is a text, not a name


def metadata(wheel: Path) -> Message:
    """The headers of a wheel's METADATA; none when it cannot be read."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith(".dist-info/METADATA"))
            return HeaderParser().parsestr(archive.read(name).decode("utf-8", "replace"))
    except (zipfile.BadZipFile, StopIteration):
        return Message()


def licence(headers: Message) -> Iterable[License]:
    """What a wheel says of its licence: an SPDX expression, else its own words, else its classifier."""
    words = [str(headers.get("License-Expression") or ""), str(headers.get("License") or "")]
    classifiers = [
        str(value).rpartition(" :: ")[2] for value in headers.get_all("Classifier") or [] if str(value).startswith("License :: ")
    ]
    said = [word.strip() for word in [*words, *classifiers]]
    short = [word for word in said if word and word != "UNKNOWN" and "\n" not in word and len(word) <= LONGEST_LICENCE]
    return [LicenseFactory().make_from_string(short[0])] if short else []


def component(wheel: Path, kind: ComponentType) -> Component:
    """One wheel: its package URL, hash and licence."""
    name, version = wheel_identity(wheel.name)
    purl = PackageURL("pypi", name=name, version=version)
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=file_digest(str(wheel)))]
    return Component(name=name, version=version, type=kind, bom_ref=str(purl), purl=purl, hashes=hashes, licenses=licence(metadata(wheel)))


def sbom(app: str, release: str, own: str, epoch: int, wheels: Sequence[Path]) -> str:
    """The bill of materials of a release, the same for the same wheels. own: the project's wheel among them; epoch: the release's time."""
    parts = [component(wheel, ComponentType.LIBRARY) for wheel in wheels if wheel.name != own]
    main = component(next(wheel for wheel in wheels if wheel.name == own), ComponentType.APPLICATION)
    whole = Component(name=app, version=release, type=ComponentType.PLATFORM, bom_ref=f"release:{release}")
    digest = hashlib.sha256("".join(f"{wheel.name} {file_digest(str(wheel))}\n" for wheel in wheels).encode()).hexdigest()
    bom = Bom(
        components=[main, *parts],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{app}/{release}/{digest}"),
        metadata=BomMetaData(component=whole, timestamp=datetime.fromtimestamp(epoch, UTC)),
    )
    bom.register_dependency(whole, [main, *parts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"
