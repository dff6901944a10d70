"""What builds the pages besides Sphinx: mathematics without a network, and what is generated from the sources."""
