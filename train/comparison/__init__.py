"""Comparisons: a recipe becomes runs, and runs become a verdict."""
