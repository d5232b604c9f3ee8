"""`python -m diffusette.runtimes.ncnn.probe FILE.param`: a process of its own that exits 0 if ncnn takes the graph."""

from __future__ import annotations

import sys


def main(file: str) -> int:
    import ncnn

    status: int = ncnn.Net().load_param(file)
    return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
