"""Write the Python code of the documentation as modules, for type checkers to read.

Each page is one module, as `tests/test_docs.py` runs it. A whole program is one of its own.

Usage: python tests/typed_pages.py FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parents[1]
# They await outside of functions, or use frameworks that are not installed together.
LEFT_OUT = {"notebooks.md", "frameworks.md"}
# Pages that continue the first program of another one.
CONTINUES = {"frontends.md": "fastapi.md", "web-access.md": "fastapi.md"}
# pyright does not see that this is asynchronous. `tests/typing/limiter.py` has the block.
LIMITER = "RedisBucket"
# A page may define a name twice, and use packages that are not installed here.
PYRIGHT = {"reportMissingImports": False, "reportRedeclaration": False}


def code_of(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found: list[str] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [whole(block) for block in found if LIMITER not in block]


def whole(block: str) -> str:
    """Return a block as it is, or within a coroutine if it is part of one."""
    if not block.startswith("async with"):
        return block
    coroutine = f"async def main() -> None:\n{indent(block, '    ')}"
    return f"from promptlayer_exec import Session\n\n\n{coroutine}"


def write_modules(folder: Path) -> None:
    """Write a module for each page, and for each program."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if page.name in LEFT_OUT:
            continue

        code = code_of(page)
        programs = [block for block in code if "asyncio.run(" in block]
        parts = [block for block in code if block not in programs]
        if page.name in CONTINUES:
            parts.insert(0, code_of(page.with_name(CONTINUES[page.name]))[0])

        for index, module in enumerate(["\n".join(parts), *programs]):
            if module:
                name = f"{page.stem}_{index}.py".replace("-", "_").lower()
                (folder / name).write_text(module, encoding="utf-8")

    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")


if __name__ == "__main__":
    write_modules(Path(sys.argv[1]))
