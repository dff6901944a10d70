"""What builds the pages besides Sphinx: mathematics without a network, and what is generated from the sources."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
