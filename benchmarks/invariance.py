# SPDX-License-Identifier: Apache-2.0
"""What `batch_invariant` costs: ``python -m benchmarks.invariance --out FILE.json``.

Each of the 45 cells, scales per token, without the option and with it, as `benchmarks.choices` says. Writes
``header``, ``records`` (two for each cell) and ``failures``.
"""

from __future__ import annotations

import sys

from benchmarks import choices

CHOICE = choices.Choice("batch_invariant", "token", options=lambda chosen: {"batch_invariant": chosen})


def main(arguments: list[str] | None = None) -> int:
    """Run all cells; the exit status is 1 if a result was wrong."""
    return choices.run("benchmarks.invariance", __doc__, CHOICE, arguments)


if __name__ == "__main__":
    sys.exit(main())
