"""A person's files, enhanced by a finished run: the plan, the network, the work, and what is told of it."""
