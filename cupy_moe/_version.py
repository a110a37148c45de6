# SPDX-License-Identifier: Apache-2.0
"""The version, alone: a build reads it without importing what the package needs."""

__version__ = "0.1.0"
