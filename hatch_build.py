"""What the README says in a package, where its neighbours are not: links lead to an address, or are words.

The address is that of the tree as a browser shows it, in the environment of the build::

    REGULARIZED_ADDRESS=https://example.org/regularized/blob/main python -m build
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<to>(?![a-z]+:|#)[^)\s]+)\)")


def described(readme: str, address: str) -> str:
    """The README with whole addresses in the place of paths; without an address with the words of its links alone."""

    def lead(link: re.Match[str]) -> str:
        if address:
            shown = "?raw=true" if link["image"] else ""
            return f"{link['image']}[{link['text']}]({address}/{link['to']}{shown})"
        return "" if link["image"] else link["text"]

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(lead, readme))


class LinksThatLead(MetadataHookInterface):
    """Description and addresses of the package."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill them in."""
        address = os.environ.get("REGULARIZED_ADDRESS", "").rstrip("/")
        readme = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": described(readme, address)}
        if address:
            metadata["urls"] = {
                "Source": address,
                "Documentation": f"{address}/docs/index.md",
                "Changelog": f"{address}/CHANGELOG.md",
            }
