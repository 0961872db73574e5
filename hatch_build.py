"""Puts a bill of materials into the wheel, and makes the links of the README absolute.

PEP 770 describes the bill: `.dist-info/sboms/`.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


class AbsoluteLinks(MetadataHookInterface):
    """Makes the links of the README absolute: on a package index there are no files beside it."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description of the package."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata["urls"]["Repository"]
        text = re.sub(r"(!\[[^]]*]\()(?!https:)", rf"\1{repository}/raw/main/", text)
        text = re.sub(r"(]\()(?!https:)", rf"\1{repository}/blob/main/", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


class BillOfMaterials(BuildHookInterface[Any]):
    """Writes the bill from the project's metadata, in CycloneDX's JSON.

    The wheel contains no code of other projects. So the bill names each dependency with the range
    of its versions: only an environment knows which version is installed there.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the bill to a temporary folder, and have it included."""
        core = self.metadata.core
        required = {canonicalize_name(Requirement(line).name) for line in core.dependencies}
        lines = itertools.chain(core.dependencies, *core.optional_dependencies.values())
        requirements = {canonicalize_name(it.name): it for it in map(Requirement, lines)}
        bill = {
            "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.7",
            "version": 1,
            "metadata": {
                "component": {
                    "type": "library",
                    "bom-ref": core.name,
                    "name": core.name,
                    "version": self.metadata.version,
                    "description": core.description,
                    "licenses": [{"expression": core.license_expression}],
                    "purl": f"pkg:pypi/{core.name}@{self.metadata.version}",
                }
            },
            "components": [
                {
                    "type": "library",
                    "bom-ref": name,
                    "name": name,
                    "versionRange": _range(requirement),
                    "isExternal": True,
                    "scope": "required" if name in required else "optional",
                    "purl": f"pkg:pypi/{name}",
                }
                for name, requirement in sorted(requirements.items())
            ],
            "dependencies": [{"ref": core.name, "dependsOn": sorted(requirements)}],
        }
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / f"{core.name}.cdx.json"
        path.write_text(f"{json.dumps(bill, indent=1)}\n", encoding="utf-8", newline="\n")
        build_data["sbom_files"].append(str(path))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        self._folder.cleanup()


def _range(requirement: Requirement) -> str:
    """Return the versions of a requirement as a version range specifier, `vers:pypi/>=1|<2`."""
    limits = sorted(requirement.specifier, key=lambda it: Version(it.version))
    return f"vers:pypi/{'|'.join(map(str, limits))}"
