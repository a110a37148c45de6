# SPDX-License-Identifier: Apache-2.0
"""What it brings to ask for weights before there are rows: ``python -m benchmarks.early --out FILE.json``.

Each of the 45 cells with up to 64 tokens, scales per tensor, backend `sm90`, with GEMMs that wait for the kernel in
front of them before they ask for anything and as they are, as `benchmarks.choices` says. Writes ``header``,
``records`` (two for each cell) and ``failures``.
"""

from __future__ import annotations

import sys
from unittest import mock

from benchmarks import choices
from cupy_moe import sm90

MOST_TOKENS = 64
CHOICE = choices.Choice(
    "early_weights", "tensor", during=lambda chosen: mock.patch.object(sm90, "EARLY", sm90.EARLY if chosen else 0)
)


def main(arguments: list[str] | None = None) -> int:
    """Run all cells; the exit status is 1 if a result was wrong."""
    return choices.run("benchmarks.early", __doc__, CHOICE, arguments, most_tokens=MOST_TOKENS, backend="sm90")


if __name__ == "__main__":
    sys.exit(main())
