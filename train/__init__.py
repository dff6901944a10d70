"""The experiments: data sets, degradations, strategies, training engine, metrics, figures and the command line."""
