"""The training of a run: settings become objects, and an engine drives them through time."""
