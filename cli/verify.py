"""diffusette verify: every hash in the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..stages.errors import BundleError
from .options import Json


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)],
    as_json: Json = False,
) -> int:
    """Read every file of BUNDLE and compare it with the manifest. Exits with 6 when one differs."""
    from ..bundle.bundle import verify_bundle
    from .terminal import print_json, size_text, warn

    found = verify_bundle(bundle)
    for path in found.undeclared:
        warn(f"{path} is not part of the bundle")
    if as_json:
        bad = [{"path": file.path, "problem": file.problem} for file in found.bad]
        facts = {"ok": found.ok, "files": found.checked, "bytes": found.bytes, "bad": bad}
        print_json({**facts, "undeclared": list(found.undeclared)})
    elif not found.ok:
        raise BundleError(
            f"{bundle}: {len(found.bad)} of {found.checked} files are damaged\n"
            + "\n".join(f"  {file}" for file in found.bad),
            hint="copy the bundle again from an intact copy, or convert the checkpoint again",
        )
    else:
        print(f"{bundle}: {found.checked} files, {size_text(found.bytes)}, all as the manifest says")
    return 0 if found.ok else BundleError.exit_code
