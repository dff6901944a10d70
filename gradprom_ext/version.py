"""The version, in a file that the build reads without importing torch."""

__version__ = "0.1.0"

#: The oldest and the newest PyTorch that the suite was run on, major and minor.
TESTED_TORCH = ((2, 10), (2, 14))
